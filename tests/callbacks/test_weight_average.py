"""The weight average is validated, tested and exported; it resumes exactly, and can be switched on and off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch import Tensor

from lit_llm.callbacks.metrics_csv import read_metrics
from lit_llm.callbacks.weight_average import WeightAverage
from lit_llm.checkpoint_files import read_checkpoint
from lit_llm.checkpoints import load_model
from lit_llm.data.text import TextData
from lit_llm.objectives.causal_lm import CausalLM
from tests.cli.test_resume import losses
from tests.writing import REPOSITORY, exactly

AVERAGE = ["--config", REPOSITORY / "configs/strategy/weight_average.yaml"]
LAST = "checkpoints/last.ckpt"


class Weights(Callback):
    """Keeps the trained weights before the first step and after each step."""

    kept: list[dict[str, Tensor]] = []  # noqa: RUF012

    def on_train_start(self, trainer, pl_module):
        Weights.kept = []
        self.on_train_batch_end(trainer, pl_module, None, None, 0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if len(Weights.kept) == trainer.global_step:  # otherwise a micro-batch within a step
            Weights.kept.append({name: p.detach().clone() for name, p in pl_module.network.named_parameters()})


def averaged(weights: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    found = weights[0]
    for step, now in enumerate(weights[1:], 1):
        kept = min(decay, (1 + step) / (10 + step))
        found = {name: kept * found[name] + (1 - kept) * now[name] for name in found}
    return found


def parts(run: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Network and average of the last checkpoint."""
    state = read_checkpoint(run / LAST)["state_dict"]
    return tuple(
        {name.removeprefix(f"{kind}."): t for name, t in state.items() if name.startswith(f"{kind}.")}
        for kind in ("network", "average")
    )


