"""Checks and resets for callbacks that change the network during a run."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_llm.callbacks.run_report import RunReport
from lit_llm.callbacks.spike_recovery import SpikeRecovery


def require_one_network(pl_module: LightningModule, changed: str) -> None:
    """Requires that the network that is trained is the one that is evaluated and exported.

    Args:
        pl_module: The objective.
        changed: What is done to its network, for example "pruned".

    Raises:
        ValueError: When another network than the trained one is evaluated, or adapters are trained beside the weights.
    """
    if pl_module.evaluated is not pl_module.network:
        raise ValueError(
            f"model must evaluate the network that learns where that is {changed}, but {type(pl_module).__name__} "
            f"evaluates an average of its weights; leave out WeightAverage, or take another objective"
        )
    if getattr(getattr(pl_module, "adaptation", None), "adds", False):
        raise ValueError(
            f"model.adaptation must train the weights themselves where they are {changed}, but is a "
            f"{type(pl_module.adaptation).__name__}"
        )


def look_anew(trainer: Trainer, pl_module: LightningModule) -> None:
    """Drops cached features of a frozen backbone and resets early stopping: for a change that others will follow."""
    pl_module.forget_features()
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = callback.best_score.new_tensor(math.inf * (1 if callback.mode == "min" else -1))


def begin_anew(trainer: Trainer, pl_module: LightningModule) -> None:
    """Like `look_anew`; also forgets the best validation so far and the state that `SpikeRecovery` rolls back to.

    For the last change that a callback makes to the network.
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
