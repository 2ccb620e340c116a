"""What a frozen backbone gives for each example, made once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lit_llm.batch import inputs
from lit_llm.compression.calibration import evaluating


class FeatureCache:
    """The features of the examples of one split, by row: with them a step costs what the head costs.

    They are made in one pass in a fixed order, with dropout off, so that they depend neither on the order of training
    nor on where a resumed run goes on.

    Args:
        network: Has `features`, which gives tensors with a row for each example.
        batches: All examples of the split.
        num_rows: Rows of the split.
    """

    def __init__(self, network: Any, batches: Iterable[Mapping[str, Tensor]], num_rows: int) -> None:
        device = next(network.parameters()).device
        self._features: dict[str, Tensor] = {}
        with evaluating(network), torch.no_grad():
            for batch in batches:
                given = network.features(**{name: x.to(device) for name, x in inputs(batch).items()})
                for name, part in given.items():
                    if name not in self._features:
                        self._features[name] = part.new_full((num_rows, *part.shape[1:]), torch.nan)
                    self._features[name][batch["rows"].to(device)] = part

    def __call__(self, rows: Int[Tensor, " batch"]) -> dict[str, Tensor]:
        """What `network.classify` reads, for some rows."""
        return {name: stored[rows] for name, stored in self._features.items()}


def can_be_cached(network: Any, batch: Mapping[str, Tensor]) -> bool:
    """Whether each example has features of one size: not where the head reads whole sequences."""
    device = next(network.parameters()).device
    with evaluating(network), torch.no_grad():
        given = network.features(**{name: x.to(device) for name, x in inputs(batch).items()})
    return "last_hidden_state" not in given
