"""How networks are sharded; tests/cli/test_strategies.py has runs over several processes."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lit_llm.checkpoint_files import AtomicCheckpointIO, Shares, cut, read_checkpoint
from lit_llm.cli.errors import one_line
from lit_llm.deferred_init import deferred, materialize
from lit_llm.models.cnn import CNN
from lit_llm.models.gpt2 import GPT2
from lit_llm.models.lenet import LeNet
from lit_llm.models.llama import Llama
from lit_llm.models.mlp import MLP
from lit_llm.objectives.causal_lm import CausalLM
from lit_llm.objectives.classification import Classification
from lit_llm.objectives.distillation import CausalLMDistillation
from lit_llm.shards import is_shared_out, local, part, shared_as, total_norm, whole
from lit_llm.strategies import Sharded, share_out
from tests.meshes import copy_of, devices


@pytest.fixture(params=["llama", "gpt2"])
def network(request, tiny_llama, tiny_gpt2):
    # 37 tokens and 3 * 32 rows: not all divide evenly.
    return tiny_llama(qk_norm=True) if request.param == "llama" else tiny_gpt2()


@pytest.mark.parametrize(("data", "tensor"), [(3, 1), (1, 2)])
def test_what_a_device_takes_of_a_checkpoint_is_what_it_was_given_of_the_network(network, data, tensor):
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for rank in (0, data * tensor - 1):
        copy = copy_of(network)
        with devices(rank, data, tensor) as mesh:
            share_out(copy, mesh)
            for name, p in copy.named_parameters():
                assert isinstance(p, DTensor)
                assert p.shape == state[name].shape
                mine = part(state[name], p)
                torch.testing.assert_close(p.to_local(), mine, rtol=0, atol=0, msg=name)
                assert shared_as(mine, p).shape == p.shape
            here = sum(t.numel() for t in local(copy.parameters()))
            assert here < sum(t.numel() for t in state.values()) * (0.4 if data == 3 else 0.8)
            assert is_shared_out(copy.parameters())


@pytest.mark.parametrize(("data", "tensor"), [(3, 1), (1, 2)])
def test_what_devices_write_is_the_whole_network_and_any_others_find_their_shares_in_it(
    network, data, tensor, tmp_path, monkeypatch
):
    monkeypatch.setattr(dist, "all_gather_object", lambda *said, group: None)
    state = {name: value.clone() for name, value in network.state_dict().items()}

    def shared_out(mesh: DeviceMesh) -> nn.Module:
        copy = copy_of(network)
        share_out(copy, mesh)
        return copy

    for rank in reversed(range(data * tensor)):
        with devices(rank, data, tensor) as mesh:
            rest, tensors = cut({"step": 3, "state_dict": shared_out(mesh).state_dict()})
            shares = Shares(tensors, "save", None)
            AtomicCheckpointIO().save_checkpoint(rest, tmp_path / "x.ckpt", storage_options=shares)
    sizes = [path.stat().st_size for path in (tmp_path / "x.shares/save").iterdir()]
    assert sum(sizes) < 4 * sum(p.numel() for p in network.parameters()) + len(sizes) * 25_000  # each value once
    stored = read_checkpoint(tmp_path / "x.ckpt")
    assert stored["step"] == 3
    for name, value in state.items():
        assert torch.equal(stored["state_dict"][name], value), name
    pieces = read_checkpoint(tmp_path / "x.ckpt", in_pieces=True)["state_dict"]
    with devices(1, 2, 1) as mesh:
        for name, p in shared_out(mesh).named_parameters():
            assert torch.equal(part(pieces[name], p), p.to_local()), name


@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize(
    ("kind", "more"),
    [(Llama, {"qk_norm": True}), (Llama, {"tie_embeddings": True}), (GPT2, {}), (GPT2, {"tie_embeddings": False})],
)
def test_what_is_drawn_share_by_share_is_what_one_process_would_have_drawn(kind, more, data, tensor):
    make = partial(kind, d_model=32, num_layers=2, num_heads=4, d_ff=48, max_seq_len=64, **more)
    torch.manual_seed(1)
    real, after = make(37), torch.get_rng_state()
    for rank in range(data * tensor):
        torch.manual_seed(1)
        network = deferred(make, 37)
        assert torch.equal(torch.get_rng_state(), after)
        assert all(p.is_meta for p in network.parameters())
        with devices(rank, data, tensor) as mesh:
            share_out(network, mesh)
            materialize(network, torch.device("cpu"))
            found = dict(network.named_parameters())
            for name, p in real.named_parameters():
                mine = part(p.detach(), found[name])
                assert torch.equal(local([found[name]])[0], mine), name
                assert local([found[name]])[0].untyped_storage().nbytes() == mine.nbytes
                assert found[name].shape == p.shape
        assert torch.equal(torch.get_rng_state(), after)
        assert network.state_dict().keys() == real.state_dict().keys()


@pytest.mark.parametrize("kind", [CNN, LeNet, MLP])
def test_a_network_that_is_shared_out_still_says_how_it_was_made(kind):
    network = kind(3, 2, 9, ["a", "b", "c"])
    arguments = network.arguments
    assert arguments["class_names"] == ["a", "b", "c"]
    with devices(0, 2, 1) as mesh:
        share_out(network, mesh)
        assert is_shared_out(network.parameters())
        assert network.arguments == arguments


class Looks(CausalLM):
    """Reads the weights of its network as soon as it is built."""

    def configure_model(self) -> None:
        super().configure_model()
        self.seen = self.network.lm_head.weight.sum().item()


@pytest.mark.parametrize(
    ("objective", "strategy", "deferred"),
    [
        (CausalLM, Sharded(), True),
        (CausalLM, SingleDeviceStrategy(), False),
        (CausalLM, None, False),
        (Looks, Sharded(), False),
    ],
)
def test_weights_wait_only_for_a_strategy_that_draws_them_and_where_nobody_looks_before(objective, strategy, deferred):
    made = objective(partial(Llama, d_model=16, num_layers=1, num_heads=2), vocab_size=37)
    if strategy is not None:
        made._trainer = SimpleNamespace(strategy=strategy, datamodule=None, state=SimpleNamespace(fn="fit"))
    made.configure_model()
    assert all(p.is_meta == deferred for p in made.network.parameters())


def test_an_objective_that_wants_all_logits_does_not_share_its_loss():
    strategy = Sharded(tensor_parallel_size=2, loss_parallel=True)
    strategy._lightning_module = Classification(partial(Llama, d_model=16), num_classes=2)
    line = (
        "loss_parallel must be false for an objective that wants all logits at once, but is true for a Classification"
    )
    with pytest.raises(ValueError, match=f"^{line}$"):
        strategy.setup(Trainer(accelerator="cpu", logger=False))
    assert CausalLM.shares_vocabulary
    assert not CausalLMDistillation.shares_vocabulary


def test_hidden_states_are_not_compared_where_products_are_shared_out():
    strategy = Sharded(tensor_parallel_size=2)
    strategy._lightning_module = SimpleNamespace(hidden_weight=0.5)
    line = (
        "model.hidden_weight must be 0 where products are shared out over devices, but is 0.5; take "
        "configs/strategy/fsdp.yaml"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        strategy.setup(Trainer(accelerator="cpu", logger=False))


def test_batch_normalisation_is_not_of_all_rows_where_weights_are_shared_out():
    strategy = Sharded()
    Trainer(accelerator="cpu", logger=False, strategy=strategy, sync_batchnorm=True)
    line = (
        "trainer.sync_batchnorm must be false where weights are shared out over devices, but is true; take "
        "configs/strategy/ddp.yaml"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        strategy.setup(Trainer(accelerator="cpu", logger=False))


def test_all_evaluate_with_the_running_statistics_of_the_first_process(monkeypatch):
    strategy, norm = Sharded(), nn.BatchNorm1d(2)
    strategy._lightning_module = nn.Sequential(nn.Linear(2, 2), norm, nn.BatchNorm1d(2, track_running_stats=False))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: tensor.fill_(7.0 + source))
    strategy.on_validation_start()
    assert [norm.running_mean.tolist(), norm.running_var.tolist()] == [[7.0, 7.0]] * 2
    assert norm.weight.tolist() == [1.0, 1.0]


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"^tensor_parallel_size must be at least 1, but is 0$"):
        Sharded(tensor_parallel_size=0)
    for name in ("sequence_parallel", "loss_parallel"):
        with pytest.raises(ValueError, match=f"^tensor_parallel_size must be at least 2 for {name}, but is 1$"):
            Sharded(**{name: True})
    with pytest.raises(ValueError, match=r"^timeout_minutes must be above 0, but is 0.0$"):
        Sharded(timeout_minutes=0.0)


def test_of_plain_tensors_the_share_and_the_whole_are_the_tensor():
    tensors = [torch.randn(3, 4), torch.randn(5)]
    assert local(tensors)[0] is tensors[0]
    assert whole(tensors[0]) is tensors[0] is part(tensors[0], tensors[0])
    assert total_norm(tensors).item() == torch.nn.utils.get_total_norm(tensors).item()
    assert total_norm([]).item() == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ValueError("The strategy `fsdp` requires a GPU accelerator, but received `accelerator='cpu'`."),
            "trainer.strategy must be one that this machine can run, but is fsdp, which needs a GPU; "
            "configs/strategy/fsdp.yaml runs everywhere",
        ),
        (
            ValueError("You selected an invalid strategy name: `strategy='dpp'`. It must be either a string or"),
            "trainer.strategy must be a class path or a name of Lightning, but is 'dpp'; see configs/strategy",
        ),
        (
            ValueError("SyncBatchNorm layers only work with GPU modules"),
            "trainer.sync_batchnorm must be false without a GPU, but is true",
        ),
    ],
)
def test_what_lightning_says_of_a_strategy_is_said_in_one_line(error, line):
    assert one_line(error) == line


def test_a_module_says_where_it_computes_wherever_its_weights_are():
    module = LightningModule()
    module.register_buffer("seen", torch.zeros(2))
    Sharded.model_to_device(SimpleNamespace(lightning_module=module, root_device=torch.device("meta")))
    assert module.device == module.seen.device == torch.device("meta")
