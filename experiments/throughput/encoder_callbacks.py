"""What the encoder's experiment attaches to `lit-llm fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from experiments.throughput.encoder import Clock


class EpochClock(Callback):
    """Hands every step of an epoch to a `Clock`.

    Args:
        path: File to write.
        batch_size: Examples in a step.
    """

    def __init__(self, path: str, batch_size: int) -> None:
        self.clock = Clock(Path(path), batch_size)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ticks; writes before the validation at the end of the epoch."""
        self.clock.tick()
        if batch_idx + 1 == trainer.num_training_batches:
            self.clock.write()
