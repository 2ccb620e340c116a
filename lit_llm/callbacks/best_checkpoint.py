"""The checkpoint of the best validation, wherever its run folder lies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint


def keeps_best(trainer: Trainer, checkpoints: Path) -> bool:
    """Whether a run goes on from a checkpoint of its own folder, in which the best so far is, too."""
    best, own = checkpoints / "best.ckpt", trainer.ckpt_path
    return best.exists() and own is not None and Path(own).parent.resolve() == checkpoints.resolve()


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, writing `best.ckpt`; what was best so far stays so where the run folder has been moved or copied.

    Args:
        dirpath: The folder of checkpoints.
        monitor: Metric that decides which validation is best.
        mode: Whether its `min` or its `max` is best.
    """

    on_train_batch_end = Callback.on_train_batch_end  # it saves after validations alone: nothing to ask at each step

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
        """Remembers who will know from which checkpoint the run goes on."""
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Has what was logged up to it written, too: who goes on from it goes on from there."""
        for logger in trainer.loggers:
            logger.save()
        super()._save_checkpoint(trainer, filepath)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Judges what was best by the metric that decides now, where another one did: as `RunReport`, which knows all.

        Where the new one was not measured, the next validation is best.
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
        """Goes on from there, if what was best is in this folder: a run that goes on in another one begins anew."""
        if not keeps_best(self._trainer, Path(self.dirpath)):
            return
        here = Path(self.dirpath) / "best.ckpt"
        scores = state_dict["best_k_models"].values()
        moved = {"dirpath": self.dirpath, "best_k_models": {str(here): score for score in scores}}
        moved |= {name: str(here) for name in ("best_model_path", "kth_best_model_path") if state_dict[name]}
        super().load_state_dict(state_dict | moved)
