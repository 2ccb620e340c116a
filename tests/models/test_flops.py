from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_llm.adaptation import Adaptation, FrozenLayers, HeadOnly, LoRA
from lit_llm.models.gpt2 import GPT2
from lit_llm.models.llama import Llama


@pytest.mark.parametrize("kind", [Llama, GPT2])
@pytest.mark.parametrize(
    ("adaptation", "tied"),
    [
        (LoRA(rank=4), False),
        (LoRA(rank=4), True),
        (HeadOnly(), False),
        (FrozenLayers(0), True),
        (FrozenLayers(2), False),
        (FrozenLayers(2), True),
    ],
)
def test_what_is_frozen_is_counted_as_far_as_gradients_go(
    kind: type[Llama | GPT2], adaptation: Adaptation, tied: bool
) -> None:
    seq = 64
    network = kind(500, d_model=64, num_layers=4, num_heads=4, tie_embeddings=tied)
    adaptation.prepare(network)
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(2, seq, dtype=torch.long)).sum().backward()
    # The rule counts vectors as matrices, and in the first block an input gradient that is not computed.
    assert network.flops_per_token(seq) == pytest.approx(counter.get_total_flops() / (2 * seq), rel=0.04)
