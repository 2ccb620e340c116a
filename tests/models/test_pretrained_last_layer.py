from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from lit_llm.compression.taps import tapping
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.models.pretrained_last_layer import FAMILIES, compute_what_is_read
from tests.models.test_pretrained_classifier import SIZE, config, inputs, stirred


def sizes(network: nn.Module) -> list[int]:
    """A list that collects the number of positions that each feed-forward layer computes, in order."""
    seen: list[int] = []

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[1])

    for layer in network.base_model.encoder.layer:
        layer.intermediate.register_forward_pre_hook(see)
    return seen


def answer(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    network.zero_grad()
    logits = network(**batch).logits
    logits.square().sum().backward()
    return logits.detach(), [None if p.grad is None else p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_and_gradients_are_those_of_transformers_own_network(family: str) -> None:
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **SIZE, num_labels=3))
    theirs = stirred(made)
    ours = copy.deepcopy(theirs)
    assert compute_what_is_read(ours)
    seen, batch = sizes(ours), inputs("bert")
    (said, found), (expected, wanted) = answer(ours, batch), answer(theirs, batch)
    assert seen == [9, 1]
    torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_classifier_here_does_so_by_itself_and_its_copy_too() -> None:
    network = PretrainedClassifier(2, config=config("bert"))
    twin = copy.deepcopy(network)
    for made in (network, twin):
        seen = sizes(made.model)
        made(**inputs("bert"))
        assert seen == [9, 1]


def test_who_looks_at_the_last_layer_sees_all_positions() -> None:
    network = PretrainedClassifier(2, config=config("bert")).eval()
    twin = copy.deepcopy(network)
    for made in (network, twin):
        seen = sizes(made.model)
        with tapping(made) as tapped:
            made(**inputs("bert"))
        assert seen == [9, 9]
        assert [hidden.shape for hidden in tapped.hidden.values()] == [(4, 9, 16)] * 2


@pytest.mark.parametrize("kind", ["modernbert", "distilbert", "llama"])
def test_other_architectures_stay_as_they_are(kind: str) -> None:
    model = PretrainedClassifier(2, config=config(kind)).model
    assert not compute_what_is_read(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_that_are_computed_again_stay_as_they_are() -> None:
    network = PretrainedClassifier(2, config=config("bert"), activation_checkpointing=True).train()
    seen = sizes(network.model)
    network(**inputs("bert"))
    assert seen == [9, 9]
