"""Poisoned batches: bad steps are undone on the device, diverged runs roll back, and good runs are unchanged."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lit_llm.callbacks.spike_recovery import ON_DEVICE, SpikeRecovery
from lit_llm.checkpoint_files import read_checkpoint
from lit_llm.objectives.causal_lm import CausalLM
from tests.cli.test_resume import losses
from tests.writing import REPOSITORY

SPIKES = "--trainer.callbacks+=lit_llm.callbacks.spike_recovery.SpikeRecovery"
POISON = "--trainer.callbacks+=tests.callbacks.test_spike_recovery.Poison"


class Poison(Callback):
    """Multiplies the loss of some steps by a factor, and keeps the weights and optimiser state after each step.

    They are kept in class attributes, since the command line creates the object.
    """

    weights: list[torch.Tensor] = []  # noqa: RUF012
    state: list[torch.Tensor] = []  # noqa: RUF012

    def __init__(self, first: int = 0, last: int = 0, factor: float = float("nan")) -> None:
        self.first, self.last, self.factor = first, last, factor
        Poison.weights, Poison.state = [], []

    def on_train_start(self, trainer, pl_module):
        plain = CausalLM.loss

        def loss(batch):
            total, targets = plain(pl_module, batch)
            bad = self.first <= trainer.global_step < self.last
            return (total * self.factor if bad else total), targets

        pl_module.loss = loss

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        Poison.weights.append(torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()]))
        state = trainer.optimizers[0].state.values()
        tensors = [t.detach().flatten().float().clone() for s in state for t in s.values() if torch.is_tensor(t)]
        Poison.state.append(torch.cat(tensors or [torch.zeros(0)]))


class NoImages(Callback):
    """Makes one step's images NaN, and keeps the network's running statistics from before and after it."""

    statistics: list[torch.Tensor] = []  # noqa: RUF012

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            self.keep(pl_module)
            batch["pixel_values"].fill_(float("nan"))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            self.keep(pl_module)

    def keep(self, pl_module):
        NoImages.statistics.append(torch.cat([b.flatten().float().clone() for b in pl_module.network.buffers()]))


def words(tiny, *more, steps=6):
    return [*tiny, "--trainer.max_steps", steps, "--trainer.limit_val_batches", 0, "--test_after_fit", "false", *more]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "lit_llm.optimizers.Muon"])
def test_a_run_without_spikes_is_the_same_bit_for_bit(lit_llm, tiny, tmp_path, accumulate, optimizer):
    more = ["--trainer.accumulate_grad_batches", accumulate, "--model.optimizer", optimizer]
    assert lit_llm("fit", *words(tiny, *more, POISON), "--run_dir", tmp_path / "without").code == 0
    without = Poison.weights[-1], Poison.state[-1], losses(tmp_path / "without")
    outcome = lit_llm("fit", *words(tiny, *more, SPIKES, POISON), "--run_dir", tmp_path / "with")
    assert outcome.code == 0, outcome.err
    assert torch.equal(without[0], Poison.weights[-1])
    assert torch.equal(without[1], Poison.state[-1])
    assert without[2] == losses(tmp_path / "with")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "lit_llm.optimizers.Muon"])
@pytest.mark.parametrize("first", [0, 3])
def test_a_poisoned_step_changes_neither_weights_nor_optimizer(lit_llm, tiny, tmp_path, optimizer, first):
    poisoned = [POISON, "--trainer.callbacks.first", first, "--trainer.callbacks.last", first + 1]
    more = ["--model.optimizer", optimizer]
    outcome = lit_llm("fit", *words(tiny, *more, SPIKES, *poisoned), "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert all(w.isfinite().all() for w in (*Poison.weights, *Poison.state))
    if first:
        assert torch.equal(Poison.weights[first - 1], Poison.weights[first])
        assert torch.equal(Poison.state[first - 1], Poison.state[first])
    else:
        assert not Poison.state[0].any()
    assert not torch.equal(Poison.weights[first], Poison.weights[first + 1])
    assert "1 steps with an outlying loss or gradient were skipped" in outcome.err


def test_a_poisoned_step_leaves_running_statistics_as_they_were(lit_llm, pictures, tmp_path):
    config = REPOSITORY / "configs/pretraining/cnn_digits.yaml"
    small = [
        "--data.path",
        pictures,
        "--data.image_size",
        8,
        "--data.validation_fraction",
        "0.3",
        "--data.batch_size",
        4,
    ]
    more = [SPIKES, "--trainer.callbacks+=tests.callbacks.test_spike_recovery.NoImages", "--trainer.max_steps", 5]
    NoImages.statistics = []
    outcome = lit_llm("fit", "--config", config, *small, *more, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    before, after = NoImages.statistics
    assert before.any()
    assert torch.equal(before, after)


def test_a_finite_outlier_is_one_too_and_without_the_callback_it_is_not_noticed(lit_llm, tiny, tmp_path):
    poisoned = [POISON, "--trainer.callbacks.first", 8, "--trainer.callbacks.last", 9, "--trainer.callbacks.factor", 50]
    few = [SPIKES, "--trainer.callbacks.window", 8]
    assert lit_llm("fit", *words(tiny, *few, *poisoned, steps=10), "--run_dir", tmp_path / "with").code == 0
    assert torch.equal(Poison.weights[7], Poison.weights[8])
    assert lit_llm("fit", *words(tiny, *poisoned, steps=10), "--run_dir", tmp_path / "without").code == 0
    assert not torch.equal(Poison.weights[7], Poison.weights[8])


def test_a_run_that_is_lost_goes_back_and_then_on_with_other_data(lit_llm, tiny, tmp_path):
    few = [SPIKES, "--trainer.callbacks.window", 4, "--trainer.callbacks.patience", 3]
    poisoned = [POISON, "--trainer.callbacks.first", 6, "--trainer.callbacks.last", 9]
    outcome = lit_llm("fit", *words(tiny, *few, *poisoned, steps=12), "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "Step 9: the loss did not recover; returning to step 6" in outcome.err
    good = torch.load(tmp_path / "run/checkpoints/good.ckpt", weights_only=True)
    assert good["global_step"] >= 6
    assert torch.equal(Poison.weights[8], Poison.weights[5])
    assert not torch.equal(Poison.weights[9], Poison.weights[8])
    assert Poison.weights[-1].isfinite().all()
    # Skipped steps have no logged loss.
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6, 10, 11, 12]


def test_it_gives_up_in_one_line(lit_llm, tiny, tmp_path):
    few = [SPIKES, "--trainer.callbacks.window", 4, "--trainer.callbacks.patience", 2]
    poisoned = [POISON, "--trainer.callbacks.first", 4, "--trainer.callbacks.last", 99]
    limit = ["--trainer.callbacks.max_rollbacks", 1]
    outcome = lit_llm("fit", *words(tiny, *few, *limit, *poisoned, steps=30), "--run_dir", tmp_path / "run")
    assert outcome.code == 2
    assert "train/loss must return within 2 steps, but did not at step 8 after 1 roll-backs" in outcome.last_line


def test_what_was_seen_survives_a_resume(lit_llm, tiny, tmp_path):
    poisoned = [POISON, "--trainer.callbacks.first", 3, "--trainer.callbacks.last", 4]
    whole = words(tiny, SPIKES, *poisoned, steps=10)
    assert lit_llm("fit", *whole, "--run_dir", tmp_path / "whole").code == 0
    weights = Poison.weights[-1]
    crash = ["--checkpoint.every_n_steps", 5, "--trainer.callbacks+=tests.cli.test_resume.Crash"]
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm("fit", *whole, *crash, "--run_dir", tmp_path / "cut")
    assert lit_llm("fit", *whole, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    assert torch.equal(weights, Poison.weights[-1])
    states = [torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("whole", "cut")]
    kept = [state["callbacks"]["SpikeRecovery"] for state in states]
    assert int(kept[0]["skipped"]) == int(kept[1]["skipped"]) == 1
    assert torch.equal(kept[0]["losses"], kept[1]["losses"])


RARELY = [SPIKES, "--trainer.callbacks.window", 8, "--trainer.callbacks.patience", 3]
RARELY += ["--trainer.log_every_n_steps", 2, "--checkpoint.every_n_steps", 5]
CRASH = "--trainer.callbacks+=tests.cli.test_resume.Crash"


def test_a_run_that_goes_on_goes_back_where_one_never_stopped_does(lit_llm, tiny, tmp_path):
    poisoned = [POISON, "--trainer.callbacks.first", 6, "--trainer.callbacks.last", 10]
    whole = words(tiny, *RARELY, *poisoned, steps=14)
    outcome = lit_llm("fit", *whole, "--run_dir", tmp_path / "whole")
    assert "Step 10: the loss did not recover; returning to step 4" in outcome.err
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm("fit", *whole, CRASH, "--trainer.callbacks.step", 7, "--run_dir", tmp_path / "cut")
    outcome = lit_llm("fit", *whole, "--run_dir", tmp_path / "cut", "--ckpt_path", "last")
    assert "Step 10: the loss did not recover; returning to step 4" in outcome.err
    for name in ("last", "good"):
        states = [read_checkpoint(tmp_path / run / f"checkpoints/{name}.ckpt") for run in ("whole", "cut")]
        assert states[0]["global_step"] == states[1]["global_step"]
        assert all(torch.equal(*pair) for pair in zip(*(s["state_dict"].values() for s in states), strict=True))
        for kept, other in zip(*(state["callbacks"]["SpikeRecovery"].values() for state in states), strict=True):
            assert torch.equal(torch.as_tensor(kept), torch.as_tensor(other))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_run_does_not_go_back_to_steps_that_it_has_yet_to_take(lit_llm, tiny, tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm(
            "fit", *words(tiny, *RARELY, CRASH, "--trainer.callbacks.step", 9, steps=14), "--run_dir", tmp_path / "run"
        )
    assert read_checkpoint(tmp_path / "run/checkpoints/good.ckpt")["global_step"] == 8
    poisoned = [POISON, "--trainer.callbacks.first", 6, "--trainer.callbacks.last", 10]
    again = words(tiny, *RARELY, *poisoned, "--ckpt_path", "last", steps=14)
    outcome = lit_llm("fit", *again, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "Step 10: the loss did not recover; returning to step 6" in outcome.err


def test_a_damaged_state_to_go_back_to_does_not_keep_a_run_from_going_on(lit_llm, tiny, tmp_path):
    run = words(tiny, *RARELY, steps=14)
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm("fit", *run, CRASH, "--trainer.callbacks.step", 9, "--run_dir", tmp_path / "run")
    good = tmp_path / "run/checkpoints/good.ckpt"
    good.write_bytes(good.read_bytes()[:1000])
    outcome = lit_llm("fit", *run, "--run_dir", tmp_path / "run", "--ckpt_path", "last")
    assert outcome.code == 0, outcome.err
    assert "There is no state to go back to until the next is written: " in outcome.err
    assert read_checkpoint(good)["global_step"] > 5


@pytest.mark.parametrize(("found", "kept"), [(8, 8), (12, 0), (None, 0)])
def test_an_older_checkpoint_tells_of_nothing_again_and_may_go_back_to_what_is_earlier(tmp_path, found, kept):
    before, now = SpikeRecovery(), SpikeRecovery()
    before.skipped += 2
    now.load_state_dict({name: before.state_dict()[name] for name in (*ON_DEVICE, "rollbacks")})
    assert now.skipped_before == 2
    good = tmp_path / "checkpoints/good.ckpt"
    good.parent.mkdir()
    if found is not None:
        torch.save({"global_step": found, "state_dict": {}}, good)
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 10
    assert now._has_good(trainer)
    assert now.good_step == kept
    assert good.exists() is (kept > 0)


@pytest.mark.parametrize("seen", [0, 3, 4, 6, 9])
@pytest.mark.parametrize("window", [2, 4, 5, 8])
def test_another_window_holds_the_newest_of_what_was_seen(window, seen):
    before, now = SpikeRecovery(window=4), SpikeRecovery(window=window)
    for step in range(seen):
        before.losses[step % 4] = before.norms[step % 4] = step
    before.seen += seen
    before.norms = before.losses + 10
    now.load_state_dict(before.state_dict())
    kept = list(range(seen))[-min(window, 4) :]
    held = torch.arange(window) < now.seen
    assert now._is_usual(torch.tensor(1.0), now.losses)
    assert sorted(now.losses[held].tolist()) == kept
    assert torch.equal(now.norms[held], now.losses[held] + 10)
    now.losses[now.seen % window] = 99  # the next one replaces the oldest
    assert sorted(now.losses[: len(kept) + 1].tolist()) == [*kept, 99][-window:]


@pytest.mark.parametrize(("name", "value"), [("threshold", 0.0), ("window", 1), ("patience", 0), ("max_rollbacks", -1)])
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        SpikeRecovery(**{name: value})
