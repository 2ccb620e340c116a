from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_llm.callbacks.best_checkpoint import BestCheckpoint
from lit_llm.callbacks.metrics_csv import MetricsCSV, read_metrics


@pytest.mark.parametrize("known", [{"best/val/f1": 0.5}, {"best/val/f1": float("nan")}, {"best/val/accuracy": 0.8}])
def test_what_was_best_is_judged_by_another_metric_only_where_that_was_measured(tmp_path, known):
    before, now = (BestCheckpoint(tmp_path, f"val/{name}", "max") for name in ("accuracy", "f1"))
    before.best_k_models = {"best.ckpt": torch.tensor(0.8)}
    states = {before.state_key: before.state_dict(), "RunReport": {"results": known}}
    now.on_load_checkpoint(Trainer(accelerator="cpu", logger=False), LightningModule(), {"callbacks": states})
    if known == {"best/val/f1": 0.5}:
        assert states[now.state_key]["best_k_models"] == {"best.ckpt": 0.5}
    else:
        assert states.keys() == {"RunReport"}


def test_what_was_best_by_the_same_metric_is_left_as_it_is(tmp_path):
    callback = BestCheckpoint(tmp_path, "val/f1", "max")
    callback.best_k_models = {"best.ckpt": torch.tensor(0.8)}
    state = callback.state_dict()
    states = {callback.state_key: state, "RunReport": {"results": {"best/val/f1": 0.5}}}
    callback.on_load_checkpoint(Trainer(accelerator="cpu", logger=False), LightningModule(), {"callbacks": states})
    assert states[callback.state_key] is state


def test_what_was_logged_is_written_before_the_checkpoint_that_follows_it(tmp_path, monkeypatch):
    logger, seen = MetricsCSV(tmp_path), []
    monkeypatch.setattr(ModelCheckpoint, "_save_checkpoint", lambda *_: seen.extend(read_metrics(logger.path)))
    logger.log_metrics({"train/loss": 2.0}, 3)
    BestCheckpoint(tmp_path, "val/loss", "min")._save_checkpoint(Trainer(accelerator="cpu", logger=logger), "best.ckpt")
    assert seen == [{"step": 3, "train/loss": 2.0}]