@pytest.mark.parametrize(("decay", "accumulate"), [(0.999, 1), (0.3, 2)])
def test_the_average_is_that_of_all_steps_and_is_the_model(lit_llm, tiny, tmp_path, decay, accumulate):
    words = [*tiny, *AVERAGE, "--trainer.callbacks.decay", decay, "--trainer.accumulate_grad_batches", accumulate]
    words += ["--trainer.callbacks+", "tests.callbacks.test_weight_average.Weights"]
    outcome = lit_llm("fit", *words, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert len(Weights.kept) == 7
    network, average = parts(tmp_path / "run")
    torch.testing.assert_close(network, Weights.kept[-1], rtol=0, atol=0)
    torch.testing.assert_close(average, averaged(Weights.kept, decay), rtol=1e-5, atol=1e-7)
    # The exported weights are the validated ones; in this run, the last step is the best.
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["best/step"] == 6
    torch.testing.assert_close(dict(load_model(tmp_path / "run")[0].named_parameters()), average, rtol=0, atol=0)
    outcome = lit_llm("validate", "--run_dir", tmp_path / "run", "--ckpt_path", "last")
    assert outcome.code == 0, outcome.err
    found = next(float(line.split()[1]) for line in outcome.out.splitlines() if line.startswith("val/loss "))
    assert found == pytest.approx(results["val/loss"], abs=1e-4)
    exported = lit_llm("validate", *tiny, "--model.weights", tmp_path / "run/model", "--run_dir", tmp_path / "exported")
    assert f"{found:.4f}" in exported.out


def test_training_is_the_same_bit_for_bit_and_goes_on_exactly(lit_llm, tiny, tmp_path):
    words = [*tiny, "--trainer.max_steps", 10, "--checkpoint.every_n_steps", 5, "--test_after_fit", "false"]
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "without").code == 0
    assert lit_llm("fit", *words, *AVERAGE, "--run_dir", tmp_path / "whole").code == 0
    assert losses(tmp_path / "without") == losses(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm(
            "fit", *words, *AVERAGE, "--run_dir", tmp_path / "cut", "--trainer.callbacks+=tests.cli.test_resume.Crash"
        )
    assert lit_llm("fit", *words, *AVERAGE, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    validations = [
        [(row["step"], row["val/loss"]) for row in read_metrics(tmp_path / run / "metrics.csv") if "val/loss" in row]
        for run in ("whole", "cut", "without")
    ]
    assert validations[0] == validations[1] != validations[2]
    torch.testing.assert_close(parts(tmp_path / "cut"), parts(tmp_path / "whole"), rtol=0, atol=0)


def test_it_may_begin_or_end_within_a_run(lit_llm, tiny, tmp_path):
    run = ["--run_dir", tmp_path / "run"]
    assert lit_llm("fit", *tiny, *run).code == 0
    before, nothing = parts(tmp_path / "run")
    assert nothing == {}
    on = [*tiny, *run, "--ckpt_path", "last"]
    assert lit_llm("fit", *on, *AVERAGE, "--trainer.max_steps", 7).code == 0
    network, average = parts(tmp_path / "run")
    for name, begun in before.items():
        torch.testing.assert_close(average[name], begun + (1 - 8 / 17) * (network[name] - begun))
    outcome = lit_llm("fit", *on, "--trainer.max_steps", 8)  # also tests the best checkpoint, which has an average
    assert outcome.code == 0, outcome.err
    assert "Ignoring the checkpoint's weight average: the run has no WeightAverage" in outcome.err
    assert parts(tmp_path / "run")[1] == {}


def test_a_notebook_opens_a_checkpoint_and_trains_it_on_with_or_without_an_average(lit_llm, tiny, texts, tmp_path):
    fitted = {}
    for name, more in (("with", AVERAGE), ("without", [])):
        assert lit_llm("fit", *tiny, *more, "--run_dir", tmp_path / name).code == 0
        made = CausalLM.load_from_checkpoint(tmp_path / name / LAST, weights_only=True)
        network, average = parts(tmp_path / name)
        torch.testing.assert_close(dict(made.evaluated.named_parameters()), average or network, rtol=0, atol=0)
        fitted[name] = made
    data = TextData(str(texts), tokenizer="bytes", seq_len=32, batch_size=4, validation_fraction=0.1)
    quiet = {"max_steps": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    for made, callbacks in ((fitted["with"], []), (fitted["without"], [WeightAverage()]), (fitted["without"], [])):
        trainer = Trainer(accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **quiet)
        begun = [p.detach().clone() for p in made.evaluated.parameters()]
        trainer.fit(made, data)
        assert (made.average is None) == (not callbacks)
        assert not any(torch.equal(*pair) for pair in zip(begun, made.evaluated.parameters(), strict=True))


RECOVERY = ["--config", REPOSITORY / "configs/strategy/spike_recovery.yaml"]


def poison(first: int, last: int) -> list[object]:
    words = ["--trainer.callbacks+", "tests.callbacks.test_spike_recovery.Poison"]
    return [*words, "--trainer.callbacks.first", first, "--trainer.callbacks.last", last]


def test_a_step_that_is_taken_back_is_not_averaged(lit_llm, tiny, tmp_path):
    for name, overlays in {"before": [*AVERAGE, *RECOVERY], "after": [*RECOVERY, *AVERAGE]}.items():
        outcome = lit_llm("fit", *tiny, *overlays, *poison(3, 4), "--run_dir", tmp_path / name)
        assert outcome.code == 0, outcome.err
    before, after = (parts(tmp_path / name)[1] for name in ("before", "after"))
    assert all(t.isfinite().all() and torch.equal(t, after[name]) for name, t in before.items())


def test_a_run_goes_back_to_a_checkpoint_from_before_the_average(lit_llm, tiny, tmp_path):
    words = [*tiny, *RECOVERY, "--trainer.callbacks.window", 4, "--trainer.callbacks.patience", 2]
    words += ["--trainer.limit_val_batches", 0, "--test_after_fit", "false", "--run_dir", tmp_path / "run"]
    assert lit_llm("fit", *words, "--trainer.max_steps", 6).code == 0
    on = [*words, *AVERAGE, *poison(6, 8), "--ckpt_path", "last", "--trainer.max_steps", 10]
    outcome = lit_llm("fit", *on)
    assert outcome.code == 0, outcome.err
    assert "the loss did not recover; returning to step" in outcome.err
    assert all(t.isfinite().all() for t in parts(tmp_path / "run")[1].values())


def test_an_adapter_is_exported_without_a_validation(lit_llm, tiny, tmp_path):
    words = [*tiny, *AVERAGE, "--config", REPOSITORY / "configs/adaptation/lora.yaml", "--trainer.limit_val_batches", 0]
    outcome = lit_llm("fit", *words, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    found = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    average = {name: t for name, t in parts(tmp_path / "run")[1].items() if "lora_" in name}
    assert len(found) == len(average) > 0


def test_weights_in_16_bits_and_what_changes_the_network_are_refused(lit_llm, tiny, tmp_path):
    refused = {
        "trainer.precision must leave weights in 32 bits where they are averaged, but is bf16-true; take bf16-mixed": [
            *("--trainer.precision", "bf16-true"),
        ],
        "where that is pruned, but CausalLM evaluates an average of its weights; leave out WeightAverage": [
            *("--config", REPOSITORY / "configs/compression/pruning.yaml"),
        ],
        "where that is factorised, but CausalLM evaluates an average of its weights; leave out WeightAverage": [
            *("--config", REPOSITORY / "configs/compression/low_rank.yaml"),
        ],
    }
    for message, words in refused.items():
        outcome = lit_llm("fit", *tiny, *AVERAGE, *words, "--run_dir", tmp_path / "run")
        assert outcome.code == 2
        assert message in outcome.last_line


FIXMATCH = ["--config", REPOSITORY / "configs/pretraining/cnn_mnist_fixmatch.yaml"]
FIXMATCH += [
    "--data",
    REPOSITORY / "configs/data/digits.yaml",
    "--data.unlabelled_ratio",
    1,
    "--data.labels_per_class",
    4,
]


class SpoiltGradients(Callback):
    """Makes the gradients of one step NaN."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 1:
            next(pl_module.network.parameters()).grad.fill_(float("nan"))


def test_an_average_that_moves_within_the_step_moves_to_weights_that_are_good(lit_llm, tmp_path):
    words = [*FIXMATCH, "--trainer.callbacks+", "tests.callbacks.test_weight_average.SpoiltGradients", *RECOVERY]
    words += ["--trainer.log_every_n_steps", 1, "--trainer.max_steps", 3]
    outcome = lit_llm("fit", *words, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "1 steps with an outlying loss or gradient were skipped" in outcome.err
    for state in parts(tmp_path / "run"):
        assert state != {}
        assert all(t.isfinite().all() for t in state.values())


def test_an_objective_that_has_an_average_keeps_it_alone(lit_llm, tmp_path):
    outcome = lit_llm("fit", *FIXMATCH, *AVERAGE, "--trainer.max_steps", 1, "--run_dir", tmp_path / "run")
    assert outcome.code == 2
    message = "trainer.callbacks must leave the average to FixMatch, which evaluates its own, but has a WeightAverage"
    assert message in outcome.last_line


def test_a_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match=exactly("decay must be in [0, 1), but is 1.0")):
        WeightAverage(decay=1.0)
