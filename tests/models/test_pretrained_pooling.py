import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM

from lit_llm.adaptation import LoRA
from lit_llm.blocks import Block, depths
from lit_llm.checkpoint_files import AtomicCheckpointIO
from lit_llm.checkpoints import load_model, save_model
from lit_llm.data.tokenizer import byte_tokenizer
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.models.pretrained_pooling import MeanClassifier, PairClassifier, PooledClassifier
from lit_llm.objectives.features import can_be_cached
from tests.examples import T5, twenty_tokens
from tests.models.test_pretrained_classifier import CONFIGS, IMAGES, config, stirred
from tests.writing import exactly

SEPARATOR = 3
KINDS = {"mean": MeanClassifier, "pair": PairClassifier}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
encoders = pytest.mark.parametrize("encoder", sorted(set(CONFIGS) - IMAGES))


def awake(kind: type[PooledClassifier], encoder: str, num_classes: int = 3, **changes: Any) -> PooledClassifier:
    return stirred(kind(num_classes, config=config(encoder, sep_token_id=SEPARATOR, **changes)))


def pairs() -> dict[str, torch.Tensor]:
    """Two rows `[2] a a [3] b b b [3]` and `[2] a [3] b [3]`, the second one padded."""
    rows = [[2, 7, 8, 3, 9, 10, 11, 3], [2, 12, 3, 13, 3, 0, 0, 0]]
    mask = [[1] * 8, [1] * 5 + [0] * 3]
    types = [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0]]
    names = ("input_ids", "attention_mask", "token_type_ids")
    return dict(zip(names, map(torch.tensor, (rows, mask, types)), strict=True))


def hidden_of(network: PooledClassifier, encoder: str, batch: dict[str, torch.Tensor]) -> np.ndarray:
    heard = {"token_type_ids": batch["token_type_ids"]} if encoder in ("bert", "electra", "albert") else {}
    return network.backbone(batch["input_ids"], attention_mask=batch["attention_mask"], **heard)[0].numpy()


@encoders
@torch.no_grad()
def test_means_are_as_numpy_makes_them(encoder: str) -> None:
    network, batch = awake(MeanClassifier, encoder), pairs()
    expected = [row[:length].mean(axis=0) for row, length in zip(hidden_of(network, encoder, batch), (8, 5))]
    features = network.features(**batch)
    np.testing.assert_allclose(features["pooled"].numpy(), np.stack(expected), atol=2e-5, rtol=1e-4)
    assert torch.equal(network.classify(features), network(**batch))


@encoders
@torch.no_grad()
def test_texts_are_compared_as_numpy_compares_them(encoder: str) -> None:
    network, batch = awake(PairClassifier, encoder), pairs()
    head = network.model.pooled_head
    weight, bias = head.compare.weight.numpy(), head.compare.bias.numpy()

    def against(a: np.ndarray, others: np.ndarray) -> np.ndarray:
        cosines = others @ a / np.linalg.norm(others, axis=1) / np.linalg.norm(a)
        shares = np.exp(head.scale.exp().item() * cosines)
        b = shares @ others / shares.sum()
        return np.maximum(0, weight @ np.concatenate([a, b, abs(a - b), a * b]) + bias)

    expected = []
    for row, (first, second) in zip(hidden_of(network, encoder, batch), ((4, 8), (3, 5)), strict=True):
        u, v = row[:first], row[first:second]
        means = [np.mean([against(a, others) for a in own], axis=0) for own, others in ((u, v), (v, u))]
        expected.append(head.aggregate.weight.numpy() @ np.concatenate(means) + head.aggregate.bias.numpy())
    np.testing.assert_allclose(network(**batch).numpy(), np.stack(expected), atol=2e-5, rtol=1e-4)
    assert torch.equal(network.classify(network.features(**batch)), network(**batch))


@kinds
@encoders
@torch.no_grad()
def test_directories_and_checkpoints_give_the_network_back(kind: type, encoder: str, tmp_path: Path) -> None:
    network, batch = awake(kind, encoder), pairs()
    network.class_names = ["no", "maybe", "yes"]
    save_model(tmp_path / "model", network, byte_tokenizer())
    path = f"{kind.__module__}.{kind.__qualname__}"
    recipe = {"class_path": path, "init_args": network.arguments, "size": network.num_classes}
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    AtomicCheckpointIO().save_checkpoint({"network": recipe, "state_dict": state}, tmp_path / "x.ckpt")
    for place in ("model", "x.ckpt"):
        again, _ = load_model(tmp_path / place)
        assert type(again) is kind
        assert again.class_names == ["no", "maybe", "yes"]
        torch.testing.assert_close(again(**batch), network(**batch), atol=1e-6, rtol=1e-5)


