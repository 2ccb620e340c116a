"""Checks of the trainer's options before anything is built: Lightning fails later, or divides by zero."""

from __future__ import annotations

from collections.abc import Mapping
from pydoc import locate
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, Timer

from lit_llm.cli.standard_parts import listed

LEAST = {
    "num_nodes": 1,
    "accumulate_grad_batches": 1,
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "num_sanity_val_steps": -1,
    "limit_train_batches": 0,
    "limit_val_batches": 0,
    "limit_test_batches": 0,
    "limit_predict_batches": 0,
}


def require_sound(trainer: Mapping[str, Any], seed: bool | int | None) -> None:
    """Refuses options that are invalid in every run.

    Args:
        trainer: The trainer's options.
        seed: Value of `seed_everything`.
    """
    for name, least in LEAST.items():
        value = trainer.get(name)
        if isinstance(value, int | float) and not value >= least:
            raise ValueError(f"trainer.{name} must be at least {least}, but is {value}")
    interval, by_steps = trainer.get("val_check_interval"), trainer.get("check_val_every_n_epoch") is None
    if isinstance(interval, int | float) and not (interval > 0 if isinstance(interval, int) else 0 < interval <= 1):
        raise ValueError(
            f"trainer.val_check_interval must be a number of batches, at least 1, or a part of an epoch in (0, 1], but "
            f"is {interval}"
        )
    if isinstance(interval, float) and by_steps:
        raise ValueError(
            f"trainer.val_check_interval must be a number of steps where trainer.check_val_every_n_epoch is null, but "
            f"is {interval}; set one of them"
        )
    if trainer.get("barebones"):
        raise ValueError("trainer.barebones must be false, but is true; a run logs, and keeps checkpoints")
    if trainer.get("devices") in (0, "0"):
        raise ValueError("trainer.devices must be at least 1, auto or a list, but is 0")
    if trainer.get("overfit_batches"):  # a resumable loader would read other batches each epoch
        raise ValueError(
            f"trainer.overfit_batches must be 0, but is {trainer['overfit_batches']}; give data of a few rows, as with "
            f"data.max_examples or data.max_documents"
        )
    if reload := trainer.get("reload_dataloaders_every_n_epochs"):  # a new loader would repeat the first epoch's order
        raise ValueError(
            f"trainer.reload_dataloaders_every_n_epochs must be 0, but is {reload}; each epoch has an order of its own "
            f"without it"
        )
    if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"seed_everything must be in [0, {2**32 - 1}], but is {seed}")


def require_end(trainer: Mapping[str, Any]) -> None:
    """Refuses options by which a run on a stream would never end, since an epoch of a stream has no end.

    A run ends by `max_steps`, by `max_time`, by `max_epochs` together with `limit_train_batches` as a number of
    batches, or by `Timer`, `EarlyStopping` or a subclass; other callbacks that would end a run are not recognised.

    Args:
        trainer: The trainer's options.

    Raises:
        ValueError: When nothing ends the run, or `val_check_interval` is a fraction of an endless epoch.
    """
    batches, interval, max_steps = (trainer.get(n) for n in ("limit_train_batches", "val_check_interval", "max_steps"))
    epochs_end = isinstance(batches, int) and batches > 0
    if trainer.get("fast_dev_run"):
        return
    ends = max_steps not in (None, -1) or trainer.get("max_time") or (epochs_end and trainer.get("max_epochs") != -1)
    enders = (Timer, EarlyStopping) if epochs_end or isinstance(interval, int) else (Timer,)  # only with validations
    if not ends and not any(issubclass(locate(c.class_path), enders) for c in listed(trainer.get("callbacks"))):
        raise ValueError(
            f"trainer.max_steps must be given where data.streaming is true, since a stream's epoch has no end, but is "
            f"{max_steps}; set it, or trainer.max_epochs with trainer.limit_train_batches, the batches of an epoch"
        )
    if not epochs_end and isinstance(interval, float) and interval < 1:
        raise ValueError(
            f"trainer.val_check_interval must be a number of batches where data.streaming is true, since a stream's "
            f"epoch has no end, but is {interval}"
        )
