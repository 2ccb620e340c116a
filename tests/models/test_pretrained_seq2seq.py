from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from lit_llm.blocks import Block
from lit_llm.checkpoints import load_model, save_model
from lit_llm.data.tokenizer import train_t5_bpe
from lit_llm.models.pretrained_seq2seq import PretrainedSeq2Seq
from tests.writing import exactly

BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    "bart": BART,  # its decoder starts with the end token
    "pegasus": BART,
}
kinds = pytest.mark.parametrize("kind", CONFIGS)
TOKENS = train_t5_bpe(["ab"], 360)


def awake(kind: str, vocab_size: int = len(TOKENS)) -> PretrainedSeq2Seq:
    network = PretrainedSeq2Seq(vocab_size, {"model_type": kind, **CONFIGS[kind]})
    network.read_tokens_of(TOKENS)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(p + 0.1 * torch.randn_like(p) if p.ndim == 1 else 0.3 * torch.randn_like(p))
    return network.eval()


def texts() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    mask = (torch.arange(9) < torch.tensor([[9], [6]])).long()
    labels = torch.randint(2, 300, (2, 5), generator=draw)
    labels[1, 3:] = -100
    return {
        "input_ids": torch.randint(2, 300, (2, 9), generator=draw) * mask,
        "labels": labels,
        "attention_mask": mask,
    }


@kinds
@torch.no_grad()
def test_logits_are_those_of_transformers_for_the_same_labels(kind: str) -> None:
    network, batch = awake(kind), texts()
    theirs, wanted = network.model(**batch), batch["labels"] >= 0
    torch.testing.assert_close(network(**batch)[wanted], theirs.logits[wanted], atol=1e-6, rtol=1e-6)
    loss = torch.nn.functional.cross_entropy(network(**batch)[wanted], batch["labels"][wanted])
    torch.testing.assert_close(loss, theirs.loss)


@kinds
@torch.no_grad()
def test_a_network_that_is_made_again_starts_to_write_with_the_token_that_it_learnt(kind: str) -> None:
    tokens = {"pad_token_id": 9, "eos_token_id": 8, "decoder_start_token_id": 7}
    network, again = awake(kind), PretrainedSeq2Seq(len(TOKENS), {"model_type": kind, **CONFIGS[kind], **tokens}).eval()
    again.load_state_dict(network.state_dict())
    again.recall_tokens(network.arguments["config"])
    torch.testing.assert_close(again(**texts()), network(**texts()))
    assert torch.equal(again.generate(texts()["input_ids"]), network.generate(texts()["input_ids"]))


@kinds
@torch.no_grad()
def test_a_token_is_told_from_those_before_it_and_from_the_text_read(kind: str) -> None:
    network, batch = awake(kind), texts()
    before = network(**batch)
    for name, place, changed in (("labels", 2, slice(3, 5)), ("input_ids", 4, slice(0, 5))):
        other = batch | {name: batch[name].clone()}
        other[name][0, place] += 1
        same = (network(**other) == before).all(dim=-1)[0]
        assert same.tolist() == [not changed.start <= position < changed.stop for position in range(5)]


@kinds
@torch.no_grad()
def test_a_directory_of_transformers_is_read_and_written_without_a_change(kind: str, tmp_path: Path) -> None:
    network, batch = awake(kind), texts()
    save_model(tmp_path / "ours", network, TOKENS)
    theirs, found = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    theirs.save_pretrained(tmp_path / "theirs")
    expected = network(**batch)
    for folder in ("ours", "theirs"):
        again, _ = load_model(tmp_path / folder)
        assert type(again) is PretrainedSeq2Seq
        torch.testing.assert_close(again(**batch), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(again.generate(batch["input_ids"]), network.generate(batch["input_ids"]))


@kinds
@torch.no_grad()
def test_it_writes_the_most_probable_token_each_time_and_ends_with_the_end(kind: str) -> None:
    network, batch = awake(kind), texts()
    found = network.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=6)
    assert network.generate(batch["input_ids"], batch["attention_mask"], 6, num_beams=3).shape[1] <= 6
    for row, written in enumerate(found):
        here = slice(0, int(batch["attention_mask"][row].sum()))
        alone, wanted = batch["input_ids"][row : row + 1, here], []
        while len(wanted) < 6 and wanted[-1:] != [TOKENS.eos_token_id]:
            labels = torch.tensor([[*wanted, 0]])
            wanted.append(int(network(alone, labels)[0, -1].argmax()))
        assert written.tolist()[: len(wanted)] == wanted
        assert set(written.tolist()[len(wanted) :]) <= {TOKENS.pad_token_id}


@kinds
def test_fresh_weights_take_the_tokenisers_padding_and_end(kind: str) -> None:
    network = awake(kind)
    start = TOKENS.eos_token_id if kind == "bart" else TOKENS.pad_token_id
    found = network.config.pad_token_id, network.config.eos_token_id, network.config.decoder_start_token_id
    assert found == (TOKENS.pad_token_id, TOKENS.eos_token_id, start)
    before = network.model
    network.read_tokens_of(TOKENS)
    assert network.model is before
    assert network.arguments["config"]["decoder_start_token_id"] == start


def test_its_layers_are_blocks() -> None:
    assert [sum(isinstance(module, Block) for module in awake(kind).modules()) for kind in CONFIGS] == [4, 3, 3]


def test_what_reads_or_writes_alone_is_refused() -> None:
    message = "model_type must be that of an encoder-decoder, but is bert"
    with pytest.raises(ValueError, match=exactly(message)):
        PretrainedSeq2Seq(11, {"model_type": "bert"})
