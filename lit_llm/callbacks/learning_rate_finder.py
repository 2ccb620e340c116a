"""Learning-rate range test: the loss while the learning rates rise from step to step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_llm.files import write_picture, write_table
from lit_llm.ranges import require_at_least

STEPS = 100
LOWEST, HIGHEST = 1e-3, 1e2
"""Factors on the configured rates at the first and at the last step."""

DIVERGED = 4.0
"""The test ends once the running mean of the losses exceeds this many times its lowest value."""

REMEMBERED = 0.98
"""Decay of the running mean of the losses."""

FEWEST_LOSSES = 8


class LearningRateFinder(Callback):
    """Multiplies all learning rates by a factor that rises from step to step, and records the loss of each step.

    Parameter groups keep their configured proportions (Muon's four rates, layer-wise rates): a single factor is
    searched. Training ends after `steps` steps, or once the running mean of the losses diverges (a single hard batch
    does not end it); the resulting network is of no use. `lr_find.csv` has the rates of the first group, the factors
    and the losses; `lr_find.png` plots them.

    Lightning's own finder gives all parameter groups the same rate, and does not restore the random state.

    Args:
        steps: Optimiser steps, from a thousandth of the configured rates to a hundred times these.

    Attributes:
        rates: Learning rate of the first parameter group at each step.
        factors: Factor on the configured rates at each step.
        losses: Mean loss of each step, before its update.

    Raises:
        ValueError: When there are too few steps to estimate a slope.

    Source:
        Smith, 2015, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, section 3.3, with the
        geometric steps, the running mean and the end at four times its lowest that fast.ai's `lr_find` has.
    """

    needs_plain_weights = True
    """Not for a strategy whose engine holds the weights or gradients itself (DeepSpeed)."""

    def __init__(self, steps: int = STEPS) -> None:
        require_at_least(FEWEST_LOSSES, steps=steps)
        self.steps = steps
        self.rates: list[float] = []
        self.factors: list[float] = []
        self.losses: list[float] = []
        self._sum, self._lowest = 0.0, math.inf

    @property
    def suggestion(self) -> float | None:
        """The suggested factor on the configured rates; `None` if there is none."""
        return steepest(self.factors[: len(self.losses)], self.losses)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the learning rates of the step, overriding the schedule."""
        step = len(self.losses)
        factor = LOWEST * (HIGHEST / LOWEST) ** (step / (self.steps - 1))
        groups = trainer.optimizers[0].param_groups
        for group in groups:
            group["lr"] = group["initial_lr"] * group.get("rate", 1.0) * factor
        if step == len(self.factors):
            self.factors.append(factor)
            self.rates.append(groups[0]["lr"] / groups[0].get("unit", 1.0))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the loss after each optimiser step; ends the test after the last step or on divergence."""
        if trainer.global_step == len(self.losses):
            return
        try:
            self.losses.append(pl_module.take_train_loss())
        except FloatingPointError:
            trainer.should_stop = True
            return
        trainer.should_stop |= len(self.losses) == self.steps or self._diverges(self.losses[-1])

    def _diverges(self, loss: float) -> bool:
        """Whether the running mean (bias-corrected) has risen far above its lowest value."""
        self._sum = REMEMBERED * self._sum + (1 - REMEMBERED) * loss
        mean = self._sum / (1 - REMEMBERED ** len(self.losses))
        self._lowest = min(self._lowest, mean)
        return mean > DIVERGED * self._lowest

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the table and the plot into the run folder."""
        folder = Path(trainer.default_root_dir)
        rows = list(zip(self.rates, self.factors, self.losses, strict=False))
        write_table(folder / "lr_find.csv", ["learning_rate", "factor", "loss"], rows)
        role = trainer.optimizers[0].param_groups[0].get("role", "parameters")
        self._draw(folder / "lr_find.png", f"learning rate of the {role}, all others in proportion")

    def _draw(self, path: Path, label: str) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        rates = self.rates[: len(self.losses)]
        axes.plot(rates, self.losses, ".", color="tab:gray", label="loss of a step")
        if self.suggestion is not None:
            axes.plot(rates, smoothed(self.losses), color="tab:blue", label="smoothed")
            rate = rates[self.factors.index(self.suggestion)]
            axes.axvline(rate, color="tab:green", label=f"suggested: {rate:.3g}")
            axes.legend()
            fall = self.losses[0] - min(self.losses)
            axes.set_ylim(min(self.losses) - 0.1 * fall, self.losses[0] + fall)  # diverged losses would hide the rest
        axes.set(xscale="log", xlabel=label, ylabel="loss")
        axes.grid(alpha=0.3)
        write_picture(path, figure)


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Losses smoothed by local linear regression over a twelfth of all points on either side."""
    return _lines(losses)[0]


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the loss falls fastest with the logarithm of the rate, before its minimum.

    Losses are smoothed by local linear regression. (fast.ai's running mean lags by half of its window, which moves the
    steepest point to higher rates.)

    Args:
        rates: Rates in a rising geometric sequence.
        losses: Loss at each rate.

    Returns:
        One of the rates; `None` if there are fewer than eight losses, or the loss never falls.

    Source:
        fast.ai's `lr_find`, suggestion "steep".

    Example:
        >>> rates = [10 ** (step / 10) for step in range(41)]
        >>> round(steepest(rates, [-np.tanh(np.log10(rate) - 2) for rate in rates]))
        100
    """
    if len(losses) < FEWEST_LOSSES:
        return None
    lines, slopes = _lines(losses)
    lowest = int(lines.argmin())
    place = int(slopes[: lowest + 1].argmin())
    return rates[place] if slopes[place] < 0 else None


def _lines(losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Value and slope of the least-squares line through the neighbours of each point."""
    reach, values, slopes = max(2, len(losses) // 12), [], []
    for place in range(len(losses)):
        first = max(0, place - reach)
        near = np.asarray(losses[first : place + reach + 1])
        slope, start = np.polyfit(np.arange(len(near)), near, 1)
        values.append(start + slope * (place - first))
        slopes.append(slope)
    return np.array(values), np.array(slopes)
