"""What the experiment attaches to `lit-llm fit` to see what it trains."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class TrainableParameters(Callback):
    """Writes how many parameters the optimiser has, those that begin to learn later included.

    Args:
        path: File to write.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts."""
        groups = trainer.optimizers[0].param_groups
        Path(self.path).write_text(str(sum(p.numel() for group in groups for p in group["params"])))
