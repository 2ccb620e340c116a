"""Progress display of a sweep and its running trials."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from lit_llm.callbacks.metrics_csv import read_metrics
from lit_llm.callbacks.progress import STEP_OF_TOTAL
from lit_llm.cli.trial_run import TrialRun

SECONDS_BETWEEN_MOVES = 1.0
SECONDS_BETWEEN_LINES = 15.0


@dataclass
class _UnderWay:
    """Progress of a running trial, read from the files that it writes.

    Attributes:
        process: The trial.
        bar: Its progress bar; `None` without a terminal.
        first: Optimiser step at which the process started; above 0 if it resumed from a checkpoint.
        step: Optimiser steps done so far.
        total: Total number of steps; `None` until the trial has reported it.
        values: Latest values of the displayed metrics.
    """

    process: TrialRun
    bar: TaskID | None
    first: int = 0
    step: int = 0
    total: int | None = None
    values: dict[str, float] = field(default_factory=dict)

    def read(self, metric: str) -> None:
        """Reads new output of the trial; skips files that cannot be parsed because they are being written."""
        with contextlib.suppress(OSError, ValueError):
            if said := STEP_OF_TOTAL.findall(self.process.said()):
                self.first, (self.step, self.total) = int(said[0][0]), map(int, said[-1])
            rows = read_metrics(self.process.folder / "metrics.csv")
            self.step = max([self.step, *(row["step"] for row in rows[-1:])])
            for name in dict.fromkeys([metric, "train/loss"]):
                if found := [row[name] for row in rows if name in row]:
                    self.values[name] = found[-1]

    def part(self, step: int) -> float:
        """A number of steps as a fraction of the total; 0 while the total is unknown."""
        return min(1.0, step / self.total) if self.total else 0.0

    def __str__(self) -> str:
        if not self.step and not self.total:
            return "starts"
        of = f"/{self.total}" if self.total else ""
        return "  ".join([f"step {self.step}{of}", *(f"{name} {value:.4f}" for name, value in self.values.items())])


class _Console(Console):
    """A console that goes quiet on a broken pipe, where rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class SweepProgress:
    """A progress bar for each running trial and one for the sweep; without a terminal, a line at intervals.

    It only reads files that trials write.

    Args:
        metric: Metric of the sweep; shown beside the training loss.
        wanted: Total number of trials.
        ended: Number of trials that had ended before.
    """

    def __init__(self, metric: str, wanted: int, ended: int = 0) -> None:
        self.metric, self.wanted, self.ended = metric, wanted, ended
        self._console = _Console(stderr=True, highlight=False)
        self._bars: Progress | None = None
        self._whole: TaskID | None = None
        self._under_way: dict[str, _UnderWay] = {}
        self._done = 0.0
        self._started = self._looked = time.perf_counter()

    def __enter__(self) -> SweepProgress:
        self._started = self._looked = time.perf_counter()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            texts = (TextColumn(f"{{task.{what}}}", markup=False) for what in ("description", "fields[status]"))
            columns = next(texts), BarColumn(bar_width=None), next(texts)
            self._bars = Progress(*columns, console=self._console, expand=True, transient=True, auto_refresh=False)
            self._whole = self._bars.add_task("sweep", total=self.wanted, completed=self.ended, status="")
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        bars, self._bars = self._bars, None
        if bars is not None:
            bars.stop()

    def begin(self, name: str, process: TrialRun) -> None:
        """Adds a trial that has been started."""
        bar = self._bars.add_task(name, total=None, status="starts") if self._bars is not None else None
        self._under_way[name] = _UnderWay(process, bar)
        self._draw()

    def end(self, name: str) -> None:
        """Removes a trial that has ended."""
        run = self._under_way.pop(name)
        self.ended += 1
        self._done += 1 - run.part(run.first)
        if self._bars is not None:
            self._bars.remove_task(run.bar)
            self._draw()

    def look(self) -> None:
        """Updates the display, unless the last update was too recent."""
        now = time.perf_counter()
        if now - self._looked < (SECONDS_BETWEEN_LINES if self._bars is None else SECONDS_BETWEEN_MOVES):
            return
        self._looked = now
        for run in self._under_way.values():
            run.read(self.metric)
        if self._bars is not None:
            self._draw()
        elif self._under_way:
            self._print(f"{self}: " + "; ".join(f"{name}  {run}" for name, run in self._under_way.items()))

    def say(self, line: str, style: str | None = None) -> None:
        """Prints a permanent line above the bars."""
        self._print(line, style)
        if self._bars is None:
            self._looked = time.perf_counter()

    def _print(self, line: str, style: str | None = None) -> None:
        with contextlib.suppress(OSError):  # a closed terminal or a full disk ends no sweep
            self._console.print(line, style=style, markup=False, soft_wrap=True)

    def _draw(self) -> None:
        if self._bars is None:
            return
        for run in self._under_way.values():
            self._bars.update(run.bar, total=run.total, completed=run.step, status=str(run))
        self._bars.update(self._whole, completed=self.ended + self._parts(), status=str(self))
        with contextlib.suppress(OSError):
            self._bars.refresh()

    def _parts(self) -> float:
        return sum((run.part(run.step) for run in self._under_way.values()), 0.0)

    def __str__(self) -> str:
        """Number of trials that have ended, and the time left for the others at the current rate."""
        done = self._done + self._parts() - sum(run.part(run.first) for run in self._under_way.values())
        left = ""
        if done > 0:
            seconds = (time.perf_counter() - self._started) / done * (self.wanted - self.ended - self._parts())
            left = f", {timedelta(seconds=round(max(0.0, seconds)))} left"
        return f"{self.ended} of {self.wanted} ended{left}"
