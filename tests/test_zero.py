"""Refusals of DeepSpeed in one line, and parts that need no engine; tests/cli/test_deepspeed.py has its runs."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lit_llm.async_checkpoints import AsyncCheckpointIO
from lit_llm.callbacks.pruning import Pruning
from lit_llm.callbacks.spike_recovery import SpikeRecovery
from lit_llm.checkpoint_files import AtomicCheckpointIO, Shares, read_checkpoint
from lit_llm.cli.errors import one_line
from lit_llm.objectives.causal_lm import CausalLM
from lit_llm.objectives.exact_steps import PART_SCALE
from lit_llm.optimizers import Muon
from lit_llm.shards import is_shared_out, whole_shape
from lit_llm.zero import DeepSpeed
from tests.writing import REPOSITORY


@pytest.fixture
def installed(monkeypatch):
    """Pretends that the package is installed; nothing here uses it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_without_the_package_one_line_names_it_and_the_exit_code_is_not_0(lit_llm, tiny, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: find(name, *more) if name != "deepspeed" else None
    )
    overlay = REPOSITORY / "configs/strategy/deepspeed_zero2.yaml"
    outcome = lit_llm("fit", *tiny, "--config", overlay, "--run_dir", tmp_path / "run")
    assert outcome.code == 2
    assert outcome.err.strip().splitlines()[-1] == (
        "lit-llm: error: package deepspeed must be installed for this strategy, but is not; "
        "pip install 'lit-llm[deepspeed]', or take configs/strategy/fsdp.yaml"
    )
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_minutes": 0.0}, "timeout_minutes must be above 0, but is 0.0"),
        ({"stage": 1, "offload": True}, "offload must be false in stage 1, but is true; take stage 2 or 3"),
    ],
)
def test_arguments_out_of_range_are_refused(installed, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        DeepSpeed(**options)


def test_a_machine_without_cuda_and_half_precision_are_refused(installed, monkeypatch):
    strategy = DeepSpeed()
    strategy._accelerator = CPUAccelerator()
    with pytest.raises(ValueError, match=r"^trainer.accelerator must be cuda for DeepSpeed, but is cpu; configs/strat"):
        strategy.setup_environment()
    monkeypatch.setattr(strategy, "_require_machine", lambda: None)
    strategy._precision_plugin = SimpleNamespace(precision="16-mixed")
    with pytest.raises(
        ValueError, match=r"^trainer.precision must be 32-true or bf16-mixed for DeepSpeed, but is 16-m"
    ):
        strategy.setup_environment()


@pytest.mark.parametrize(
    ("callbacks", "clip", "io", "message"),
    [
        ([SpikeRecovery()], "norm", AtomicCheckpointIO(), "trainer.callbacks must .* but has SpikeRecovery; take"),
        ([Pruning()], "norm", AtomicCheckpointIO(), "trainer.callbacks must .* but has Pruning; take"),
        (
            [],
            "value",
            AtomicCheckpointIO(),
            "trainer.gradient_clip_algorithm must be norm for DeepSpeed, but is value; leave it out$",
        ),
        ([], "norm", AsyncCheckpointIO(), "trainer.plugins must let DeepSpeed write checkpoints, but has Async"),
    ],
)
def test_what_its_engine_cannot_share_gradients_and_files_with_is_refused(installed, callbacks, clip, io, message):
    strategy = DeepSpeed()
    strategy.checkpoint_io = io
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=callbacks, gradient_clip_algorithm=clip)
    trainer.state.fn = "fit"
    with pytest.raises(ValueError, match=f"^{message}"):
        strategy.setup(trainer)


@pytest.mark.parametrize(
    ("make", "start", "message"),
    [
        (
            Muon,
            0.0,
            "model.optimizer must treat each value by itself for DeepSpeed, but is Muon; take torch.optim.AdamW$",
        ),
        (
            torch.optim.AdamW,
            0.5,
            "model.adaptation must have all parameters learn from the first step on for DeepSpeed",
        ),
    ],
)
def test_an_optimiser_of_matrices_and_parameters_that_wait_are_refused(installed, monkeypatch, make, start, message):
    strategy = DeepSpeed()
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2))], "role": "matrices", "start": start}]
    monkeypatch.setattr(DDPStrategy, "setup_optimizers", lambda self, trainer: None)
    strategy._optimizers = [make(groups)]
    with pytest.raises(ValueError, match=f"^{message}"):
        strategy.setup_optimizers(Trainer(accelerator="cpu", logger=False))


def test_a_stage_with_a_second_network_is_refused_where_no_device_has_all_weights(installed, monkeypatch):
    pytest.importorskip("deepspeed")
    strategy, module = DeepSpeed(stage=3), nn.Module()
    module.network, module.average = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    strategy._lightning_module = module
    with pytest.raises(ValueError, match=r"^stage must be 1 or 2 for a Module, which keeps a second network, but is 3"):
        strategy._share_out()


