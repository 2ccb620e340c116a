from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from lit_llm.checkpoints import load_model, save_model
from lit_llm.compression.compression import records_of
from lit_llm.compression.sparsity import (
    Magnitude,
    Movement,
    Wanda,
    Zeros,
    add_masks,
    apply_masks,
    cubic,
    mask_by_row,
    mask_n_of_m,
    mask_together,
    masked_layers,
    remove_masks,
    sparsity_of,
)
from lit_llm.optimizers import Muon, parameter_groups
from tests.cli.test_killed import OPTIMIZERS
from tests.writing import exactly


def tokens(rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(37, (rows, 9), generator=torch.Generator().manual_seed(seed))}


# Masks.


def test_masks_are_those_made_by_hand() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [8.0, 7.0, 6.0, 5.0]])
    assert mask_by_row(scores, 0.5).int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    assert mask_together({"a": scores}, 0.5)["a"].int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert mask_n_of_m(scores, 1, 2).int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]
    both = mask_together({"a": scores, "b": torch.tensor([[9.0, 0.0]])}, 0.3)
    assert both["a"].int().tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]
    assert both["b"].int().tolist() == [[1, 0]]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.99])
def test_equal_scores_are_pruned_to_the_exact_count_too(sparsity: float) -> None:
    mask = mask_together({"a": torch.ones(7, 13)}, sparsity)["a"]
    assert int((~mask).sum()) == round(sparsity * 91)


def test_of_convolutions_the_inputs_of_an_output_are_a_row() -> None:
    scores = torch.rand(5, 4, 3, 3)
    mask = mask_by_row(scores, 0.5)
    assert mask.shape == scores.shape
    assert (mask.flatten(1).sum(1) == 18).all()


def test_the_cubic_curve_rises_from_nothing_to_its_end_and_stays_within_them() -> None:
    curve = [cubic(step / 10, final=0.9) for step in range(-3, 14)]
    assert curve == sorted(curve)
    assert curve[:4] == [0.0] * 4
    assert curve[-4:] == [pytest.approx(0.9)] * 4
    assert curve[8] == pytest.approx(0.9 - 0.9 * 0.5**3)


# Methods.


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_magnitude_takes_the_smallest_weights(tiny_llama, scope: str) -> None:
    network, before = tiny_llama(), tiny_llama()
    record = Magnitude(sparsity=0.3, scope=scope, layers=["*.mlp.*"]).apply(network)
    layers = {name: network.get_submodule(name) for name in record["layers"]}
    assert sparsity_of(network, list(layers)) == pytest.approx(0.3, abs=0.01)
    assert record["sparsity"] == sparsity_of(network, list(layers))
    for name, layer in layers.items():
        weight, pruned = before.get_submodule(name).weight.detach().abs(), layer.weight == 0
        groups = zip(weight, pruned) if scope == "row" else [(weight, pruned)]
        assert all(w[p].max() <= w[~p].min() for w, p in groups)
        assert torch.equal(layer.weight[~pruned], before.get_submodule(name).weight[~pruned])
    if scope == "global":
        kept = min(before.get_submodule(n).weight[m.weight != 0].abs().min() for n, m in layers.items())
        gone = max(before.get_submodule(n).weight[m.weight == 0].abs().max() for n, m in layers.items())
        assert gone <= kept
        assert len({sparsity_of(network, [name]) for name in layers}) > 1
    assert torch.equal(network.lm_head.weight, before.lm_head.weight)
    assert torch.equal(network.layers[0].self_attn.q_proj.weight, before.layers[0].self_attn.q_proj.weight)


def wanda_in_numpy(weight: np.ndarray, x: np.ndarray, sparsity: float) -> np.ndarray:
    metric = np.abs(weight) * np.sqrt((x**2).sum(axis=0))
    pruned = weight.copy()
    for row in range(len(weight)):
        order = np.argsort(metric[row], kind="stable")
        pruned[row, order[: round(sparsity * weight.shape[1])]] = 0
    return pruned


def test_wanda_is_that_of_ten_lines_of_numpy() -> None:
    network = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.Linear(8, 2))
    before = [p.detach().numpy().copy() for p in network.parameters()]
    batches = [torch.randn(5, 12) * torch.linspace(0.1, 3, 12) for _ in range(3)]
    Wanda(sparsity=0.5).apply(network, [{"input": x} for x in batches])
    x = torch.cat(batches).numpy()
    first = wanda_in_numpy(before[0], x, 0.5)
    np.testing.assert_array_equal(network[0].weight.detach().numpy(), first)
    hidden = np.maximum(x @ first.T + before[1], 0)  # input of the second layer after the first is pruned
    np.testing.assert_array_equal(network[2].weight.detach().numpy(), wanda_in_numpy(before[2], hidden, 0.5))
    np.testing.assert_array_equal(network[3].weight.detach().numpy(), before[4])


