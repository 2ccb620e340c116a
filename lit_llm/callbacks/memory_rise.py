"""What training adds to the memory of its process."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_llm.callbacks.throughput import peak_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryRise(Callback):
    """Measures the most bytes that training holds at once, over what the process held when the data were ready.

    Counted are the weights, since the network is built after that, the optimiser's state, gradients and activations,
    and what libraries set aside when they are first used. Not counted are pages of files, as of the libraries' code or
    of tokens that are read in place: the kernel lends them, and takes them back. Where there is no `/proc`, they are
    counted; where the peak cannot begin anew, only what lies above an earlier one is.

    On an accelerator it is the allocator's peak.
    """

    def __init__(self) -> None:
        self._before = (0, 0)
        self._most = 0
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes what is there: Lightning has set the data up, and builds the network next."""
        if self._trainer is None:
            with contextlib.suppress(OSError):
                CLEAR.write_text("5")  # the peak begins anew
            self._trainer, self._before = trainer, peak_and_files()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks again: of files there may be more later than there were at the peak."""
        (peak, files), (peak_before, files_before) = peak_and_files(), self._before
        self._most = max(self._most, peak - peak_before - (files - files_before))

    @property
    def bytes(self) -> int:
        """The most after any step."""
        device = self._trainer.strategy.root_device
        return self._most if device.type == "cpu" else peak_memory(device)


def peak_and_files() -> tuple[int, int]:
    """Most bytes that this process has held since its peak last began, and how many it holds now of files."""
    try:
        lines = STATUS.read_text().splitlines()
        found = {name: value for name, _, value in (line.partition(":") for line in lines)}
        return int(found["VmHWM"].split()[0]) * 1024, int(found["RssFile"].split()[0]) * 1024
    except (OSError, KeyError):
        return peak_memory(torch.device("cpu")), 0
