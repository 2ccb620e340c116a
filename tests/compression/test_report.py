from __future__ import annotations

import torch
from torch import nn

from lit_llm.compression.quantization import Int4WeightOnly, Int8WeightOnly
from lit_llm.compression.report import count_nonzero, count_parameters, peak_memory, rows_of, speeds
from lit_llm.compression.sparsity import Magnitude


def test_a_weight_counts_as_one_however_few_bits_it_has(tiny_llama):
    network = tiny_llama(tie_embeddings=True)
    before = count_parameters(network)
    assert before == sum(p.numel() for p in network.parameters())
    Magnitude(0.5).apply(network)
    pruned = count_nonzero(network)
    inside = sum(
        m.weight.numel() for name, m in network.named_modules() if "layers" in name and isinstance(m, nn.Linear)
    )
    assert pruned == before - inside // 2
    Int4WeightOnly(group_size=16).apply(network)
    assert count_parameters(network) == before
    assert count_nonzero(network) <= pruned  # small weights round to zero


def test_memory_is_the_state_and_the_most_that_is_alive_at_once():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 100, bias=False), nn.Linear(100, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu())

    batch = {"x": torch.zeros(10, 8)}
    network, state = Chain(), 4 * (800 + 400)
    wide = 4 * 10 * 100
    assert state + 2 * wide <= peak_memory(network, batch) < state + 3 * wide
    assert peak_memory(network, rows_of(batch, 20)) > peak_memory(network, batch) + 2 * wide - 4 * 20 * 8
    Int8WeightOnly(["first"]).apply(network)
    assert peak_memory(network, batch) < state + 3 * wide


def test_what_looks_at_a_weight_is_not_counted_beside_it():
    network = nn.Sequential(nn.Linear(100, 50, bias=False))
    assert peak_memory(network, {"input": torch.zeros(2, 100)}) == 4 * 100 * 50 + 4 * 2 * 50


def test_speeds_are_of_one_row_and_of_thirty_two(tiny_llama):
    batch = {"input_ids": torch.randint(37, (3, 8)), "labels": torch.zeros(3, 8), "size": 3}
    assert rows_of(batch, 5)["input_ids"].tolist() == batch["input_ids"][[0, 1, 2, 0, 1]].tolist()
    found = speeds({"a": tiny_llama(), "b": tiny_llama(num_layers=1)}, batch, repeats=3)
    assert set(found) == {"a", "b"}
    for row in found.values():
        assert row["latency_ms_p50"] <= row["latency_ms_p95"]
        assert abs(row["throughput"] * row["latency_ms_p50_b32"] - 32_000) < 1
