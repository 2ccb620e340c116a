"""Chains of compression: what is done to a model, in which order, and what it is measured by."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHAIN_KEYS = {"evaluate", "split", "metric", "floor", "calibration_batches", "repeats", "compiled", "stages"}
STAGE_KEYS = {"name", "class_path", "init_args", "fit", "options", "floor"}
STAGE_KINDS = {
    "class_path": (str, "the path of a class"),
    "init_args": (dict, "arguments by name"),
    "options": (dict, "values by dotted flag"),
}
VALUES = {
    "metric": (lambda value: value is None or isinstance(value, str), "the name of a metric"),
    "calibration_batches": (lambda value: type(value) is int and value >= 0, "a whole number of at least 0"),
    "repeats": (lambda value: type(value) is int and value >= 1, "a whole number of at least 1"),
    "compiled": (lambda value: isinstance(value, bool), "true or false"),
}
"""Which values of a chain are right, and what is said of the others."""


@dataclass(frozen=True)
class Stage:
    """One step of a chain: a method of compression, or a training.

    Attributes:
        name: What it is called.
        method: `class_path` and `init_args` of a `Compression`; `None` for a training.
        fit: Run files of a training, later ones laid over earlier ones.
        options: What is set beside them, by dotted flag; `{previous}` and `{original}` are those models' folders.
        floor: Part of the original's score that must be left after it.
    """

    name: str
    method: dict[str, Any] | None
    fit: list[str]
    options: dict[str, Any]
    floor: float


@dataclass(frozen=True)
class Chain:
    """What a chain's config says.

    Attributes:
        evaluate: Run files that name objective and data to measure by.
        split: `validate` or `test`.
        metric: What is measured; `None` is the data's headline metric, or the objective's.
        stages: The steps, in their order.
        calibration_batches: Training batches that methods look at which want to see what flows.
        repeats: How many times each model is timed.
        compiled: Time models as torch.compile makes them.
    """

    evaluate: list[str]
    stages: list[Stage]
    split: str = "validate"
    metric: str | None = None
    calibration_batches: int = 8
    repeats: int = 30
    compiled: bool = False
    content: dict[str, Any] = field(default_factory=dict)


def read_chain(path: Path) -> Chain:
    """Reads a chain's config; the files it names are relative to it.

    Raises:
        FileNotFoundError: When there is none, or it names a run file that is not there.
        ValueError: When it has a key that means nothing, lacks one, or a value that cannot be.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"--config must be a file, but is {path}, which does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config must be YAML, but {path} is not: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content.get("stages") or not content.get("evaluate"):
        raise ValueError(f"--config must be a chain, with stages and what to evaluate them by, but {path} is none")
    _require_keys(content, CHAIN_KEYS, "a chain", path)
    floor = content.get("floor", 0.0)

    def files(key: str, named: Any) -> list[str]:
        if not isinstance(named, str) and not _is_texts(named):
            raise ValueError(f"{key} must name run files, but is {named!r} in {path}")
        found = [str(path.parent / name) for name in ([named] if isinstance(named, str) else named)]
        for file in found:
            if not Path(file).is_file():
                raise FileNotFoundError(f"{path} must name run files, but {file} does not exist")
        return found

    stages = []
    if not isinstance(content["stages"], list):
        raise ValueError(f"stages must be a list, but is {content['stages']!r} in {path}; begin each stage with a dash")
    for number, stage in enumerate(content["stages"], 1):
        if not isinstance(stage, dict):
            raise ValueError(f"stage {number} of {path} must have either class_path or fit, but is {stage!r}")
        for key, (kind, what) in STAGE_KINDS.items():
            if not isinstance(stage.get(key), kind | None):
                raise ValueError(f"{key} must be {what}, but is {stage[key]!r} in stage {number} of {path}")
        _require_keys(stage, STAGE_KEYS, "a stage", path)
        if ("fit" in stage) == ("class_path" in stage):
            raise ValueError(f"stage {number} of {path} must have either class_path or fit, but has {', '.join(stage)}")
        method = None if "fit" in stage else {k: stage[k] for k in ("class_path", "init_args") if k in stage}
        name = stage.get("name") or (stage.get("class_path") or "fit").rpartition(".")[2].lower()
        if not re.fullmatch(r"[\w.-]+", str(name)) or name in {"original", *(earlier.name for earlier in stages)}:
            raise ValueError(f"name of a stage must be a word that no other has, but is {name!r} in {path}")
        own = stage.get("floor", floor)
        if not isinstance(own, int | float) or not 0 <= own <= 1:
            raise ValueError(f"floor must be part of the original's score, in [0, 1], but is {own}")
        stages.append(Stage(name, method, files("fit", stage.get("fit", [])), stage.get("options") or {}, float(own)))
    split = content.get("split", "validate")
    if split not in ("validate", "test"):
        raise ValueError(f"split must be validate or test, but is {split}")
    for key, (is_right, what) in VALUES.items():
        if key in content and not is_right(content[key]):
            raise ValueError(f"{key} must be {what}, but is {content[key]!r} in {path}")
    rest = {key: content[key] for key in VALUES if key in content}
    return Chain(files("evaluate", content["evaluate"]), stages, split, content=content, **rest)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _require_keys(content: dict[str, Any], known: set[str], what: str, path: Path) -> None:
    if wrong := sorted(content.keys() - known):
        raise ValueError(f"{what} must have keys of {', '.join(sorted(known))}, but in {path} has {wrong[0]}")
