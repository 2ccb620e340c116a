from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_llm.objectives.exact_steps import ExactSteps, Loss
from tests.writing import exactly

ROWS = [torch.arange(1.0, 1 + length)[:, None] for length in (1, 4, 2, 5)]  # each row has as many targets as its length


class Line(ExactSteps):
    """Fits `2 x`, and keeps the gradient of each optimiser step."""

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        self.line, self.wrong, self.gradients = nn.Linear(1, 1), wrong, []
        nn.init.ones_(self.line.weight)
        nn.init.zeros_(self.line.bias)

    def loss(self, batch: Tensor) -> Loss:
        return (self.line(batch) - 2 * batch).square().sum() + self.wrong, torch.tensor(float(len(batch)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def optimizer_step(self, epoch, batch_idx, optimizer, closure=None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        assert all(p.grad is None for p in self.parameters())

    def configure_gradient_clipping(self, *args, **kwargs) -> None:
        super().configure_gradient_clipping(*args, **kwargs)
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters()]))


def fitted(folder: Path, made: Line, **options) -> Line:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, enable_model_summary=False, **quiet, **({"max_epochs": 1} | options)
    )
    made.trainer = trainer
    trainer.fit(made, DataLoader(ROWS, batch_size=None))
    return made


def mean_gradient() -> Tensor:
    made = Line()
    total, targets = made.loss(torch.cat(ROWS))
    return torch.cat([g.flatten() for g in torch.autograd.grad(total / targets, list(made.parameters()))])


def test_a_step_of_uneven_parts_has_the_gradient_of_the_mean_over_all_targets(tmp_path: Path) -> None:
    [gradient] = fitted(tmp_path, Line(), accumulate_grad_batches=4).gradients
    torch.testing.assert_close(gradient, mean_gradient())


def test_gradients_are_clipped_by_the_norm_of_the_whole_step(tmp_path: Path) -> None:
    made = fitted(tmp_path, Line(), accumulate_grad_batches=4, gradient_clip_val=0.5)
    expected = mean_gradient()
    torch.testing.assert_close(made.grad_norm, expected.norm())
    torch.testing.assert_close(made.gradients[0], 0.5 * expected / expected.norm(), rtol=1e-4, atol=0)


def test_what_the_steps_lost_is_their_mean_over_targets_and_is_taken_once(tmp_path: Path) -> None:
    made = fitted(tmp_path, Line())
    total, targets = Line().loss(torch.cat(ROWS))
    assert made.take_train_loss() == pytest.approx(float(total / targets))
    assert math.isnan(made.take_train_loss())  # without targets there is no loss


def test_a_loss_that_is_no_number_ends_the_run_in_one_line_that_names_a_checkpoint_if_there_is_one(
    tmp_path: Path,
) -> None:
    message = (
        "train/loss must be finite, but is nan at step 4; lower the learning rate, lengthen the warm-up or clip "
        "gradients, and "
    )
    made = fitted(tmp_path, Line(wrong=float("nan")))
    with pytest.raises(FloatingPointError, match=exactly(message + "start again")):
        made.take_train_loss()
    go_on = "go on from the last good checkpoint with --ckpt_path last"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    made = fitted(tmp_path, Line(wrong=float("nan")))
    with pytest.raises(FloatingPointError, match=exactly(message + go_on)):
        made.take_train_loss()


class Noise(Line):
    """Draws a random number at each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def loss(self, batch: Tensor) -> Loss:
        self.drawn.append(torch.rand(()).item())
        return super().loss(batch)


def test_what_is_drawn_at_a_step_depends_on_seed_step_and_micro_batch_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # may be set by another test
    found = {}
    for name, seed, options in (("a", 1, {}), ("b", 1, {}), ("c", 2, {}), ("d", 1, {"accumulate_grad_batches": 2})):
        torch.manual_seed(seed)
        made = Noise()
        torch.rand(len(found))  # earlier draws have no influence
        found[name] = fitted(tmp_path, made, **options).drawn
    assert found["a"] == found["b"]
    assert len({*found["a"], *found["c"]}) == 8
    assert len(set(found["d"])) == 4
    assert found["d"][0] == found["a"][0]
    assert found["d"][2] == found["a"][1]  # the first micro-batch of the second step


class Broken(Noise):
    """Ends the first epoch in the middle of a step."""

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == 2 else None


def test_micro_batches_that_came_to_no_step_do_not_count_in_the_next(tmp_path: Path) -> None:
    made = Broken()
    [gradient] = fitted(tmp_path, made, accumulate_grad_batches=4, max_epochs=2).gradients
    torch.testing.assert_close(gradient, mean_gradient())
    assert made.drawn[2:4] == made.drawn[:2]  # still the first step


class Apart(Line):
    """Has a parameter that is not in its optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.apart = nn.Parameter(torch.ones(()))

    def loss(self, batch: Tensor) -> Loss:
        total, targets = super().loss(batch)
        return total + 100 * self.apart, targets

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.line.parameters(), lr=0.0)

    def optimizer_step(self, epoch, batch_idx, optimizer, closure=None) -> None:
        ExactSteps.optimizer_step(self, epoch, batch_idx, optimizer, closure)


def test_gradients_of_what_is_not_optimised_are_not_in_the_norm(tmp_path: Path) -> None:
    made = fitted(tmp_path, Apart(), accumulate_grad_batches=4, gradient_clip_val=0.5)
    torch.testing.assert_close(made.grad_norm, mean_gradient().norm())
