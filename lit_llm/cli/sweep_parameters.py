"""What the options of a sweep's runs may be, and how they are drawn: the `parameters` of a W&B sweep file."""

from __future__ import annotations

import bisect
import difflib
import itertools
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

log = logging.getLogger(__name__)

RANGES = (
    *("int_uniform", "uniform", "q_uniform"),
    *("log_uniform", "log_uniform_values", "q_log_uniform", "q_log_uniform_values"),
    *("inv_log_uniform", "inv_log_uniform_values"),
)
BELLS = ("normal", "q_normal", "log_normal", "q_log_normal")
BETAS = ("beta", "q_beta")
LISTS = ("constant", "categorical", "categorical_w_probabilities")
DISTRIBUTIONS = (*LISTS, *RANGES, *BELLS, *BETAS)
"""W&B's names."""

QUANTILE = " (quantile)"
"""What Optuna's name of an option ends with, of which it draws the quantile."""

KEYS = ("value", "values", "probabilities", "distribution", "min", "max", "q", "mu", "sigma", "a", "b", "parameters")


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
class Listed(Parameter):
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
            return self.values[min(bisect.bisect_right(upper, quantile(self.key, trial)), len(upper) - 1)]
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
class Shaped(Parameter):
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
        return self._of(quantile(self.key, trial))

    def _of(self, quantile: float) -> int | float:
        value = self.at(min(max(quantile, 1e-6), 1 - 1e-6))
        return value if self.q is None else times(round(value / self.q), self.q)

    def extremes(self) -> tuple[Any, ...]:
        """What lies below and above all but one draw of a thousand."""
        return self._of(0.001), self._of(0.999)


@dataclass(frozen=True)
class Bell(Shaped):
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
        """As `Shaped`."""
        value = NormalDist(self.mu, self.sigma).inv_cdf(quantile)
        return math.exp(value) if self.is_log else value


@dataclass(frozen=True)
class Beta(Shaped):
    """Between 0 and 1.

    Attributes:
        a: The higher, the nearer to 1.
        b: The higher, the nearer to 0.
    """

    a: int | float
    b: int | float

    def at(self, quantile: float) -> float:
        """As `Shaped`."""
        from scipy.special import betaincinv

        return float(betaincinv(self.a, self.b, quantile))


def quantile(key: str, trial: Any) -> float:
    """A number between 0 and 1, which Optuna keeps under a name that says so."""
    return trial.suggest_float(f"{key}{QUANTILE}", 0.0, 1.0)


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


def read_parameters(content: Any, prefix: str = "") -> Iterator[Parameter]:
    """Those of a sweep file, nested ones by their dotted names.

    Raises:
        ValueError: When W&B would not take one.
    """
    if not isinstance(content, dict) or not content:
        raise ValueError(f"parameters of {prefix.removesuffix('.')} must have names, but are {content}")
    for name, options in content.items():
        key = f"{prefix}{name}"
        if not isinstance(options, dict):
            raise ValueError(f"{key} must have value, values, or min and max, but is {options}")
        if (kind := options.get("distribution") or "uniform") not in DISTRIBUTIONS:
            raise ValueError(f"distribution of {key} must be one of {', '.join(DISTRIBUTIONS)}, but is {kind}")
        require_keys(options, KEYS, key)
        if "parameters" in options:
            yield from read_parameters(options["parameters"], f"{key}.")
        else:
            yield _parameter(key, options)


def require_keys(content: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    """Refuses a key that is not known.

    Raises:
        ValueError: Naming it.
    """
    for key in content.keys() - set(known):
        close = difflib.get_close_matches(str(key), known, n=1)
        remedy = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{what} must have keys of {', '.join(known)}, but has {key}{remedy}")


def number(key: str, name: str, value: Any) -> float | int:
    """A number, also where YAML took it for text, as it does with `1e-4`.

    Raises:
        ValueError: When it is none.
    """
    if isinstance(value, str):
        try:
            read = float(value)
        except ValueError:
            pass
        else:
            log.info(f"{name} of {key} is text to YAML and to W&B; write {value} as {_with_point(value)}")
            return read
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} of {key} must be a number, but is {value}")
    return value


def _with_point(number: str) -> str:
    """A number so that YAML reads it as one.

    Example:
        >>> _with_point("1e-4"), _with_point("2.5e3")
        ('1.0e-4', '2.5e+3')
    """
    mantissa, _, exponent = number.lower().partition("e")
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{mantissa}e{exponent if exponent[:1] in '+-' else '+' + exponent}" if exponent else mantissa


def _parameter(key: str, options: dict[str, Any]) -> Parameter:
    if {"value", "values"} <= options.keys():
        raise ValueError(f"{key} must have value or values, but has both")
    if "value" in options:
        return Constant(key, options["value"])
    if "values" in options:
        return _listed(key, options)
    kind = options.get("distribution")
    if kind in LISTS:
        raise ValueError(f"{key} must have value or values for the distribution {kind}, but has none")
    q = number(key, "q", options.get("q", 1)) if (kind or "").startswith("q_") else None
    if q is not None and q <= 0:
        raise ValueError(f"q of {key} must be positive, but is {q}")
    if kind in BELLS:
        mu, sigma = (number(key, name, options.get(name, usual)) for name, usual in (("mu", 0), ("sigma", 1)))
        _require_positive(key, sigma=sigma)
        return Bell(key, q, mu, sigma, is_log="log" in kind)
    if kind in BETAS:
        a, b = (number(key, name, options.get(name)) for name in ("a", "b"))
        _require_positive(key, a=a, b=b)
        return Beta(key, q, a, b)
    return _range(key, kind, options, q)


def _require_positive(key: str, **values: int | float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} of {key} must be positive, but is {value}")


def _listed(key: str, options: dict[str, Any]) -> Listed:
    values, shares = options["values"], options.get("probabilities")
    if not isinstance(values, list) or not values:
        raise ValueError(f"values of {key} must be a list, but are {values}")
    if shares is None:
        return Listed(key, tuple(values))
    if not isinstance(shares, list) or len(shares) != len(values):
        raise ValueError(f"probabilities of {key} must be a list of {len(values)}, as its values, but are {shares}")
    shares = tuple(number(key, "each of the probabilities", share) for share in shares)
    if min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"probabilities of {key} must be at least 0 and 1 together, but are {list(shares)}")
    return Listed(key, tuple(values), shares)


def _range(key: str, kind: str | None, options: dict[str, Any], q: int | float | None) -> Range:
    if not {"min", "max"} <= options.keys():
        raise ValueError(f"{key} must have value, values, or min and max, but has {', '.join(options) or 'nothing'}")
    low, high = (number(key, name, options[name]) for name in ("min", "max"))
    whole = isinstance(low, int) and isinstance(high, int)
    kind = kind or ("int_uniform" if whole else "uniform")
    if kind in ("log_uniform", "q_log_uniform"):
        low, high = math.exp(low), math.exp(high)
    if kind == "inv_log_uniform":  # the logarithm of what is 1 divided by it
        low, high = math.exp(-high), math.exp(-low)
    if low >= high or ("log" in kind and low <= 0) or (kind == "int_uniform" and not whole):
        rule = "whole numbers" if kind == "int_uniform" else "positive" if "log" in kind else "numbers"
        raise ValueError(f"min and max of {key} must be {rule}, the smaller first, but are {low} and {high}")
    made = Range(key, low, high, kind == "int_uniform", "log" in kind, q)
    if q is not None and made.multiples[0] > made.multiples[1]:
        raise ValueError(f"min and max of {key} must have a multiple of q between them, but are {low}, {high} (q {q})")
    return made
