import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from lit_llm.blocks import Block
from lit_llm.checkpoint_files import AtomicCheckpointIO
from lit_llm.checkpoints import load_model, save_model
from lit_llm.data.tokenizer import byte_tokenizer
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.models.pretrained_pooling import MeanClassifier
from tests.writing import exactly

SIZE = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ATTENTION_FREE = {
    "num_channels": 1,
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [1, 1],
    "layer_type": "basic",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": SIZE,
    "roberta": SIZE | {"type_vocab_size": 1, "pad_token_id": 1},
    "electra": SIZE | {"embedding_size": 8},
    "albert": SIZE | {"embedding_size": 8, "num_hidden_groups": 2, "inner_group_num": 1},
    "modernbert": SIZE | {"classifier_pooling": "mean", "global_attn_every_n_layers": 2, "local_attention": 8},
    "distilbert": {"vocab_size": 37, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "pad_token_id": 0},
    "llama": SIZE | {"num_key_value_heads": 1},  # reads the last token that is not padding
    "vit": {**SIZE, "image_size": 8, "patch_size": 4, "num_channels": 1},
    "resnet": ATTENTION_FREE,
}
IMAGES = {"vit", "resnet"}
KEPT = {
    "bert": {"first_hidden_state"},
    "resnet": {"pooler_output"},
    "modernbert": {"last_hidden_state", "input_ids", "attention_mask"},
    "llama": {"last_hidden_state", "input_ids", "attention_mask"},
}
kinds = pytest.mark.parametrize("kind", CONFIGS)


def config(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **CONFIGS[kind], **changes}


def stirred(network: nn.Module) -> nn.Module:
    """Sets all weights far from their initial values, in evaluation mode."""
    with torch.no_grad():
        for tensor in filter(torch.is_floating_point, network.state_dict().values()):
            noise = torch.randn_like(tensor)
            tensor.copy_(tensor + 0.2 * noise.abs() if tensor.ndim == 1 else 0.4 * noise)
    return network.eval()


def awake(kind: str, num_classes: int = 3, **changes: Any) -> PretrainedClassifier:
    return stirred(PretrainedClassifier(num_classes, config=config(kind, **changes)))


def inputs(kind: str, batch: int = 4) -> dict[str, torch.Tensor]:
    if kind in IMAGES:
        return {"pixel_values": torch.randn(batch, 1, 8, 8)}
    lengths = torch.tensor([9, 4, 7, 5])[:batch, None]
    mask = (torch.arange(9) < lengths).long()
    return {"input_ids": torch.randint(1, 37, (batch, 9)) * mask, "attention_mask": mask}


def auto(kind: str) -> Any:
    return AutoModelForImageClassification if kind in IMAGES else AutoModelForSequenceClassification


