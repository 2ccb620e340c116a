"""Parameters of a sweep: their values or distributions, and how values are drawn with Optuna."""

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
"""Suffix of the name, in Optuna, of a parameter whose quantile is drawn instead of its value."""


@dataclass(frozen=True)
class Parameter(ABC):
    """A parameter: an option of the runs and the values that it may have.

    Attributes:
        key: The option's dotted name.
    """

    key: str

    @abstractmethod
    def suggest(self, trial: Any) -> Any:
        """Draws a value with an Optuna trial; a resumed trial gets the same value again."""

    @abstractmethod
    def extremes(self) -> tuple[Any, ...]:
        """All values of a list, or the two ends of a range, in the type that is drawn."""

    def listed(self) -> tuple[Any, ...]:
        """All values, for a grid.

        Raises:
            ValueError: When they cannot be enumerated.
        """
        raise ValueError(
            f"{self.key} must have values that can be counted in a grid, but has a range; "
            f"list its values, or take the method random"
        )


@dataclass(frozen=True)
class Constant(Parameter):
    """A parameter with the same value in all runs.

    Attributes:
        value: The value.
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
    """One of a list of values.

    Attributes:
        values: The values.
        probabilities: Probability of each value; `None` draws them uniformly.
    """

    values: tuple[Any, ...]
    probabilities: tuple[int | float, ...] | None = None

    def suggest(self, trial: Any) -> Any:
        """One of the values."""
        if self.probabilities is not None:
            upper = list(itertools.accumulate(self.probabilities))
            return self.values[bisect.bisect_right(upper, drawn_quantile(self.key, trial) * upper[-1])]
        labels = [label(value) for value in self.values]
        return self.values[labels.index(trial.suggest_categorical(self.key, labels))]

    def extremes(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    def listed(self) -> tuple[Any, ...]:
        """All values.

        Raises:
            ValueError: When there are probabilities, which a grid cannot respect.
        """
        if self.probabilities is not None:
            raise ValueError(f"{self.key} must have no probabilities in a grid, but has; take the method random")
        return self.values


@dataclass(frozen=True)
class Range(Parameter):
    """A number in a closed range.

    Attributes:
        low: Lower bound.
        high: Upper bound.
        is_whole: Whether only whole numbers are drawn.
        is_log: Whether the distribution is log-uniform rather than uniform.
        q: Values are rounded to multiples of `q` (distributions `q_…`); `None` does not round.
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
        """The smallest and the largest multiple of `q` in the range, in units of `q`."""
        return math.ceil(self.low / self.q - 1e-9), math.floor(self.high / self.q + 1e-9)  # in floats, 0.3 / 0.1 < 3

    def _rounded(self, drawn: int | float) -> int | float:
        """The multiple of `q` within the range that is nearest to a value."""
        first, last = self.multiples
        return times(min(max(round(drawn / self.q), first), last), self.q)

    def extremes(self) -> tuple[Any, ...]:
        """Both ends of the range; with `q`, the smallest and largest multiple in it."""
        if self.q is not None:
            return self._rounded(self.low), self._rounded(self.high)
        return (self.low, self.high) if self.is_whole else (float(self.low), float(self.high))

    def listed(self) -> tuple[Any, ...]:
        """All whole numbers, or all multiples of `q`."""
        if self.is_whole:
            return tuple(range(self.low, self.high + 1))
        if self.q is not None and not self.is_log:
            first, last = self.multiples
            return tuple(times(number, self.q) for number in range(first, last + 1))
        return super().listed()


@dataclass(frozen=True)
class ByQuantile(Parameter):
    """A number from a distribution that Optuna lacks, drawn by inverse transform: its quantile is uniform in (0, 1).

    Attributes:
        q: Values are rounded to multiples of `q` (distributions `q_…`); `None` does not round.
    """

    q: int | float | None

    @abstractmethod
    def at(self, quantile: float) -> float:
        """The inverse of the cumulative distribution function."""

    def suggest(self, trial: Any) -> Any:
        """A number of the distribution."""
        return self._of(drawn_quantile(self.key, trial))

    def _of(self, quantile: float) -> int | float:
        value = self.at(quantile)
        return value if self.q is None else times(round(value / self.q), self.q)

    def extremes(self) -> tuple[Any, ...]:
        """The quantiles 0.001 and 0.999."""
        return self._of(0.001), self._of(0.999)


@dataclass(frozen=True)
class Normal(ByQuantile):
    """Normal or log-normal distribution.

    Attributes:
        mu: Mean; of the logarithm if `is_log`.
        sigma: Standard deviation; of the logarithm if `is_log`.
        is_log: Whether the distribution is log-normal.
    """

    mu: int | float
    sigma: int | float
    is_log: bool

    def at(self, quantile: float) -> float:
        """The inverse of the cumulative distribution function."""
        value = NormalDist(self.mu, self.sigma).inv_cdf(quantile)
        return math.exp(value) if self.is_log else value


@dataclass(frozen=True)
class Beta(ByQuantile):
    """Beta distribution, on [0, 1].

    Attributes:
        a: First shape parameter; higher values shift the distribution towards 1.
        b: Second shape parameter; higher values shift it towards 0.
    """

    a: int | float
    b: int | float

    def at(self, quantile: float) -> float:
        """The inverse of the cumulative distribution function."""
        from scipy.special import betaincinv

        return float(betaincinv(self.a, self.b, quantile))


def drawn_quantile(key: str, trial: Any) -> float:
    """Draws a uniform number in the open interval (0, 1), stored by Optuna under the key with the suffix `QUANTILE`."""
    return trial.suggest_float(f"{key}{QUANTILE}", 1e-6, 1 - 1e-6)


def times(number: int, q: int | float) -> int | float:
    """`number · q`, rounded to 12 significant digits if `q` is a float.

    Example:
        >>> times(3, 2), times(3, 0.1)  # not 0.30000000000000004
        (6, 0.3)
    """
    return number * q if isinstance(q, int) else float(f"{number * q:.12g}")


def label(value: Any) -> Any:
    """A value as Optuna can store it: lists and dicts become JSON text.

    Example:
        >>> label(0.1), label([0.8, 0.95])
        (0.1, '[0.8, 0.95]')
    """
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
