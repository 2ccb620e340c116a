"""Which matrix products are split, and refusals; tests/cli/test_strategies.py has runs over several processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lit_llm.blocks import Block
from lit_llm.models.gpt2 import GPT2Block
from lit_llm.shards import local, whole
from lit_llm.strategies import share_out
from lit_llm.tensor_parallel import STYLES
from tests.meshes import copy_of, devices
from tests.threads import each


@pytest.fixture(params=["llama", "gpt2"])
def network(request, tiny_llama, tiny_gpt2):
    return tiny_llama(qk_norm=True) if request.param == "llama" else tiny_gpt2()


def test_a_block_says_of_each_of_its_matrices_how_it_is_cut(network):
    for block in (module for module in network.modules() if isinstance(module, Block)):
        matrices = {name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        assert {name for name, style in block.tensor_parallel.items() if style in STYLES} == matrices
        assert set(block.tensor_parallel.values()) <= {*STYLES, "heads"}
        assert matrices == {name for name in matrices if name.startswith(block.whole_sequence)}


def test_a_layer_that_devices_have_in_common_computes_with_plain_weights_and_keeps_its_class(network):
    ids = torch.arange(6)[None]
    with devices(0, 1, 2) as mesh:
        share_out(network, mesh)
        head = network.lm_head
        assert type(head).__name__ == "Linear"
        assert isinstance(head, nn.Linear)
        assert not isinstance(head.weight, DTensor)
        assert isinstance(
            dict(network.named_parameters())["lm_head.weight" if not tied(network) else "wte.weight"], DTensor
        )
        assert network(ids).shape == (1, 6, 37)


def tied(network: nn.Module) -> bool:
    return network.lm_head._parameters["weight"] is not None and hasattr(network, "wte")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 2, "num_kv_heads": 1},
            "tensor_parallel_size must divide the network's num_kv_heads, 1, but is 2",
        ),
        ({"d_ff": 47}, "tensor_parallel_size must divide the network's d_ff, 47, but is 2"),
    ],
)
def test_a_network_that_does_not_divide_is_refused(tiny_llama, changes, message):
    with devices(0, 1, 2) as mesh, pytest.raises(ValueError, match=f"^{message}$"):
        share_out(tiny_llama(**changes), mesh)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_lies_between_products_is_shared_out_and_gradients_are_those_of_one_device(network, size, checkpointing):
    network.activation_checkpointing = checkpointing
    ids = torch.randint(0, 37, (3, 8), generator=torch.Generator().manual_seed(0))
    network.hidden(ids).square().sum().backward()
    expected = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    def work() -> tuple[dict[str, torch.Tensor], set[int], int]:
        copy = copy_of(network)
        copy.activation_checkpointing = checkpointing
        mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data_parallel", "tensor_parallel"))
        share_out(copy, mesh, sequence_parallel=True)
        lengths = set()
        for name, module in copy.named_modules():
            if name.endswith(("layernorm", "ln_1", "ln_2")):
                module.register_forward_hook(lambda layer, args, out: lengths.add(out.shape[1]))
        copy.hidden(ids).square().sum().backward()
        found = {name: whole(p.grad) for name, p in copy.named_parameters() if p.grad is not None}
        seen = set(lengths)
        with torch.no_grad():  # without gradients, any length works
            torch.testing.assert_close(copy.hidden(ids[:, :5]), network.hidden(ids[:, :5]).detach())
        return found, seen, max(lengths)

    for found, during_training, evaluated in each(size, work):
        assert during_training == {8 // size}
        assert evaluated == 5
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():  # which sums terms as large as its largest element
            rounding = 1e-6 * gradient.abs().max().item()
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=rounding, msg=name)


def test_what_lies_between_products_is_kept_for_a_part_of_the_positions_only(network):
    def kept(sequence_parallel: bool) -> int:
        copy = copy_of(network)
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            [here] = local([t])
            sizes[here.untyped_storage().data_ptr()] = here.untyped_storage().nbytes()
            held.append(here)
            return t

        held: list[torch.Tensor] = []
        with devices(0, 1, 4) as mesh:
            share_out(copy, mesh, sequence_parallel)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                copy.hidden(torch.zeros(4, 64, dtype=torch.long))
        return sum(sizes.values())

    assert kept(sequence_parallel=True) < 0.9 * kept(sequence_parallel=False)


def test_sequences_that_cannot_be_shared_out_are_refused(tiny_llama, tiny_gpt2, monkeypatch):
    with devices(0, 1, 2) as mesh:
        network = tiny_llama()
        share_out(network, mesh, sequence_parallel=True)
        with pytest.raises(
            ValueError,
            match="^sequence length must be a multiple of tensor_parallel_size, 2, for sequence_parallel, but is 5; "
            r"set data.seq_len$",
        ):
            network(torch.arange(5)[None])
        with pytest.raises(
            ValueError,
            match="^sequence_parallel must be false where devices would drop alike, but is true with the network's "
            r"dropout 0.1$",
        ):
            share_out(tiny_gpt2(dropout=0.1), mesh, sequence_parallel=True)
        monkeypatch.delattr(GPT2Block, "whole_sequence")
        with pytest.raises(ValueError, match=r"do not say what reads whole sequences, but is true for a GPT2$"):
            share_out(tiny_gpt2(), mesh, sequence_parallel=True)


def test_a_network_with_adapters_or_without_a_plan_is_refused(tiny_llama):
    from lit_llm.adaptation import LoRA
    from lit_llm.models.recurrent import LSTM

    adapted = tiny_llama()
    LoRA().prepare(adapted)
    with devices(0, 1, 2) as mesh:
        with pytest.raises(
            ValueError, match=r"^tensor_parallel_size must be 1 where self_attn.q_proj has an adapter, but is 2$"
        ):
            share_out(adapted, mesh)
        with pytest.raises(ValueError, match=r"how they are cut, but is 2 for a LSTM$"):
            share_out(LSTM(37, d_model=16), mesh)
