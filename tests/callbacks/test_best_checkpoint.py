from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lit_llm.callbacks.best_checkpoint import BestCheckpoint
from lit_llm.callbacks.metrics_csv import MetricsCSV, read_metrics
from lit_llm.callbacks.run_report import RunReport
from tests.objectives.test_classification import trainer


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


class Measured(LightningModule):
    """Its validations measure given pairs of accuracy and loss."""

    def __init__(self, validations: list[tuple[float, float]]) -> None:
        super().__init__()
        self.weight, self.validations = torch.nn.Parameter(torch.ones(1)), validations

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.weight * batch).sum()

    def validation_step(self, batch: torch.Tensor) -> None:
        accuracy, loss = self.validations[self.trainer.global_step - 1]
        self.log_dict({"val/accuracy": accuracy, "val/loss": loss})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


NAN = float("nan")


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize(
    ("validations", "best"),
    [
        ([(0.9, 0.7), (0.9, 0.1), (0.9, 0.3), (0.5, 0.0)], 2),
        ([(0.9, 0.7), (0.9, 0.7), (0.8, 0.1)], 1),
        ([(0.9, NAN), (0.9, 0.7), (0.9, NAN)], 2),
        ([(NAN, 0.1), (0.5, 0.7)], 2),
    ],
)
def test_of_equal_scores_that_of_the_lower_loss_is_best_also_for_a_resumed_run(
    tmp_path, monkeypatch, validations, best, interrupted
):
    monkeypatch.setattr(RunReport, "on_fit_end", lambda *_: None)  # needs a network that can be exported
    folder, data = tmp_path / "checkpoints", DataLoader(torch.ones(1, 1))
    last = folder / "last.ckpt"
    for epochs in (1, len(validations)) if interrupted else (len(validations),):
        report = RunReport("val/accuracy", "max")
        checkpoint = BestCheckpoint(folder, "val/accuracy", "max")
        run = trainer(tmp_path, max_epochs=epochs, callbacks=[report, checkpoint], enable_checkpointing=True)
        run.fit(Measured(validations), data, data, ckpt_path=last if last.exists() else None)
        run.save_checkpoint(last)
    assert torch.load(folder / "best.ckpt", weights_only=False)["global_step"] == best
    assert report.results["best/step"] == best
