"""What an option of a sweep's runs may be, and how it is drawn."""

from __future__ import annotations

import bisect
import itertools
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

QUANTILE = " (quantile)"
"""What Optuna's name of an option ends with, of which it draws the quantile."""


@dataclass(frozen=True)
class Parameter(ABC):
    """What one option of the runs may be.

    Attributes:
        key: The option's dotted name.
    """

    key: str

    @abstractmethod
    def suggest(self, trial: Any) -> Any:
        """Draws a value by an Optuna trial, which gives the same one again for a trial that is taken up again."""

    @abstractmethod
    def extremes(self) -> tuple[Any, ...]:
        """All values that are listed, or the ends of the range, of the type that is drawn."""

    def listed(self) -> tuple[Any, ...]:
        """All values, for a grid.

        Raises:
            ValueError: When they cannot be counted.
        """
        raise ValueError(
            f"{self.key} must have values that can be counted in a grid, but has a range; "
            f"list its values, or take the method random"
        )


@dataclass(frozen=True)
class Constant(Parameter):
    """What is the same in all runs.

    Attributes:
        value: What it is.
    """

    value: Any

    def suggest(self, trial: Any) -> Any:
        """The value."""
        return self.value

    def extremes(self) -> tuple[Any, ...]:
        """The value."""
        return (self.value,)

    def listed(self) -> tuple[Any, ...]:
        """The value."""
        return (self.value,)


@dataclass(frozen=True)
class Categorical(Parameter):
    """One of some values.

    Attributes:
        values: What it may be.
        probabilities: How often each is drawn, if not all alike.
    """

    values: tuple[Any, ...]
    probabilities: tuple[int | float, ...] | None = None

    def suggest(self, trial: Any) -> Any:
        """One of them."""
        if self.probabilities is not None:
            upper = list(itertools.accumulate(self.probabilities))
            return self.values[bisect.bisect_right(upper, drawn_quantile(self.key, trial) * upper[-1])]
        labels = [label(value) for value in self.values]
        return self.values[labels.index(trial.suggest_categorical(self.key, labels))]

    def extremes(self) -> tuple[Any, ...]:
        """All."""
        return self.values

    def listed(self) -> tuple[Any, ...]:
        """All."""
        if self.probabilities is not None:
            raise ValueError(f"{self.key} must have no probabilities in a grid, but has; take the method random")
        return self.values


@dataclass(frozen=True)
class Range(Parameter):
    """A number between two others.

    Attributes:
        low: The smallest.
        high: The largest.
        is_whole: Whether only whole numbers are drawn.
        is_log: Whether its logarithm is drawn evenly, not the number.
        q: What all values are multiples of, for `q_…`.
    """

    low: int | float
    high: int | float
    is_whole: bool = False
    is_log: bool = False
    q: int | float | None = None

    def suggest(self, trial: Any) -> Any:
        """A number of the range."""
        if self.is_whole:
            return trial.suggest_int(self.key, self.low, self.high)
        if self.q is None or self.is_log:
            drawn = trial.suggest_float(self.key, self.low, self.high, log=self.is_log)
            return drawn if self.q is None else self._rounded(drawn)
        low, high = self.extremes()
        draw = trial.suggest_int if isinstance(self.q, int) else trial.suggest_float
        return self._rounded(draw(self.key, low, high, step=self.q))

    @property
    def multiples(self) -> tuple[int, int]:
        """The smallest and the largest multiple of `q` in the range, in units of it."""
        return math.ceil(self.low / self.q - 1e-9), math.floor(self.high / self.q + 1e-9)  # 0.3 / 0.1 is below 3

    def _rounded(self, drawn: int | float) -> int | float:
        """The multiple of `q` that is next to a value, within the range."""
        first, last = self.multiples
        return times(min(max(round(drawn / self.q), first), last), self.q)

    def extremes(self) -> tuple[Any, ...]:
        """Both ends."""
        if self.q is not None:
            return self._rounded(self.low), self._rounded(self.high)
        return (self.low, self.high) if self.is_whole else (float(self.low), float(self.high))

    def listed(self) -> tuple[Any, ...]:
        """All whole numbers, or all multiples."""
        if self.is_whole:
            return tuple(range(self.low, self.high + 1))
        if self.q is not None and not self.is_log:
            first, last = self.multiples
            return tuple(times(number, self.q) for number in range(first, last + 1))
        return super().listed()


@dataclass(frozen=True)
class ByQuantile(Parameter):
    """A number with a distribution that Optuna lacks: its quantile is drawn, evenly.

    Attributes:
        q: What all values are multiples of, for `q_…`.
    """

    q: int | float | None

    @abstractmethod
    def at(self, quantile: float) -> float:
        """The value below which that share of the draws lies."""

    def suggest(self, trial: Any) -> Any:
        """A number of the distribution."""
        return self._of(drawn_quantile(self.key, trial))

    def _of(self, quantile: float) -> int | float:
        value = self.at(quantile)
        return value if self.q is None else times(round(value / self.q), self.q)

    def extremes(self) -> tuple[Any, ...]:
        """What lies below and above all but one draw of a thousand."""
        return self._of(0.001), self._of(0.999)


@dataclass(frozen=True)
class Normal(ByQuantile):
    """Normally distributed, or its logarithm.

    Attributes:
        mu: The mean.
        sigma: The standard deviation.
        is_log: Whether both are the logarithm's.
    """

    mu: int | float
    sigma: int | float
    is_log: bool

    def at(self, quantile: float) -> float:
        """As `ByQuantile`."""
        value = NormalDist(self.mu, self.sigma).inv_cdf(quantile)
        return math.exp(value) if self.is_log else value


@dataclass(frozen=True)
class Beta(ByQuantile):
    """Between 0 and 1.

    Attributes:
        a: The higher, the nearer to 1.
        b: The higher, the nearer to 0.
    """

    a: int | float
    b: int | float

    def at(self, quantile: float) -> float:
        """As `ByQuantile`."""
        from scipy.special import betaincinv

        return float(betaincinv(self.a, self.b, quantile))


def drawn_quantile(key: str, trial: Any) -> float:
    """A number between 0 and 1, but neither, which Optuna keeps under a name that says so."""
    return trial.suggest_float(f"{key}{QUANTILE}", 1e-6, 1 - 1e-6)


def times(number: int, q: int | float) -> int | float:
    """A multiple.

    Example:
        >>> times(3, 2), times(3, 0.1)  # not 0.30000000000000004
        (6, 0.3)
    """
    return number * q if isinstance(q, int) else float(f"{number * q:.12g}")


def label(value: Any) -> Any:
    """What stands for a value where only numbers and text can.

    Example:
        >>> label(0.1), label([0.8, 0.95])
        (0.1, '[0.8, 0.95]')
    """
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
