"""Callbacks with which the experiments time the steps of `lit-llm fit`."""

from __future__ import annotations

import cProfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from experiments.throughput.clock import Clock


class StepClock(Callback):
    """Reports every step to a `Clock`; with several processes, only the first one does.

    Args:
        path: As in `Clock`.
        steps: As in `Clock`.
        warmup: As in `Clock`.
        tokens_per_step: As in `Clock`.
    """

    def __init__(self, path: str, steps: int, warmup: int, tokens_per_step: int) -> None:
        self.clock = Clock(path, steps, warmup, tokens_per_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reports the step."""
        if trainer.is_global_zero:
            self.clock.tick(outputs["loss"], pl_module.network)


class Stamp(Callback):
    """Writes the seconds of all steps after a warm-up; reads the clock only twice.

    Args:
        path: File to write.
        steps: Number of steps of the run.
        warmup: Number of steps before the clock starts.
        profile: File for cProfile's statistics of those steps.
    """

    def __init__(self, path: str, steps: int, warmup: int, profile: str | None = None) -> None:
        self.path, self.steps, self.warmup, self.profile = path, steps, warmup, profile
        self.profiler = cProfile.Profile()
        self.started = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock after the warm-up; stops it and writes after the last step."""
        if batch_idx == self.warmup - 1:
            self.started = time.perf_counter()
            if self.profile:
                self.profiler.enable()
        elif batch_idx == self.steps - 1:
            if self.profile:
                self.profiler.disable()
                self.profiler.dump_stats(self.profile)
            Path(self.path).write_text(str(time.perf_counter() - self.started))


class FirstStep(Callback):
    """Writes the time (`time.time()`) at which the first step was done.

    Args:
        path: File to write.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the time after the first step."""
        if not Path(self.path).exists():
            Path(self.path).write_text(str(time.time()))