@kinds
@torch.no_grad()
def test_a_directory_of_transformers_is_read_and_written_without_a_change(kind: str, tmp_path: Path) -> None:
    network, batch = awake(kind), inputs(kind)
    network.class_names = ["no", "maybe", "yes"]
    expected = network(**batch)
    save_model(tmp_path / "ours", network, byte_tokenizer())
    theirs, found = auto(kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert theirs.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert kind in IMAGES or theirs.config.pad_token_id == network.config.pad_token_id
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again, _ = load_model(tmp_path / folder)
        assert type(again) is PretrainedClassifier
        assert again.class_names == ["no", "maybe", "yes"]
        torch.testing.assert_close(again(**batch), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert expected.std(dim=0).min() > 1e-3


@kinds
@torch.no_grad()
def test_a_checkpoint_gives_the_network_back_with_its_buffers_and_class_names(kind: str, tmp_path: Path) -> None:
    network, batch = awake(kind), inputs(kind)
    network.class_names = ["no", "maybe", "yes"]
    path = f"{PretrainedClassifier.__module__}.PretrainedClassifier"
    recipe = {"class_path": path, "init_args": network.arguments, "size": network.num_classes}
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    AtomicCheckpointIO().save_checkpoint({"network": recipe, "state_dict": state}, tmp_path / "x.ckpt")
    again, _ = load_model(tmp_path / "x.ckpt")
    assert again.class_names == ["no", "maybe", "yes"]
    assert torch.equal(again(**batch), network(**batch))


@kinds
@torch.no_grad()
def test_what_the_backbone_gives_is_all_the_head_needs(kind: str) -> None:
    network, batch = awake(kind), inputs(kind)
    found = network.features(**batch)
    assert set(found) == KEPT.get(kind, {"first_hidden_state"})
    assert {len(tensor) for tensor in found.values()} == {4}
    torch.testing.assert_close(network.classify(found), network(**batch), atol=1e-6, rtol=1e-5)
    other = inputs(kind)
    torch.testing.assert_close(network.classify(network.features(**other)), network(**other), atol=1e-6, rtol=1e-5)
    one = {name: tensor[1:2] for name, tensor in found.items()}
    torch.testing.assert_close(network.classify(one), network(**batch)[1:2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name", "changes"),
    [
        ("longformer", "LongformerForSequenceClassification", {"attention_window": 4, "type_vocab_size": 1}),
        ("canine", "CanineForSequenceClassification", {"downsampling_rate": 2, "local_transformer_stride": 8}),
    ],
)
def test_features_that_the_head_would_answer_otherwise_are_refused(kind: str, name: str, changes: dict) -> None:
    network = stirred(PretrainedClassifier(3, config={"model_type": kind, **SIZE, **changes}))
    line = (
        f"network must have a backbone that gives all that its head reads, but a {name} has not; set "
        f"model.adaptation.cache_features to false"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=exactly(line)):
            network.features(**inputs(kind))


def test_classes_that_a_config_calls_by_numbers_are_called_so_in_words() -> None:
    network = PretrainedClassifier(2, config={"model_type": "bert", **SIZE, "id2label": {0: 0, 1: 1}})
    assert network.class_names == ["0", "1"]
    network.class_names = ["0", "1"]
    assert network.model.config.id2label == {0: "0", 1: "1"}


def test_a_head_of_zeros_is_still_found_to_read_what_it_reads() -> None:
    network = awake("modernbert")
    nn.init.zeros_(network.model.classifier.weight)
    assert "last_hidden_state" in network.features(**inputs("modernbert"))


def test_only_the_head_gets_gradients_from_features() -> None:
    network, batch = awake("bert", classifier_dropout=0.5).train(), inputs("bert")
    network.model.base_model.eval()
    modes = {name: module.training for name, module in network.named_modules()}
    with torch.no_grad():
        found = network.features(**batch)
    assert set(found) == {"first_hidden_state"}
    assert {name: module.training for name, module in network.named_modules()} == modes
    network.classify(found).sum().backward()
    reached = {name.rpartition(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert reached == {"model.classifier", "model.bert.pooler.dense"}
    assert "forward" not in vars(network.model.base_model)


def test_padding_says_nothing() -> None:
    for kind in sorted(set(CONFIGS) - IMAGES):
        network, batch = awake(kind), inputs(kind, batch=2)
        longer = {name: nn.functional.pad(tensor, (0, 5)) for name, tensor in batch.items()}
        torch.testing.assert_close(network(**longer), network(**batch), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_head_that_reads_padding_is_refused_with_one_that_does_not() -> None:
    size = {"model_type": "xlnet", "vocab_size": 37, "d_model": 16, "d_inner": 32, "n_layer": 1, "n_head": 2}
    message = (
        "summary_type must be first in the config of a classifier of xlnet, which else reads padding, but is last; set "
        "model.network to lit_llm.models.pretrained_pooling.MeanClassifier"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        PretrainedClassifier(3, config=size)
    batch = inputs("xlnet", batch=2)
    longer = {name: nn.functional.pad(tensor, (0, 5)) for name, tensor in batch.items()}
    for network in (PretrainedClassifier(3, config=size | {"summary_type": "first"}), MeanClassifier(3, config=size)):
        stirred(network)
        torch.testing.assert_close(network(**longer), network(**batch), atol=1e-5, rtol=1e-5)


def test_segments_are_read_where_the_architecture_has_them_and_no_harm_elsewhere() -> None:
    segments = torch.ones(4, 9, dtype=torch.long)
    for kind in sorted(set(CONFIGS) - IMAGES):
        network, batch = awake(kind), inputs(kind)
        reads = kind in {"bert", "electra", "albert"} or getattr(network.config, "type_vocab_size", 1) > 1
        assert torch.equal(network(**batch), network(**batch, token_type_ids=segments)) != reads, kind


def backbone(network: PretrainedClassifier) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in network.model.base_model.state_dict().items() if "pooler" not in name}


@pytest.mark.parametrize("source", ["backbone", "masked language model", "classifier of five"])
def test_a_backbone_is_taken_and_that_the_head_is_new_is_said_in_one_line(source: str, tmp_path: Path, caplog) -> None:
    made = {
        "backbone": AutoModel,
        "masked language model": AutoModelForMaskedLM,
        "classifier of five": AutoModelForSequenceClassification,
    }[source].from_config(awake("bert", 5).config)
    stirred(made).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "lit_llm"):
        network = PretrainedClassifier(3, str(tmp_path))
    start = made if source == "backbone" else made.bert
    start = start.state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in backbone(network).items())
    [line] = [record.getMessage() for record in caplog.records]
    has = "one of another width than 3" if source == "classifier of five" else "none"
    assert line.startswith(f"The head is new unless a checkpoint is loaded; {tmp_path} has {has}: ")
    assert line.endswith("classifier.bias, classifier.weight")
    assert network(**inputs("bert")).shape == (4, 3)
    assert all(module.training for module in network.modules())
    message = f"path must hold a head of 3 classes with strict, but {tmp_path} has {has}"
    with pytest.raises(ValueError, match=exactly(message)):
        PretrainedClassifier(3, str(tmp_path), strict=True)


def test_a_head_of_the_same_width_is_taken_too_and_its_names(tmp_path: Path, caplog) -> None:
    before = awake("bert")
    before.class_names = ["no", "maybe", "yes"]
    save_model(tmp_path / "model", before)
    with caplog.at_level(logging.INFO, "lit_llm"):
        network = PretrainedClassifier(3, str(tmp_path), strict=True).eval()  # a run folder
        network.class_names = ["no", "maybe", "yes"]
    assert not caplog.records
    assert torch.equal(network(**(batch := inputs("bert"))), before(**batch))
    message = (
        f"path must hold a head of the classes a, b, c with strict, but {tmp_path / 'model'} has one of no, maybe, yes"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        network.class_names = ["a", "b", "c"]
    network = PretrainedClassifier(3, str(tmp_path))
    with caplog.at_level(logging.INFO, "lit_llm"):
        network.class_names = ["a", "b", "c"]
    [line] = [record.getMessage() for record in caplog.records]
    assert line == "The classes of the head are now a, b, c; they were no, maybe, yes"


def test_a_head_of_classes_that_do_not_exclude_each_other_says_so_and_is_not_taken_as_it_is(tmp_path: Path) -> None:
    before = awake("bert")
    assert not before.multi_label
    before.multi_label = True
    save_model(tmp_path, before)
    assert load_model(tmp_path)[0].multi_label
    assert PretrainedClassifier(3, str(tmp_path)).multi_label
    message = (
        f"path must hold a head of classes that exclude each other with strict, but {tmp_path} has one for "
        f"multi_label_classification; ask it with lit-llm serve"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        PretrainedClassifier(3, str(tmp_path), strict=True)


def test_a_decoder_of_ours_is_a_backbone_too(tiny_llama, tmp_path: Path) -> None:
    made = tiny_llama()
    save_model(tmp_path / "model", made)
    network = PretrainedClassifier(2, str(tmp_path / "model"))
    assert torch.equal(network.model.model.embed_tokens.weight, made.embed_tokens.weight)


@torch.no_grad()
def test_a_network_that_is_made_again_counts_positions_from_where_it_learnt_them() -> None:
    network, again = (PretrainedClassifier(2, config=config("roberta", vocab_size=257)).eval() for _ in range(2))
    network.read_tokens_of(byte_tokenizer())
    again.load_state_dict(network.eval().state_dict())
    again.recall_tokens(network.arguments["config"])
    assert again.arguments == network.arguments
    ids = torch.arange(1, 13).view(2, 6)
    torch.testing.assert_close(again(input_ids=ids), network(input_ids=ids))


def test_fresh_weights_take_the_tokenisers_size_and_padding_and_others_must_have_room(tmp_path: Path) -> None:
    network, tokenizer = PretrainedClassifier(2, config=config("roberta")), byte_tokenizer()
    network.read_tokens_of(tokenizer)
    assert network.model.get_input_embeddings().weight.shape == (257, 16)
    assert network.model.get_input_embeddings().padding_idx == tokenizer.pad_token_id
    assert json.loads(json.dumps(network.to_hf_config()))["vocab_size"] == 257
    save_model(tmp_path / "large", network)
    large = PretrainedClassifier(2, str(tmp_path / "large"))
    before = large.model
    large.read_tokens_of(tokenizer)
    assert large.model is before
    save_model(tmp_path / "small", awake("bert"))
    message = "data.tokenizer must have at most the tokens of the network, 37, but has 257"
    with pytest.raises(ValueError, match=exactly(message)):
        PretrainedClassifier(2, str(tmp_path / "small")).read_tokens_of(tokenizer)


def test_padding_that_the_vocabulary_has_no_room_for_is_left_to_the_tokeniser() -> None:
    size = {name: value for name, value in SIZE.items() if name != "pad_token_id"}
    network = PretrainedClassifier(2, config={"model_type": "modernbert", **size})  # by default it pads with 50283
    assert network.config.pad_token_id is None
    tokenizer = byte_tokenizer()
    network.read_tokens_of(tokenizer)
    assert network.config.pad_token_id == tokenizer.pad_token_id


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    gradients, batch = [], inputs("bert")
    for checkpointing in (False, True):
        torch.manual_seed(0)
        arguments = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        network = PretrainedClassifier(2, config=config("bert", **arguments), activation_checkpointing=checkpointing)
        network.train()(**batch).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients)


def test_lists_of_lists_of_layers_are_no_blocks_themselves() -> None:
    funnel = {"model_type": "funnel", "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [2, 2]}
    network = PretrainedClassifier(2, config=funnel | {"vocab_size": 20})
    found = [module for module in network.modules() if isinstance(module, Block)]
    assert {type(module).__name__ for module in found} == {"FunnelLayer"}
    assert not isinstance(torch.nn.ModuleList(), Block)


def test_its_layers_are_blocks() -> None:
    for kind in sorted(set(CONFIGS) - {"resnet"}):
        assert sum(isinstance(module, Block) for module in awake(kind).modules()) == 2, kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "model.network.path or model.network.config must be given, one of them, but neither is"),
        (
            {"path": "x", "config": {}},
            "model.network.path or model.network.config must be given, one of them, but both are; set the one that is not meant to null",
        ),
        ({"config": {"model_type": "clap"}}, "model_type must be that of a classifier, but is clap"),
    ],
)
def test_what_makes_no_classifier_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        PretrainedClassifier(2, **arguments)


def test_a_place_without_a_model_and_weights_that_are_not_whole_are_refused_in_one_line(tmp_path: Path) -> None:
    line = r"\Apath must be a directory with a config\.json or a name on the hub, but is [^\n]+\Z"
    with pytest.raises(FileNotFoundError, match=line):
        PretrainedClassifier(2, str(tmp_path / "nothing"))
    save_model(tmp_path, awake("bert", 2))
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    line = r"\Amodel must hold the network's tensors as \.safetensors, but [^\n]+\Z"
    with pytest.raises(ValueError, match=line):
        PretrainedClassifier(2, str(tmp_path))
    file.unlink()
    with pytest.raises(ValueError, match=line):
        PretrainedClassifier(2, str(tmp_path))


def test_a_backbone_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, awake("bert", 2, num_hidden_layers=1))
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = (
        rf"\Apath must hold the network's backbone, but {tmp_path} lacks bert\.encoder\.layer\.1[\w.]+ and 15 more\Z"
    )
    with pytest.raises(ValueError, match=message):
        PretrainedClassifier(2, str(tmp_path))
