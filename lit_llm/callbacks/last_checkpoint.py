"""The checkpoint that a run resumes from."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lit_llm.ranges import require_at_least

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)
HALF_WRITTEN = ("checkpoints/.*.ckpt-*", ".model-*", ".adapter-*")
log = logging.getLogger(__name__)


def settle(trainer: Trainer) -> None:
    """Waits until all processes have written their checkpoints, so that any of them can read them.

    Raises:
        OSError: When this process could not write one.
    """
    trainer.strategy.checkpoint_io.teardown()
    trainer.strategy.barrier("lit_llm.settle")


def ends_last_epoch(trainer: Trainer) -> bool:
    """Whether the current batch is the last of `max_epochs`."""
    return trainer.current_epoch + 1 == trainer.max_epochs and trainer.is_last_batch


class LastCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt` in the run folder up to date, and saves it on Ctrl-C.

    Saves only after complete optimiser steps: every `every_n_steps`, at the end, and when interrupted. A second Ctrl-C
    stops at once. SIGTERM, which clusters send before they take a machine away, is treated like Ctrl-C. If a time
    limit or a validation asks the run to stop within a step (gradient accumulation), it stops after that step.

    Args:
        every_n_steps: Steps between two saves.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        require_at_least(1, "checkpoint.", every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self._saved_step = -1
        self._interrupted = self._stopped = False
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the signal handlers, and removes files that a killed process left half-written."""
        self._saved_step, self._stopped = trainer.global_step, False
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            for half in itertools.chain.from_iterable(map(folder.glob, HALF_WRITTEN)):
                if not (half / "old").exists():  # may be the only copy of the model that was being replaced
                    shutil.rmtree(half, ignore_errors=True)
        with contextlib.suppress(ValueError):  # not the main thread, as in a notebook's server
            for number in INTERRUPTIONS:
                self._previous_handlers[number] = signal.signal(number, self._on_interrupt)

    def _on_interrupt(self, number: int, frame: Any) -> None:
        self._interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log.info("Interrupted: saving after this step. Interrupt again to stop immediately.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if it is due.

        Raises:
            KeyboardInterrupt: After saving, when the run was interrupted.
        """
        self._put_off(trainer)
        self._agree(trainer)
        if not self._is_due(trainer) or trainer.global_step == self._saved_step:
            return
        # Before a validation, leave it to on_validation_end: a run resumed from here would skip the validation.
        loop, data = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if loop.val_loop.skip or not loop._should_check_val_fx(data):
            self._save_and_stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves if it is due, with the results of the validation.

        Raises:
            KeyboardInterrupt: After saving, when the run was interrupted.
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._put_off(trainer)
            self._agree(trainer)
            if self._is_due(trainer):
                self._save_and_stop(trainer)

    def _put_off(self, trainer: Trainer) -> None:
        """Postpones a stop request to the end of the step: checkpoints do not hold accumulated gradients."""
        if trainer.should_stop or self._stopped:
            self._stopped = True
            trainer.should_stop = not trainer.fit_loop.epoch_loop._should_accumulate()

    def _agree(self, trainer: Trainer) -> None:
        if trainer.world_size > 1 and not trainer.fit_loop.epoch_loop._should_accumulate():  # all ranks save, or none
            self._interrupted = trainer.strategy.reduce_boolean_decision(self._interrupted, all=False)

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether to save now: only at the end of a complete step."""
        # Within an epoch, on_train_end would be too late: by then Lightning counts the epoch as complete. At the end of
        # the last epoch, it is the right place: a run resumed from a checkpoint before it would train one batch more.
        ends = (trainer.should_stop and trainer.fit_loop._can_stop_early) or trainer.global_step == trainer.max_steps
        comes = ends or trainer.global_step % self.every_n_steps == 0
        is_time = self._interrupted or (comes and not ends_last_epoch(trainer))
        return is_time and not trainer.fit_loop.epoch_loop._should_accumulate()

    def _save_and_stop(self, trainer: Trainer) -> None:
        """Saves, and raises KeyboardInterrupt if the run was interrupted."""
        self._save(trainer)
        if self._interrupted:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step and waits, so that what follows, such as the export, finds all checkpoints written."""
        self._restore_handler()
        if trainer.global_step != self._saved_step:
            self._save(trainer)
        settle(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores the signal handlers, and waits for this process's writes but not for others, which may be gone."""
        self._restore_handler()
        trainer.strategy.checkpoint_io.teardown()

    def _restore_handler(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python
        self._previous_handlers = {}

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
        self._saved_step = trainer.global_step
