"""What a finished run was asked for and reached, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEEDS = ("seed_everything", "data.seed")
"""What randomness comes from: that of the run, and that of which data are read in which order."""

NOT_OF_THE_SETTING = (
    *SEEDS,
    *("trainer.logger", "trainer.enable_progress_bar", "trainer.default_root_dir", "trainer.log_every_n_steps"),
    "checkpoint.every_n_steps",
)
"""What two runs of one setting may differ in."""

FALLING = ("loss", "perplexity", "bits_per_byte", "nll", "error", "error_rate", "mse", "rmse", "mae", "seconds")
"""Names of metrics of which less is better, or the last words of such."""


def falls(metric: str) -> bool:
    """Whether less of a metric is better, as its name has it.

    Example:
        >>> falls("val/loss"), falls("val/hinge_loss"), falls("val/accuracy"), falls("val/gloss")
        (True, True, False, False)
    """
    name = metric.rpartition("/")[2]
    return any(name == last or name.endswith(f"_{last}") for last in FALLING)


@dataclass(frozen=True)
class Finished:
    """A run that came to its end.

    Attributes:
        folder: Its folder.
        settings: Its config by dotted names, a class under the name of what it is.
        results: What `results.json` holds.
    """

    folder: Path
    settings: dict[str, Any]
    results: dict[str, Any]

    @property
    def seed(self) -> tuple[Any, ...]:
        """What its randomness came from; see `SEEDS`."""
        return tuple(self.settings.get(name) for name in SEEDS)

    @property
    def setting(self) -> str:
        """All of its config that is not the seed, as text."""
        kept = {k: v for k, v in self.settings.items() if not k.startswith(NOT_OF_THE_SETTING)}
        return json.dumps(kept, sort_keys=True, default=str)

    def figure(self, metric: str) -> float | None:
        """What it reached at its best validation, or at its end."""
        found = self.results.get(f"best/{metric}", self.results.get(metric))
        return None if found is None else float(found)


def read_run(folder: Path) -> Finished:
    """Reads a run folder.

    Raises:
        FileNotFoundError: When it holds no finished run.
        ValueError: When the run, or what the folder holds, was cut off.
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
    """Whether a run did, by its `results.json`, of which older ones do not say it."""
    return bool(results) and results.get("finished", True)


def dotted(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A config by the names that its options have on the command line.

    Example:
        >>> dict(dotted({"data": {"class_path": "x.Text", "init_args": {"path": "a/"}}, "seed": 1}))
        {'data': 'x.Text', 'data.path': 'a/', 'seed': 1}

    The weights of a mixture of corpora are one value.
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