def test_all_evaluate_with_the_running_statistics_of_the_first_process(installed, monkeypatch):
    strategy, norm = DeepSpeed(), nn.BatchNorm1d(2)
    strategy._lightning_module = nn.Sequential(nn.Linear(2, 2), norm, nn.BatchNorm1d(2, track_running_stats=False))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: tensor.fill_(7.0 + source))
    strategy.on_validation_start()
    assert [norm.running_mean.tolist(), norm.running_var.tolist()] == [[7.0, 7.0]] * 2
    assert norm.weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("here", "there"), [(None, 2), (2, None), (2, 3), (2, 2)])
def test_training_goes_on_only_from_a_checkpoint_of_the_same_stage_and_devices(here, there):
    model = CausalLM(nn.Identity, vocab_size=3)
    zero = {stage: stage and {"stage": stage, "devices": 2} for stage in (None, 2, 3)}
    model._trainer = SimpleNamespace(strategy=SimpleNamespace(zero=zero[here]), state=SimpleNamespace(fn="fit"))
    names = {None: "a strategy that is not DeepSpeed", 2: "DeepSpeed's ZeRO 2 on 2 devices"}
    names[3] = "DeepSpeed's ZeRO 3 on 2 devices"
    if here == there:
        model._require_same_zero(zero[there])
        return
    line = f"ckpt_path must be written by {names[here]} to train on with it, but is by {names[there]}; a new run takes"
    with pytest.raises(ValueError, match=f"^{line}"):
        model._require_same_zero(zero[there])
    model._trainer.state.fn = "test"
    model._require_same_zero(zero[there])


def test_a_checkpoint_that_lacks_a_file_of_a_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    monkeypatch.setattr(Shares, "write", lambda self, path: None)
    state = {"network.weight": torch.empty(2, device="meta")}
    AtomicCheckpointIO().save_checkpoint(
        {"zero": 2, "state_dict": state}, tmp_path / "x.ckpt", Shares({}, "save", None)
    )
    folder = tmp_path / "x.shares/save"
    folder.mkdir(parents=True)
    (folder / "mp_rank_00_model_states.pt").touch()
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    lost = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with pytest.raises(
        ValueError, match=f"^ckpt_path must be a whole checkpoint, but .*x.ckpt lacks its share {lost}$"
    ):
        read_checkpoint(tmp_path / "x.ckpt")
    lost.touch()
    found = read_checkpoint(tmp_path / "x.ckpt", in_pieces=True)
    assert found["zero"] == {"stage": 2, "devices": 2, "folder": str(folder)}
    assert found["state_dict"]["network.weight"].shape == (2,)
    with pytest.raises(ValueError, match=r"^ckpt_path must be a whole checkpoint, but .*_optim_states.pt is not"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_the_factor_on_a_steps_gradient_goes_to_a_strategy_that_owns_gradients():
    model, asked = CausalLM(nn.Identity, vocab_size=3), []
    strategy = SimpleNamespace(
        owns_gradients=True, scale_gradients=asked.append, reduce=lambda value, reduce_op: value + 4
    )
    model._trainer = SimpleNamespace(strategy=strategy, accumulate_grad_batches=3, world_size=2)
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    optimizer = torch.optim.SGD([p], lr=0.1)
    model._step_targets = torch.tensor(8.0)
    model.on_before_optimizer_step(optimizer)
    model.configure_gradient_clipping(optimizer, 1e-9)
    model.optimizer_zero_grad(0, 0, optimizer)
    assert [float(factor) for factor in asked] == [PART_SCALE * 6 / 12]
    assert p.grad.tolist() == [1.0, 1.0]


def test_lightnings_own_strategy_for_deepspeed_is_refused():
    model = CausalLM(nn.Identity, vocab_size=3)
    model._trainer = SimpleNamespace(strategy=SimpleNamespace(handles_gradient_accumulation=True))
    with pytest.raises(
        ValueError, match=r"^trainer.strategy must leave the weighing of gradients to the objective, but"
    ):
        model.setup("fit")
    line = one_line(RuntimeError("The DeepSpeed strategy is only supported on CUDA GPUs but `CPUAccelerator` is used."))
    assert line == (
        "trainer.strategy must be one that this machine can run, but is DeepSpeed, which needs a GPU; "
        "configs/strategy/fsdp.yaml runs everywhere"
    )


def test_a_parameter_of_the_third_stage_is_shared_out_and_has_the_shape_of_the_whole():
    p = nn.Parameter(torch.empty(0))
    assert whole_shape(p) == (0,)
    p.ds_id, p.ds_shape = 0, torch.Size([2, 3])
    assert whole_shape(p) == (2, 3)
    assert is_shared_out([torch.zeros(1), p])
