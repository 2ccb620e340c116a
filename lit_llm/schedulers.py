"""Learning-rate schedules: pure functions of the step, so that a resumed run continues where it stopped."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from lit_llm.ranges import require_at_least, require_range


def step_at(fraction: int | float, total_steps: int | float) -> int:
    """The first step at which a fraction of a run is done.

    Raises:
        ValueError: When the run has no last step, and the fraction is above 0.

    Example:
        >>> step_at(0.5, 7), step_at(0.0, math.inf)
        (4, 0)
    """
    if not fraction:
        return 0
    if math.isinf(total_steps):
        raise ValueError(
            f"trainer.max_steps or trainer.max_epochs must be given where something begins after {fraction:.0%} of the "
            f"run, but both are -1"
        )
    return math.ceil(fraction * total_steps)


class Schedule(ABC):
    """A factor on every group's learning rate at each optimiser step.

    Args:
        warmup_steps: Steps over which the factor rises linearly to one; at most the first half of the run.

    Raises:
        ValueError: When `warmup_steps` is negative.
    """

    def __init__(self, warmup_steps: int = 0) -> None:
        require_at_least(0, warmup_steps=warmup_steps)
        self.warmup_steps = warmup_steps

    def factor(self, step: int, total_steps: int | float) -> float:
        """The factor at `step` (from 0) of a run of `total_steps`, which may be infinite."""
        warmup = min(self.warmup_steps, total_steps / 2)
        if step < warmup:
            return min(1.0, (step + 1) / warmup)
        return self.after_warmup(min(1.0, (step - warmup) / max(1, total_steps - warmup)))

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """The factor when a fraction `progress` in [0, 1] of the steps after the warm-up is done."""


class Constant(Schedule):
    """Stays at one after the warm-up."""

    def after_warmup(self, progress: float) -> float:
        """Always one."""
        return 1.0


class _Decaying(Schedule):
    """Falls from one to `final` after the warm-up.

    Args:
        warmup_steps: As in `Schedule`.
        final: The factor reached after the last step, in [0, 1].
    """

    def __init__(self, warmup_steps: int = 0, final: float = 0.0) -> None:
        super().__init__(warmup_steps)
        require_range("in [0, 1]", final=final)
        self.final = final


class Linear(_Decaying):
    """Falls linearly.

    Example:
        >>> [Linear(warmup_steps=2).factor(step, total_steps=6) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    def after_warmup(self, progress: float) -> float:
        """`1 - progress`, scaled to end at `final`."""
        return 1 - (1 - self.final) * progress


class Cosine(_Decaying):
    """Falls along half a cosine.

    Source:
        Loshchilov & Hutter, 2016, "SGDR", arXiv:1608.03983, eq. 5, without restarts.
    """

    def after_warmup(self, progress: float) -> float:
        """Half a cosine period from one to `final`."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class WarmupStableDecay(_Decaying):
    """Stays at one, then falls linearly over the last part; a run can be extended from a checkpoint before the fall.

    Args:
        warmup_steps: As in `Schedule`.
        final: The factor reached after the last step, in [0, 1].
        decay_fraction: Fraction of the steps after the warm-up over which it falls, in (0, 1].

    Source:
        Hu et al., 2024, "MiniCPM", arXiv:2404.06395, section 4; the linear fall of Hägele et al., 2024,
        arXiv:2405.18392.
    """

    def __init__(self, warmup_steps: int = 0, final: float = 0.0, decay_fraction: float = 0.2) -> None:
        super().__init__(warmup_steps, final)
        require_range("in (0, 1]", decay_fraction=decay_fraction)
        self.decay_fraction = decay_fraction

    def after_warmup(self, progress: float) -> float:
        """One until the last `decay_fraction`, then linear to `final`."""
        fallen = max(0.0, progress - (1 - self.decay_fraction)) / self.decay_fraction
        return 1 - (1 - self.final) * fallen
