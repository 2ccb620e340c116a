"""The callback with which the encoder experiment times `lit-llm fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from experiments.throughput.encoder import Clock


class EpochClock(Callback):
    """Reports every step of an epoch to a `Clock`.

    Args:
        path: File to write.
        batch_size: Number of examples per step.
    """

    def __init__(self, path: str, batch_size: int) -> None:
        self.clock = Clock(Path(path), batch_size)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reports the step; writes the results after the last one, before the validation."""
        self.clock.tick()
        if batch_idx + 1 == trainer.num_training_batches:
            self.clock.write()
