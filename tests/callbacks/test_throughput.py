from __future__ import annotations

import torch

from lit_llm.callbacks.throughput import count_items, peak_flops, peak_memory


def test_text_is_counted_in_tokens_and_all_else_in_rows():
    assert count_items({"input_ids": torch.zeros(3, 5), "labels": torch.zeros(3, 5)}) == 15
    assert count_items({"image": torch.zeros(4, 1, 28, 28)}) == 4
    assert count_items((torch.zeros(2, 8), torch.zeros(2))) == 2


def test_the_peak_of_a_cpu_is_one_that_a_product_reaches():
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e9 < peak < 1e14


def test_memory_is_that_of_this_process():
    before = peak_memory(torch.device("cpu"))
    kept = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory(torch.device("cpu")) >= before > kept.numel()
