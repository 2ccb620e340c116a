"""TensorBoard's log."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lit_llm.callbacks.tensorboard import TensorBoard


def test_what_is_logged_can_be_read_and_is_one_event_a_step(tmp_path: Path) -> None:
    logger = TensorBoard(tmp_path, name="", version="tensorboard")
    logger.log_metrics({"train/loss": 2.5, "train/tokens": 96}, step=10)
    logger.log_metrics({"train/loss": torch.tensor(1.25)}, step=20)
    logger.finalize("success")
    logger.log_metrics({"val/loss": 1.5}, step=20)  # like a validation after the end of training
    logger.finalize("success")

    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert scalars == {"train/loss": [(10, 2.5), (20, 1.25)], "train/tokens": [(10, 96.0)], "val/loss": [(20, 1.5)]}
    files = sorted((tmp_path / "tensorboard").iterdir())
    events = [event for file in files for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]
    assert len(events) == 3


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="could not convert"):
        TensorBoard(tmp_path, name="", version="tensorboard").log_metrics({"note": "text"}, step=1)  # type: ignore
