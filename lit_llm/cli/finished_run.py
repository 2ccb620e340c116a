"""Settings and results of a finished run, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEEDS = ("seed_everything", "data.seed")
"""Options that set the random seeds: of the run, and of the selection and order of the data."""

NOT_OF_THE_SETTING = (
    *SEEDS,
    *("trainer.logger", "trainer.enable_progress_bar", "trainer.default_root_dir", "trainer.log_every_n_steps"),
    "checkpoint.every_n_steps",
)
"""Options in which two runs of one setting may differ."""

FALLING = ("loss", "perplexity", "bits_per_byte", "nll", "error", "error_rate", "mse", "rmse", "mae", "seconds")
"""Metrics for which lower is better, by the whole name or by its last words."""


def falls(metric: str) -> bool:
    """Whether lower is better for a metric, judging by its name.

    Example:
        >>> falls("val/loss"), falls("val/hinge_loss"), falls("val/accuracy"), falls("val/gloss")
        (True, True, False, False)
    """
    name = metric.rpartition("/")[2]
    return any(name == last or name.endswith(f"_{last}") for last in FALLING)


@dataclass(frozen=True)
class Finished:
    """A run that has finished.

    Attributes:
        folder: The run folder.
        settings: The config by dotted names, as `dotted` gives them.
        results: Content of `results.json`.
    """

    folder: Path
    settings: dict[str, Any]
    results: dict[str, Any]

    @property
    def seed(self) -> tuple[Any, ...]:
        """The seeds, in the order of `SEEDS`."""
        return tuple(self.settings.get(name) for name in SEEDS)

    @property
    def setting(self) -> str:
        """The config without `NOT_OF_THE_SETTING`, as JSON: equal for runs of one setting."""
        kept = {k: v for k, v in self.settings.items() if not k.startswith(NOT_OF_THE_SETTING)}
        return json.dumps(kept, sort_keys=True, default=str)

    def figure(self, metric: str) -> float | None:
        """The metric at the best validation, or otherwise at the end; `None` if there is neither."""
        found = self.results.get(f"best/{metric}", self.results.get(metric))
        return None if found is None else float(found)


def read_run(folder: Path) -> Finished:
    """Reads a run folder.

    Raises:
        FileNotFoundError: When it holds no finished run.
        ValueError: When the run was interrupted, or a file is truncated.
    """
    import yaml

    for name in ("config.yaml", "results.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"RUN must be the folder of a finished run, but {folder} has no {name}")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"RUN must be the folder of a finished run, but files of {folder} are not whole") from error
    if not came_to_its_end(results):
        raise ValueError(
            f"RUN must be the folder of a finished run, but {folder} was cut short at step {results.get('step')}; go "
            f"on with lit-llm fit --run_dir {folder} --ckpt_path last"
        )
    return Finished(folder, dict(dotted(config)), results)


def came_to_its_end(results: dict[str, Any]) -> bool:
    """Whether a run finished, by its `results.json`; those of older versions do not say and count as finished."""
    return bool(results) and results.get("finished", True)


def dotted(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flattens a config into pairs of an option's dotted name on the command line and its value.

    Example:
        >>> dict(dotted({"data": {"class_path": "x.Text", "init_args": {"path": "a/"}}, "seed": 1}))
        {'data': 'x.Text', 'data.path': 'a/', 'seed': 1}

    A mixture of corpora (`data.path`) is kept as one value.
    """
    for name, value in content.items():
        if name == "class_path":
            yield prefix.rstrip("."), value
        elif name == "init_args" and isinstance(value, dict):
            yield from dotted(value, prefix)
        elif isinstance(value, dict) and f"{prefix}{name}" != "data.path":
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
