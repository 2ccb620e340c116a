"""Sweep files of Weights & Biases: what is varied, how, by which command, and what the runs are judged by."""

from __future__ import annotations

import difflib
import itertools
import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

METHODS = ("grid", "random", "bayes")
DISTRIBUTIONS = (
    "constant",
    "categorical",
    "int_uniform",
    "uniform",
    "q_uniform",
    "log_uniform",
    "log_uniform_values",
    "q_log_uniform",
    "q_log_uniform_values",
)
KEYS = (
    *("name", "description", "project", "entity", "program", "command", "run_cap"),
    *("method", "metric", "parameters", "early_terminate"),
)
METRIC_KEYS = ("name", "goal", "target")
PARAMETER_KEYS = ("value", "values", "distribution", "min", "max", "q", "parameters")
STOPPING_KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")


@dataclass(frozen=True)
class Parameter:
    """What one option of the runs may be.

    Attributes:
        key: The option's dotted name.
        distribution: How it is drawn, by W&B's names.
        values: What it may be, where those are listed.
        low: Smallest value of a range.
        high: Largest value of a range.
        q: What the values of a range are multiples of, for `q_…`.
    """

    key: str
    distribution: str
    values: tuple[Any, ...] = ()
    low: int | float = 0
    high: int | float = 0
    q: int | float = 1

    def suggest(self, trial: Any) -> Any:
        """Draws a value by an Optuna trial, which gives the same one again for a trial that is taken up again."""
        if self.distribution == "constant":
            return self.values[0]
        if self.distribution == "categorical":
            labels = [label(value) for value in self.values]
            return self.values[labels.index(trial.suggest_categorical(self.key, labels))]
        low, high = self.low, self.high
        if self.distribution == "int_uniform":
            return trial.suggest_int(self.key, low, high)
        if self.distribution == "q_uniform":
            low, high = self.extremes()
            draw = trial.suggest_int if isinstance(self.q, int) else trial.suggest_float
            return self._rounded(draw(self.key, low, high, step=self.q))
        drawn = trial.suggest_float(self.key, low, high, log="log" in self.distribution)
        return self._rounded(drawn) if self.distribution.startswith("q_") else drawn

    @property
    def _multiples(self) -> tuple[int, int]:
        """The smallest and the largest multiple of `q` in the range, in units of it."""
        return math.ceil(self.low / self.q - 1e-9), math.floor(self.high / self.q + 1e-9)  # 0.3 / 0.1 is below 3

    def _times_q(self, number: int) -> int | float:
        return (
            number * self.q if isinstance(self.q, int) else float(f"{number * self.q:.12g}")
        )  # not 0.30000000000000004

    def _rounded(self, drawn: int | float) -> int | float:
        """The multiple of `q` that is next to a value, within the range."""
        first, last = self._multiples
        return self._times_q(min(max(round(drawn / self.q), first), last))

    def extremes(self) -> tuple[Any, ...]:
        """All values that are listed, or the ends of the range, of the type that is drawn."""
        if self.values:
            return self.values
        ends = self.low, self.high
        if self.distribution.startswith("q_"):
            return tuple(map(self._rounded, ends))
        return ends if self.distribution == "int_uniform" else tuple(map(float, ends))

    def listed(self) -> tuple[Any, ...]:
        """All values, for a grid.

        Raises:
            ValueError: When they cannot be counted.
        """
        if self.values:
            return self.values
        if self.distribution == "int_uniform":
            return tuple(range(int(self.low), int(self.high) + 1))
        if self.distribution == "q_uniform":
            first, last = self._multiples
            return tuple(map(self._times_q, range(first, last + 1)))
        raise ValueError(
            f"{self.key} must have values that can be counted in a grid, but has a {self.distribution}; "
            f"list its values, or take the method random"
        )


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Attributes:
        path: The file.
        method: `grid`, `random` or `bayes`.
        metric: What the runs are judged by.
        mode: Whether its `min` or its `max` is best.
        target: What the best has to reach for the search to end, if the file says it.
        parameters: What is varied, a class before its arguments.
        command: The words of `lit-llm fit` before the parameters and after them.
        early_terminate: `min_iter` and `eta` of the stopping of trials that fall behind; `None` lets all finish.
        run_cap: How many trials the file asks for, if it does.
    """

    path: Path
    method: str
    metric: str
    mode: str
    parameters: tuple[Parameter, ...]
    command: tuple[tuple[str, ...], tuple[str, ...]]
    early_terminate: tuple[int, int] | None = None
    run_cap: int | None = None
    target: int | float | None = None

    def words(self, settings: dict[str, Any]) -> list[str]:
        """The words of `lit-llm fit` for some values of the parameters."""
        before, after = self.command
        return [*before, *(f"--{key}={written(value)}" for key, value in sorted(settings.items())), *after]

    def grid(self) -> Iterator[dict[str, Any]]:
        """All combinations, the last parameter's values fastest."""
        keys = [parameter.key for parameter in self.parameters]
        return (dict(zip(keys, each)) for each in itertools.product(*(p.listed() for p in self.parameters)))


