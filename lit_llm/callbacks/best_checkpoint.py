"""The checkpoint of the best validation, also in a run folder that was moved or copied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

LOSS = "val/loss"
"""Decides between validations whose monitored metrics are equal."""


def keeps_best(trainer: Trainer, checkpoints: Path) -> bool:
    """Whether a run resumes from a checkpoint in its own folder, which also holds `best.ckpt`."""
    best, own = checkpoints / "best.ckpt", trainer.ckpt_path
    return best.exists() and own is not None and Path(own).parent.resolve() == checkpoints.resolve()


def rank(metrics: Mapping[str, Any], monitor: str, mode: str) -> tuple[float, float]:
    """Rank of a validation, lower is better: by the monitored metric, and where that is equal, by `val/loss`.

    A metric that is missing or no number ranks last. Validations of equal rank are equally good; the first is kept.

    Example:
        >>> tied = {"val/accuracy": 1.0, "val/loss": 0.7}, {"val/accuracy": 1.0, "val/loss": 0.1}
        >>> min(tied, key=lambda metrics: rank(metrics, "val/accuracy", "max"))
        {'val/accuracy': 1.0, 'val/loss': 0.1}
    """
    judged = (1 if mode == "min" else -1) * float(metrics.get(monitor, math.nan)), float(metrics.get(LOSS, math.nan))
    first, second = (math.inf if math.isnan(value) else value for value in judged)
    return first, second


class BestCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, writing `best.ckpt`; keeps the best so far if the run folder is moved or copied.

    Of validations that are equal by the metric, that of the lower `val/loss` is best.

    Args:
        dirpath: The folder of checkpoints.
        monitor: Metric that decides which validation is best.
        mode: Whether its `min` or its `max` is best.
    """

    on_train_batch_end = Callback.on_train_batch_end  # saves only after validations: skips the check at each step

    def __init__(self, dirpath: Path, monitor: str, mode: str) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self._best_loss = math.nan

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keeps the trainer, which knows the checkpoint that the run resumes from."""
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Writes pending log entries before the checkpoint, since a run may resume from it."""
        for logger in trainer.loggers:
            logger.save()
        super()._save_checkpoint(trainer, filepath)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether the validation that just ended is the best so far; all processes take the same decision."""
        better = not self.best_k_models
        if current is not None and not better:
            best = {LOSS: self._best_loss, self.monitor: self.best_k_models[self.kth_best_model_path]}
            found = {LOSS: trainer.callback_metrics.get(LOSS, math.nan), self.monitor: current}
            better = rank(found, self.monitor, self.mode) < rank(best, self.monitor, self.mode)
        return trainer.strategy.reduce_boolean_decision(current is not None and better)

    def _update_best_and_save(self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Notes the loss of the new best."""
        self._best_loss = float(monitor_candidates.get(LOSS, math.nan))
        super()._update_best_and_save(current, trainer, monitor_candidates)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the loss of the best checkpoint from `RunReport`, and its score if the metric or its mode has changed.

        If the new metric was not measured then, the next validation becomes the best.
        """
        states = checkpoint["callbacks"]
        results = states.get("RunReport", {}).get("results", {})
        self._best_loss = results.get(f"best/{LOSS}", math.nan)
        before = next((key for key in states if key.startswith(f"{type(self).__qualname__}{{")), self.state_key)
        if before == self.state_key:
            return
        state = states.pop(before)
        score = torch.tensor(results.get(f"best/{self.monitor}", math.nan), dtype=torch.float64)
        if not score.isnan():
            scores = {"best_model_score": score, "kth_value": score}
            states[self.state_key] = state | scores | {"best_k_models": dict.fromkeys(state["best_k_models"], score)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best so far if it is in this folder; a run that resumes in another folder starts without one."""
        if not keeps_best(self._trainer, Path(self.dirpath)):
            return
        here = Path(self.dirpath) / "best.ckpt"
        scores = state_dict["best_k_models"].values()
        moved = {"dirpath": self.dirpath, "best_k_models": {str(here): score for score in scores}}
        moved |= {name: str(here) for name in ("best_model_path", "kth_best_model_path") if state_dict[name]}
        super().load_state_dict(state_dict | moved)
