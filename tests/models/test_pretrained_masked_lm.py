import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM

from lit_llm.checkpoints import load_model, save_model
from lit_llm.data.tokenizer import byte_tokenizer, train_bert_bpe
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.models.pretrained_masked_lm import PretrainedMaskedLM
from tests.writing import exactly

SIZE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": SIZE,
    "roberta": SIZE | {"pad_token_id": 2},  # its positions start at 3
    "electra": SIZE | {"embedding_size": 8},
    "ernie": SIZE,
    "modernbert": SIZE | {"global_attn_every_n_layers": 2, "local_attention": 4},  # two kinds of layers
    "convbert": SIZE,  # its convolutions read neighbours, whatever the mask is
}
KEEPS_NOTHING_APART = {"convbert"}
kinds = pytest.mark.parametrize("kind", CONFIGS)


def config(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **CONFIGS[kind], **changes}


def awake(kind: str, vocab_size: int = 37, **changes: Any) -> PretrainedMaskedLM:
    network = PretrainedMaskedLM(vocab_size, config(kind, **changes)).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(p + 0.1 * torch.randn_like(p) if p.ndim == 1 else 0.4 * torch.randn_like(p))
    return network


def tokens(batch: int = 2, seq: int = 12) -> torch.Tensor:
    return torch.randint(3, 37, (batch, seq), generator=torch.Generator().manual_seed(1))


@kinds
@torch.no_grad()
def test_a_directory_of_transformers_is_read_and_written_without_a_change(kind: str, tmp_path: Path) -> None:
    theirs = awake(kind).model
    theirs.save_pretrained(tmp_path / "theirs")
    network, _ = load_model(tmp_path / "theirs")
    assert type(network) is PretrainedMaskedLM
    save_model(tmp_path / "ours", network, byte_tokenizer())
    again, found = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert again.config.pad_token_id == CONFIGS[kind]["pad_token_id"]
    expected = theirs(tokens()).logits
    for logits in (network(tokens()), load_model(tmp_path / "ours")[0](tokens()), again(tokens()).logits):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@kinds
def test_logits_of_some_positions_are_those_of_all_and_so_are_their_gradients(kind: str) -> None:
    network, ids = awake(kind), tokens()
    selected = torch.rand(ids.shape) < 0.3
    some, full = network.logits_at(selected, ids), network(ids)
    torch.testing.assert_close(some, full[selected], atol=1e-5, rtol=1e-5)
    assert network._head_is_apart
    reached = []
    for logits in (network.logits_at(selected, ids), network(ids)[selected]):
        network.zero_grad()
        logits.square().sum().backward()
        reached.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*reached, atol=1e-2, rtol=1e-4)
    assert network.logits_at(torch.zeros_like(selected), ids).shape == (0, 37)


def test_the_head_reads_only_the_positions_that_are_asked_for() -> None:
    network, ids, seen = awake("bert"), tokens(), []
    network.logits_at(torch.rand(ids.shape) < 0.3, ids)  # the first call tests the head
    network.model.cls.register_forward_hook(lambda module, args, out: seen.append(out.shape[-2]))
    selected = torch.zeros_like(ids, dtype=torch.bool)
    selected[0, 3] = selected[1, 7] = selected[1, 8] = True
    network.logits_at(selected, ids)
    assert seen == [3]


