from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lit_llm.checkpoints import load_model, save_model
from lit_llm.compression.compression import Compression, records_of, replay
from lit_llm.compression.importance import column_squares, taylor
from lit_llm.compression.low_rank import SVD
from lit_llm.compression.structured import Blocks, Channels, Heads, Neurons
from lit_llm.models.lenet import LeNet
from lit_llm.models.pretrained import PretrainedCausalLM
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from tests.examples import BERT, example, together
from tests.test_contracts import MISTRAL
from tests.writing import exactly

IMPORTANCES = ["magnitude", "activation", "taylor"]
MODERNBERT = {
    "model_type": "modernbert",
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "global_attn_every_n_layers": 3,
    "max_position_embeddings": 32,
}
SMOLLM3 = MISTRAL | {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1]}
SMOLLM3 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [1, 2, 3, 4]}
DISTILBERT = {"model_type": "distilbert", "vocab_size": 20, "dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 2}


def tokens(rows: int = 4, vocab: int = 37) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocab, (rows, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


def read(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def silence(layer: nn.Linear, kept: list[int], width: int) -> None:
    """Zeroes a layer's weights for the units that are not kept."""
    with torch.no_grad():
        for unit in set(range(layer.in_features // width)) - set(kept):
            layer.weight[:, unit * width : (unit + 1) * width] = 0


def classifier(config: dict) -> PretrainedClassifier:
    network = PretrainedClassifier(3, config=config).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


# The pruned network computes what the whole network computes with the removed units silenced.


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_neurons_that_are_gone_are_as_if_silent(tiny_llama, tiny_gpt2, kind: str, importance: str) -> None:
    make, batch = {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind], tokens()
    network, whole = make(), make()
    record = Neurons(sparsity=0.6, importance=importance).apply(network, [batch])
    blocks = whole.layers if kind == "llama" else whole.h
    for block, kept in zip(blocks, record["kept"], strict=True):
        silence(block.mlp.down_proj if kind == "llama" else block.mlp.c_proj, kept, 1)
    torch.testing.assert_close(network(**read(batch)), whole(**read(batch)), atol=1e-5, rtol=1e-5)
    assert network.d_ff == 48 - round(0.6 * 48) == len(record["kept"][0])
    assert record["kept"][0] != record["kept"][1]
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_heads_that_are_gone_are_as_if_silent(tiny_llama, num_kv_heads: int, importance: str) -> None:
    batch, width = tokens(), 8 * 4 // num_kv_heads
    network, whole = (tiny_llama(num_kv_heads=num_kv_heads, qk_norm=True) for _ in range(2))
    record = Heads(sparsity=0.5, importance=importance).apply(network, [batch])
    for block, kept in zip(whole.layers, record["kept"], strict=True):
        silence(block.self_attn.o_proj, kept, width)
    torch.testing.assert_close(network(**read(batch)), whole(**read(batch)), atol=1e-5, rtol=1e-5)
    assert (network.num_heads, network.num_kv_heads) == (2, num_kv_heads // 2)
    assert network.layers[0].self_attn.q_proj.weight.shape == (16, 32)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_blocks_that_are_gone_are_as_if_they_added_nothing(tiny_llama, importance: str) -> None:
    batch, network, whole = tokens(), tiny_llama(num_layers=4), tiny_llama(num_layers=4)
    record = Blocks(sparsity=0.5, importance=importance).apply(network, [batch])
    assert len(record["kept"]) == 2
    assert record["kept"][0] == 0
    for index in set(range(4)) - set(record["kept"]):
        nn.init.zeros_(whole.layers[index].self_attn.o_proj.weight)
        nn.init.zeros_(whole.layers[index].mlp.down_proj.weight)
    torch.testing.assert_close(network(**read(batch)), whole(**read(batch)), atol=1e-5, rtol=1e-5)
    assert network.num_layers == 2


def test_the_block_that_adds_nothing_goes_first(tiny_llama) -> None:
    for importance in ("activation", "taylor"):
        network = tiny_llama(num_layers=4)
        nn.init.zeros_(network.layers[2].self_attn.o_proj.weight)
        nn.init.zeros_(network.layers[2].mlp.down_proj.weight)
        assert Blocks(sparsity=0.25, importance=importance).apply(network, [tokens()])["kept"] == [0, 1, 3]


@pytest.mark.parametrize("importance", ["activation", "taylor"])
def test_padding_has_no_say_in_which_blocks_go(importance: str) -> None:
    ids, kept = torch.randint(8, 20, (2, 6)), []
    for padding in (0, 20):
        padded, mask = (nn.functional.pad(x, (0, padding)) for x in (ids, torch.ones_like(ids)))
        torch.manual_seed(1)
        network = classifier(BERT | {"num_hidden_layers": 4})
        batch = {"input_ids": padded, "attention_mask": mask, "labels": torch.tensor([0, 1])}
        kept.append(Blocks(sparsity=0.5, importance=importance).apply(network, [batch])["kept"])
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    "config", [BERT | {"num_hidden_layers": 3}, MODERNBERT, DISTILBERT], ids=lambda c: c["model_type"]
)
def test_encoders_of_transformers_shrink(tmp_path, config: dict) -> None:
    from transformers import AutoModelForSequenceClassification

    batch = together([example(row, 3) for row in range(4)])
    network = classifier(config)
    torch.manual_seed(3)
    whole = classifier(config)
    whole.load_state_dict(network.state_dict())
    record = Neurons(importance="activation").apply(network, [batch])
    blocks = [
        m for m in whole.modules() if type(m).__name__ in ("BertLayer", "ModernBertEncoderLayer", "TransformerBlock")
    ]
    for block, kept in zip(blocks, record["kept"], strict=True):
        reader = {"BertLayer": "output.dense", "ModernBertEncoderLayer": "mlp.Wo", "TransformerBlock": "ffn.lin2"}
        silence(block.get_submodule(reader[type(block).__name__]), kept, 1)
    torch.testing.assert_close(network(**read(batch)), whole(**read(batch)), atol=1e-5, rtol=1e-5)
    Blocks(sparsity=0.3).apply(network, [batch])
    save_model(tmp_path / "model", network)
    again, _ = load_model(tmp_path / "model")
    assert len([m for m in again.modules() if type(m) is type(blocks[0])]) == len(blocks) - 1
    torch.testing.assert_close(again(**read(batch)), network(**read(batch)), atol=1e-6, rtol=1e-6)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(theirs(**read(batch)).logits, network(**read(batch)), atol=1e-5, rtol=1e-5)
    assert [record["class_path"].rsplit(".")[-1] for record in records_of(again)] == ["Neurons", "Blocks"]


@pytest.mark.parametrize("config", [BERT, MODERNBERT, DISTILBERT], ids=lambda c: c["model_type"])
def test_heads_are_refused_where_no_config_describes_what_would_be_left(config: dict) -> None:
    with pytest.raises(
        ValueError, match=r"^network must have attention heads whose width its config states, but a \w+ has not"
    ):
        Heads().apply(classifier(config))


def test_heads_of_gpt2_are_refused(tiny_gpt2) -> None:
    message = (
        "network must have attention heads whose width its config states, but a GPT2 has not, or has been "
        "factorised or quantised, which is for afterwards"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        Heads().apply(tiny_gpt2())


def test_decoders_of_transformers_shrink_too() -> None:
    network = PretrainedCausalLM(
        37, config=MISTRAL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    ).eval()
    whole = PretrainedCausalLM(37, config=network.to_hf_config()).eval()
    whole.load_state_dict(network.state_dict())
    batch = tokens()
    record = Heads(importance="activation").apply(network, [batch])
    for block, kept in zip(whole.model.model.layers, record["kept"], strict=True):
        silence(block.self_attn.o_proj, kept, 8)
    torch.testing.assert_close(network(**read(batch)), whole(**read(batch)), atol=1e-5, rtol=1e-5)
    assert network.to_hf_config()["num_key_value_heads"] == 1
    again = PretrainedCausalLM(37, config=network.to_hf_config()).eval()
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(**read(batch)), network(**read(batch)))


@pytest.mark.parametrize("importance", ["magnitude", "activation"])
def test_what_a_config_lists_of_each_block_goes_with_the_block(tmp_path, importance: str) -> None:
    network, batch = PretrainedCausalLM(37, config=SMOLLM3).eval(), tokens()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
        network.model.model.layers[1].self_attn.o_proj.weight.zero_()
        network.model.model.layers[1].mlp.down_proj.weight.zero_()
    assert Blocks(sparsity=0.25, importance=importance).apply(network, [batch])["kept"] == [0, 2, 3]
    assert network.to_hf_config()["no_rope_layers"] == [1, 0, 1]
    assert network.to_hf_config()["eos_token_id"] == [1, 2, 3, 4]
    save_model(tmp_path / "model", network)
    again, _ = load_model(tmp_path / "model")
    torch.testing.assert_close(again(**read(batch)), network(**read(batch)), atol=1e-6, rtol=1e-6)


def test_a_network_that_answers_otherwise_than_its_config_says_is_refused(tiny_llama) -> None:
    for method in (Blocks(0.25), Neurons(importance="activation")):
        network = tiny_llama(num_layers=4)
        network.layers[0].input_layernorm.eps = 10.0
        message = r"^network must still be one that its config can describe, but a Llama made from that answers otherw"
        with pytest.raises(ValueError, match=message):
            method.apply(network, [tokens()])


def test_a_smaller_llama_is_one_that_transformers_opens(tiny_llama, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    network, batch = tiny_llama(num_layers=3, num_kv_heads=2), tokens()
    for method in (Heads(importance="taylor"), Neurons(), Blocks(sparsity=0.3)):
        method.apply(network, [batch])
    save_model(tmp_path / "model", network)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(theirs(**read(batch)).logits, network(**read(batch)), atol=1e-4, rtol=1e-4)
    again, _ = load_model(tmp_path / "model")
    assert torch.equal(again(**read(batch)), network(**read(batch)))
    assert len(records_of(again)) == 3


# Convolutions.


class Residual(nn.Module):
    """Convolutions with a residual sum, a norm, and a head on flattened features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12 * 9, 5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(pixel_values)).relu()
        x = (x + self.second(x)).relu()
        return self.head(self.third(x).relu().flatten(1))


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(6, 1, 8, 8), "labels": torch.arange(6) % 5}


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_channels_that_are_gone_are_as_if_silent(importance: str) -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 5)
    )
    batch = {"input": images()["pixel_values"], "labels": images()["labels"]}
    whole = {name: p.clone() for name, p in network.state_dict().items()}
    record = Channels(importance=importance).apply(network, [batch])
    assert (network[0].out_channels, network[3].in_channels, network[3].out_channels) == (4, 4, 3)
    assert network[6].weight.shape == (5, 3)
    kept = [[bool((whole["0.weight"] == w).flatten(1).all(1).any()) for w in network[0].weight]]
    assert all(kept[0])
    first = [i for i, w in enumerate(whole["0.weight"]) if any(torch.equal(w, v) for v in network[0].weight)]
    second = [i for i, w in enumerate(whole["3.weight"][:, first]) if any(torch.equal(w, v) for v in network[3].weight)]
    silent = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 5)
    )
    silent.load_state_dict(whole)
    with torch.no_grad():
        for layer, stay in ((silent[0], first), (silent[3], second)):
            gone = [i for i in range(layer.out_channels) if i not in stay]
            layer.weight[gone] = 0
            layer.bias[gone] = 0
    assert len(first) == 4
    assert len(second) == 3
    torch.testing.assert_close(network(batch["input"]), silent(batch["input"]), atol=1e-5, rtol=1e-5)
    again = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 5)
    )
    replay(again, json.loads(json.dumps([record])))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(batch["input"]), network(batch["input"]))
    assert again[3].in_channels == 4


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_channels_that_are_added_up_go_together(importance: str) -> None:
    network = Residual().eval()
    before = {name: p.requires_grad for name, p in network.named_parameters()}
    record = Channels(sparsity=0.25, importance=importance).apply(network, [images()])
    assert network.first.out_channels == network.norm.num_features == network.second.in_channels == 6
    assert network.second.out_channels == network.third.in_channels == 6
    assert network.third.out_channels == 9
    again = replay(Residual().eval(), json.loads(json.dumps([record])))
    again.load_state_dict(network.state_dict())
    batch = images()
    assert torch.equal(again(batch["pixel_values"]), network(batch["pixel_values"]))
    assert {name: p.requires_grad for name, p in network.named_parameters()} == before


@pytest.mark.parametrize("method", [Channels(0.3), SVD(layers=["*"])], ids=lambda method: type(method).__name__)
def test_a_network_that_went_on_after_its_channels_is_opened_as_it_was(tmp_path, method: Compression) -> None:
    network, batch = LeNet(5, image_size=8, width=8).eval(), images()
    for each in (Channels(0.25), method):
        each.apply(network, [batch])
    save_model(tmp_path / "model", network)
    again, _ = load_model(tmp_path / "model")
    assert len(records_of(again)) == 2
    assert torch.equal(again(batch["pixel_values"]), network(batch["pixel_values"]))
    replay(again, json.loads(json.dumps(records_of(network))))  # like an objective that loads its checkpoint again
    assert torch.equal(again(batch["pixel_values"]), network(batch["pixel_values"]))


# Importance.


def test_importances_are_those_of_their_formulas() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x, labels = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    hidden = network[:2](x)
    found = column_squares(network, {"2": network[2]}, 2, [{"input": x}])["2"]
    contributions = torch.stack([(hidden[:, [j]] * network[2].weight[:, j]).square().sum(1).mean() for j in range(4)])
    torch.testing.assert_close(found, contributions.view(2, 2).sum(1))
    for p in network.parameters():
        p.requires_grad_(False)
    found = taylor(network, {"2": network[2]}, [{"input": x, "labels": labels}], lambda a: a)["2"]
    hidden = hidden.detach().requires_grad_()
    nn.functional.cross_entropy(network[2](hidden), labels, reduction="sum").backward()
    torch.testing.assert_close(found, (hidden * hidden.grad).abs().sum(0))
    assert not any(p.requires_grad for p in network.parameters())


# Errors.


@pytest.mark.parametrize("kind", [Neurons, Heads, Blocks, Channels])
def test_a_sparsity_out_of_range_is_refused(kind: type) -> None:
    with pytest.raises(ValueError, match=exactly("sparsity must be in [0, 1), but is 1.0")):
        kind(sparsity=1.0)


@pytest.mark.parametrize("kind", [Neurons, Heads, Blocks])
def test_a_network_without_blocks_is_refused(kind: type) -> None:
    message = "network must have one list of blocks, but a Sequential has 0 (none)"
    with pytest.raises(ValueError, match=exactly(message)):
        kind(importance="magnitude").apply(nn.Sequential(nn.Linear(2, 2)))


def test_channels_of_a_network_without_convolutions_are_refused(tiny_llama) -> None:
    message = (
        "network must have convolutions to take channels out of, but a Llama has none; transformers have Neurons, Heads "
        "and Blocks"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        Channels().apply(tiny_llama(), [tokens()])


def test_blocks_of_a_factorised_network_are_refused(tiny_llama) -> None:
    network = tiny_llama()
    SVD().apply(network)
    message = "network must be whole where blocks are taken out, but has been factorised or quantised, which is for "
    message += "afterwards"
    with pytest.raises(ValueError, match=exactly(message)):
        Blocks(importance="magnitude").apply(network)
    with pytest.raises(ValueError, match="but a Llama has not, or has been factorised or quantised"):
        Neurons().apply(network)


def test_activations_without_batches_are_refused(tiny_llama) -> None:
    with pytest.raises(ValueError, match=exactly("calibration of Neurons must have at least one batch, but is empty")):
        Neurons(importance="taylor").apply(tiny_llama())
