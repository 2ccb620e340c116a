"""The progress of a run on the terminal."""

from __future__ import annotations

import re
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from lit_llm.callbacks.throughput import Throughput

SECONDS_BETWEEN_MOVES = 0.5

STEP_OF_TOTAL = re.compile(r"^step +(\d+)/(\d+)", re.MULTILINE)
"""Start of a progress line of training, for a program that follows a run in another process."""


class Progress(ProgressBar):
    """Shows one bar for the whole run with loss, tokens per second, MFU and time left, and a line per validation.

    If the output is not a terminal, prints a line at the start and then at intervals instead of the bar.

    Args:
        seconds_between_lines: Seconds between two lines if the output is not a terminal.
    """

    def __init__(self, seconds_between_lines: float = 15.0) -> None:
        super().__init__()
        self.seconds_between_lines = seconds_between_lines
        self._enabled = True
        self._bar: RichProgress | None = None
        self._started = self._last_line = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Disables all output (Lightning calls this on all processes but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Enables output again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Writes a line without disturbing the bar."""
        if self._enabled:
            print(*args, file=sys.stderr, flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the bar."""
        self._started = self._last_line = time.perf_counter()
        self._first_step = trainer.global_step
        self._show("training", float(trainer.estimated_stepping_batches), trainer.global_step)
        if self._bar is None and self._enabled:
            self.print(self._status(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar; its text changes with each report."""
        now = time.perf_counter()
        if now - self._last_line < (SECONDS_BETWEEN_MOVES if self._bar is not None else self.seconds_between_lines):
            return
        self._last_line = now
        if self._bar is not None:
            self._move(trainer.global_step, self._status(trainer))
        elif self._enabled:
            self.print(self._status(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the validation metrics."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn != "fit":
            self._stop()
            return
        found = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self.print(f"step {trainer.global_step:>6}  " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes the bar."""
        self._stop()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows a bar of batches."""
        self._show("testing", float(sum(trainer.num_test_batches)))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Moves the bar."""
        self._move(batch_idx + 1)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the bar."""
        self._stop()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows a bar of batches."""
        self._show("predicting", float(sum(trainer.num_predict_batches)))

    on_predict_batch_end = on_test_batch_end
    on_train_end = on_predict_end = on_test_end

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows a bar of batches, unless the validation is part of a fit."""
        if trainer.state.fn != "fit":
            self._show("validating", float(sum(trainer.num_val_batches)))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Moves the bar; in a fit, shows the progress of the validation as its text."""
        if trainer.state.fn != "fit":
            self._move(batch_idx + 1)
        elif not trainer.sanity_checking:
            self._move(trainer.global_step, f"validating {batch_idx + 1}/{sum(trainer.num_val_batches):.0f}")

    def _show(self, what: str, total: float, completed: int = 0) -> None:
        console = Console(stderr=True)
        if self._enabled and console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[status]}")
            self._bar = RichProgress(
                *columns, console=console, expand=True, refresh_per_second=1 / SECONDS_BETWEEN_MOVES
            )
            self._bar.add_task(what, total=None if total == float("inf") else total, completed=completed, status="")
            self._bar.start()

    def _move(self, completed: int, status: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=completed, status=status)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _status(self, trainer: Trainer) -> str:
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)
        latest = throughput.latest if throughput else {}
        step, total = trainer.global_step, float(trainer.estimated_stepping_batches)
        parts = [f"step {step:>6}" + ("" if total == float("inf") else f"/{total:.0f}")]
        if latest:
            rate = f"{latest['train/tokens_per_second'] / 1e3:.1f}k {throughput.unit}/s"
            parts += [f"loss {latest['train/loss']:.3f}"] if "train/loss" in latest else []
            parts.append(rate)
        if "train/mfu" in latest:
            parts.append(f"mfu {latest['train/mfu']:.0%}")
        done = step - self._first_step
        if done and total != float("inf"):
            left = (time.perf_counter() - self._started) / done * (total - step)
            parts.append(f"left {int(left) // 60}:{int(left) % 60:02d}")
        return "  ".join(parts)
