from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import quantize_

from lit_llm.checkpoints import finish, load_model, save_model
from lit_llm.compression.compression import records_of, replay
from lit_llm.compression.integers import Quantized, pack, unpack
from lit_llm.compression.quantization import (
    FakeQuantized,
    Int4WeightOnly,
    Int8Dynamic,
    Int8DynamicInt4,
    Int8WeightOnly,
    convert,
    freeze_scales,
)
from lit_llm.compression.sparsity import Magnitude, Zeros, apply_masks, masked_layers
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from tests.examples import BERT

METHODS = [Int8WeightOnly(), Int8Dynamic(), Int4WeightOnly(group_size=16), Int8DynamicInt4(group_size=16)]


def named(method: object) -> str:
    return type(method).__name__


@pytest.mark.parametrize("n", [6, 7])
def test_two_integers_go_into_a_byte_and_come_out_again(n):
    values = torch.randint(-8, 8, (5, n), dtype=torch.int8)
    assert pack(values).shape == (5, (n + 1) // 2)
    assert torch.equal(unpack(pack(values), n), values)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_a_quantised_network_says_what_torchaos_says(method, tiny_llama):
    network, ids = tiny_llama(), torch.randint(37, (2, 9))
    theirs, exact = copy.deepcopy(network), network(ids)
    inside = {name for name, m in network.named_modules() if name.startswith("layers.") and isinstance(m, nn.Linear)}
    quantize_(theirs, method.config(), filter_fn=lambda _, name: name in inside)
    method.apply(network)
    assert {name for name, m in network.named_modules() if isinstance(m, Quantized)} == inside
    torch.testing.assert_close(network(ids), theirs(ids), rtol=1e-5, atol=1e-5)
    apart = (network(ids) - exact).std() / exact.std()
    assert 1e-4 < apart < (0.05 if "4" not in named(method) else 0.4)
    layer = network.layers[0].self_attn.q_proj
    torch.testing.assert_close(layer.weight, layer.matrix.dequantize())


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_a_directory_holds_the_integers_and_makes_the_network_again(method, tiny_llama, tmp_path):
    network, ids = tiny_llama(d_model=64, d_ff=128), torch.randint(37, (2, 9))
    save_model(tmp_path / "dense", network)
    method.apply(network)
    save_model(tmp_path / "small", network)
    again, _ = load_model(tmp_path / "small")
    assert torch.equal(again(ids), network(ids))
    assert records_of(again) == records_of(network)
    bits, groups = (4, 64 / 16) if "4" in named(method) else (8, 1)
    stored = load_file(tmp_path / "small/model.safetensors")
    weight = [t for name, t in stored.items() if "layers.0.self_attn.q_proj" in name]
    assert sum(t.nbytes for t in weight) == 64 * 64 * bits / 8 + 64 * groups * 4
    save_model(tmp_path / "twice", again)
    assert (tmp_path / "twice/model.safetensors").read_bytes() == (tmp_path / "small/model.safetensors").read_bytes()


def test_a_network_of_transformers_loads_again_too(tmp_path):
    network = PretrainedClassifier(3, config=BERT).eval()
    ids = {"input_ids": torch.randint(20, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    Int8WeightOnly(["*"]).apply(network)
    save_model(tmp_path / "small", network)
    again, _ = load_model(tmp_path / "small")
    assert torch.equal(again(**ids), network(**ids))


@pytest.mark.parametrize("method", [Int8WeightOnly(["*embed*"]), Int4WeightOnly(["*embed*"], 16)], ids=named)
def test_an_embedding_reads_rows_of_the_quantised_matrix(method, tiny_llama):
    network, ids = tiny_llama(), torch.randint(37, (2, 9))
    exact = network.embed_tokens.weight.detach().clone()
    method.apply(network)
    weight = network.embed_tokens.weight
    assert torch.equal(network.embed_tokens(ids), weight[ids])
    assert (weight - exact).abs().max() < exact.abs().max() / (7 if "4" in named(method) else 127)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv1d(4, 6, 3, groups=2, bias=False)])
def test_a_convolution_of_integers_is_near_what_it_was(layer):
    network = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2)).eval()
    x = torch.randn(2, 4, 9, 9) if isinstance(layer, nn.Conv2d) else torch.randn(2, 4, 9)
    exact = network(x)
    Int8WeightOnly().apply(network)
    assert network[0].weight_qdata.dtype == torch.int8
    torch.testing.assert_close(network(x), exact, atol=0.02, rtol=0.02)
    assert not torch.equal(network(x), exact)


