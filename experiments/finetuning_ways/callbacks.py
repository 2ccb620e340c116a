"""The callback with which the experiment counts the parameters that `lit-llm fit` trains."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class TrainableParameters(Callback):
    """Writes the number of parameters in the optimiser, including those that are unfrozen later.

    Args:
        path: File to write.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the parameters and writes their number."""
        groups = trainer.optimizers[0].param_groups
        Path(self.path).write_text(str(sum(p.numel() for group in groups for p in group["params"])))