def label(value: Any) -> Any:
    """What stands for a value where only numbers and text can.

    Example:
        >>> label(0.1), label([0.8, 0.95])
        (0.1, '[0.8, 0.95]')
    """
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def written(value: Any) -> str:
    """A value as a word of the command line.

    Example:
        >>> written(None), written(True), written(1e-05), written("x"), written({"lr": 1})
        ('null', 'true', '1e-05', 'x', '{"lr": 1}')
    """
    return value if isinstance(value, str) else json.dumps(value)


def read_sweep(path: Path) -> Sweep:
    """Reads a sweep file.

    Raises:
        FileNotFoundError: When there is none.
        ValueError: When W&B would not take it, or it asks for what cannot be done here.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"--config must be a file, but is {path}, which does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise ValueError(f"--config must be YAML, but {path} is not, at line {line}") from error
    if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict) or not content["parameters"]:
        raise ValueError(f"--config must be a sweep file, with parameters, but {path} is none")
    _require_keys(content, KEYS, f"sweep file {path}")
    method = content.get("method")
    if method not in METHODS:
        raise ValueError(f"method of {path} must be grid, random or bayes, but is {method}")
    metric = content.get("metric")
    metric = {"goal": "minimize"} | metric if isinstance(metric, dict) else {}
    if not metric.get("name") or metric["goal"] not in ("minimize", "maximize"):
        raise ValueError(
            f"metric of {path} must have a name, and minimize or maximize as its goal, but is {content.get('metric')}"
        )
    _require_keys(metric, METRIC_KEYS, f"metric of {path}")
    run_cap = content.get("run_cap")
    if run_cap is not None and (not isinstance(run_cap, int) or run_cap < 1):
        raise ValueError(f"run_cap of {path} must be a whole number of at least 1, but is {run_cap}")
    return Sweep(
        path=path,
        method=method,
        metric=metric["name"],
        mode=metric["goal"][:3],
        parameters=tuple(sorted(_parameters(content["parameters"], ""), key=lambda p: p.key)),
        command=_command(content.get("command"), path),
        early_terminate=_stopping(content.get("early_terminate"), path),
        run_cap=run_cap,
        target=None if metric.get("target") is None else _number("metric", "target", metric["target"]),
    )


def _require_keys(content: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    for key in content.keys() - set(known):
        close = difflib.get_close_matches(str(key), known, n=1)
        remedy = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{what} must have keys of {', '.join(known)}, but has {key}{remedy}")


def _parameters(content: Any, prefix: str) -> Iterator[Parameter]:
    if not isinstance(content, dict) or not content:
        raise ValueError(f"parameters of {prefix.removesuffix('.')} must have names, but are {content}")
    for name, options in content.items():
        key = f"{prefix}{name}"
        if not isinstance(options, dict):
            raise ValueError(f"{key} must have value, values, or min and max, but is {options}")
        if (kind := options.get("distribution") or "uniform") not in DISTRIBUTIONS:
            raise ValueError(
                f"distribution of {key} must be one of {', '.join(DISTRIBUTIONS)} to be drawn here, but is {kind}"
            )
        _require_keys(options, PARAMETER_KEYS, key)
        if {"value", "values"} <= options.keys():
            raise ValueError(f"{key} must have value or values, but has both")
        if "parameters" in options:
            yield from _parameters(options["parameters"], f"{key}.")
        else:
            yield _parameter(key, options)


def _parameter(key: str, options: dict[str, Any]) -> Parameter:
    if "value" in options:
        return Parameter(key, "constant", (options["value"],))
    if "values" in options:
        if not isinstance(options["values"], list) or not options["values"]:
            raise ValueError(f"values of {key} must be a list, but are {options['values']}")
        return Parameter(key, "categorical", tuple(options["values"]))
    if (listed := options.get("distribution")) in DISTRIBUTIONS[:2]:
        raise ValueError(f"{key} must have value or values for the distribution {listed}, but has none")
    if not {"min", "max"} <= options.keys():
        raise ValueError(f"{key} must have value, values, or min and max, but has {', '.join(options) or 'nothing'}")
    low, high, q = (_number(key, name, options.get(name, 1)) for name in ("min", "max", "q"))
    whole = isinstance(low, int) and isinstance(high, int)
    kind = options.get("distribution") or ("int_uniform" if whole else "uniform")
    if kind in ("log_uniform", "q_log_uniform"):
        low, high = math.exp(low), math.exp(high)
    if low >= high or q <= 0 or ("log" in kind and low <= 0) or (kind == "int_uniform" and not whole):
        rule = "whole numbers" if kind == "int_uniform" else "positive" if "log" in kind else "numbers"
        raise ValueError(f"min and max of {key} must be {rule}, the smaller first, but are {low} and {high} (q {q})")
    made = Parameter(key, kind, (), low, high, q)
    if kind.startswith("q_") and made._multiples[0] > made._multiples[1]:
        raise ValueError(f"min and max of {key} must have a multiple of q between them, but are {low}, {high} (q {q})")
    return made


def _number(key: str, name: str, value: Any) -> float | int:
    """A number, also where YAML took it for text, as it does with `1e-4`."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            pass
        else:
            log.info(f"{name} of {key} is text to YAML and to W&B; write {value} as {_with_point(value)}")
            return number
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


