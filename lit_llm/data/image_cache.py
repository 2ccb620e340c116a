"""Images decoded once to one size and number of channels, then memory-mapped."""

from __future__ import annotations

import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image, ImageOps

from lit_llm.data.cache import new_cache, read_manifest
from lit_llm.data.cleaning import content_hash

log = logging.getLogger(__name__)

READING = 2
"""Version of the decoder, raised whenever an image would be decoded or measured differently."""

GREY = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"})
"""Modes of images without colour."""

USUAL_SIZE = 224
CHUNK = 512
ALONE = 2048
"""Number of images up to which further processes cost more than they save."""

ORIENTATION = 0x0112
TURNED = {5, 6, 7, 8}
"""Values of the EXIF orientation tag, `ORIENTATION`, that swap an image's height and width."""

SAYS_ORIENTATION = (b"eXIf", b"exif", b"XML:com.adobe.xmp")
"""Byte strings of which a PNG that states its orientation contains at least one."""


class ImageInfo(NamedTuple):
    """Facts about an image before it is decoded.

    Attributes:
        height: In pixels.
        width: In pixels.
        grey: Whether it has no colour.
    """

    height: int
    width: int
    grey: bool


@dataclass(frozen=True)
class ImageCache:
    """Decoded images.

    Attributes:
        folder: Folder of the cache.
        manifest: `shape` of an image (channels, height, width), number of `rows` of each split, and `broken`: split,
            row and reason for each image that could not be read.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.manifest["shape"])

    @cached_property
    def pixels(self) -> np.ndarray:
        """All images of all splits, one split after another, from 0 to 255, memory-mapped: rows × `shape`."""
        mapped = np.memmap(self.folder / "pixels", dtype=np.uint8, mode="r")
        return np.asarray(mapped).reshape(-1, *self.shape)

    @cached_property
    def contents(self) -> np.ndarray:
        """A hash of each image."""
        return np.load(self.folder / "contents.npy", mmap_mode="r")

    @cached_property
    def sums(self) -> np.ndarray:
        """Sum of the pixels and of their squares, for each image and channel."""
        return np.load(self.folder / "sums.npy", mmap_mode="r")

    def places(self, split: str) -> np.ndarray:
        """Indices of a split's images in `pixels`; broken images are all 0."""
        names = list(self.manifest["rows"])
        first = sum(self.manifest["rows"][name] for name in names[: names.index(split)])
        return np.arange(first, first + self.manifest["rows"][split])

    def moments(self, places: np.ndarray) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over some images, of pixels from 0 to 1, from exact sums.

        A constant channel gets a standard deviation of 1.
        """
        count = len(places) * self.shape[1] * self.shape[2]
        means, deviations = [], []
        for total, squares in self.sums[places].astype(object).sum(axis=0):  # Python integers do not overflow
            means.append(total / (255 * count))
            deviations.append((count * squares - total**2) ** 0.5 / (255 * count) or 1.0)
        return means, deviations

    @classmethod
    def open(cls, folder: Path) -> ImageCache | None:
        """The cache in a folder; `None` if there is none or it is incomplete."""
        manifest = read_manifest(folder)
        return None if manifest is None else cls(folder, manifest)


def build_image_cache(
    folder: Path, splits: dict[str, Dataset], size: tuple[int, int] | None, channels: int | None
) -> ImageCache:
    """Decodes images into `folder`, which appears only once it is complete.

    Many images are shared among several processes, each of which writes its part into the same file, so that each holds
    only a chunk of images in memory.

    Args:
        folder: Folder of the cache.
        splits: Tables of one column, the encoded images.
        size: Height and width; `None` takes the size of the images if all have the same, else 224 × 224.
        channels: 1 (grey) or 3 (colour); `None` takes 1 if no image has colour, else 3.
    """
    started = time.perf_counter()
    counts = {name: len(rows) for name, rows in splits.items()}
    tasks = [
        (name, start, first + start)
        for (name, count), first in zip(counts.items(), np.cumsum([0, *counts.values()]).tolist())
        for start in range(0, count, CHUNK)
    ]
    with _processes(splits) as share:
        if size is None or channels is None:
            looks = {look for found in share(_look, tasks) for look in found}
            sizes = {(look.height, look.width) for look in looks}
            size = size or (next(iter(sizes)) if len(sizes) == 1 else (USUAL_SIZE, USUAL_SIZE))
            channels = channels or (1 if looks and all(look.grey for look in looks) else 3)
        shape, total = (channels, *size), sum(counts.values())
        with new_cache(folder) as (new, manifest):
            with (new / "pixels").open("wb") as file:
                _reserve(file.fileno(), total * int(np.prod(shape)))
            contents, sums = np.zeros(total, np.uint64), np.zeros((total, channels, 2), np.uint64)
            broken: list[tuple[str, int, str]] = []
            decode = partial(_decode, file=new / "pixels", shape=shape, total=total)
            for (name, start, place), done in zip(tasks, share(decode, tasks), strict=True):
                contents[place : place + len(done.contents)], sums[place : place + len(done.sums)] = done[:2]
                broken += [(name, start + row, reason) for row, reason in done.broken]
            np.save(new / "contents.npy", contents)
            np.save(new / "sums.npy", sums)
            manifest |= {"shape": shape, "rows": counts, "broken": broken}
    log.info(
        f"Decoded {total:,} images into {size[0]} × {size[1]} pixels with {channels} channel{'s' * (channels > 1)} in "
        f"{time.perf_counter() - started:.0f} s; kept in {folder}"
    )
    return ImageCache.open(folder)


@contextmanager
def _processes(splits: dict[str, Dataset]) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yields a `map` of functions of the tables and a task over tasks; in several processes if there are many images.

    Each process receives the tables once, so that the paths of a million images are not sent with every task.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if sum(map(len, splits.values())) <= ALONE or available == 1:
        yield lambda function, tasks: map(partial(function, splits), tasks)
        return
    pool = ProcessPoolExecutor(available, initializer=_keep, initargs=(splits,))
    try:
        yield lambda function, tasks: pool.map(partial(_of_kept, function), tasks)
    finally:
        pool.shutdown(cancel_futures=True)


_kept: dict[str, Dataset] = {}
"""The tables, in a worker process."""


def _keep(splits: dict[str, Dataset]) -> None:
    _kept.update(splits)


def _of_kept(function: Callable[..., Any], task: Any) -> Any:
    return function(_kept, task)


def _reserve(file: int, size: int) -> None:
    """Allocates a file, so that a full disk raises an error here instead of a signal (SIGBUS) at a later write."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def _encoded(splits: dict[str, Dataset], task: tuple[str, int, int]) -> list[dict[str, Any] | None]:
    name, start, _ = task
    part = splits[name][start : start + CHUNK]
    return next(iter(part.values()))


