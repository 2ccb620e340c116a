"""Early stopping on the metric that selects the best checkpoint."""

from __future__ import annotations

import logging
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping

from lit_llm.callbacks.best_checkpoint import BestCheckpoint

log = logging.getLogger(__name__)


class EarlyStopping(LightningEarlyStopping):
    """Lightning's early stopping on the metric that selects the best checkpoint.

    That is `checkpoint.monitor` if given, else the metric of the data module, else that of the objective. Without
    checkpoints, it is one of the latter two. An equal value is no improvement, even if its `val/loss` is lower.

    Args:
        patience: Number of consecutive validations without improvement before the run stops.
        min_delta: Smallest change that counts as an improvement.
        monitor: Another metric to monitor.
        mode: Whether `min` or `max` of `monitor` is best; must be given together with it.

    Raises:
        ValueError: When only one of `monitor` and `mode` is given, or the validation measures no such metric.
    """

    def __init__(
        self,
        patience: int = 3,
        min_delta: float = 0.0,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        if (monitor is None) != (mode is None):
            raise ValueError(f"monitor and mode must be given together, but are {monitor} and {mode}")
        self._options, self._decides = (patience, min_delta), monitor is not None
        self._watch(monitor or "val/loss", mode or "min")

    def _watch(self, monitor: str, mode: str) -> None:
        patience, min_delta = self._options
        # Checked at an epoch's end, the result would be missing from a checkpoint saved after the validation.
        super().__init__(monitor, min_delta, patience, mode=mode, check_on_train_epoch_end=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Chooses the metric, before the state in a checkpoint is loaded."""
        if not self._decides:
            best = next((c for c in trainer.callbacks if isinstance(c, BestCheckpoint)), None)
            headline = getattr(trainer.datamodule, "monitor", None) or pl_module.monitor
            self._watch(*((best.monitor, best.mode) if best else headline))
        super().setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """The state without `patience`, which is configuration."""
        return {name: value for name, value in super().state_dict().items() if name != "patience"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state, with the current `patience`."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops at once if the resumed run had been stopped early and `patience` is not larger now."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True
            log.info(f"{self.monitor} was no better {self.wait_count} times in a row; to go on, be more patient")

    def _validate_condition_metric(self, logs: dict) -> bool:
        if self.monitor not in logs:
            found = ", ".join(sorted(name for name in logs if name.startswith("val/")))
            raise ValueError(f"monitor must be one of what a validation measures, {found}, but is {self.monitor}")
        return super()._validate_condition_metric(logs)
