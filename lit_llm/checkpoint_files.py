"""Checkpoint files that are never half-written, and are read without executing anything in them."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError

from lit_llm.files import replacing

SEAL = b"lit-llm sha256:"
"""Stands, before a hash of all that precedes it, at the end of our checkpoints; torch reads over it."""


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """A disk that is full says so here: it reaches us through the writers' own C++ and Rust as anything but that."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"disk must have room to write {path}, but writing failed: {reason}; the last checkpoint is whole"
        ) from error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; reads one without executing anything in it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves, so that at every moment `path` is either the old checkpoint or the new one."""
        with replacing(Path(path)) as new:
            with plain_errors(Path(path)):
                torch.save(checkpoint, new)
            digest = _digest(new)
            with new.open("ab") as file:
                file.write(SEAL + digest)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Loads plain values and tensors only."""
        return read_checkpoint(Path(path), map_location)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint file after checking that it is whole.

    Raises:
        FileNotFoundError: When there is none.
        ValueError: When it is truncated, damaged, or holds more than plain values and tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path must be a checkpoint file, but is {path}, which does not exist")
    others = [p.name for p in sorted(path.parent.glob("*.ckpt")) if p.name != path.name]
    remedy = f"; {path.parent} also holds {', '.join(others)}" if others else ""
    if damage := _damage(path):
        raise ValueError(f"ckpt_path must be a whole checkpoint, but {path} {damage}{remedy}")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"ckpt_path must hold plain values and tensors only, but {path} does not: {reason}{remedy}"
        ) from error


def _digest(path: Path, without: int = 0) -> bytes:
    """A hash of a file up to its last bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size - without
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.digest()


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file; `None` for a whole one."""
    length = len(SEAL) + hashlib.sha256().digest_size
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - length))
        end = file.read()
    if end.startswith(SEAL):
        return None if end == SEAL + _digest(path, without=length) else "is damaged"
    try:  # not one of ours: an archive has checksums of its own
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception as error:  # damage shows in many ways
        return f"is not: {error}"
    if part:
        return f"is damaged in {part}"
    return None if end[-22:].startswith(b"PK\x05\x06") else "is cut short"  # that begins an archive's last record
