import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lit_llm.checkpoints import load_model, save_model
from lit_llm.models.attention import KVCache
from lit_llm.models.llama import Llama
from lit_llm.models.rotary import Llama3Scaling, PositionInterpolation, YaRN, rotation
from tests.writing import exactly

VARIANTS = [
    {"tie_embeddings": tied, "num_kv_heads": kv_heads, "qk_norm": qk_norm}
    for tied in (False, True)
    for kv_heads in (4, 2)
    for qk_norm in (False, True)
]


def name(variant: dict[str, object]) -> str:
    parts = ("tied" if variant["tie_embeddings"] else "untied", f"{variant['num_kv_heads']}kv")
    return "-".join((*parts, "qk_norm" if variant["qk_norm"] else "plain"))


variants = pytest.mark.parametrize("variant", VARIANTS, ids=name)


def tokens(batch: int = 2, seq: int = 12, vocab: int = 37) -> torch.Tensor:
    return torch.randint(vocab, (batch, seq), generator=torch.Generator().manual_seed(1))


@variants
def test_transformers_computes_the_same_from_an_exported_directory(tiny_llama, tmp_path: Path, variant) -> None:
    network = tiny_llama(rope_base=5000.0, norm_eps=1e-5, **variant)
    save_model(tmp_path / "model", network)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(theirs) is (Qwen3ForCausalLM if variant["qk_norm"] else LlamaForCausalLM)
    assert theirs.num_parameters() == sum(p.numel() for p in network.parameters())
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, network(tokens()), atol=1e-5, rtol=1e-5)


