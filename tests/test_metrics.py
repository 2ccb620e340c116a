import math

import numpy as np
import pytest
import torch

from lit_llm.batch import IGNORE_INDEX
from lit_llm.metrics import LanguageModeling

ROWS, SEQ = 12, 9


def reference(nats: torch.Tensor, labels: torch.Tensor, num_bytes: torch.Tensor | None) -> dict[str, float]:
    counted = labels.numpy() != IGNORE_INDEX
    total = nats.numpy().astype(np.float64)[counted].sum()
    found = {"loss": total / counted.sum(), "perplexity": np.exp(total / counted.sum())}
    if num_bytes is not None:
        found["bits_per_byte"] = total / np.log(2) / num_bytes.numpy().astype(np.float64).sum()
    return found


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    nats, labels, num_bytes = 3 * torch.rand(ROWS, SEQ), torch.randint(50, (ROWS, SEQ)), 40 * torch.rand(ROWS)
    for row in range(ROWS):
        labels[row, SEQ - row % 4 :] = IGNORE_INDEX
    return nats.masked_fill(labels == IGNORE_INDEX, 0.0), labels, num_bytes


def measured(data: tuple[torch.Tensor, ...], batches: list[list[int]]) -> dict[str, float]:
    metric = LanguageModeling()
    for rows in batches:
        metric.update(*(part[rows] for part in data))
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("with_bytes", [False, True])
def test_metrics_are_those_of_the_whole_in_numpy(data, with_bytes: bool) -> None:
    given = data if with_bytes else data[:2]
    assert measured(given, [list(range(ROWS))]) == pytest.approx(reference(*data[:2], data[2] if with_bytes else None))


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_neither_order_nor_batches_matter(data, size: int) -> None:
    order = torch.randperm(ROWS).tolist()
    batches = [order[start : start + size] for start in range(0, ROWS, size)]
    assert measured(data, batches) == pytest.approx(reference(*data), rel=1e-6)


def test_sums_do_not_lose_small_parts_in_large_ones() -> None:
    metric = LanguageModeling()
    labels = torch.zeros(1, 1, dtype=torch.long)
    metric.update(torch.full((1, 1), 1e9), labels)
    for _ in range(1000):
        metric.update(torch.full((1, 1), 1.0), labels)
    assert metric.nats.item() == 1e9 + 1000


def test_knowing_nothing_of_bytes_is_eight_bits_a_byte() -> None:
    metric = LanguageModeling()
    metric.update(torch.full((2, 5), math.log(256)), torch.zeros(2, 5, dtype=torch.long), torch.tensor([5.0, 5.0]))
    found = metric.compute()
    assert found["bits_per_byte"].item() == pytest.approx(8)
    assert found["perplexity"].item() == pytest.approx(256, rel=1e-5)


def test_a_reset_metric_begins_anew(data) -> None:
    metric = LanguageModeling()
    metric.update(*data)
    metric.reset()
    metric.update(*(part[:3] for part in data))
    assert {k: v.item() for k, v in metric.compute().items()} == pytest.approx(reference(*(p[:3] for p in data)))
