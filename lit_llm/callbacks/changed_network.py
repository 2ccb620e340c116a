"""What a callback that changes the network asks of a run, and what that leaves behind, which is of another one."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_llm.callbacks.run_report import RunReport
from lit_llm.callbacks.spike_recovery import SpikeRecovery


def require_one_network(pl_module: LightningModule, changed: str) -> None:
    """Sees that what learns is what is evaluated and exported.

    Args:
        pl_module: The objective.
        changed: What is done to its network, as in "pruned".

    Raises:
        ValueError: When another network than the one that learns is evaluated, or adapters stand beside weights.
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
