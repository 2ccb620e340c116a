"""Parts that every run has besides those that its config names: callbacks, loggers, atomic checkpoints."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_llm.callbacks.best_checkpoint import BestCheckpoint
from lit_llm.callbacks.confusion import ConfusionMatrix
from lit_llm.callbacks.intervals import ConfidenceIntervals
from lit_llm.callbacks.last_checkpoint import LastCheckpoint
from lit_llm.callbacks.metrics_csv import MetricsCSV
from lit_llm.callbacks.mistakes import WorstMistakes
from lit_llm.callbacks.predictions import DocumentScores, ExamplePredictions, GeneratedTexts
from lit_llm.callbacks.progress import Progress
from lit_llm.callbacks.run_report import RunReport
from lit_llm.callbacks.tensorboard import TensorBoard
from lit_llm.callbacks.throughput import Throughput
from lit_llm.checkpoint_files import AtomicCheckpointIO
from lit_llm.cli.finished_run import falls
from lit_llm.cli.lean_loop import NoProfiler

log = logging.getLogger(__name__)

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
"""Lightning's profilers by the names that `trainer.profiler` accepts."""


class CheckpointOptions:
    """When checkpoints are written.

    Args:
        monitor: Metric that decides which validation is best; `best.ckpt` and the exported model are from that step.
            `None` uses the headline metric of the data's task, or otherwise the objective's. Of equal validations, that
            of the lower `val/loss` is best. A run that is resumed with another metric also compares with the earlier
            best step by that metric.
        mode: Whether `min` or `max` of the metric is best; `None` is `min` for losses and errors, otherwise `max`.
        every_n_steps: Steps between writes of `last.ckpt`, which is also written at the end and on Ctrl-C.
    """

    def __init__(
        self, monitor: str | None = None, mode: Literal["min", "max"] | None = None, every_n_steps: int = 100
    ) -> None:
        self.monitor, self.mode, self.every_n_steps = monitor, mode, every_n_steps

    def decided(self, headline: tuple[str, str]) -> CheckpointOptions:
        """These options with `monitor` and `mode` filled in from the headline metric and its mode where `None`."""
        monitor = self.monitor or headline[0]
        mode = self.mode or (headline[1] if monitor == headline[0] else "min" if falls(monitor) else "max")
        return CheckpointOptions(monitor, mode, self.every_n_steps)


def standard_parts(options: Any, checkpoint: CheckpointOptions, run_dir: Path, command: str) -> dict[str, Any]:
    """The trainer's callbacks, loggers, plugins and profiler: those of its options and those that every run has.

    Args:
        options: Options of the trainer, with their classes instantiated.
        checkpoint: When checkpoints are written, with no field left `None`.
        run_dir: The run folder.
        command: The sub-command.

    Raises:
        ValueError: When a callback of this package, or one that saves state under the same key, occurs twice.
    """
    callbacks, loggers, plugins = listed(options["callbacks"]), options["logger"], listed(options["plugins"])
    if not options["fast_dev_run"]:
        callbacks += _standard_callbacks(options, checkpoint, run_dir, predicts=command == "predict")
        standard = [MetricsCSV(run_dir)]
        if loggers is not False and command == "fit":  # an evaluation has no curve, and its folder may be read-only
            standard.append(TensorBoard(run_dir, name="", version="tensorboard"))
        loggers = [*([] if isinstance(loggers, bool) else listed(loggers)), *standard]
    _require_one_of_each(callbacks)
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpointIO())
    profiler = _profiler(options["profiler"], run_dir)
    return {"callbacks": callbacks, "logger": loggers, "plugins": plugins, "profiler": profiler}


def _profiler(given: Profiler | str | None, run_dir: Path) -> Profiler | str:
    """The profiler; one given by name reports to the run folder, since Lightning's log, its default, is silenced."""
    if not (isinstance(given, str) and given.lower() in PROFILERS):
        return given or NoProfiler()
    log.info(f"When it ends, the profiler says where the time went: {run_dir}/*-profile*.txt")
    return PROFILERS[given.lower()](dirpath=run_dir, filename="profile")


def _require_one_of_each(callbacks: list[Callback]) -> None:
    """Refuses duplicates of callbacks of this package, and of others that have a state, under the same state key."""
    single = Counter(
        callback.state_key
        for callback in callbacks
        if type(callback).__module__.startswith("lit_llm.") or is_overridden("state_dict", callback, Callback)
    )
    for callback in callbacks:
        if single[callback.state_key] > 1:
            raise ValueError(
                f"trainer.callbacks must have one {type(callback).__name__}, but have {single[callback.state_key]}; "
                f"leave out an overlay that the run's config has already"
            )


def listed(given: Any) -> list[Any]:
    """A new list of what is given: one value, a list, or nothing."""
    return [*given] if isinstance(given, list) else [] if given is None else [given]


def _standard_callbacks(options: Any, checkpoint: CheckpointOptions, run_dir: Path, predicts: bool) -> list[Callback]:
    given = listed(options["callbacks"])
    standard = [Throughput(), RunReport(checkpoint.monitor, checkpoint.mode)]
    if options["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in given):
        standard.insert(1, Progress())
    standard += [ConfusionMatrix(), WorstMistakes(), ConfidenceIntervals()]
    standard = [callback for callback in standard if not any(type(own) is type(callback) for own in given)]
    if predicts:
        standard += [DocumentScores(), ExamplePredictions(), GeneratedTexts()]
    if options["enable_checkpointing"] is False:
        return standard
    best = BestCheckpoint(run_dir / "checkpoints", checkpoint.monitor, checkpoint.mode)
    return [*standard, best, LastCheckpoint(checkpoint.every_n_steps)]