@kinds
@pytest.mark.parametrize("source", ["encoder", "masked language model", "other classifier"])
def test_an_encoder_is_taken_from_any_model_that_has_it(kind: type, source: str, tmp_path: Path, caplog) -> None:
    if source == "other classifier":
        start = stirred(PretrainedClassifier(5, config=config("bert")))
        save_model(tmp_path, start)
        before = start.backbone
    else:
        auto = AutoModel if source == "encoder" else AutoModelForMaskedLM
        made = stirred(auto.from_config(awake(kind, "bert").config))
        made.save_pretrained(tmp_path)
        before = made if source == "encoder" else made.bert
    with caplog.at_level(logging.INFO, "lit_llm"):
        network = kind(3, str(tmp_path))
    [line] = [record.getMessage() for record in caplog.records]
    new = ", ".join(sorted(f"pooled_head.{name}" for name, _ in network.model.pooled_head.named_parameters()))
    assert line == f"The head is new unless a checkpoint is loaded; {tmp_path} has none: {new}"
    stored = before.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in network.backbone.state_dict().items())
    assert not any("pooler" in name for name in network.state_dict())
    network.read_tokens_of(twenty_tokens())
    assert network(**pairs()).shape == (2, 3)


@kinds
@encoders
@torch.no_grad()
def test_padding_says_nothing(kind: type, encoder: str) -> None:
    network, batch = awake(kind, encoder), pairs()
    alone = network(**{name: tensor[1:, :5] for name, tensor in batch.items()})
    torch.testing.assert_close(network(**batch)[1:], alone, atol=2e-5, rtol=1e-4)


@kinds
@pytest.mark.parametrize("how", ["autocast", "weights"])
@torch.no_grad()
def test_in_half_precision_it_says_nearly_the_same(kind: type, how: str) -> None:
    network, batch = awake(kind, "bert"), pairs()
    expected = network(**batch)
    if how == "weights":
        network.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = network(**batch | {"attention_mask": batch["attention_mask"].bool()})
    torch.testing.assert_close(found.float(), expected, atol=0.1 * expected.abs().max().item(), rtol=0.1)


def test_an_adapter_beside_it_is_saved_with_the_whole_head(tmp_path: Path) -> None:
    network = awake(PairClassifier, "bert")
    adaptation = LoRA(rank=2)
    adaptation.prepare(network)
    adaptation.save(network, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["pooled_head"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    head = {name for name in saved if "lora_" not in name}
    assert head == {f"base_model.model.pooled_head.{name}" for name, _ in network.model.pooled_head.named_parameters()}


def test_a_text_alone_is_compared_with_nothing() -> None:
    network = awake(PairClassifier, "bert").train()
    head, seen = network.model.pooled_head, []
    head.compare.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    head.dropout.p = 0.0
    network(input_ids=torch.tensor([[2, 5, 6, 3]])).sum().backward()
    a, b, apart, product = seen[0].chunk(4, dim=-1)
    assert torch.equal(b, torch.zeros_like(a))
    assert torch.equal(product, torch.zeros_like(a))
    assert torch.equal(apart, a.abs())
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_features_of_two_texts_are_as_long_as_they_are_and_so_not_kept() -> None:
    assert can_be_cached(awake(MeanClassifier, "bert"), pairs())
    assert not can_be_cached(awake(PairClassifier, "bert"), pairs())


def test_gradients_reach_all_of_it_and_its_head_is_the_last_depth() -> None:
    network = awake(PairClassifier, "modernbert").train()
    network(**pairs()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    found, top = depths(network)
    assert {name for name, p in network.named_parameters() if found[p] == top} == {
        *(f"model.pooled_head.{layer}.{part}" for layer in ("compare", "aggregate") for part in ("weight", "bias")),
        "model.pooled_head.scale",
    }
    assert sum(isinstance(module, Block) for module in network.modules()) == 2


@kinds
@pytest.mark.parametrize("described", [T5, config("vit"), config("resnet")], ids=["t5", "vit", "resnet"])
def test_what_is_no_encoder_of_texts_is_refused(kind: type, described: dict) -> None:
    message = f"model_type must be that of an encoder of texts, but is {described['model_type']}"
    with pytest.raises(ValueError, match=exactly(message)):
        kind(2, config=described)


def test_a_tokeniser_without_a_separator_is_refused_where_two_texts_are_compared() -> None:
    network = PairClassifier(2, config=config("bert"))
    message = (
        "data.tokenizer must have a separator for a PairClassifier, which compares two texts, but has none; set "
        "model.network to lit_llm.models.pretrained_pooling.MeanClassifier"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        network.read_tokens_of(byte_tokenizer())
    MeanClassifier(2, config=config("bert")).read_tokens_of(byte_tokenizer())


@torch.no_grad()
def test_the_mean_of_an_encoder_whose_code_asks_for_attention_by_its_name_reads_no_padding() -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
    network = stirred(MeanClassifier(2, config={"model_type": "falcon", **size}))
    ids, mask = torch.randint(4, 20, (1, 9)), (torch.arange(9) < 5).long()[None]
    torch.testing.assert_close(network(input_ids=ids, attention_mask=mask), network(input_ids=ids[:, :5]))
