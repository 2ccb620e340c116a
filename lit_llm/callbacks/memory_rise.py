"""The memory that training adds to its process."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_llm.callbacks.throughput import peak_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryRise(Callback):
    """Measures the peak memory of training, in bytes above what the process held once the data was set up.

    Counts the weights (the network is built after that point), optimiser state, gradients, activations, and what
    libraries allocate on first use. Does not count file pages, such as library code or memory-mapped tokens, because
    the kernel can reclaim them. Without `/proc` they are counted; if the peak cannot be reset, only memory above an
    earlier peak is counted.

    On an accelerator it is the allocator's peak.
    """

    def __init__(self) -> None:
        self._before = (0, 0)
        self._most = 0
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Records the memory before training: Lightning has set up the data and builds the network next."""
        if self._trainer is None:
            with contextlib.suppress(OSError):
                CLEAR.write_text("5")  # resets the peak
            self._trainer, self._before = trainer, peak_and_files()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures after every batch: file pages mapped after the peak would be subtracted from it later."""
        (peak, files), (peak_before, files_before) = peak_and_files(), self._before
        self._most = max(self._most, peak - peak_before - (files - files_before))

    @property
    def bytes(self) -> int:
        """The peak so far."""
        device = self._trainer.strategy.root_device
        return self._most if device.type == "cpu" else peak_memory(device)


def peak_and_files() -> tuple[int, int]:
    """Peak resident bytes of this process since the last reset, and resident bytes of file pages now."""
    try:
        lines = STATUS.read_text().splitlines()
        found = {name: value for name, _, value in (line.partition(":") for line in lines)}
        return int(found["VmHWM"].split()[0]) * 1024, int(found["RssFile"].split()[0]) * 1024
    except (OSError, KeyError):
        return peak_memory(torch.device("cpu")), 0
