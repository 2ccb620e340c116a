"""What a run leaves behind when a callback changes its network: what was found before is of another one."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_llm.callbacks.run_report import RunReport
from lit_llm.callbacks.spike_recovery import SpikeRecovery


def look_anew(trainer: Trainer, pl_module: LightningModule) -> None:
    """Forgets features of a frozen backbone, and has early stopping compare with what comes: for a change of many."""
    pl_module.forget_features()
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = callback.best_score.new_tensor(math.inf * (1 if callback.mode == "min" else -1))


def begin_anew(trainer: Trainer, pl_module: LightningModule) -> None:
    """As `look_anew`; what was best so far gives way to the next validation, and nothing goes back to before.

    For a callback after which the network is another one for good.
    """
    look_anew(trainer, pl_module)
    for callback in trainer.callbacks:
        if isinstance(callback, RunReport):
            callback.results = {name: v for name, v in callback.results.items() if not name.startswith("best/")}
        elif isinstance(callback, ModelCheckpoint):
            callback.best_k_models = {}
            callback.best_model_score = callback.current_score = None
            callback.kth_best_model_path = callback.best_model_path = ""
        elif isinstance(callback, SpikeRecovery):
            callback.forget(trainer)
