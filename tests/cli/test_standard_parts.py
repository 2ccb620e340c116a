from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from lit_llm.callbacks.compile import Compile
from lit_llm.callbacks.metrics_csv import MetricsCSV
from lit_llm.callbacks.tensorboard import TensorBoard
from lit_llm.callbacks.weight_average import WeightAverage
from lit_llm.cli.standard_parts import CheckpointOptions, standard_parts
from tests.writing import exactly


class Plain(Callback):
    """A third-party callback without state."""


def parts(callbacks: list[Callback], folder: Path, command: str = "fit", **changes: Any) -> dict[str, Any]:
    options = {
        "callbacks": callbacks,
        "logger": False,
        "plugins": None,
        "fast_dev_run": True,
        "profiler": None,
    } | changes
    return standard_parts(options, CheckpointOptions("val/loss", "min"), folder, command)


@pytest.mark.parametrize("kind", [WeightAverage, Compile])
def test_a_callback_of_this_package_is_not_there_twice(kind: type[Callback], tmp_path: Path) -> None:
    message = (
        f"trainer.callbacks must have one {kind.__name__}, but have 2; leave out an overlay that the run's config has "
        f"already"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        parts([kind(), Plain(), kind()], tmp_path)
    assert len(parts([kind(), Plain(), Plain()], tmp_path)["callbacks"]) == 3


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_only_a_training_is_drawn_by_tensorboard(command: str, tmp_path: Path) -> None:
    options = {"fast_dev_run": False, "logger": None, "enable_progress_bar": False, "enable_checkpointing": False}
    kinds = [type(logger) for logger in parts([], tmp_path, command, **options)["logger"]]
    assert kinds == ([MetricsCSV, TensorBoard] if command == "fit" else [MetricsCSV])


@pytest.mark.parametrize(
    ("name", "kind"), [("simple", SimpleProfiler), ("Advanced", AdvancedProfiler), ("pytorch", PyTorchProfiler)]
)
def test_a_profiler_by_name_has_a_file_in_the_run_folder(name: str, kind: type[Profiler], tmp_path: Path) -> None:
    profiler = parts([], tmp_path, profiler=name)["profiler"]
    assert type(profiler) is kind
    assert (profiler.dirpath, profiler.filename) == (tmp_path, "profile")
    assert parts([], tmp_path, profiler=profiler)["profiler"] is profiler
    assert parts([], tmp_path, profiler="nope")["profiler"] == "nope"  # Lightning refuses it


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [("val/hinge_loss", "min"), ("val/error_rate", "min"), ("val/nll", "min"), ("val/top_5", "max"), ("val/f1", "max")],
)
def test_the_name_of_a_metric_says_which_of_two_is_better(monitor: str, mode: str) -> None:
    assert CheckpointOptions(monitor).decided(("val/accuracy", "max")).mode == mode
    assert CheckpointOptions(monitor, "max").decided(("val/accuracy", "max")).mode == "max"


def test_the_headline_metric_says_it_itself() -> None:
    assert CheckpointOptions().decided(("val/regret", "min")).mode == "min"
