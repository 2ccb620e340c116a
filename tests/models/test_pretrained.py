import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lit_llm.checkpoints import load_model, save_model
from lit_llm.data.tokenizer import byte_tokenizer, train_bert_bpe
from lit_llm.generation import generate
from lit_llm.models.pretrained import PretrainedCausalLM
from tests.examples import BERT
from tests.writing import exactly

SIZE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": SIZE | {"sliding_window": 4},
    "gemma2": SIZE | {"sliding_window": 4, "query_pre_attn_scalar": 8},  # two kinds of layers; eager; capped logits
    "granite": SIZE | {"logits_scaling": 3.0},
    "mixtral": SIZE | {"num_local_experts": 4},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 64},  # a head with biases
    "modernbert-decoder": SIZE | {"local_attention": 8},  # its config must have a padding token
    "roberta": SIZE | {"is_decoder": True},  # counts positions from the padding token
}
SCALED = {"gemma2", "granite"}
BIASED = {"gptj", "modernbert-decoder", "roberta"}
kinds = pytest.mark.parametrize("kind", CONFIGS)


def config(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **CONFIGS[kind], **changes}


def awake(kind: str, vocab_size: int = 37, **changes: Any) -> PretrainedCausalLM:
    network = PretrainedCausalLM(vocab_size, config(kind, **changes)).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(p + 0.1 * torch.randn_like(p) if p.ndim == 1 else 0.4 * torch.randn_like(p))
    return network


def tokens(batch: int = 2, seq: int = 12) -> torch.Tensor:
    return torch.randint(37, (batch, seq), generator=torch.Generator().manual_seed(1))


@kinds
@torch.no_grad()
def test_a_directory_of_transformers_is_read_and_written_without_a_change(kind: str, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config(kind, vocab_size=38, pad_token_id=37)))
    theirs.eval().load_state_dict(awake(kind, 38).model.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    network, _ = load_model(tmp_path / "theirs")
    assert type(network) is PretrainedCausalLM
    save_model(tmp_path / "ours", network, byte_tokenizer())
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    expected = theirs(tokens()).logits
    for logits in (network(tokens()), load_model(tmp_path / "ours")[0](tokens()), again(tokens()).logits):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "ours/config.json").read_text())["eos_token_id"] == 0


PLAIN = SIZE | {"model_type": "llama"}
OWN = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
LACKED: dict[str, tuple[dict[str, Any], str]] = {
    "attention_bias": (PLAIN, "a Llama: attention_bias in config.json must be the default of plain Llama or Qwen3"),
    "hidden_act": (PLAIN, "a Llama: hidden_act in config.json must be the default of plain Llama or Qwen3"),
    "rope_parameters": (PLAIN, "a Llama: rope_type in config.json must be one of default, linear, llama3, yarn"),
    "use_sliding_window": (
        SIZE | {"model_type": "qwen3", "sliding_window": 4, "max_window_layers": 1},
        "a Llama: use_sliding_window in config.json must be the default of plain Llama or Qwen3",
    ),
    "scale_attn_by_inverse_layer_idx": (
        OWN,
        "a GPT2: scale_attn_by_inverse_layer_idx in config.json must be False, as in plain GPT-2",
    ),
}
VALUES = {"hidden_act": "gelu", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}}


