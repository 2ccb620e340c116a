"""Small pictures on disk, for tests of code that reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def noise(number: int, height: int = 6, width: int = 6, mode: str = "L") -> Image.Image:
    """A noise picture, different for each number."""
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def tree(folder: Path, classes: dict[str, int], first: int = 0, side: int = 6) -> Path:
    """Writes one folder per class with the given number of pictures, all different."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for _ in range(count):
            noise(first, side, side).save(folder / name / f"{first:03}.png")
            first += 1
    return folder


def truncated(path: Path) -> Path:
    """Writes a truncated picture."""
    noise(0, 40, 40).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    return path