def test_a_network_computes_in_lower_precision_around_its_integers(tiny_llama):
    network, ids = tiny_llama(), torch.randint(37, (2, 9))
    Int8Dynamic().apply(network)
    with torch.autocast("cpu", torch.bfloat16):
        said = network(ids)
    torch.testing.assert_close(said.float(), network(ids), atol=0.15, rtol=0.1)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Int8Dynamic(["*.none"]), r"^layers must be patterns that match a layer \(.*\), but '\*.none' matches none$"),
        (Int4WeightOnly(group_size=64), r"^group_size must divide the inputs of each layer, 32 of layers.0.self_attn.q_proj, but is 64$"),
    ],
)  # fmt: skip
def test_what_has_no_such_layers_is_refused(method, message, tiny_llama):
    with pytest.raises(ValueError, match=message):
        method.apply(tiny_llama())


def test_what_is_integers_already_is_no_layer_to_quantise(tiny_llama):
    network = tiny_llama()
    Int8WeightOnly().apply(network)
    with pytest.raises(ValueError, match=r"^network must have layers of real weights .* of a Llama are quantised"):
        Int8Dynamic().apply(network)
    Int8WeightOnly(["lm_head", "embed_tokens"]).apply(network)
    assert len(records_of(network)) == 2


@pytest.mark.parametrize("size", [1, 3])
def test_a_group_that_does_not_fill_bytes_is_refused(size):
    with pytest.raises(ValueError, match=rf"^group_size must be even and at least 2, but is {size}$"):
        Int4WeightOnly(group_size=size)


# Training with rounded weights.


@pytest.mark.parametrize("method", [Int4WeightOnly(group_size=16), Int8DynamicInt4(group_size=16)], ids=named)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_training_feels_is_what_conversion_gives(method, frozen, tiny_llama):
    network, ids = tiny_llama(), torch.randint(37, (2, 9))
    keys = set(network.state_dict())
    FakeQuantized.by(method).apply(network)
    if frozen:
        freeze_scales(network)
    parameters = dict(network.named_parameters())
    assert keys <= set(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    network(ids).square().mean().backward()
    assert all(p.grad is not None for p in parameters.values())
    optimizer.step()
    felt = network(ids)
    state, records = copy.deepcopy(network.state_dict()), copy.deepcopy(records_of(network))
    convert(network)
    assert isinstance(network.layers[0].mlp.down_proj, Quantized)
    torch.testing.assert_close(network(ids), felt, rtol=1e-4, atol=1e-4)
    again = replay(tiny_llama(seed=3), records)
    again.load_state_dict(state)
    torch.testing.assert_close(again(ids), felt, rtol=0, atol=0)
    assert records_of(network)[0]["class_path"].endswith(named(method))


@pytest.mark.parametrize("first", ["masks", "rounding"])
def test_zeros_are_kept_by_masks_where_weights_are_rounded_and_are_so_as_integers(first, tiny_llama):
    network, ids = tiny_llama(), torch.randint(37, (2, 9))
    Magnitude(0.5).apply(network)
    masks, rounding = Zeros(), FakeQuantized.by(Int4WeightOnly(group_size=16))
    for method in (masks, rounding) if first == "masks" else (rounding, masks):
        method.apply(network)
    kept = {name: layer.weight_mask.clone() for name, layer in masked_layers(network).items()}
    assert 0 < (~kept["layers.0.mlp.up_proj"]).float().mean() < 1
    again = replay(tiny_llama(seed=3), copy.deepcopy(records_of(network)))
    again.load_state_dict(network.state_dict())
    assert masked_layers(again).keys() == kept.keys()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.3)
    again(ids).square().mean().backward()
    optimizer.step()
    apply_masks(again)
    felt = again(ids)
    finish(again, None)
    for name, mask in kept.items():
        layer = again.get_submodule(name)
        assert isinstance(layer, Quantized)
        assert not layer.weight[~mask].any(), name
    torch.testing.assert_close(again(ids), felt, rtol=1e-4, atol=1e-4)
    assert all(("sparsity" in record) == record["class_path"].endswith("Zeros") for record in records_of(again)[1:])


def test_a_method_that_cannot_be_trained_with_is_refused():
    with pytest.raises(
        ValueError,
        match=r"^method must be Int4WeightOnly or Int8DynamicInt4 to train with, but is lit_llm.*Int8Dynamic$",
    ):
        _ = FakeQuantized.by(Int8Dynamic()).method
