"""The checkpoint of the best validation, also in a run folder that was moved or copied."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint


def keeps_best(trainer: Trainer, checkpoints: Path) -> bool:
    """Whether a run resumes from a checkpoint in its own folder, which also holds `best.ckpt`."""
    best, own = checkpoints / "best.ckpt", trainer.ckpt_path
    return best.exists() and own is not None and Path(own).parent.resolve() == checkpoints.resolve()


class BestCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, writing `best.ckpt`; keeps the best so far if the run folder is moved or copied.

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keeps the trainer, which knows the checkpoint that the run resumes from."""
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Writes pending log entries before the checkpoint, since a run may resume from it."""
        for logger in trainer.loggers:
            logger.save()
        super()._save_checkpoint(trainer, filepath)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """If the monitored metric or its mode has changed, takes the new score of the best checkpoint from `RunReport`.

        If the new metric was not measured then, the next validation becomes the best.
        """
        states = checkpoint["callbacks"]
        before = next((key for key in states if key.startswith(f"{type(self).__qualname__}{{")), self.state_key)
        if before == self.state_key:
            return
        state, results = states.pop(before), states.get("RunReport", {}).get("results", {})
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
