from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lit_llm.callbacks.learning_rate_finder import LearningRateFinder, smoothed, steepest
from tests.writing import exactly


class Valley(LightningModule):
    """A quadratic loss, curvature / 2 times the squares of two weights, which have different learning rates."""

    def __init__(self, curvature: float) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(())) for _ in range(2)])
        self.curvature = curvature
        self.seen: list[list[float]] = []
        self.loss = torch.zeros(())

    def configure_optimizers(self):
        groups = [{"params": [w], "lr": rate} for w, rate in zip(self.weights, (0.1, 0.01))]
        groups[1]["rate"] = 0.5
        optimizer = torch.optim.SGD(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch, batch_idx):
        self.loss = self.curvature / 2 * sum(w**2 for w in self.weights)
        return self.loss

    def on_before_optimizer_step(self, optimizer):
        self.seen.append([group["lr"] for group in optimizer.param_groups])

    def take_train_loss(self):
        if not self.loss.isfinite():
            raise FloatingPointError
        return self.loss.item()


def find(tmp_path, curvature, parts=1, steps=40, kind=Valley):
    finder, model = LearningRateFinder(steps), kind(curvature)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "limit_val_batches": 0, "accelerator": "cpu"}
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=-1, callbacks=[finder], accumulate_grad_batches=parts, **quiet
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.zeros(6, 1)))
    return finder, model, trainer


def test_all_rates_rise_in_proportion_from_a_thousandth_to_a_hundred_times_the_configs(tmp_path):
    finder, model, trainer = find(tmp_path, curvature=1e-6)
    assert trainer.global_step == len(finder.losses) == 40
    first, second = np.array(model.seen).T
    np.testing.assert_allclose(first, 0.1 * np.geomspace(1e-3, 1e2, 40))
    np.testing.assert_allclose(second, 0.05 * first)
    np.testing.assert_allclose(finder.rates, first)
    with (tmp_path / "lr_find.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == finder.losses
    assert [float(row["learning_rate"]) for row in rows] == finder.rates
    assert (tmp_path / "lr_find.png").stat().st_size > 5000


def test_a_valley_is_left_where_its_curvature_says_and_the_suggestion_is_below_that(tmp_path):
    for curvature in (5.0, 50.0):
        finder, _, trainer = find(tmp_path, curvature)
        assert trainer.global_step < 40  # gradient descent diverges above 2 / curvature
        assert finder.losses[-1] > 4 * min(finder.losses)
        assert 0.02 / curvature < 0.1 * finder.suggestion < 2 / curvature


def test_the_batches_of_one_step_have_one_rate_and_one_loss(tmp_path):
    finder, model, trainer = find(tmp_path, curvature=1e-6, parts=3, steps=10)
    assert trainer.global_step == len(finder.losses) == len(finder.rates) == 10
    assert len(model.seen) == 10


def test_a_loss_that_is_no_number_ends_the_test(tmp_path):
    finder, _, trainer = find(tmp_path, curvature=1e25)
    assert trainer.global_step < 20
    assert all(np.isfinite(finder.losses))


class OneHardBatch(Valley):
    """A valley in which the loss of one step is ten times that of the others."""

    def take_train_loss(self):
        return super().take_train_loss() * (10 if self.trainer.global_step == 20 else 1)


def test_a_batch_that_is_harder_than_others_does_not_end_the_test(tmp_path):
    finder, _, trainer = find(tmp_path, curvature=1e-6, kind=OneHardBatch)
    assert max(finder.losses) > 4 * min(finder.losses)
    assert trainer.global_step == 40


def test_the_steepest_fall_is_found_under_noise_and_a_divergence_is_none():
    rates = np.geomspace(1e-5, 1, 100)
    falling = -np.tanh(2 * (np.log10(rates) + 2.5))
    noise = np.random.default_rng(0).normal(scale=0.05, size=100)
    diverged = np.where(rates > 0.1, 30 * (rates - 0.1), 0.0)
    bounced = diverged.copy()
    bounced[-3:] = 0  # the steepest fall, but after the minimum
    for end in (diverged, bounced):
        found = steepest(rates.tolist(), (falling + noise + end).tolist())
        assert 10**-3 < found < 10**-2
    assert steepest(rates.tolist(), rates.tolist()) is None
    assert steepest(rates[:7].tolist(), falling[:7].tolist()) is None
    line = np.linspace(3, 1, 50)
    np.testing.assert_allclose(smoothed(line.tolist()), line)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match=exactly("steps must be at least 8, but is 7")):
        LearningRateFinder(7)
