from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_llm.callbacks.best_checkpoint import BestCheckpoint
from lit_llm.callbacks.early_stopping import EarlyStopping
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.objectives.classification import Classification
from lit_llm.objectives.regression import Regression
from tests.examples import BERT, Examples
from tests.objectives.test_classification import trainer
from tests.writing import exactly

NETWORK = functools.partial(PretrainedClassifier, config=BERT)
STILL = functools.partial(torch.optim.SGD, lr=0.0)


class Named(Examples):
    """A task with a metric of its own."""

    monitor = ("val/mcc", "max")


@pytest.mark.parametrize(
    ("objective", "data", "watched"),
    [
        (Classification, Examples(3), ("val/accuracy", "max")),
        (Classification, Named(3), ("val/mcc", "max")),
        (Regression, Examples(None), Regression.monitor),
    ],
)
def test_it_watches_the_headline_metric(
    objective: Any, data: Examples, watched: tuple[str, str], tmp_path: Path
) -> None:
    stopping = EarlyStopping(patience=2)
    run = trainer(tmp_path, max_epochs=20, callbacks=[stopping])
    run.fit(objective(NETWORK, STILL), datamodule=data)
    assert (stopping.monitor, stopping.mode) == watched
    assert run.current_epoch == 3  # the first validation is the best; the next two are no better


def test_it_watches_what_selects_the_best_checkpoint(tmp_path: Path) -> None:
    stopping, best = EarlyStopping(patience=1), BestCheckpoint(tmp_path, "val/loss", "min")
    run = trainer(tmp_path, max_epochs=20, callbacks=[stopping, best], enable_checkpointing=True)
    run.fit(Classification(NETWORK, STILL), datamodule=Named(3))
    assert (stopping.monitor, stopping.mode) == ("val/loss", "min")


def test_another_metric_can_be_named(tmp_path: Path) -> None:
    stopping = EarlyStopping(monitor="val/f1", mode="max", patience=1)
    run = trainer(tmp_path, max_epochs=20, callbacks=[stopping])
    run.fit(Classification(NETWORK, STILL), datamodule=Examples(3))
    assert (stopping.monitor, run.current_epoch) == ("val/f1", 2)


def test_what_is_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=exactly("monitor and mode must be given together, but are val/f1 and None")):
        EarlyStopping(monitor="val/f1")
    stopping = EarlyStopping(monitor="val/nothing", mode="max")
    with pytest.raises(
        ValueError, match=r"^monitor must be one of what a validation measures, val/accuracy, .*, but is val/nothing$"
    ):
        trainer(tmp_path, max_epochs=2, callbacks=[stopping]).fit(Classification(NETWORK), datamodule=Examples(3))
