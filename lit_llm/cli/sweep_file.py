"""Sweep files of Weights & Biases: what is varied, how, by which command, and what the runs are judged by."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llm.cli.sweep_parameters import Parameter, number, read_parameters, require_keys

METHODS = ("grid", "random", "bayes")
KEYS = (
    *("name", "description", "project", "entity", "program", "command", "run_cap"),
    *("method", "metric", "parameters", "early_terminate"),
)
METRIC_KEYS = ("name", "goal", "target")
STOPPING_KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")


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
        space: The same as it is written in the file.
        command: The words of `lit-llm fit` before the parameters and after them.
        early_terminate: `min_iter` and `eta` of the stopping of trials that fall behind; `None` lets all finish.
        run_cap: How many trials the file asks for, if it does.
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
        """The words of `lit-llm fit` for some values of the parameters."""
        before, after = self.command
        return [*before, *(f"--{key}={written(value)}" for key, value in sorted(settings.items())), *after]

    def grid(self) -> Iterator[dict[str, Any]]:
        """All combinations, the last parameter's values fastest."""
        keys = [parameter.key for parameter in self.parameters]
        return (dict(zip(keys, each)) for each in itertools.product(*(p.listed() for p in self.parameters)))


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
        target=None if metric.get("target") is None else number("metric", "target", metric["target"]),
    )


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