@pytest.mark.parametrize("key", LACKED)
@torch.no_grad()
def test_what_the_class_written_here_lacks_is_read_by_transformers_own_which_is_said(
    key: str, tmp_path: Path, caplog
) -> None:
    (plain, why), value = LACKED[key], VALUES.get(key, True)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain, vocab_size=37, **{key: value})).eval()
    for p in theirs.parameters():
        p.copy_(p + 0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    said = f"Opening {tmp_path / 'theirs'} with a PretrainedCausalLM instead of {why}, but is "
    with caplog.at_level(logging.INFO, "lit_llm"):
        network, _ = load_model(tmp_path / "theirs")
    assert [message for message in caplog.messages if message.startswith(said)]
    assert type(network) is PretrainedCausalLM
    save_model(tmp_path / "ours", network)
    for made in (network, load_model(tmp_path / "ours")[0]):
        torch.testing.assert_close(made(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_a_name_that_transformers_has_nothing_for_is_refused() -> None:
    with pytest.raises(ValueError, match=exactly("config must name what transformers has, but names 'nothing'")):
        PretrainedCausalLM(37, config("mistral", hidden_act="nothing"))


@torch.no_grad()
def test_a_config_with_infinity_in_it_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba2", vocab_size=37, pad_token_id=0, **size))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    assert '"__float__": "Infinity"' in (tmp_path / "theirs/config.json").read_text()
    network, _ = load_model(tmp_path / "theirs")
    save_model(tmp_path / "ours", network)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert [*network.config.time_step_limit] == [*again.config.time_step_limit] == [0, float("inf")]
    expected = theirs(tokens()).logits
    torch.testing.assert_close(network(tokens()), expected)
    torch.testing.assert_close(again(tokens()).logits, expected)


@kinds
@torch.no_grad()
def test_documents_are_kept_apart_and_prompts_too_by_every_attention(kind: str) -> None:
    network, ids = awake(kind), tokens()
    documents = torch.tensor([[0] * 5 + [1] * 7] * 2)
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = network(ids, document_ids=documents, positions=positions)
    alone = torch.cat([network(ids[:, :5]), network(ids[:, 5:])], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(packed[:, 5:], network(ids)[:, 5:], atol=1e-2)
    prompts = [[5], [3, 14, 15, 9, 2, 6], [1, 2, 3]]
    each = [generate(network, [prompt], 7, temperature=0.0)[0] for prompt in prompts]
    assert generate(network, prompts, 7, temperature=0.0) == each


@kinds
@torch.no_grad()
def test_it_has_a_head_of_its_own_only_where_nothing_else_is_done_to_the_logits(kind: str) -> None:
    network, ids = awake(kind), tokens()
    assert hasattr(network, "hidden") == hasattr(network, "lm_head") == (kind not in SCALED | BIASED)
    if kind not in SCALED | BIASED:
        torch.testing.assert_close(network.hidden(ids) @ network.lm_head.weight.T, network(ids))
    elif kind in SCALED:
        head = network.model.get_output_embeddings()
        assert not torch.allclose(head(network.model.base_model(ids)[0]), network(ids), atol=1e-2)


def test_the_vocabulary_is_that_of_the_data() -> None:
    network = PretrainedCausalLM(11, config("mistral", vocab_size=32_000, pad_token_id=31_999))
    assert network(tokens() % 11).shape == (2, 12, 11)
    assert network.to_hf_config()["vocab_size"] == 11


@pytest.mark.parametrize("kind", ["mistral", "modernbert-decoder", "roberta"])
def test_the_embedding_of_the_boundary_learns_though_it_pads(kind: str) -> None:
    network = PretrainedCausalLM(11, config(kind, pad_token_id=0))
    assert network.model.get_input_embeddings().weight[0].abs().sum() > 0
    network(torch.zeros(1, 3, dtype=torch.long)).square().sum().backward()
    assert network.model.get_input_embeddings().weight.grad[0].abs().sum() > 0
    assert network.to_hf_config()["pad_token_id"] == 0


def test_an_architecture_that_must_have_a_token_keeps_its_own_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    network, tokenizer = awake("modernbert-decoder", bos_token_id=7, pad_token_id=9), byte_tokenizer()
    tokenizer.bos_token = tokenizer.pad_token = None
    save_model(tmp_path, network, tokenizer)
    written = json.loads((tmp_path / "config.json").read_text())
    assert [written[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [7, 0, 9]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)[0](tokens()), network(tokens()))


@pytest.mark.parametrize("kind", ["roberta", "camembert", "data2vec-text"])
@torch.no_grad()
def test_positions_that_are_counted_from_the_padding_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    network = PretrainedCausalLM(38, CONFIGS["roberta"] | {"model_type": kind, "pad_token_id": 37}).eval()
    assert (network.first_position, network.max_seq_len) == (38, 26)
    save_model(tmp_path, network, byte_tokenizer())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, mask = tokens(), torch.ones(2, 12, dtype=torch.long)
    ids[0, :5], mask[0, :5] = 37, 0
    logits = theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[:1, 5:], network(ids[:1, 5:]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1:], network(ids[1:]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1:], network(ids[1:], positions=torch.arange(12)[None]), atol=1e-5, rtol=1e-5)


def test_fresh_weights_take_the_padding_from_which_they_count_positions_of_the_tokeniser() -> None:
    tokenizer = train_bert_bpe(["ab"], 260)
    network = PretrainedCausalLM(len(tokenizer), config("roberta"))
    assert (network.first_position, network.max_seq_len) == (2, 62)
    network.read_tokens_of(tokenizer)
    assert tokenizer.pad_token_id == network.to_hf_config()["pad_token_id"] == 0
    assert (network.first_position, network.max_seq_len) == (1, 63)
    message = (
        "data.tokenizer must have a padding token of its own for a causal roberta, which counts positions by it, but "
        "pads with <|endoftext|>"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        network.read_tokens_of(byte_tokenizer())
    PretrainedCausalLM(257, config("mistral")).read_tokens_of(byte_tokenizer())


@torch.no_grad()
def test_a_network_that_is_made_again_counts_positions_from_where_it_learnt_them() -> None:
    tokenizer = train_bert_bpe(["ab"], 260)
    network, again = (PretrainedCausalLM(len(tokenizer), config("roberta")).eval() for _ in range(2))
    network.read_tokens_of(tokenizer)
    again.load_state_dict(network.eval().state_dict())
    again.recall_tokens(network.arguments["config"])
    assert (again.first_position, again.max_seq_len) == (1, 63)
    assert again.arguments == network.arguments
    torch.testing.assert_close(again(tokens()), network(tokens()))


def test_a_network_that_counts_positions_from_no_padding_is_refused() -> None:
    message = (
        "pad_token_id must be in the config of a causal roberta, which counts positions from it, and less than "
        "vocab_size, but is not"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        PretrainedCausalLM(37, config("roberta", pad_token_id=37))


def test_a_network_whose_attention_counts_distances_by_padding_is_refused_where_that_matters() -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = PretrainedCausalLM(37, {"model_type": "falcon", "alibi": True, **size})
    assert network(tokens()).shape == (2, 12, 37)
    line = r"\Anetwork must be made of attention [^\n]+, but a FalconForCausalLM has alibi\Z"
    with pytest.raises(ValueError, match=line):
        network(tokens(), document_ids=torch.zeros(2, 12, dtype=torch.long))
    with pytest.raises(ValueError, match=line):
        network.new_cache(2, 12)
    PretrainedCausalLM(37, {"model_type": "falcon", "alibi": False, **size}).new_cache(2, 12)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = PretrainedCausalLM(37, config("mistral"), activation_checkpointing=checkpointing).train()
        network(tokens(), document_ids=torch.tensor([[0] * 5 + [1] * 7] * 2)).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("config", "has"),
    [
        (
            {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
            r"MambaForCausalLM has linear_attention, [^\n]+",
        ),
        (
            {"model_type": "openai-gpt", "n_embd": 16, "n_layer": 1, "n_head": 2},
            "OpenAIGPTLMHeadModel has no cache of keys and values",
        ),
    ],
    ids=["mamba", "openai-gpt"],
)
def test_a_network_that_is_not_all_attention_or_has_no_cache_is_refused_where_that_matters(
    config: dict, has: str
) -> None:
    network = PretrainedCausalLM(37, config)
    assert network(tokens()).shape == (2, 12, 37)
    line = rf"\Anetwork must be made of attention [^\n]+, but a {has}\Z"
    for use in (
        lambda: network(tokens(), document_ids=torch.zeros(2, 12, dtype=torch.long)),
        lambda: network.new_cache(2, 12),
    ):
        with pytest.raises(ValueError, match=line):
            use()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "is_decoder must be true in the config of a causal bert, but is false"),
        (
            {"model_type": "bert-generation"},
            "is_decoder must be true in the config of a causal bert-generation, but is false",
        ),
        (
            {"model_type": "xlnet", "d_model": 16, "d_inner": 32, "n_layer": 1, "n_head": 2},
            "config must describe a network that sees no later token at any position, but a XLNetLMHeadModel of it "
            "does",
        ),
        (
            {"model_type": "gemma3_text", **SIZE, "use_bidirectional_attention": True},
            "config must describe a network that sees no later token at any position, but a Gemma3ForCausalLM of it "
            "does",
        ),
        ({"model_type": "vit"}, "model_type must be that of a causal language model, but is vit"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        PretrainedCausalLM(10, config)


@pytest.mark.parametrize("config", [{}, {"model_type": "no such"}, config("mistral", hidden_size="wide")], ids=str)
def test_a_config_of_nothing_is_refused_in_one_line(config: dict) -> None:
    with pytest.raises(ValueError, match=r"\Aconfig must describe a network of transformers, but does not: [^\n]+\Z"):
        PretrainedCausalLM(10, config)


def test_a_place_without_a_config_is_refused_in_one_line(tmp_path: Path) -> None:
    line = r"\Aconfig must be a directory with a config\.json or a name on the hub, but is [^\n]+\Z"
    with pytest.raises(FileNotFoundError, match=line):
        PretrainedCausalLM(10, str(tmp_path))


def test_missing_extra_and_misshapen_tensors_truncated_files_and_pickles_are_refused(tmp_path: Path) -> None:
    awake("mistral").model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"

    def refused(tensors: dict[str, torch.Tensor], line: str) -> None:
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=line):
            load_model(tmp_path)

    refused({n: t for n, t in whole.items() if n != name}, rf" no others, but {tmp_path} lacks {name}\Z")
    refused(whole | {"model.layers.1.bias": torch.ones(1)}, r" also has model\.layers\.1\.bias\Z")
    refused(
        whole | {name: torch.ones(3, 3)}, rf"\Amodel must have {name} of shape \[32, 16\], but .* of shape \[3, 3\]\Z"
    )
    save_file(whole, file, metadata={"format": "pt"})
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"\Amodel must hold whole weights, but [^\n]+\Z"):
        load_model(tmp_path)
    file.unlink()
    torch.save(whole, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"; pickles are not read, save them as safetensors\Z"):
        load_model(tmp_path)


HEADS = {
    "BertForMaskedLM": ({**BERT, "num_hidden_layers": 1}, ["bert.pooler.dense.weight", "cls.seq_relationship.bias"]),
    "RobertaForSequenceClassification": (
        {**BERT, "model_type": "roberta", "num_hidden_layers": 1},
        ["lm_head.dense.weight", "roberta.pooler.dense.weight"],
    ),
    "GPTNeoForCausalLM": (
        {"model_type": "gpt_neo", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
        | {"attention_types": [[["global"], 1]]},
        ["transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"],
    ),
}


@pytest.mark.parametrize("architecture", HEADS)
def test_heads_for_other_tasks_and_old_masks_are_passed_over_and_named(
    architecture: str, tmp_path: Path, caplog
) -> None:
    content, extra = HEADS[architecture]
    made = getattr(transformers, architecture)(AutoConfig.for_model(**content)).eval()
    made.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    save_file(whole | {name: torch.ones(1) for name in extra}, file, metadata={"format": "pt"})
    with caplog.at_level(logging.INFO, "lit_llm"):
        network, _ = load_model(tmp_path)
    assert all(torch.equal(tensor, network.model.state_dict()[name]) for name, tensor in made.state_dict().items())
    line = f"Passing over what a {architecture} does not read in {tmp_path}: {', '.join(extra)}"
    assert [record.getMessage() for record in caplog.records if record.name.startswith("lit_llm")] == [line]
    base = made.base_model_prefix
    for name in (f"{base}.layers.1.pooler.weight", f"{base}.norm.weight", f"{base}.bias", "projection.weight"):
        save_file(whole | {name: torch.ones(1)}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf" also has {name}\Z"):
            load_model(tmp_path)
