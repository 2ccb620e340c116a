"""Config files of compression chains: the stages that a model goes through, and how it is evaluated."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_llm.cli.yaml_file import read_yaml, require_keys

CHAIN_KEYS = ("evaluate", "split", "metric", "floor", "calibration_batches", "repeats", "compiled", "stages")
STAGE_KEYS = ("name", "class_path", "init_args", "fit", "options", "floor")
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
"""For each key of a chain, a check of its value, and the description of a valid value for the error message."""


@dataclass(frozen=True)
class Stage:
    """One stage of a chain: a compression method or a training run.

    Attributes:
        name: Name of the stage.
        method: `class_path` and `init_args` of a `Compression`; `None` for a training run.
        fit: Run files of a training run; later ones override earlier ones.
        options: Further options of the training run, by dotted flag. `{previous}` and `{original}` stand for the
            folders of the previous stage's and the original model.
        floor: Fraction of the original's score that the stage must keep.
    """

    name: str
    method: dict[str, Any] | None
    fit: list[str]
    options: dict[str, Any]
    floor: float


@dataclass(frozen=True)
class Chain:
    """Content of a chain's config.

    Attributes:
        evaluate: Run files that name the objective and the data for the evaluation of each stage.
        stages: The stages, in order.
        split: `validate` or `test`.
        metric: Metric that decides; `None` uses the headline metric of the data, or otherwise the objective's.
        calibration_batches: Number of training batches for methods that need calibration data.
        repeats: Number of timed forward passes of each model.
        compiled: Whether models are compiled with `torch.compile` before they are timed.
        content: The config as it was read.
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
    """Reads a chain's config; the run files that it names are relative to its folder.

    Raises:
        FileNotFoundError: When the config, or a run file that it names, does not exist.
        ValueError: When a key is unknown or missing, or a value is invalid.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not content.get("stages") or not content.get("evaluate"):
        raise ValueError(f"--config must be a chain, with stages and what to evaluate them by, but {path} is none")
    require_keys(content, CHAIN_KEYS, f"chain {path}")
    floor = content.get("floor", 0.0)

    def files(key: str, named: Any) -> list[str]:
        names = [named] if isinstance(named, str) else named
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key} must name run files, but is {named!r} in {path}")
        found = [str(path.parent / name) for name in names]
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
        require_keys(stage, STAGE_KEYS, f"stage {number} of {path}")
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
