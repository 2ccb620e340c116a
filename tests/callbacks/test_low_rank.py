from __future__ import annotations

import json

import pytest
import torch
import yaml
from torch import nn

from lit_llm.callbacks.low_rank import LowRank, give_new_parameters
from lit_llm.checkpoint_files import read_checkpoint
from lit_llm.checkpoints import load_model
from lit_llm.compression.compression import records_of
from lit_llm.compression.sparsity import sparsity_of
from tests.cli.test_resume import losses
from tests.writing import REPOSITORY, exactly

STEPS = 12
METHODS = "lit_llm.compression"


@pytest.fixture
def overlay(tmp_path) -> list[str]:
    """The shipped overlay, factorising half-way through the run."""
    content = yaml.safe_load((REPOSITORY / "configs/compression/low_rank.yaml").read_text())
    content["trainer"]["callbacks+"][0]["init_args"]["start"] = 0.5
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(content))
    return ["--config", str(tmp_path / "overlay.yaml"), "--model.network.d_ff", "48"]


@pytest.mark.parametrize("every", [5, 7])  # the checkpoint is saved before or after factorisation
def test_a_resumed_run_has_the_losses_of_one_never_stopped(lit_llm, tiny, overlay, tmp_path, every):
    words = [*tiny, *overlay, "--trainer.max_steps", STEPS, "--checkpoint.every_n_steps", every]
    words += ["--test_after_fit", "false"]
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "whole").code == 0
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--trainer.callbacks+=tests.cli.test_resume.Crash")
    stored = read_checkpoint(tmp_path / "cut/checkpoints/last.ckpt")
    assert ("compression" in stored) == (every == 7)
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ends = [read_checkpoint(tmp_path / run / "checkpoints/last.ckpt")["state_dict"] for run in ("whole", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
def test_a_factorised_run_is_tested_exported_and_trained_on(lit_llm, tiny, overlay, tmp_path):
    outcome = lit_llm("fit", *tiny, *overlay, "--trainer.max_steps", STEPS, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert read_checkpoint(tmp_path / "run/checkpoints/best.ckpt")["global_step"] > STEPS / 2
    network, _ = load_model(tmp_path / "run")
    assert any(isinstance(module, nn.Sequential) for module in network.modules())
    assert "transformers does not" in (tmp_path / "run/model/README.md").read_text()
    outcome = lit_llm("generate", "--model", tmp_path / "run", "--prompt", "the", "--max_new_tokens", "4")
    assert outcome.code == 0, outcome.err
    outcome = lit_llm("test", "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    words = [
        "--model.network.d_ff",
        "48",
        "--model.weights",
        tmp_path / "run",
        "--test_after_fit",
        "false",
        "--run_dir",
        tmp_path / "on",
    ]
    for end in ([], ["--ckpt_path", "last", "--trainer.max_steps", 8]):
        outcome = lit_llm("fit", *tiny, *words, *end)
        assert outcome.code == 0, outcome.err
    again, _ = load_model(tmp_path / "on")
    assert records_of(again) == records_of(network)
    assert [p.shape for p in again.parameters()] == [p.shape for p in network.parameters()]
    assert not torch.equal(next(again.parameters()), next(network.parameters()))


def test_an_optimiser_remembers_what_it_knows_of_the_parameters_that_stay():
    old, new, stays = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer, fresh = (torch.optim.Adam([first, stays]) for first in (old, new))
    old.grad = stays.grad = torch.ones(2)
    optimizer.step()
    before = optimizer.state[stays]
    give_new_parameters(optimizer, fresh)
    assert list(optimizer.state) == [stays]
    assert optimizer.state[stays] is before
    new.grad = torch.ones(2)
    optimizer.step()
    assert (new < 1).all()
    assert float(before["step"]) == 2


@pytest.mark.parametrize(
    ("adaptation", "options", "blocks"),
    [("FrozenLayers", {"num_layers": 1}, 1), ("FrozenLayers", {"num_layers": 2}, 0), ("GradualUnfreezing", {}, 2)],
)
def test_factors_learn_where_and_when_the_matrices_would(lit_llm, tiny, overlay, tmp_path, adaptation, options, blocks):
    content = yaml.safe_load((tmp_path / "overlay.yaml").read_text())
    init_args = content["trainer"]["callbacks+"][0]["init_args"]
    init_args |= {"start": 0.2, "method": {"class_path": "lit_llm.compression.low_rank.SVD", "init_args": {"rank": 2}}}
    how = {"class_path": f"lit_llm.adaptation.{adaptation}", "init_args": options}
    content["model"] = {"init_args": {"adaptation": how}}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(content))
    words = [*tiny, *overlay, "--model.network.num_layers", 2, "--test_after_fit", "false"]
    outcome = lit_llm("fit", *words, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    stored = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["optimizer_states"][0]
    matrices = [i for group in stored["param_groups"] if group["role"] == "matrices" for i in group["params"]]
    assert len(matrices) == blocks * 7 * 2
    assert stored["state"].keys() >= set(matrices)


def test_adapters_beside_factors_are_refused(lit_llm, tiny, overlay, tmp_path):
    outcome = lit_llm(
        "fit", *tiny, *overlay, "--model.adaptation", "lit_llm.adaptation.LoRA", "--run_dir", tmp_path / "run"
    )
    assert outcome.code == 2
    assert outcome.last_line.endswith(
        "model.adaptation must train the weights themselves where they are factorised, but is a LoRA"
    )


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (
            "pruning.Pruning",
            {},
            "must prune other layers than they factorise, but Pruning and LowRank both have layers.0.self_attn.q_proj; "
            "choose their layers, or run one after the other",
        ),
        (
            "quantization.QuantizationAwareTraining",
            {
                "delay": 0.3,
                "method": {"class_path": f"{METHODS}.quantization.Int4WeightOnly", "init_args": {"group_size": 16}},
            },
            "must factorise a layer before they quantise it, but QuantizationAwareTraining begins with "
            "layers.0.self_attn.q_proj before LowRank; set its delay above 0.5",
        ),
    ],
)
def test_layers_that_another_callback_has_changed_are_not_factorised(
    lit_llm, tiny, overlay, tmp_path, other, options, message
):
    added = json.dumps({"class_path": f"lit_llm.callbacks.{other}", "init_args": options})
    outcome = lit_llm("fit", *tiny, *overlay, f"--trainer.callbacks+={added}", "--run_dir", tmp_path / "run")
    assert outcome.code == 2
    assert outcome.last_line.endswith(f"trainer.callbacks {message}")


def test_other_layers_than_the_factorised_ones_are_pruned_in_the_same_run(lit_llm, tiny, overlay, tmp_path):
    words = [*tiny, *overlay, "--trainer.max_steps", STEPS, "--test_after_fit", "false", "--run_dir", tmp_path / "run"]
    content = yaml.safe_load((tmp_path / "overlay.yaml").read_text())
    own = content["trainer"]["callbacks+"]
    own[0]["init_args"]["method"] = {
        "class_path": "lit_llm.compression.low_rank.SVD",
        "init_args": {"layers": ["*.mlp.*"]},
    }
    magnitude = {"class_path": "lit_llm.compression.sparsity.Magnitude", "init_args": {"layers": ["*.q_proj"]}}
    own += [{"class_path": "lit_llm.callbacks.pruning.Pruning", "init_args": {"method": magnitude, "every_n_steps": 1}}]
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(content))
    outcome = lit_llm("fit", *words)
    assert outcome.code == 0, outcome.err
    network, _ = load_model(tmp_path / "run/model")
    assert sparsity_of(network, ["layers.0.self_attn.q_proj"]) == pytest.approx(0.5, abs=0.01)
    assert isinstance(network.layers[0].mlp.up_proj, nn.Sequential)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.5}, "start must be in [0, 1], but is 1.5"),
        ({"num_batches": 0}, "num_batches must be at least 1, but is 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        LowRank(**options)
