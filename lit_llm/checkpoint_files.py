"""Checkpoint files that are never half-written, and are read without executing anything in them."""

from __future__ import annotations

import copy
import hashlib
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError
from torch import Tensor
from torch.utils._pytree import tree_leaves

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


class AsyncCheckpointIO(AtomicCheckpointIO):
    """Has training go on while a checkpoint is written, by a thread, from a copy in the CPU's memory.

    The next save waits until the last one is written, as do loading, removing and `teardown`: there is one copy at a
    time. What went wrong while writing is raised by the first of them. The process does not end before the thread.

    Lightning's class of this name is not enough: saves queue up, with a copy each, which stays on the device; nobody
    who loads waits; and an error of the last write comes after a run has said what it reached, from its tear-down.
    """

    def __init__(self) -> None:
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copies, and starts to write."""
        self.teardown()
        self._writer = threading.Thread(target=self._write, args=(snapshot(checkpoint), path, storage_options))
        self._writer.start()

    def _write(self, *saved: Any) -> None:
        try:
            super().save_checkpoint(*saved)
        except BaseException as error:  # raised where somebody listens
            self._error = error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Loads, once all is written."""
        self.teardown()
        return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes, once all is written."""
        self.teardown()
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
            OSError: When it could not be.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def snapshot(checkpoint: Any) -> Any:
    """A copy, in the CPU's memory, that shares nothing with what training changes; a tensor that is there twice is so.

    Example:
        >>> weight = torch.zeros(2)
        >>> copied = snapshot({"embedding": weight, "head": weight.detach(), "steps": [3]})
        >>> copied["embedding"] is copied["head"], copied["embedding"].data_ptr() == weight.data_ptr()
        (True, False)
    """
    copies: dict[Any, Tensor] = {}
    memo: dict[int, Any] = {}
    on_devices = set()
    for t in tree_leaves(checkpoint):
        if not isinstance(t, Tensor):
            continue
        key = (t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) if t.numel() else id(t)
        if key not in copies and t.device.type == "cpu":
            copies[key] = t.detach().clone()
        elif key not in copies:  # pinned memory is faster to copy to, and torch keeps it for the next time
            copies[key] = torch.empty_like(t, device="cpu", pin_memory=True).copy_(t.detach(), non_blocking=True)
            on_devices.add(t.device)
        memo[id(t)] = copies[key]
    for device in on_devices:
        torch.accelerator.synchronize(device)
    return copy.deepcopy(checkpoint, memo)


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