def _look(splits: dict[str, Dataset], task: tuple[str, int, int]) -> set[ImageInfo]:
    """Distinct sizes and colours of the images of a chunk; broken images are skipped here and found when decoded."""
    looks = set()
    with warnings.catch_warnings(action="ignore"):
        for encoded in _encoded(splits, task):
            try:
                with _opened(encoded) as image:
                    width, height = _upright_size(image)
                    looks.add(ImageInfo(height, width, image.mode in GREY))
            except Exception:  # each format's reader raises its own kinds
                continue
    return looks


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image after `read_image` applies its orientation.

    In a PNG, the orientation may come after the pixels, so Pillow decodes the whole image to find it: this is done only
    if the file's bytes may contain one.
    """
    if image.format == "TIFF":  # from Pillow 11 on, the size is the upright one already
        return image.size
    if image.format == "PNG":
        place = image.fp.tell()
        image.fp.seek(0)
        content = image.fp.read()
        image.fp.seek(place)
        if not any(word in content for word in SAYS_ORIENTATION):
            return image.size
    return image.size[::-1] if image.getexif().get(ORIENTATION) in TURNED else image.size


class _Decoded(NamedTuple):
    contents: np.ndarray
    sums: np.ndarray
    broken: list[tuple[int, str]]


def _decode(
    splits: dict[str, Dataset], task: tuple[str, int, int], file: Path, shape: tuple[int, int, int], total: int
) -> _Decoded:
    """Decodes a chunk into its place in the file."""
    chunk, broken = _encoded(splits, task), []
    pixels = np.zeros((len(chunk), *shape), np.uint8)
    with warnings.catch_warnings(action="ignore"):
        for row, encoded in enumerate(chunk):
            try:
                pixels[row] = read_image(encoded, *shape)
            except Exception as error:  # each format's reader raises its own kinds
                broken.append((row, " ".join(str(error).split()) or type(error).__name__))
    place = task[2]
    np.memmap(file, np.uint8, "r+", shape=(total, *shape))[place : place + len(chunk)] = pixels
    flat = pixels.reshape(len(chunk), shape[0], -1).astype(np.uint32)
    sums = np.stack([flat.sum(axis=-1, dtype=np.uint64), (flat * flat).sum(axis=-1, dtype=np.uint64)], axis=-1)
    contents = np.array([content_hash(image.tobytes().decode("latin-1")) for image in pixels], np.uint64)
    return _Decoded(contents, sums, broken)


def _opened(encoded: dict[str, Any] | None) -> Image.Image:
    if encoded is None or (encoded.get("bytes") is None and encoded.get("path") is None):
        raise ValueError("an image must be there, but is missing")
    image = Image.open(encoded["path"] if encoded.get("bytes") is None else io.BytesIO(encoded["bytes"]))
    image.filename = ""  # else Pillow memory-maps a grey TIFF in the shape that it has only after rotation
    return image


def read_image(encoded: dict[str, Any] | None, channels: int, height: int, width: int) -> np.ndarray:
    """Decodes an image, upright, to the given channels and size.

    An image of another size is scaled until it covers `height × width`, keeping its aspect ratio (bilinear, with
    anti-aliasing), and centre-cropped. The upper 8 bits of 16-bit grey are kept; transparency is dropped.

    Args:
        encoded: The image's `bytes`, or the `path` of its file.
        channels: 1 (grey) or 3 (colour).
        height: In pixels.
        width: In pixels.

    Raises:
        ValueError: When it is missing, or its mode does not define which value is white.

    Returns:
        Channels × height × width, from 0 to 255.
    """
    with _opened(encoded) as image:
        return decoded(image, channels, height, width)


def decoded(image: Image.Image, channels: int, height: int, width: int) -> np.ndarray:
    """Decodes an open image as `read_image` does."""
    image.load()
    deep = is_deep(image)
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if deep:
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "LAB":  # Pillow converts this mode to RGB only
        image = image.convert("RGB")
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = _covering(image, height, width)
    array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def is_deep(image: Image.Image) -> bool:
    """Whether an image is 16-bit grey.

    Raises:
        ValueError: When its values are real numbers or have 32 bits, for which white is not defined.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return True
    if image.mode in ("I", "F"):
        raise ValueError(f"an image must have 8 or 16 bits a channel, but is of mode {image.mode}; convert it")
    return False


def _covering(image: Image.Image, height: int, width: int) -> Image.Image:
    if height * image.width >= width * image.height:
        size = (height * image.width // image.height, height)
    else:
        size = (width, width * image.height // image.width)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))
