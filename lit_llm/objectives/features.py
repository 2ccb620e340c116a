"""Cached features of a frozen backbone, computed once for each example."""

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
    """The features of the examples of one split, so that a step only has to compute the head.

    They are computed in one pass in a fixed order, without dropout, so they depend neither on the order of training nor
    on the step at which a run is resumed.

    Args:
        network: Its `features` returns tensors with one row per example.
        batches: All examples of the split.
        num_rows: Number of rows of the split.
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
        """The features of some rows, as input of `network.classify`."""
        return {name: stored[rows] for name, stored in self._features.items()}


def can_be_cached(network: Any, batch: Mapping[str, Tensor]) -> bool:
    """Whether features have the same size for all examples, as they do unless the head reads whole sequences."""
    device = next(network.parameters()).device
    with evaluating(network), torch.no_grad():
        given = network.features(**{name: x.to(device) for name, x in inputs(batch).items()})
    return "last_hidden_state" not in given


def features_of(
    network: Any, data: Any, forward_context: Callable[[], AbstractContextManager[Any]]
) -> dict[RunningStage, FeatureCache]:
    """Computes the features of the training and validation split once; empty if network or data do not support it.

    Args:
        network: A network with `features` and `classify`; for others the result is empty.
        data: A data module with `ordered_dataloader`; for others the result is empty.
        forward_context: Context of the network's computation, such as autocast.

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
        # Each process reads the whole split, because its training batches come from all of it.
        if loader := data.ordered_dataloader(split, share=False):
            with forward_context():
                found[stage] = FeatureCache(network, loader, loader.num_rows)
    log.info(f"Cached the features of the frozen backbone for all examples in {time.perf_counter() - started:.0f} s")
    return found