def test_wanda_reads_patches_where_a_layer_is_a_convolution() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)
    network, x = nn.Sequential(conv, nn.Flatten(), nn.Linear(64, 2)), torch.randn(6, 3, 8, 8)
    before = conv.weight.detach().flatten(1).numpy().copy()
    patches = nn.functional.unfold(x, 3, padding=1, stride=2).mT.flatten(0, 1).numpy()
    np.testing.assert_allclose(
        patches @ before.T + conv.bias.detach().numpy(), conv(x).detach().flatten(2).mT.flatten(0, 1).numpy(), atol=1e-5
    )
    Wanda(sparsity=0.4).apply(network, [{"input": x}])
    np.testing.assert_array_equal(conv.weight.detach().flatten(1).numpy(), wanda_in_numpy(before, patches, 0.4))


def test_wanda_does_not_look_at_padding() -> None:
    class Texts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.head(self.first(x))

    one, other = Texts(), Texts()
    other.load_state_dict(one.state_dict())
    x, mask = torch.randn(2, 4, 6), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    Wanda().apply(one, [{"x": x, "attention_mask": mask, "labels": mask}])
    Wanda().apply(other, [{"x": x.masked_fill(mask[..., None] == 0, 100.0), "attention_mask": mask}])
    assert torch.equal(one.first.weight, other.first.weight)


def test_wanda_leaves_the_mode_as_it_was_and_does_not_look_through_dropout(tiny_gpt2) -> None:
    one, other = tiny_gpt2(dropout=0.5).train(), tiny_gpt2(dropout=0.0).train()
    for network in (one, other):
        Wanda().apply(network, [tokens()])
        assert network.training
        assert network.h[0].drop.training
    for name, p in one.named_parameters():
        assert torch.equal(p, other.get_parameter(name))


@pytest.mark.parametrize("method", [Magnitude, Wanda])
def test_two_of_four_leaves_two_of_each_four(tiny_llama, method: type) -> None:
    network = tiny_llama()
    method(pattern="2:4").apply(network, [tokens()])
    for name in records_of(network)[0]["layers"]:
        assert ((network.get_submodule(name).weight != 0).reshape(-1, 4).sum(1) == 2).all()
    assert sparsity_of(network) == 0.5


def test_a_pattern_is_reached_one_zero_after_the_other() -> None:
    scores = {"a": torch.rand(3, 8)}
    method = Magnitude(pattern="1:4")
    counts = [(~method.masks(scores, s)["a"]).reshape(-1, 4).sum(1).unique().tolist() for s in (0.0, 0.25, 0.6, 0.75)]
    assert counts == [[0], [1], [2], [3]]


def test_what_is_pruned_stays_so_whatever_its_score_becomes() -> None:
    method, scores = Magnitude(), {"a": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}
    kept = method.masks(scores, 0.25)
    later = method.masks({"a": torch.tensor([[9.0, 1.0, 3.0, 4.0]])}, 0.5, kept)
    assert later["a"].int().tolist() == [[0, 0, 1, 1]]
    assert method.masks(scores, 0.0, later)["a"].int().tolist() == [[0, 0, 1, 1]]


def test_movement_adds_up_minus_weight_times_gradient() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    add_masks(network, ["0"], scores=True)
    method, expected = Movement(sparsity=0.5), torch.zeros(3, 4)
    for step in range(3):
        network.zero_grad()
        network(torch.randn(5, 4)).square().sum().backward()
        method.watch(masked_layers(network))
        expected -= network[0].weight.detach() * network[0].weight.grad
        with torch.no_grad():
            network[0].weight.sub_(0.1 * (step + 1) * network[0].weight.grad)
    torch.testing.assert_close(network[0].weight_scores, expected)
    scores = method.scores(network, {"0": network[0]}, [])
    lowest = expected.flatten().argsort()[:6]
    assert set((~method.masks(scores, 0.5)["0"]).flatten().nonzero().flatten().tolist()) == set(lowest.tolist())


# Masks during further training.


