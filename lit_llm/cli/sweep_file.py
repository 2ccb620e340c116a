"""Sweep files of Weights & Biases: parameters and their distributions, command, metric and early termination."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llm.cli.sweep_parameters import Beta, Categorical, Constant, Normal, Parameter, Range
from lit_llm.cli.yaml_file import read_yaml, require_keys

log = logging.getLogger(__name__)

METHODS = ("grid", "random", "bayes")
KEYS = (
    *("name", "description", "project", "entity", "program", "command", "run_cap"),
    *("method", "metric", "parameters", "early_terminate"),
)
METRIC_KEYS = ("name", "goal", "target")
STOPPING_KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")

RANGES = ("int_uniform", "uniform", "log_uniform", "log_uniform_values", "inv_log_uniform", "inv_log_uniform_values")
MULTIPLES = ("uniform", "log_uniform", "log_uniform_values", "normal", "log_normal", "beta")
"""Distributions with a variant `q_<name>`, which is rounded to multiples of `q`."""

DISTRIBUTIONS = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    **dict.fromkeys(RANGES, ("min", "max")),
    **dict.fromkeys(("normal", "log_normal"), ("mu", "sigma")),
    "beta": ("a", "b"),
}
DISTRIBUTIONS |= {f"q_{kind}": (*DISTRIBUTIONS[kind], "q") for kind in MULTIPLES}
"""W&B's distributions and the keys of each."""

PARAMETER_KEYS = ("distribution", "parameters", *dict.fromkeys(itertools.chain.from_iterable(DISTRIBUTIONS.values())))

ARGS = "${args}"
"""Placeholder for the parameters in a command."""

OF_ENVIRONMENT = re.compile(r"\$\{envvar:([A-Z0-9_]+)\}")
"""An environment variable in a command, in the syntax of W&B's agent."""

LARGEST_EXPONENT = 700.0
"""Bound on exponents whose `math.exp` is still finite."""


@dataclass(frozen=True)
class Sweep:
    """Content of a sweep file.

    Attributes:
        path: The file.
        method: `grid`, `random` or `bayes`.
        metric: Metric by which trials are compared.
        mode: Whether `min` or `max` of the metric is best.
        parameters: The parameters, sorted by key, so that a class comes before its arguments.
        space: The parameters as written in the file.
        command: The arguments of `lit-llm fit` before the parameters and after them.
        early_terminate: `min_iter` and `eta` of Hyperband's early termination; `None` lets all trials finish.
        run_cap: Number of trials; `None` if the file gives none.
        target: Value of the metric that ends the search once a trial reaches it; `None` if the file gives none.
    """

    path: Path
    method: str
    metric: str
    mode: str
    parameters: tuple[Parameter, ...]
    space: dict[str, Any]
    command: tuple[tuple[str, ...], tuple[str, ...]]
    early_terminate: tuple[int, int] | None = None
    run_cap: int | None = None
    target: int | float | None = None

    def words(self, settings: dict[str, Any]) -> list[str]:
        """The arguments of `lit-llm fit` for given values of the parameters."""
        before, after = self.command
        return [*before, *(f"--{key}={written(value)}" for key, value in sorted(settings.items())), *after]

    def grid(self) -> Iterator[dict[str, Any]]:
        """All combinations of values; the last parameter varies fastest."""
        keys = [parameter.key for parameter in self.parameters]
        return (dict(zip(keys, each)) for each in itertools.product(*(p.listed() for p in self.parameters)))


def written(value: Any) -> str:
    """Writes a value as a command-line argument.

    Example:
        >>> written(None), written(True), written(1e-05), written("x"), written({"lr": 1})
        ('null', 'true', '1e-05', 'x', '{"lr": 1}')
    """
    return value if isinstance(value, str) else json.dumps(value)


def read_sweep(path: Path) -> Sweep:
    """Reads a sweep file.

    Raises:
        FileNotFoundError: When it does not exist.
        ValueError: When the file is invalid for W&B, or asks for something that is not supported here.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict) or not content["parameters"]:
        raise ValueError(f"--config must be a sweep file, with parameters, but {path} is none")
    require_keys(content, KEYS, f"sweep file {path}")
    method = content.get("method")
    if method not in METHODS:
        raise ValueError(f"method of {path} must be grid, random or bayes, but is {method}")
    metric = content.get("metric")
    metric = {"goal": "minimize"} | metric if isinstance(metric, dict) else {}
    if not metric.get("name") or metric["goal"] not in ("minimize", "maximize"):
        raise ValueError(
            f"metric of {path} must have a name, and minimize or maximize as its goal, but is {content.get('metric')}"
        )
    require_keys(metric, METRIC_KEYS, f"metric of {path}")
    run_cap = content.get("run_cap")
    if run_cap is not None and (not isinstance(run_cap, int) or run_cap < 1):
        raise ValueError(f"run_cap of {path} must be a whole number of at least 1, but is {run_cap}")
    return Sweep(
        path=path,
        method=method,
        metric=metric["name"],
        mode=metric["goal"][:3],
        parameters=tuple(sorted(read_parameters(content["parameters"]), key=lambda p: p.key)),
        space=json.loads(json.dumps(content["parameters"], default=str)),
        command=_command(content.get("command"), path),
        early_terminate=_stopping(content.get("early_terminate"), path),
        run_cap=run_cap,
        target=None if metric.get("target") is None else _number("metric", "target", metric["target"]),
    )


def read_parameters(content: Any, prefix: str = "") -> Iterator[Parameter]:
    """Reads the parameters of a sweep file; nested ones get dotted names.

    Raises:
        ValueError: When one is invalid for W&B.
    """
    if not isinstance(content, dict) or not content:
        raise ValueError(f"parameters of {prefix.removesuffix('.')} must have names, but are {content}")
    for name, options in content.items():
        key = f"{prefix}{name}"
        if not isinstance(options, dict):
            raise ValueError(f"{key} must have value, values, or min and max, but is {options}")
        require_keys(options, PARAMETER_KEYS, key)
        if "parameters" in options:
            require_keys(options, ("parameters",), key)
            yield from read_parameters(options["parameters"], f"{key}.")
        else:
            yield _parameter(key, options)


def _number(key: str, name: str, value: Any) -> float | int:
    """Reads a number, also one such as `1e-4`, which YAML takes for a string."""
    if isinstance(value, str):
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if math.isfinite(found):
            log.info(f"{name} of {key} is read as text by YAML and W&B; write {_with_point(value)} instead of {value}")
            return found
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} of {key} must be a number, but is {value}")
    return value


def _with_point(number: str) -> str:
    """Rewrites a number so that YAML reads it as one.

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
    if kind not in DISTRIBUTIONS:
        raise ValueError(f"distribution of {key} must be one of {', '.join(DISTRIBUTIONS)}, but is {kind}")
    require_keys(options, ("distribution", *DISTRIBUTIONS[kind]), f"{key}, which is {kind},")
    shape = kind.removeprefix("q_")
    needed = DISTRIBUTIONS[shape] if shape in RANGES or shape.startswith("c") else ()
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
    mu, sigma = _number(key, "mu", options.get("mu", 0)), _positive(key, "sigma", options.get("sigma", 1))
    if shape == "log_normal" and mu + 5 * sigma > LARGEST_EXPONENT:
        raise ValueError(f"mu and sigma of {key} must be those of the logarithm, but are {mu} and {sigma}")
    return Normal(key, q, mu, sigma, is_log=shape == "log_normal")


