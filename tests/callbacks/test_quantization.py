from __future__ import annotations

import json

import pytest
import torch

from lit_llm.callbacks.quantization import QuantizationAwareTraining
from lit_llm.checkpoints import load_model, save_model
from lit_llm.compression.integers import Quantized
from lit_llm.data.tokenizer import byte_tokenizer


def callback(**options: object) -> str:
    method = {"class_path": "lit_llm.compression.quantization.Int4WeightOnly", "init_args": {"group_size": 16}}
    made = {"class_path": "lit_llm.callbacks.quantization.QuantizationAwareTraining"}
    return "--trainer.callbacks+=" + json.dumps(made | {"init_args": {"method": method, **options}})


@pytest.mark.slow
def test_a_run_that_is_cut_goes_on_and_leaves_integers(lit_llm, tiny, tmp_path):
    words = ["fit", *tiny, callback(delay=0.3, freeze=0.6), "--checkpoint.every_n_steps", 3]
    outcome = lit_llm(*words, "--run_dir", tmp_path / "whole")
    assert outcome.code == 0, outcome.err
    assert "Weights are quantised from step 2 on, by Int4WeightOnly" in outcome.err
    assert "Scales are frozen from step 4 on" in outcome.err
    crash = '--trainer.callbacks+={"class_path": "tests.cli.test_resume.Crash", "init_args": {"step": 5}}'
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm(*words, crash, "--run_dir", tmp_path / "cut")
    assert lit_llm(*words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    states = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "cut")]
    assert states[0]["compression"] == states[1]["compression"]
    assert states[0]["compression"][0]["form"]["frozen"]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name
    network, _ = load_model(tmp_path / "whole/model")
    assert isinstance(network.layers[0].mlp.up_proj, Quantized)
    from_checkpoint, _ = load_model(tmp_path / "whole/checkpoints/best.ckpt")
    ids = torch.randint(256, (1, 8))
    assert torch.equal(network(ids), from_checkpoint(ids))
    assert lit_llm("test", "--run_dir", tmp_path / "cut").code == 0


@pytest.mark.slow
def test_a_run_from_trained_weights_that_is_cut_goes_on_and_is_tested_too(lit_llm, tiny, tiny_llama, tmp_path):
    save_model(tmp_path / "start", tiny_llama(vocab_size=257, tie_embeddings=True), byte_tokenizer())
    words = [*tiny[:2], *tiny[8:], "--model.network", "null", "--model.weights", tmp_path / "start"]
    words += [callback().replace("+", ""), "--checkpoint.every_n_steps", 2, "--trainer.max_steps", 4]
    words += ["--test_after_fit", "false", "--trainer.limit_val_batches", 1]
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "whole").code == 0
    crash = '--trainer.callbacks+={"class_path": "tests.cli.test_resume.Crash", "init_args": {"step": 3}}'
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm("fit", *words, crash, "--run_dir", tmp_path / "cut")
    outcome = lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last")
    assert outcome.code == 0, outcome.err
    states = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "cut")]
    assert states[0]["compression"] == states[1]["compression"] != []
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name
    assert lit_llm("test", "--run_dir", tmp_path / "cut").code == 0


@pytest.mark.slow
def test_a_run_that_prunes_and_quantises_goes_on_and_leaves_integers_with_zeros(lit_llm, tiny, tmp_path):
    pruning = {"class_path": "lit_llm.callbacks.pruning.Pruning", "init_args": {"every_n_steps": 1}}
    words = ["fit", *tiny, "--trainer.callbacks+=" + json.dumps(pruning), callback(delay=0.3)]
    words += ["--checkpoint.every_n_steps", 3, "--test_after_fit", "false"]
    outcome = lit_llm(*words, "--run_dir", tmp_path / "whole")
    assert outcome.code == 0, outcome.err
    crash = '--trainer.callbacks+={"class_path": "tests.cli.test_resume.Crash", "init_args": {"step": 5}}'
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm(*words, crash, "--run_dir", tmp_path / "cut")
    assert lit_llm(*words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    states = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "cut")]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name
    network, _ = load_model(tmp_path / "whole/checkpoints/last.ckpt")
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, Quantized)}
    masks = {name: states[0]["state_dict"][f"network.{name}.weight_mask"] for name in layers}
    assert 0.4 < torch.cat([~mask.flatten() for mask in masks.values()]).float().mean() < 0.6
    assert not any(layers[name].weight[~mask].any() for name, mask in masks.items())


@pytest.mark.parametrize(("delay", "freeze"), [(1.0, 1.0), (-0.1, 0.5), (0.5, 0.4), (0.5, 1.1)])
def test_times_out_of_order_are_refused(delay, freeze):
    message = rf"^delay must be in \[0, 1\) and freeze from it to 1, but are {delay} and {freeze}$"
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(delay=delay, freeze=freeze)
