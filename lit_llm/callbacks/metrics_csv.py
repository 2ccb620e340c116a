"""A run's metrics as one CSV file."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_llm.files import replacing


class MetricsCSV(Logger):
    """Writes `metrics.csv`: a row for each step at which something was logged, a column for each metric.

    A resumed run appends to the same file, after dropping rows of steps after the one it resumes from; a run that
    starts over drops all. (Lightning's own CSV logger deletes the file.)

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns = ["step"]
        self._last_step: int | None = None
        self._began: float = math.inf
        self._pending: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Empty, so that Lightning adds no subfolder to the run folder."""
        return ""

    @property
    def version(self) -> str:
        """Empty, like `name`."""
        return ""

    def begin(self, step: int) -> None:
        """Sets the step at which training starts or resumes; without a call, it is that of the first row."""
        self._began = step

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: `config.yaml` has the hyperparameters."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds metrics of a step; metrics of the same step share a row."""
        metrics = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        if not metrics:
            return
        if self._pending.get("step") != step:
            self.save()
            self._pending = {"step": step}
        self._pending |= metrics

    @rank_zero_only
    def save(self) -> None:
        """Writes the pending row."""
        if not self._pending:
            return
        row, self._pending = self._pending, {}
        if self._last_step is not None and row["step"] > self._last_step and set(row) <= set(self._columns):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        else:
            self._rewrite_with(row)
        self._last_step = row["step"]

    def _rewrite_with(self, row: dict[str, Any]) -> None:
        """Rewrites the file: for a new column, a step that already has a row, or the first row of a process."""
        rows = read_metrics(self.path)
        if self._last_step is None:
            rows = [r for r in rows if r["step"] <= min(self._began, row["step"])]
        if rows and rows[-1]["step"] == row["step"]:
            row = rows.pop() | row
        self._columns = list(dict.fromkeys([*self._columns, *(name for r in rows for name in r), *row]))
        with replacing(self.path) as new, new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows([*rows, row])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes the last row."""
        self.save()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.csv`, each with the metrics it has; empty if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items() if k and v} for row in csv.DictReader(file)]
    return [row | {"step": int(row["step"])} for row in rows if "step" in row]
