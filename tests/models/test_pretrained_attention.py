from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from lit_llm.models import pretrained_attention
from lit_llm.models.pretrained_attention import NAME, attend_faster
from tests.models.test_pretrained import config
from tests.models.test_pretrained_classifier import config as encoder_config

KINDS = {
    "bert": encoder_config("bert"),
    "modernbert": encoder_config("modernbert", local_attention=4),
    "gpt2": {"model_type": "gpt2", "vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "mistral": config("mistral", vocab_size=37),  # grouped queries
    "vit": encoder_config("vit"),
}


def pair(kind: str) -> list[torch.nn.Module]:
    """The same network with transformers' attention, and with this package's."""
    torch.manual_seed(0)
    made = [AutoModel.from_config(AutoConfig.for_model(**KINDS[kind])) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    attend_faster(made[1])
    return made


def inputs(kind: str) -> dict[str, Any]:
    torch.manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 1, 8, 8)}
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 5:] = 0  # with a window of four, the last queries may attend to nothing
    return {"input_ids": torch.randint(2, 37, (2, 16)), "attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_transformers_own_attention(kind: str, monkeypatch) -> None:
    taken = []
    products = pretrained_attention.attend_by_products
    monkeypatch.setattr(
        pretrained_attention, "attend_by_products", lambda *args: taken.append(len(args)) or products(*args)
    )
    theirs, ours = pair(kind)
    given = inputs(kind)
    there = given["attention_mask"].bool() if "attention_mask" in given else ...
    found = []
    for network in (theirs, ours):
        network.eval()  # without dropout
        with torch.autocast("cpu", torch.bfloat16):
            y = network(**given)[0][there].float()
        y.pow(2).mean().backward()
        grads = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        found.append((y, grads))
    assert len(taken) == 2  # one call per layer
    (y, grads), (expected, expected_grads) = found[1], found[0]
    torch.testing.assert_close(y, expected, atol=5e-2, rtol=5e-2)
    assert torch.cosine_similarity(grads, expected_grads, dim=0) > 0.999


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_gradients_nothing_differs(kind: str) -> None:
    theirs, ours = (network.eval() for network in pair(kind))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(theirs(**inputs(kind))[0], ours(**inputs(kind))[0])


def test_what_is_saved_does_not_name_it(tmp_path: Path) -> None:
    _, ours = pair("bert")
    assert ours.config._attn_implementation == NAME
    ours.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_network_whose_code_asks_for_attention_by_its_name_stays_as_it_is() -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "n_routed_experts": 2, "n_group": 1}
    size |= {"num_experts_per_tok": 1, "topk_group": 1, "moe_intermediate_size": 8}
    sparse = AutoModel.from_config(AutoConfig.for_model("deepseek_v32", vocab_size=37, **size))  # would become dense
    assert sparse._can_set_attn_implementation()
    attend_faster(sparse)
    assert sparse.config._attn_implementation == "sdpa"
