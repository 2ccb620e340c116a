"""What a frozen backbone gives for each example, made once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Int
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor

from lit_llm.batch import inputs
from lit_llm.modes import evaluating

log = logging.getLogger(__name__)


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


def features_of(
    network: Any, data: Any, forward_context: Callable[[], AbstractContextManager[Any]]
) -> dict[RunningStage, FeatureCache]:
    """Has a frozen backbone read each example of training and validation once, where network and data can do with that.

    Args:
        network: One with `features`; of others there are none.
        data: The data module; has `ordered_dataloader`, or there are none.
        forward_context: What the network computes in, such as autocast.

    Raises:
        ValueError: When training examples are augmented.
    """
    if not hasattr(network, "features") or not hasattr(data, "ordered_dataloader"):
        return {}
    if getattr(data, "augmentation", None) is not None:
        raise ValueError(
            "model.adaptation.cache_features must be false where training examples are augmented, but is true"
        )
    if not can_be_cached(network, next(iter(data.ordered_dataloader("train", share=False)))):
        log.info("The head reads whole sequences, so the features of the frozen backbone cannot be cached")
        return {}
    started, found = time.perf_counter(), {}
    for stage, split in ((RunningStage.TRAINING, "train"), (RunningStage.VALIDATING, "validation")):
        # Each process reads all of it, since what it trains on comes from all of it.
        if loader := data.ordered_dataloader(split, share=False):
            with forward_context():
                found[stage] = FeatureCache(network, loader, loader.num_rows)
    log.info(f"Cached the features of the frozen backbone for all examples in {time.perf_counter() - started:.0f} s")
    return found
