import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model

from lit_llm.checkpoints import load_model, save_model
from lit_llm.models.gpt2 import GPT2
from tests.writing import exactly

VARIANTS = [
    {"tie_embeddings": tied, "bias": bias, "activation": activation}
    for tied in (True, False)
    for bias in (True, False)
    for activation in ("gelu_new", "gelu")
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))


def tokens(batch: int = 2, seq: int = 12, vocab: int = 37) -> torch.Tensor:
    return torch.randint(vocab, (batch, seq), generator=torch.Generator().manual_seed(1))


def transformers_gpt2(**changes) -> GPT2LMHeadModel:
    size = {"vocab_size": 37, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.2)
    network = GPT2LMHeadModel(GPT2Config(**(size | dropout | changes))).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape) * p.shape[-1] ** -0.5)
    return network


@variants
def test_transformers_computes_the_same_from_an_exported_directory(tiny_gpt2, tmp_path: Path, variant) -> None:
    network = tiny_gpt2(norm_eps=1e-3, **variant)
    save_model(tmp_path / "model", network)
    theirs, found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(theirs) is GPT2LMHeadModel
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, network(tokens()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "gelu_pytorch_tanh"])
def test_the_same_is_computed_from_a_directory_of_transformers(tmp_path: Path, tied: bool, activation: str) -> None:
    theirs = transformers_gpt2(tie_word_embeddings=tied, activation_function=activation, layer_norm_epsilon=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    network, _ = load_model(tmp_path / "theirs")
    assert (network.d_ff, network.dropout, network.tie_embeddings) == (128, 0.2, tied)
    with torch.no_grad():
        torch.testing.assert_close(network(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_a_directory_in_the_form_of_the_first_release_is_read(tmp_path: Path) -> None:
    theirs = transformers_gpt2()
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    buffers = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    save_file(bare | buffers | {"h.0.attn.masked_bias": torch.tensor(-1e4)}, file)
    network, _ = load_model(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(network(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_a_network_without_a_head_lacks_it_only_where_it_is_not_tied(tmp_path: Path) -> None:
    for tied in (True, False):
        size = {"vocab_size": 37, "n_embd": 32, "n_layer": 1, "n_head": 4, "tie_word_embeddings": tied}
        GPT2Model(GPT2Config(**size, architectures=["GPT2LMHeadModel"])).save_pretrained(tmp_path / "bare")
        path = tmp_path / "bare/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["GPT2LMHeadModel"]}))
        if tied:
            load_model(tmp_path / "bare")
    with pytest.raises(ValueError, match=r" lacks lm_head\.weight$"):
        load_model(tmp_path / "bare")


@variants
def test_an_exported_directory_is_read_back_bit_by_bit(tiny_gpt2, tmp_path: Path, variant) -> None:
    network = tiny_gpt2(dropout=0.1, **variant)
    save_model(tmp_path / "model", network)
    again, _ = load_model(tmp_path / "model")
    assert again.to_hf_config() == network.to_hf_config()
    for (here, p), (there, q) in zip(network.named_parameters(), again.named_parameters(), strict=True):
        assert here == there
        assert torch.equal(p, q)


def test_biases_that_came_to_be_elsewhere_are_not_dropped_silently(tiny_gpt2, tmp_path: Path) -> None:
    save_model(tmp_path / "model", tiny_gpt2(bias=False))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    nn.init.ones_(theirs.transformer.h[1].mlp.c_fc.bias)
    theirs.save_pretrained(tmp_path / "trained")
    message = "transformer.h.1.mlp.c_fc.bias must be zero for a network without biases, but is not in "
    with pytest.raises(ValueError, match=exactly(f"{message}{tmp_path / 'trained'}; give the network biases")):
        load_model(tmp_path / "trained")


@variants
def test_gradients_are_those_of_transformers(tiny_gpt2, tmp_path: Path, variant) -> None:
    network, ids = tiny_gpt2(**variant), tokens()
    save_model(tmp_path / "model", network)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for logits in (network(ids), theirs(ids).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {key: p.grad for key, p in theirs.named_parameters()}
    found = {network.hf_name(key): network.hf_view(key, p.grad) for key, p in network.named_parameters()}
    torch.testing.assert_close(found, {key: expected[key] for key in found}, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(tiny_gpt2, masked: bool) -> None:
    ids = tokens()
    documents = torch.tensor([[0] * 5 + [1] * 7] * 2) if masked else None
    gradients = []
    for checkpointing in (False, True):
        network = tiny_gpt2(activation_checkpointing=checkpointing, dropout=0.2).train()
        torch.manual_seed(3)
        F.cross_entropy(network(ids, document_ids=documents)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


def test_dropout_acts_in_training_only_and_on_attention_too(tiny_gpt2, monkeypatch) -> None:
    network, ids = tiny_gpt2(dropout=0.5), tokens()
    assert torch.equal(network(ids), network(ids))
    network.train()
    assert not torch.equal(network(ids), network(ids))
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert not torch.equal(network(ids), network(ids))
    for block in network.h:
        block.attn.dropout = 0.0
    assert torch.equal(network(ids), network(ids))


def test_dropped_attention_looks_neither_ahead_nor_into_another_document(tiny_gpt2) -> None:
    network, ids = tiny_gpt2(dropout=0.5).train(), tokens()
    documents = torch.tensor([[0] * 6 + [1] * 6] * 2)
    for document_ids in (None, documents):
        changed, before, outputs = ids.clone(), slice(0, 5), []
        changed[:, 5] = (changed[:, 5] + 1) % 37
        for read in (ids, changed):
            torch.manual_seed(0)
            outputs.append(network(read, document_ids=document_ids).detach())
        assert torch.equal(outputs[0][:, before], outputs[1][:, before])
        assert torch.equal(outputs[0][:, 6:], outputs[1][:, 6:]) == (document_ids is not None)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_per_token_are_those_counted(tied: bool) -> None:
    seq = 64
    network = GPT2(500, d_model=64, num_layers=3, num_heads=4, tie_embeddings=tied)
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(tokens(seq=seq)).sum().backward()
    # The formula counts vectors as matrices; nothing else differs.
    assert network.flops_per_token(seq) == pytest.approx(counter.get_total_flops() / (2 * seq), rel=0.02)


def test_fresh_weights_have_the_stated_spread() -> None:
    for tied in (True, False):
        network = GPT2(1000, d_model=128, num_layers=2, num_heads=4, tie_embeddings=tied)
        for key, p in network.named_parameters():
            if p.ndim == 1:
                assert (p == (1 if "ln_" in key and key.endswith("weight") else 0)).all()
            else:
                spread = 0.02 / math.sqrt(4) if key.endswith("c_proj.weight") else 0.02
                assert p.std().item() == pytest.approx(spread, rel=0.03)


def test_a_sequence_without_positions_left_is_refused_in_one_line(tiny_gpt2) -> None:
    network = tiny_gpt2(max_seq_len=10)
    assert network(tokens(seq=10)).shape == (2, 10, 37)
    message = "sequence length must be at most the network's max_seq_len, 10, but is 11"
    with pytest.raises(ValueError, match=exactly(message)):
        network(tokens(seq=11))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide d_model, but is 5 with d_model 32"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), but is 1.0"),
        ({"max_seq_len": 0}, "max_seq_len must be at least 1, but is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        GPT2(**({"vocab_size": 10, "d_model": 32, "num_layers": 1, "num_heads": 4} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx in config.json must be False, as in plain GPT-2, but is True",
        ),
        (
            {"resid_pdrop": 0.1},
            "embd_pdrop, attn_pdrop and resid_pdrop in config.json must be one number, but are [0.0, 0.0, 0.1]",
        ),
        ({"activation_function": "relu"}, "activation_function in config.json must be gelu_new or gelu, but is relu"),
    ],
)
def test_a_config_that_asks_for_another_network_is_refused(tiny_gpt2, changes, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        GPT2.from_hf_config(tiny_gpt2().to_hf_config() | changes)