@pytest.mark.parametrize("name", OPTIMIZERS, ids=lambda name: name.rsplit(".")[-1])
def test_every_optimiser_keeps_zeros(tiny_llama, name: str) -> None:
    network = tiny_llama()
    ours = name.endswith("Muon")
    options = {"lr": 0.05} | ({"weight_decay": 0.1} if "Adam" in name or "SGD" in name or ours else {})
    options |= {"momentum": 0.9} if name.endswith((".SGD", ".RMSprop")) else {}
    kind = Muon if ours else getattr(torch.optim, name.rsplit(".")[-1])
    optimizer = kind(parameter_groups(network) if ours else network.parameters(), **options)
    optimizer.register_step_post_hook(lambda *_: apply_masks(network))
    for pruned in (False, True):
        for seed in range(3):
            optimizer.zero_grad()
            ids = tokens(seed=seed)["input_ids"]
            nn.functional.cross_entropy(network(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            if pruned:
                assert sparsity_of(network) == pytest.approx(0.5, abs=1e-3)
                assert all((layer.weight[~layer.weight_mask] == 0).all() for layer in masked_layers(network).values())
        if not pruned:  # prunes after the optimiser has built up momentum
            Magnitude(sparsity=0.5).apply(network)
            Zeros().apply(network)


def test_masks_and_scores_are_in_the_state_dict_and_come_back(tiny_llama) -> None:
    network, again = tiny_llama(), tiny_llama(seed=1)
    Magnitude(sparsity=0.6).apply(network)
    Zeros().apply(network)
    names = list(masked_layers(network))
    add_masks(again, names)
    again.load_state_dict(network.state_dict())
    apply_masks(again)
    assert sparsity_of(again) == sparsity_of(network) == pytest.approx(0.6, abs=1e-3)
    remove_masks(again)
    assert not [key for key in again.state_dict() if "mask" in key or "scores" in key]
    assert sparsity_of(again) == sparsity_of(network)


def test_what_is_remembered_once_masks_are_gone_is_the_counted_sparsity(tiny_llama) -> None:
    network = tiny_llama()
    Magnitude(sparsity=0.6).apply(network)
    Zeros().apply(network)
    assert "form" in records_of(network)[1]
    remove_masks(network)
    assert ["form" in record for record in records_of(network)] == [False, False]
    assert records_of(network)[1]["sparsity"] == sparsity_of(network)


def test_a_pruned_model_directory_has_plain_weights_and_says_how_it_was_made(tiny_llama, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    network, batch = tiny_llama(), tokens()
    Wanda(sparsity=0.5).apply(network, [batch])
    save_model(tmp_path / "model", network)
    again, _ = load_model(tmp_path / "model")
    assert records_of(again) == records_of(network) != []
    assert torch.equal(again(**batch), network(**batch))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(theirs(**batch).logits, network(**batch), atol=1e-4, rtol=1e-4)
    assert sparsity_of(again) == sparsity_of(network)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be in [0, 1), but is 1.0"),
        ({"sparsity": -0.1}, "sparsity must be in [0, 1), but is -0.1"),
        ({"pattern": "half"}, "pattern must be N:M, such as 2:4, but is 'half'"),
        ({"pattern": "4:4"}, "pattern must keep at least 1 and less than all, N < M, but is '4:4'"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        Magnitude(**options)


def test_a_pattern_that_does_not_divide_the_inputs_is_refused() -> None:
    network = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 1))
    message = "layers must have a multiple of 4 inputs for 2:4, but 0 has 6"
    with pytest.raises(ValueError, match=exactly(message)):
        Magnitude(pattern="2:4").apply(network)


def test_movement_outside_a_run_is_refused() -> None:
    message = "Movement must be applied during a run, by callbacks.pruning, but 0 has no scores of one"
    with pytest.raises(ValueError, match=exactly(message)):
        Movement().apply(nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 1)))


def test_zeros_of_a_dense_network_are_refused(tiny_llama) -> None:
    message = "network must have zeros to keep, but has none; start from the weights of a pruned model"
    with pytest.raises(ValueError, match=exactly(message)):
        Zeros().apply(tiny_llama())


def test_wanda_without_batches_is_refused(tiny_llama) -> None:
    with pytest.raises(ValueError, match="calibration of Wanda must have at least one batch, but is empty"):
        Wanda().apply(tiny_llama())


def test_a_pattern_that_yaml_takes_for_a_time_is_one_still() -> None:
    read = yaml.safe_load("pattern: 2:4")
    assert read == {"pattern": 124}
    assert Magnitude(**read) == Magnitude(pattern="2:4")
