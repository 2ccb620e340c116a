"""`lit-llm fit --find_lr true`: a learning-rate range test instead of a training run."""

from __future__ import annotations

import shlex
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lit_llm.callbacks.learning_rate_finder import STEPS, LearningRateFinder

HELP = (
    "Run a learning-rate range test instead of training: raise all learning rates together step by step until the loss "
    "diverges, and suggest rates (lr_find.png and lr_find.csv in the run folder). It does not affect a later training."
)


def prepare(config: Any) -> None:
    """Reduces a fit's config to the test, in place: no validation, checkpoints, loggers or callbacks.

    Raises:
        ValueError: When `ckpt_path` is given.
    """
    if config.get("ckpt_path"):
        raise ValueError(
            f"ckpt_path must be left out with --find_lr true, but is {config['ckpt_path']}; --model.weights takes the "
            f"weights of a checkpoint"
        )
    decided = {"max_steps": STEPS, "max_epochs": -1, "min_steps": None, "min_epochs": None, "max_time": None}
    decided |= {"limit_val_batches": 0, "num_sanity_val_steps": 0, "fast_dev_run": False}
    decided |= {"enable_checkpointing": False, "enable_progress_bar": False, "logger": False, "callbacks": None}
    for name, value in decided.items():
        config["trainer"][name] = value


def say(config: Any, trainer: Trainer) -> None:
    """Prints the path of the plot, and the flags that train with the suggested rates."""
    finder = next(c for c in trainer.callbacks if isinstance(c, LearningRateFinder))
    print(f"{'picture':<24}{trainer.default_root_dir}/lr_find.png")
    factor = finder.suggestion
    if factor is None:
        print(f"{'suggested':<24}nothing: the loss never fell in {len(finder.losses)} steps")
        return
    print(f"{'suggested':<24}{factor:.3g} times the configured rates, where the loss falls fastest")
    print(f"{'to use it':<24}{shlex.join(flags(config, trainer.optimizers[0], factor))}")


def flags(config: Any, optimizer: Optimizer, factor: float) -> list[str]:
    """Flags that multiply all learning rates of a config by a factor.

    If the config names no optimiser, the flags spell out the objective's default one in full, because its learning
    rate cannot be set alone.
    """
    options = config["model"]["init_args"].get("optimizer")
    if options is None:
        own = optimizer.defaults
        return [
            f"--model.optimizer=torch.optim.{type(optimizer).__name__}",
            f"--model.optimizer.lr={own['lr'] * factor:.3g}",
            f"--model.optimizer.betas={list(own['betas'])}",
            f"--model.optimizer.weight_decay={own['weight_decay']}",
            f"--model.optimizer.fused={str(bool(own['fused'])).lower()}",
        ]
    rates = {name: rate for name, rate in options["init_args"].items() if name == "lr" or name.endswith("_lr")}
    return [f"--model.optimizer.{name}={rate * factor:.3g}" for name, rate in rates.items()]
