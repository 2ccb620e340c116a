"""Checkpoints that are written while training continues."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lit_llm.checkpoint_files import AtomicCheckpointIO


class AsyncCheckpointIO(AtomicCheckpointIO):
    """Writes checkpoints in a background thread, from a copy in CPU memory, while training continues.

    The next save waits until the last one is written, as do loading, removing and `teardown`: there is at most one copy
    at a time. An error while writing is raised by the first of these calls. The process does not end before the thread.

    Lightning's class of the same name is not enough: saves queue up, each with a copy on the device; loading does not
    wait; and an error of the last write is raised in tear-down, after the run has reported its results.
    """

    def __init__(self) -> None:
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copies the checkpoint and starts writing it."""
        self.teardown()
        checkpoint, shares = snapshot(checkpoint), storage_options
        if shares is not None:
            shares = shares._replace(tensors=snapshot(shares.tensors))
        self._writer = threading.Thread(target=self._write, args=(checkpoint, path, shares))
        self._writer.start()

    def _write(self, *saved: Any) -> None:
        try:
            super().save_checkpoint(*saved)
        except BaseException as error:  # raised by the next call
            self._error = error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Loads a checkpoint once the last write is finished."""
        self.teardown()
        return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint once the last write is finished."""
        self.teardown()
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
            OSError: When it could not be written.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def snapshot(checkpoint: Any) -> Any:
    """A copy in CPU memory that training cannot change.

    Tensors that share memory (tied weights) share it in the copy too.

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
        if not isinstance(t, Tensor) or t.is_meta:
            continue
        key = (t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) if t.numel() else id(t)
        if key not in copies and t.device.type == "cpu":
            copies[key] = t.detach().clone()
        elif key not in copies:  # copying to pinned memory is faster, and torch caches it for the next save
            copies[key] = torch.empty_like(t, device="cpu", pin_memory=True).copy_(t.detach(), non_blocking=True)
            on_devices.add(t.device)
        memo[id(t)] = copies[key]
    for device in on_devices:
        torch.accelerator.synchronize(device)
    return copy.deepcopy(checkpoint, memo)
