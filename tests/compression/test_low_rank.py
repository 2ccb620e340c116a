from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lit_llm.checkpoints import load_model, save_model
from lit_llm.compression.calibration import input_covariances
from lit_llm.compression.compression import records_of, replay
from lit_llm.compression.low_rank import SVD, ActivationSVD, activation_svd, allocate, factorize, svd
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from tests.examples import BERT, example, together
from tests.writing import exactly


def tokens(rows: int = 8) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(37, (rows, 9), generator=torch.Generator().manual_seed(0))}


def skewed(rows: int = 64, inputs: int = 12) -> torch.Tensor:
    """Inputs with most variance in a few directions."""
    return torch.randn(rows, 4) @ torch.randn(4, inputs) + 0.05 * torch.randn(rows, inputs)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_of_a_weight_is_the_tail_of_its_singular_values(rank: int) -> None:
    layer = nn.Linear(12, 8)
    made = factorize(layer, svd(layer.weight.detach()), rank)
    product = made[1].weight @ made[0].weight
    tail = torch.linalg.svdvals(layer.weight)[rank:].square().sum().sqrt()
    torch.testing.assert_close((product - layer.weight).norm(), tail, rtol=1e-4, atol=1e-6)
    assert torch.equal(made[1].bias, layer.bias)


def test_factors_and_bias_learn_where_the_layer_does() -> None:
    layer = nn.Linear(12, 8)
    layer.weight.requires_grad_(False)
    assert [p.requires_grad for p in factorize(layer, svd(layer.weight), 3).parameters()] == [False, False, True]
    layer.requires_grad_(True).bias.requires_grad_(False)
    assert [p.requires_grad for p in factorize(layer, svd(layer.weight), 3).parameters()] == [True, True, False]


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_of_an_output_is_the_tail_of_the_whitened_singular_values(rank: int) -> None:
    layer, x = nn.Linear(12, 8), skewed()
    covariance = input_covariances(nn.Sequential(layer), {"0": layer}, [{"input": x}])["0"]
    torch.testing.assert_close(covariance.float(), x.T @ x / len(x))
    factors = activation_svd(layer.weight.detach(), covariance, ridge=1e-12)
    error = (factorize(layer, factors, rank)(x) - layer(x)).square().sum(1).mean()
    torch.testing.assert_close(error.double(), factors.singular_values[rank:].square().sum(), rtol=1e-3, atol=1e-7)
    plain = (factorize(layer, svd(layer.weight.detach()), rank)(x) - layer(x)).square().sum(1).mean()
    assert error < plain


def test_full_rank_is_the_layer_itself_also_from_few_rows() -> None:
    layer, x = nn.Linear(12, 8), torch.randn(3, 12)
    covariance = input_covariances(nn.Sequential(layer), {"0": layer}, [{"input": x}])["0"]
    other = torch.randn(5, 12)
    torch.testing.assert_close(
        factorize(layer, activation_svd(layer.weight.detach(), covariance), 8)(other), layer(other)
    )


def test_a_wide_layer_that_reads_next_to_nothing_is_whitened_too() -> None:
    layer, x = nn.Linear(700, 8), torch.randn(64, 2) @ torch.randn(2, 700) * torch.logspace(-9, 2, 700)
    covariance = input_covariances(nn.Sequential(layer), {"0": layer}, [{"input": x}])["0"]
    made = factorize(layer, activation_svd(layer.weight.detach(), covariance), 4)
    torch.testing.assert_close(made(x), layer(x), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv2d(3, 8, 3, padding=1, stride=2),
        lambda: nn.Conv2d(3, 8, (3, 1), dilation=2, bias=False),
        lambda: nn.Conv1d(3, 8, 5, padding=2),
    ],
)
def test_a_convolution_becomes_one_with_its_kernel_and_a_small_one(conv) -> None:
    layer = conv()
    x = torch.randn(4, 3, *[10] * (layer.weight.ndim - 2))
    whole = factorize(layer, svd(layer.weight.detach().flatten(1)), 8)
    torch.testing.assert_close(whole(x), layer(x), atol=1e-5, rtol=1e-4)
    assert whole[1].kernel_size == (1,) * (layer.weight.ndim - 2)
    covariance = input_covariances(nn.Sequential(layer), {"0": layer}, [{"input": x}])["0"]
    weight = layer.weight.detach().flatten(1)
    error, plain = (
        (factorize(layer, factors, 3)(x) - layer(x)).square().sum()
        for factors in (activation_svd(weight, covariance), svd(weight))
    )
    assert error <= plain


@pytest.mark.parametrize("method", [SVD, ActivationSVD])
@pytest.mark.parametrize("allocation", ["uniform", "energy", "sensitivity"])
@pytest.mark.parametrize("parameters", [0.3, 0.7])
def test_the_budget_is_kept_and_nearly_spent(tiny_llama, method: type, allocation: str, parameters: float) -> None:
    network = tiny_llama()
    before = sum(p.numel() for p in network.layers.parameters() if p.ndim == 2)
    record = method(parameters=parameters, allocation=allocation).apply(network, [tokens()])
    after = sum(p.numel() for p in network.layers.parameters() if p.ndim == 2)
    assert record["parameters"] == after / before
    assert parameters - 0.05 <= after / before <= parameters