def _command(command: Any, path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    words = [str(word) for word in command] if isinstance(command, list) else []
    if "fit" not in words or words.count("${args}") != 1:
        raise ValueError(
            f"command of {path} must be a list of lit-llm, fit, what it needs, and ${{args}} for the parameters, but "
            f"is {command}"
        )
    words = words[words.index("fit") + 1 :]
    at = words.index("${args}")
    for word in words[:at] + words[at + 1 :]:
        if re.search(r"\$\{\w+\}", word):
            raise ValueError(f"command of {path} must have no variable but ${{args}} after fit, but has {word}")
    return tuple(words[:at]), tuple(words[at + 1 :])


def _stopping(options: Any, path: Path) -> tuple[int, int] | None:
    """How many reports of the metric come before the first look, and by what factor more before each further one."""
    if options is None:
        return None
    if not isinstance(options, dict) or options.get("type") != "hyperband":
        raise ValueError(f"early_terminate of {path} must be of type hyperband, but is {options}")
    _require_keys(options, STOPPING_KEYS, f"early_terminate of {path}")
    eta, first, last, looks = (options.get(name) for name in ("eta", "min_iter", "max_iter", "s"))
    eta = 3 if eta is None else eta
    if first is None and isinstance(last, int) and isinstance(looks, int) and isinstance(eta, int) and eta > 1:
        first = max(1, last // eta**looks)
    if not isinstance(eta, int) or eta < 2 or not isinstance(first, int) or first < 1:
        raise ValueError(
            f"early_terminate of {path} must have min_iter, or max_iter and s, and whole numbers for them and for eta, "
            f"which is at least 2, but is {options}"
        )
    return first, eta
