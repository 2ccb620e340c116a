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

RANGES = ("int_uniform", "uniform", "log_uniform", "log_uniform_values", "inv_log_uniform", "inv_log_uniform_values")
MULTIPLES = ("uniform", "log_uniform", "log_uniform_values", "normal", "log_normal", "beta")
"""What may be rounded to multiples of `q`: then `q_` stands before its name."""

OPTIONS = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    **dict.fromkeys(RANGES, ("min", "max")),
    **dict.fromkeys(("normal", "log_normal"), ("mu", "sigma")),
    "beta": ("a", "b"),
}
OPTIONS |= {f"q_{kind}": (*OPTIONS[kind], "q") for kind in MULTIPLES}
"""W&B's distributions, and what each is told by."""

KEYS = ("distribution", "parameters", *dict.fromkeys(itertools.chain.from_iterable(OPTIONS.values())))

LARGEST_EXPONENT = 700.0
"""Of a number that is still finite."""

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
            below = min(drawn_quantile(self.key, trial), 1 - 1e-6)
            return self.values[bisect.bisect_right(upper, below * upper[-1])]
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
        return self._of(drawn_quantile(self.key, trial))

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


def drawn_quantile(key: str, trial: Any) -> float:
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
        require_keys(options, KEYS, key)
        if "parameters" in options:
            require_keys(options, ("parameters",), key)
            yield from read_parameters(options["parameters"], f"{key}.")
        else:
            yield _parameter(key, options)


def require_keys(content: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    """Refuses a key that is not known.

    Raises:
        ValueError: Naming it.
    """
    for key in (key for key in content if key not in known):
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
            found = float(value)
        except ValueError:
            pass
        else:
            log.info(f"{name} of {key} is text to YAML and to W&B; write {value} as {_with_point(value)}")
            return found
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
    kind = options.get("distribution") or _usual(options)
    if kind not in OPTIONS:
        raise ValueError(f"distribution of {key} must be one of {', '.join(OPTIONS)}, but is {kind}")
    require_keys(options, ("distribution", *OPTIONS[kind]), f"{key}, which is {kind},")
    shape = kind.removeprefix("q_")
    needed = OPTIONS[shape] if shape in RANGES or shape.startswith("c") else ()
    if missing := [name for name in needed if name not in options]:
        raise ValueError(f"{key}, which is {kind}, must have {' and '.join(needed)}, but has no {missing[0]}")
    if kind == "constant":
        return Constant(key, options["value"])
    if shape.startswith("categorical"):
        return _listed(key, options)
    q = _positive(key, "q", options.get("q", 1)) if kind != shape else None
    if shape == "beta":
        return Beta(key, q, *(_positive(key, name, options.get(name, 1)) for name in ("a", "b")))
    if shape in RANGES:
        return _range(key, shape, options, q)
    mu, sigma = number(key, "mu", options.get("mu", 0)), _positive(key, "sigma", options.get("sigma", 1))
    if shape == "log_normal" and mu + 5 * sigma > LARGEST_EXPONENT:
        raise ValueError(f"mu and sigma of {key} must be those of the logarithm, but are {mu} and {sigma}")
    return Bell(key, q, mu, sigma, is_log=shape == "log_normal")


def _usual(options: dict[str, Any]) -> str:
    """The distribution of a parameter that does not name one."""
    if "value" in options:
        return "constant"
    if "values" in options:
        return "categorical_w_probabilities" if "probabilities" in options else "categorical"
    whole = all(isinstance(options.get(name), int) for name in ("min", "max"))
    return "int_uniform" if whole else "uniform"


def _positive(key: str, name: str, value: Any) -> int | float:
    if (found := number(key, name, value)) <= 0:
        raise ValueError(f"{name} of {key} must be positive, but is {value}")
    return found


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


def _range(key: str, kind: str, options: dict[str, Any], q: int | float | None) -> Range:
    low, high = (number(key, name, options[name]) for name in ("min", "max"))
    if kind == "int_uniform" and not (isinstance(low, int) and isinstance(high, int)):
        raise ValueError(f"min and max of {key} must be whole numbers, but are {low} and {high}")
    if low >= high:
        raise ValueError(f"min of {key} must be below its max, but they are {low} and {high}")
    if kind in ("log_uniform", "inv_log_uniform"):
        if max(abs(low), abs(high)) > LARGEST_EXPONENT:
            raise ValueError(
                f"min and max of {key} must be logarithms, but are {low} and {high}; for the values themselves the "
                f"distribution is {kind}_values"
            )
        # Of the second the logarithm of 1 divided by the value is drawn.
        low, high = (math.exp(low), math.exp(high)) if kind == "log_uniform" else (math.exp(-high), math.exp(-low))
    if "log" in kind and low <= 0:
        raise ValueError(f"min of {key} must be positive, but is {low}")
    made = Range(key, low, high, kind == "int_uniform", "log" in kind, q)
    if q is not None and made.multiples[0] > made.multiples[1]:
        raise ValueError(f"min and max of {key} must have a multiple of q between them, but are {low}, {high} (q {q})")
    return made