def test_activation_aware_factors_answer_more_like_the_whole_at_equal_parameters(tiny_llama) -> None:
    batch, found = tokens(32), {}
    expected = tiny_llama()(**batch)
    for method in (SVD, ActivationSVD):
        network = tiny_llama()
        method(parameters=0.6, allocation="uniform").apply(network, [batch])
        found[method] = (network(**batch) - expected).square().mean(), sum(p.numel() for p in network.parameters())
    assert found[ActivationSVD][0] < found[SVD][0]
    assert found[ActivationSVD][1] == found[SVD][1]


def test_ranks_go_where_a_parameter_keeps_most() -> None:
    energies = {"a": torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0]), "b": torch.full((8,), 0.1)}
    shapes = {"a": (8, 8), "b": (8, 8)}
    assert allocate(energies, shapes, 64, {"a": 1.0, "b": 1.0}) == {"a": 3, "b": 1}
    assert allocate(energies, shapes, 64, {"a": 1e-3, "b": 1.0}) == {"a": 1, "b": 3}
    assert allocate(energies, shapes, 0, {"a": 1.0, "b": 1.0}) == {"a": 1, "b": 1}
    assert allocate(energies, shapes, 128, {"a": 1.0, "b": 1.0}) == {"a": None, "b": None}


def test_sensitivity_spends_on_the_layer_that_answers_hang_on() -> None:
    network = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    with torch.no_grad():  # most outputs of the first layer hardly affect the result
        network[1].weight[:, 1:] *= 1e-3
    batches = [{"input": torch.randn(64, 16)}]
    ranks = SVD(parameters=0.5, allocation="sensitivity").apply(network, batches)["form"]
    assert ranks.get("1", 8) < ranks.get("0", 8) or "0" not in ranks


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_factorised_model_directory_is_read_again(tiny_llama, tiny_gpt2, tmp_path, kind: str) -> None:
    made = {
        "llama": tiny_llama,
        "gpt2": lambda: tiny_gpt2(bias=False),
        "bert": lambda: PretrainedClassifier(3, config=BERT),
    }
    network = made[kind]().eval()
    batch = together([example(row, 3) for row in range(4)]) if kind == "bert" else tokens()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    ActivationSVD(parameters=0.4).apply(network, [batch])
    assert any(isinstance(module, nn.Sequential) for module in network.modules())
    save_model(tmp_path / "model", network)
    again, _ = load_model(tmp_path / "model")
    assert torch.equal(again(**inputs), network(**inputs))
    assert records_of(again) == records_of(network)
    assert json.loads((tmp_path / "model/compression.json").read_text()) == records_of(network)
    SVD(parameters=0.5, layers=["*.1"]).apply(again)  # a second compression
    save_model(tmp_path / "twice", again)
    twice, _ = load_model(tmp_path / "twice")
    assert torch.equal(twice(**inputs), again(**inputs))
    assert len(records_of(twice)) == 2


def test_a_form_is_given_once(tiny_llama) -> None:
    network = tiny_llama()
    SVD().apply(network)
    before = {name: p.clone() for name, p in network.named_parameters()}
    replay(network, records_of(network))
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert len(records_of(network)) == 1


def test_no_random_number_is_drawn(tiny_llama) -> None:
    network = tiny_llama()
    state = torch.get_rng_state()
    SVD().apply(network)
    replay(network, records_of(network))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": 1.0}, "parameters must be in (0, 1), but is 1.0"),
        ({"parameters": 0.0}, "parameters must be in (0, 1), but is 0.0"),
        ({"rank": 0}, "rank must be at least 1, but is 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        SVD(**options)


def test_a_rank_above_a_layers_is_refused(tiny_llama) -> None:
    message = "rank must be at most that of the layers, but is 33, above the 32 of layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=exactly(message)):
        SVD(rank=33).apply(tiny_llama())


def test_a_rank_that_makes_no_layer_smaller_is_refused_and_one_that_makes_some_is_theirs(tiny_llama) -> None:
    message = "layers must have one that two thin ones are smaller than, but have none where rank is 8"
    with pytest.raises(ValueError, match=exactly(message)):
        SVD(rank=8, layers=["*"]).apply(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    network = nn.Sequential(nn.Linear(16, 16), nn.Linear(64, 64))
    SVD(rank=8, layers=["*"]).apply(network)
    assert [type(layer) for layer in network] == [nn.Linear, nn.Sequential]


def test_a_tied_head_is_refused(tiny_llama) -> None:
    message = "layers must have weights of their own, but lm_head shares another's"
    with pytest.raises(ValueError, match=exactly(message)):
        SVD(layers=["lm_head"]).apply(tiny_llama(tie_embeddings=True))


def test_a_convolution_with_groups_is_refused() -> None:
    message = "layers must be convolutions without groups, but 0 has 2"
    with pytest.raises(ValueError, match=exactly(message)):
        SVD(layers=["0"]).apply(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))
