from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lit_llm.callbacks.metrics_csv import read_metrics
from lit_llm.callbacks.pruning import KeepZeros, Pruning
from lit_llm.checkpoint_files import read_checkpoint
from lit_llm.checkpoints import load_model
from lit_llm.compression.compression import records_of
from lit_llm.compression.sparsity import sparsity_of
from tests.cli.test_resume import losses
from tests.writing import REPOSITORY, exactly

OVERLAY = ["--config", str(REPOSITORY / "configs/compression/pruning.yaml")]
STEPS = 12


def overlay(tmp_path, method: str, **options) -> list[str]:
    """The shipped overlay with another method, pruning every second step."""
    content = yaml.safe_load((REPOSITORY / "configs/compression/pruning.yaml").read_text())
    init_args = content["trainer"]["callbacks+"][0]["init_args"]
    arguments = {"sparsity": 0.5, "layers": ["*.q_proj", "*.up_proj"]}  # other matrices start at zero
    init_args["method"] = {"class_path": f"lit_llm.compression.sparsity.{method}", "init_args": arguments}
    init_args |= {"every_n_steps": 2, "num_batches": 2} | options
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(content))
    return ["--config", str(tmp_path / "overlay.yaml")]


def sparsities(run) -> dict[int, float]:
    rows = read_metrics(run / "metrics.csv")
    return {row["step"]: row["train/sparsity"] for row in rows if "train/sparsity" in row}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "accumulate"), [("Magnitude", 1), ("Movement", 3), ("Wanda", 1)])
def test_a_resumed_run_prunes_and_learns_as_one_never_stopped(lit_llm, tiny, tmp_path, method, accumulate):
    words = [*tiny, *overlay(tmp_path, method), "--trainer.max_steps", STEPS, "--checkpoint.every_n_steps", 5]
    words += ["--trainer.accumulate_grad_batches", accumulate, "--test_after_fit", "false"]
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "whole").code == 0
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--trainer.callbacks+=tests.cli.test_resume.Crash")
    stored = read_checkpoint(tmp_path / "cut/checkpoints/last.ckpt")["state_dict"]
    mask = stored["network.layers.0.mlp.up_proj.weight_mask"]
    assert 0.3 < (~mask).float().mean() < 0.5
    assert (stored["network.layers.0.mlp.up_proj.weight"][~mask] == 0).all()
    assert ("network.layers.0.mlp.up_proj.weight_scores" in stored) == (method == "Movement")
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    found = sparsities(tmp_path / "whole")
    assert sparsities(tmp_path / "cut") == found
    assert sorted(found) == list(range(1, STEPS + 1))
    values = [found[step] for step in sorted(found)]
    assert values == sorted(values)
    assert found[1] == 0.0  # `start` falls on the second step
    assert 0 < found[4] < 0.5
    assert [found[step] for step in range(8, STEPS + 1)] == pytest.approx([0.5] * 5, abs=2e-3)
    ends = [read_checkpoint(tmp_path / run / "checkpoints/last.ckpt")["state_dict"] for run in ("whole", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.fixture
def pruned(lit_llm, tiny, tmp_path):
    """A pruned run, including its test."""
    options = ["--trainer.max_steps", STEPS, "--run_dir", tmp_path / "run"]
    outcome = lit_llm("fit", *tiny, *OVERLAY, *options)
    assert outcome.code == 0, outcome.err
    return tmp_path / "run"


def test_an_exported_model_has_plain_weights_with_zeros(lit_llm, pruned):
    from transformers import AutoModelForCausalLM

    weights = load_file(pruned / "model/model.safetensors")
    assert not [name for name in weights if "mask" in name or "scores" in name]
    network, _ = load_model(pruned)
    assert sparsity_of(network) == pytest.approx(0.5, abs=2e-3)
    assert records_of(network)[0]["sparsity"] == sparsity_of(network)
    ids = torch.arange(8)[None]
    theirs = AutoModelForCausalLM.from_pretrained(pruned / "model")
    torch.testing.assert_close(theirs(ids).logits, network(ids), atol=1e-4, rtol=1e-4)
    again, _ = load_model(pruned / "checkpoints/best.ckpt")
    assert torch.equal(again(ids), network(ids))
    outcome = lit_llm("test", "--run_dir", pruned)
    assert outcome.code == 0, outcome.err


def test_no_validation_from_before_the_end_of_the_pruning_is_the_best(pruned):
    best = read_checkpoint(pruned / "checkpoints/best.ckpt")
    assert best["global_step"] > 0.6 * STEPS
    names = [name for name in best["state_dict"] if name.endswith("weight_mask")]
    kept = torch.cat([best["state_dict"][name].flatten() for name in names]).float().mean()
    assert kept == pytest.approx(0.5, abs=2e-3)


@pytest.mark.slow
def test_a_run_from_a_pruned_model_keeps_its_zeros(lit_llm, tiny, pruned, tmp_path):
    words = ["fit", *tiny, "--model.weights", pruned, "--run_dir", tmp_path / "on"]
    keep = "--trainer.callbacks+=lit_llm.callbacks.pruning.KeepZeros"
    outcome = lit_llm(*words, keep)
    assert outcome.code == 0, outcome.err
    before, after = (load_model(folder)[0] for folder in (pruned, tmp_path / "on"))
    assert set(sparsities(tmp_path / "on").values()) == {sparsity_of(before)}
    assert sparsity_of(after) == sparsity_of(before)
    assert not torch.equal(after.layers[0].mlp.up_proj.weight, before.layers[0].mlp.up_proj.weight)
    assert len(records_of(after)) == 2
    outcome = lit_llm(
        "fit",
        "--run_dir",
        tmp_path / "on",
        "--ckpt_path",
        "last",
        "--trainer.max_steps",
        8,
        "--test_after_fit",
        "false",
    )
    assert outcome.code == 0, outcome.err
    assert set(sparsities(tmp_path / "on").values()) == {sparsity_of(before)}


def test_a_run_that_stops_before_all_is_pruned_says_so(lit_llm, tiny, tmp_path):
    stop = ["--trainer.callbacks+=tests.callbacks.test_pruning.Stop"]
    outcome = lit_llm("fit", *tiny, *OVERLAY, *stop, "--trainer.max_steps", STEPS, "--run_dir", tmp_path / "run")
    assert "The run stopped at step 3, before pruning was complete" in outcome.err


class Stop(KeepZeros.__mro__[1]):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == 3


def test_adapters_beside_pruned_weights_are_refused(lit_llm, tiny, tmp_path):
    adapted = ["--model.adaptation", "lit_llm.adaptation.LoRA"]
    outcome = lit_llm("fit", *tiny, *OVERLAY, *adapted, "--run_dir", tmp_path / "run")
    assert outcome.code == 2
    message = "model.adaptation must train the weights themselves where they are pruned, but is a LoRA"
    assert message in outcome.last_line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.7}, "start and end must be in order and in [0, 1], but are 0.7 and 0.6"),
        ({"end": 1.5}, "start and end must be in order and in [0, 1], but are 0.1 and 1.5"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, but is 0"),
        ({"num_batches": 0}, "num_batches must be at least 1, but is 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        Pruning(**options)