def _usual(options: dict[str, Any]) -> str:
    """The default distribution of a parameter that does not name one."""
    if "value" in options:
        return "constant"
    if "values" in options:
        return "categorical_w_probabilities" if "probabilities" in options else "categorical"
    whole = all(isinstance(options.get(name), int) for name in ("min", "max"))
    return "int_uniform" if whole else "uniform"


def _positive(key: str, name: str, value: Any) -> int | float:
    if (found := _number(key, name, value)) <= 0:
        raise ValueError(f"{name} of {key} must be positive, but is {value}")
    return found


def _listed(key: str, options: dict[str, Any]) -> Categorical:
    values, shares = options["values"], options.get("probabilities")
    if not isinstance(values, list) or not values:
        raise ValueError(f"values of {key} must be a list, but are {values}")
    if shares is None:
        return Categorical(key, tuple(values))
    if not isinstance(shares, list) or len(shares) != len(values):
        raise ValueError(f"probabilities of {key} must be a list of {len(values)}, as its values, but are {shares}")
    shares = tuple(_number(key, "each of the probabilities", share) for share in shares)
    if min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"probabilities of {key} must be at least 0 and 1 together, but are {list(shares)}")
    return Categorical(key, tuple(values), shares)


def _range(key: str, kind: str, options: dict[str, Any], q: int | float | None) -> Range:
    low, high = (_number(key, name, options[name]) for name in ("min", "max"))
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
        # The bounds of `inv_log_uniform` are those of log(1 / value).
        low, high = (math.exp(low), math.exp(high)) if kind == "log_uniform" else (math.exp(-high), math.exp(-low))
    if "log" in kind and low <= 0:
        raise ValueError(f"min of {key} must be positive, but is {low}")
    made = Range(key, low, high, kind == "int_uniform", "log" in kind, q)
    if q is not None and made.multiples[0] > made.multiples[1]:
        raise ValueError(f"min and max of {key} must have a multiple of q between them, but are {low}, {high} (q {q})")
    return made


def _command(command: Any, path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    words = [str(word) for word in command] if isinstance(command, list) else []
    if "fit" not in words or words.count(ARGS) != 1:
        raise ValueError(
            f"command of {path} must be a list of lit-llm, fit, what it needs, and ${{args}} for the parameters, but "
            f"is {command}"
        )
    start = words.index("fit")
    for word in words[:start]:
        name, assigned, value = word.partition("=")
        if assigned and name.isidentifier() and os.environ.get(name) != value:
            log.info(f"{word} in the command of {path} is for W&B's agent; here set it before the sweep is started")
    words = [_filled_in(word, path) for word in words[start + 1 :]]
    at = words.index(ARGS)
    return tuple(words[:at]), tuple(words[at + 1 :])


def _filled_in(word: str, path: Path) -> str:
    """Replaces environment variables in a word of a command, as W&B's agent does."""
    if word != ARGS and re.search(r"\$\{[^}]*\}", OF_ENVIRONMENT.sub("", word)):
        raise ValueError(
            f"command of {path} must have no variable but ${{args}} and ${{envvar:NAME}} after fit, but has {word}"
        )
    for name in OF_ENVIRONMENT.findall(word):
        if name not in os.environ:
            raise ValueError(f"{name} must be set in the environment for the command of {path}, but is not")
    return OF_ENVIRONMENT.sub(lambda found: os.environ[found[1]], word)


def _stopping(options: Any, path: Path) -> tuple[int, int] | None:
    """`min_iter` and `eta` of `early_terminate`: a trial is judged after `min_iter · eta^k` reports of the metric."""
    if options is None:
        return None
    if not isinstance(options, dict) or options.get("type") != "hyperband":
        raise ValueError(f"early_terminate of {path} must be of type hyperband, but is {options}")
    require_keys(options, STOPPING_KEYS, f"early_terminate of {path}")
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