def test_a_head_that_looks_at_several_positions_is_given_all_of_them() -> None:
    class Mixing(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.head(hidden) + self.head(hidden).mean(dim=-2, keepdim=True)

    network, ids = awake("bert"), tokens()
    network.model.cls = Mixing(network.model.cls)
    selected = torch.rand(ids.shape) < 0.3
    torch.testing.assert_close(network.logits_at(selected, ids), network(ids)[selected])


@kinds
@torch.no_grad()
def test_documents_are_kept_apart_by_every_attention_or_refused(kind: str) -> None:
    network, ids = awake(kind), tokens()
    documents, positions = torch.tensor([[0] * 5 + [1] * 7] * 2), torch.tensor([[*range(5), *range(7)]])
    if kind in KEEPS_NOTHING_APART:
        with pytest.raises(ValueError, match=r"\Anetwork must be made of attention over given positions to keep "):
            network(ids, document_ids=documents, positions=positions)
        return
    alone = torch.cat([network(ids[:, :5]), network(ids[:, 5:])], dim=1)
    packed = network(ids, document_ids=documents, positions=positions)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    for part in (slice(0, 5), slice(5, 12)):
        assert not torch.allclose(packed[:, part], network(ids)[:, part], atol=1e-2)
    selected = torch.rand(ids.shape) < 0.5
    some = network.logits_at(selected, ids, document_ids=documents, positions=positions)
    torch.testing.assert_close(some, packed[selected], atol=1e-5, rtol=1e-5)


def test_eager_attention_keeps_documents_apart_too() -> None:
    network, ids, documents = awake("bert"), tokens(), torch.tensor([[0] * 5 + [1] * 7] * 2)
    expected = network(ids, document_ids=documents)
    network.model.set_attn_implementation("eager")
    torch.testing.assert_close(network(ids, document_ids=documents), expected, atol=1e-5, rtol=1e-5)


def test_padding_that_the_vocabulary_has_no_room_for_is_left_to_the_tokeniser() -> None:
    size = {name: value for name, value in SIZE.items() if name != "pad_token_id"}
    network = PretrainedMaskedLM(300, {"model_type": "modernbert", **size})  # by default it pads with token 50283
    assert network.to_hf_config()["pad_token_id"] is None
    assert network(torch.tensor([[1, 2]])).shape == (1, 2, 300)
    tokenizer = train_bert_bpe(["a"], 300)
    network.read_tokens_of(tokenizer)
    assert network.config.pad_token_id == tokenizer.pad_token_id


def test_fresh_weights_take_the_tokenisers_padding() -> None:
    tokenizer = train_bert_bpe(["ab"], 260)
    network = PretrainedMaskedLM(len(tokenizer), config("roberta"))
    assert (network.first_position, network.max_seq_len) == (3, 61)
    network.read_tokens_of(tokenizer)
    assert (network.first_position, network.max_seq_len) == (1, 63)
    assert network.model.get_input_embeddings().padding_idx == tokenizer.pad_token_id == 0
    assert json.loads(json.dumps(network.arguments))["config"]["pad_token_id"] == 0
    before = network.model
    network.read_tokens_of(tokenizer)
    assert network.model is before


@torch.no_grad()
def test_a_network_that_is_made_again_counts_positions_from_where_it_learnt_them() -> None:
    tokenizer = train_bert_bpe(["ab"], 260)
    network, again = (PretrainedMaskedLM(len(tokenizer), config("roberta")).eval() for _ in range(2))
    network.read_tokens_of(tokenizer)
    again.load_state_dict(network.eval().state_dict())
    again.recall_tokens(network.arguments["config"])
    assert (again.first_position, again.max_seq_len) == (1, 63)
    ids = torch.arange(1, 25).view(2, 12)
    torch.testing.assert_close(again(ids), network(ids))
    torch.testing.assert_close(again(ids, positions=torch.arange(12)[None]), network(ids))


@kinds
@torch.no_grad()
def test_a_classifier_takes_the_backbone_over(kind: str, tmp_path: Path) -> None:
    network = awake(kind)
    save_model(tmp_path / "model", network, train_bert_bpe(["ab"], 260))
    classifier = PretrainedClassifier(2, str(tmp_path))
    theirs = classifier.model.base_model.state_dict()
    ours = network.model.base_model.state_dict()
    assert {name for name in theirs if name not in ours} <= {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    gradients, ids, quiet = [], tokens(), {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = PretrainedMaskedLM(37, config("bert", **quiet), activation_checkpointing=checkpointing).train()
        network.logits_at(ids > 20, ids).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be that of a masked language model, but is gpt2"),
        ({"model_type": "bart"}, "model_type must be that of a masked language model, but is bart"),
        (
            {"model_type": "bert", "is_decoder": True},
            "is_decoder must be false in the config of a masked bert, but is true",
        ),
    ],
)
def test_what_fills_in_no_words_is_refused(made: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        PretrainedMaskedLM(11, made)
