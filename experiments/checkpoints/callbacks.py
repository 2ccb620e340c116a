"""The callback with which the experiment times the saves of `lit-llm fit`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class SaveClock(Callback):
    """Writes, as JSON, the seconds for which each save blocked training, and those of all steps after the warm-up.

    Args:
        path: File to write.
        steps: Number of steps of the run.
        warmup: Number of steps before the clock starts.
    """

    def __init__(self, path: str, steps: int, warmup: int) -> None:
        self.path, self.steps, self.warmup = Path(path), steps, warmup
        self.started = 0.0
        self.saves: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wraps the trainer's `save_checkpoint` with a timer."""
        save = trainer.save_checkpoint

        def timed(*given: Any, **named: Any) -> None:
            started = time.perf_counter()
            save(*given, **named)
            self.saves.append(time.perf_counter() - started)

        trainer.save_checkpoint = timed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock after the warm-up; stops it and writes after the last step, before the save of that step."""
        if batch_idx == self.warmup - 1:
            self.started = time.perf_counter()
            self.saves.clear()
        elif batch_idx == self.steps - 1:
            found = {"seconds": time.perf_counter() - self.started, "saves": self.saves}
            self.path.write_text(json.dumps(found))