@variants
def test_the_same_is_computed_from_a_directory_of_transformers(tmp_path: Path, variant) -> None:
    kind, config = (Qwen3ForCausalLM, Qwen3Config) if variant["qk_norm"] else (LlamaForCausalLM, LlamaConfig)
    theirs = kind(
        config(
            vocab_size=37,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=variant["num_kv_heads"],
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=variant["tie_embeddings"],
            rope_parameters={"rope_type": "default", "rope_theta": 777.0},
        )
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape) * p.shape[-1] ** -0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    network, tokenizer = load_model(tmp_path / "theirs")
    assert tokenizer is None
    assert (network.d_head, network.rope_base, network.qk_norm) == (16, 777.0, variant["qk_norm"])
    with torch.no_grad():
        torch.testing.assert_close(network(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


@variants
def test_an_exported_directory_is_read_back_bit_by_bit(tiny_llama, tmp_path: Path, variant) -> None:
    network = tiny_llama(**variant)
    save_model(tmp_path / "model", network)
    again, _ = load_model(tmp_path / "model")
    assert not again.training
    assert again.to_hf_config() == network.to_hf_config()
    for (here, p), (there, q) in zip(network.named_parameters(), again.named_parameters(), strict=True):
        assert here == there
        assert torch.equal(p, q)


@variants
def test_no_future_token_changes_a_past_logit(tiny_llama, variant) -> None:
    network, ids = tiny_llama(**variant), tokens()
    with torch.no_grad():
        before = network(ids)
        for place in range(1, ids.shape[1]):
            changed = ids.clone()
            changed[:, place] = (changed[:, place] + 1) % 37
            after = network(changed)
            torch.testing.assert_close(after[:, :place], before[:, :place], atol=1e-6, rtol=0)
            assert not torch.allclose(after[:, place:], before[:, place:], atol=1e-3)


@variants
def test_documents_packed_into_a_row_are_read_as_if_each_were_alone(tiny_llama, variant) -> None:
    network, ids = tiny_llama(**variant), tokens(batch=1, seq=12)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    with torch.no_grad():
        packed = network(ids, document_ids=documents)
        alone = torch.cat([network(ids[:, documents[0] == number]) for number in range(3)], dim=1)
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(packed[:, 5:], network(ids)[:, 5:], atol=1e-2)


@variants
def test_reading_with_a_cache_step_by_step_is_reading_at_once(tiny_llama, variant) -> None:
    network, ids = tiny_llama(**variant), tokens()
    cache = KVCache(2, 12)
    with torch.no_grad():
        pieces = [network(piece, cache=cache) for piece in ids.split((5, 1, 1, 4, 1), dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), network(ids), atol=1e-5, rtol=1e-5)
    assert cache.length == 12


def test_a_cache_works_with_activation_checkpointing_too(tiny_llama) -> None:
    network, ids = tiny_llama(activation_checkpointing=True), tokens()
    cache = KVCache(2, 12)
    pieces = [network(piece, cache=cache).detach() for piece in ids.split((7, 5), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), network(ids).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(tiny_llama, masked: bool) -> None:
    ids = tokens()
    documents = torch.tensor([[0] * 5 + [1] * 7] * 2) if masked else None
    gradients = []
    for checkpointing in (False, True):
        network = tiny_llama(activation_checkpointing=checkpointing).train()
        F.cross_entropy(network(ids, document_ids=documents)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients, atol=0, rtol=0)
    assert all(g.abs().max() > 0 for g in gradients[0])


def test_activation_checkpointing_keeps_less_for_the_backward_pass(tiny_llama) -> None:
    kept = []
    for checkpointing in (False, True):
        network, sizes = tiny_llama(activation_checkpointing=checkpointing), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            network(tokens())
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


@variants
def test_gradients_are_those_of_transformers(tiny_llama, tmp_path: Path, variant) -> None:
    network, ids = tiny_llama(**variant), tokens()
    save_model(tmp_path / "model", network)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for logits in (network(ids), theirs(ids).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {key: p.grad for key, p in theirs.named_parameters()}
    found = {network.hf_name(key): p.grad for key, p in network.named_parameters()}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_positions_may_be_shifted_all_together_but_not_one_alone(tiny_llama) -> None:
    network, ids = tiny_llama(), tokens()
    with torch.no_grad():
        plain = network(ids)
        torch.testing.assert_close(network(ids, positions=torch.arange(12)[None] + 9), plain, atol=1e-4, rtol=1e-4)
        stretched = network(ids, positions=torch.arange(12)[None] * 2)
    assert not torch.allclose(stretched, plain, atol=1e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_per_token_are_those_counted(tied: bool) -> None:
    seq = 64
    network = Llama(500, d_model=64, num_layers=3, num_heads=4, num_kv_heads=2, tie_embeddings=tied)
    ids = tokens(seq=seq)
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(ids).sum().backward()
    # The formula counts the gains of norms as matrices; nothing else differs.
    assert network.flops_per_token(seq) == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.005)


def test_a_fresh_network_knows_nothing() -> None:
    network, ids = Llama(101, d_model=32, num_layers=2, num_heads=2), tokens(vocab=101)
    loss = F.cross_entropy(network(ids).flatten(0, 1), ids.flatten())
    assert loss.item() == pytest.approx(math.log(101), rel=1e-6)


def test_fresh_weights_have_the_stated_spread() -> None:
    for tied, spread in ((False, 1.0), (True, 0.02)):
        network = Llama(1000, d_model=128, num_layers=2, num_heads=4, d_ff=256, tie_embeddings=tied)
        for key, p in network.named_parameters():
            if "norm" in key:
                assert (p == 1).all()
            elif key == "embed_tokens.weight":
                assert p.std().item() == pytest.approx(spread, rel=0.02)
            elif key.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                assert (p == 0).all()
            else:
                assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.05)


def test_each_block_of_a_fresh_network_is_the_identity() -> None:
    network, ids = Llama(50, d_model=32, num_layers=3, num_heads=2), tokens()
    torch.testing.assert_close(network.hidden(ids), network.norm(network.embed_tokens(ids)))


def test_the_width_inside_is_eight_thirds_rounded_up_to_64() -> None:
    assert [Llama(2, d_model=d, num_layers=1, num_heads=1).d_ff for d in (24, 48, 96, 256)] == [64, 128, 256, 704]


def test_the_loss_on_one_batch_falls() -> None:
    network, ids = Llama(37, d_model=32, num_layers=2, num_heads=4), tokens(batch=4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(network(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide d_model, but is 5 with d_model 32"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, but is 3 with num_heads 4"),
        ({"num_kv_heads": 8}, "num_kv_heads must divide num_heads, but is 8 with num_heads 4"),
        ({"d_head": 7}, "d_head must be even for rotary positions, but is 7"),
        ({"num_heads": 32}, "d_head must be even for rotary positions, but is 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        Llama(**({"vocab_size": 10, "d_model": 32, "num_layers": 1, "num_heads": 4} | changes))


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"hidden_act": "gelu"}, "hidden_act", "'gelu'"),
        ({"attention_bias": True}, "attention_bias", "True"),
        ({"mlp_bias": True}, "mlp_bias", "True"),
        ({"use_sliding_window": True}, "use_sliding_window", "True"),
        ({"attention_dropout": 0.1}, "attention_dropout", "0.1"),
    ],
)
def test_a_config_that_asks_for_another_network_is_refused(tiny_llama, changes, key: str, value: str) -> None:
    message = f"{key} in config.json must be the default of plain Llama or Qwen3, but is {value}"
    with pytest.raises(ValueError, match=exactly(message)):
        Llama.from_hf_config(tiny_llama().to_hf_config() | changes)


SCALINGS = [
    PositionInterpolation(4.0),
    Llama3Scaling(8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=20),
    YaRN(4.0, original_max_seq_len=40, beta_fast=4.0),
    YaRN(2.0, original_max_seq_len=16, attention_factor=1.5),
]
scalings = pytest.mark.parametrize("scaling", SCALINGS, ids=str)


@pytest.mark.parametrize("qk_norm", [False, True])
@scalings
def test_scaled_positions_go_out_to_transformers_and_come_back(tiny_llama, tmp_path, scaling, qk_norm) -> None:
    network, ids = tiny_llama(rope_base=500.0, rope_scaling=scaling, d_head=16, qk_norm=qk_norm), tokens(seq=64)
    save_model(tmp_path / "model", network)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again, _ = load_model(tmp_path / "model")
    theirs.save_pretrained(tmp_path / "theirs")
    back, _ = load_model(tmp_path / "theirs")
    assert again.rope_scaling == scaling
    assert back.rope_scaling.scaled(torch.ones(8), 500.0).equal(scaling.scaled(torch.ones(8), 500.0))
    with torch.no_grad():
        expected = theirs(ids).logits
        for ours in (network, again, back):
            torch.testing.assert_close(ours(ids), expected, atol=1e-5, rtol=1e-5)
        plain = tiny_llama(rope_base=500.0, d_head=16, qk_norm=qk_norm)
        assert not torch.allclose(plain(ids), expected, atol=1e-2)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 777.0}, (777.0, None)),
        ({"rope_theta": 777, "rope_scaling": None}, (777.0, None)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, (5e5, PositionInterpolation(2.0))),
        (
            {
                "rope_theta": 500_000.0,
                "rope_scaling": {
                    "factor": 32.0,
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192,
                    "rope_type": "llama3",
                },
            },
            (500_000.0, Llama3Scaling(32.0)),
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, (10_000.0, YaRN(4.0, original_max_seq_len=64))),
        (
            {
                "original_max_position_embeddings": 32,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            },
            (10_000.0, YaRN(4.0, original_max_seq_len=32)),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}},
            (10_000.0, YaRN(4.0, original_max_seq_len=16)),
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, (10_000.0, None)),
    ],
    ids=str,
)
def test_positions_are_read_from_configs_old_and_new_as_transformers_reads_them(tiny_llama, rope, expected) -> None:
    config = {k: v for k, v in tiny_llama().to_hf_config().items() if k != "rope_parameters"} | rope
    network = Llama.from_hf_config(config)
    assert (network.rope_base, network.rope_scaling) == expected
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config))
    found = rotation(torch.arange(9)[None], network.d_head, *expected)
    for ours, their in zip(found, theirs(torch.zeros(1), torch.arange(9)[None]), strict=True):
        torch.testing.assert_close(ours[:, 0], their[..., : network.d_head // 2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_a_config_that_leaves_out_the_width_of_a_head_means_what_it_means_to_transformers(tiny_llama, kind) -> None:
    config = tiny_llama(qk_norm=kind is Qwen3Config).to_hf_config()
    del config["head_dim"]
    assert Llama.from_hf_config(config).d_head == kind(**config).head_dim


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "longrope", "factor": 2.0},
            "rope_type in config.json must be one of default, linear, llama3, yarn, but is 'longrope'",
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7},
            "rope_parameters in config.json must have no mscale with rope_type yarn, but it is 0.7",
        ),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            "rope_parameters in config.json must have no partial_rotary_factor with rope_type default, but it is 0.5",
        ),
        (
            {"rope_type": "linear", "factor": None},
            "rope_parameters in config.json must have a factor with rope_type linear, but have none",
        ),
    ],
)
def test_positions_of_another_kind_are_refused(tiny_llama, rope, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        Llama.from_hf_config(tiny_llama().to_hf_config() | {"rope_parameters": rope})


def test_a_network_without_memory_knows_its_shapes() -> None:
    with torch.device("meta"):
        network = Llama(50, d_model=32, num_layers=2, num_heads=4, qk_norm=True)
        assert network(torch.zeros(2, 12, dtype=torch.long)).shape == (2, 12, 50)
