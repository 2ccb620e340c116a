"""Importance of a network's units, measured on calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.compression.calibration import answer, gather, watching
from lit_llm.compression.compression import Batch
from lit_llm.modes import evaluating


def column_squares(
    network: nn.Module, layers: Mapping[str, nn.Linear], width: int, batches: list[Batch]
) -> dict[str, Tensor]:
    """Contribution of each unit (`width` inputs of a layer) to the output: `Σ E[x²] ‖column‖²` over its inputs."""
    sums, counts = gather(network, layers, batches, lambda read: read.square().sum(0))
    return {
        name: (sums[name].float() / counts[name] * layer.weight.detach().float().square().sum(0))
        .unflatten(0, (-1, width))
        .sum(1)
        for name, layer in layers.items()
    }


def cross_entropy(network: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats, summed over targets, with the batch's `labels`, or else with the most likely class."""
    logits = answer(network, batch)
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        labels = logits.detach().argmax(-1)
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum")


def taylor(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: list[Batch],
    units: Callable[[Tensor], Tensor],
    outputs: bool = False,
) -> dict[str, Tensor]:
    """First-order change of the loss if a unit's activation `a` were 0: `|Σ a · ∂L/∂a|`, summed over examples.

    Args:
        network: Any network.
        layers: Layers whose inputs (or outputs) are the activations.
        batches: Calibration batches, with labels if there are any.
        units: Sums the products of an example to one number per unit: from (batch, …) to (batch, units).
        outputs: Use the layers' outputs instead of their inputs.

    Source:
        Molchanov et al., 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference",
        arXiv:1611.06440, eq. 7; for heads Michel et al., 2019, arXiv:1905.10650, eq. 2.
    """
    totals: dict[str, Tensor] = {}
    for batch in batches:
        seen: dict[str, Tensor] = {}
        learning = {p: p.requires_grad for p in network.parameters()}
        try:
            for p in network.parameters():  # gradients must reach the activations in a frozen network too
                p.requires_grad_(True)
            with evaluating(network), watching(layers, seen.__setitem__, outputs), torch.enable_grad():
                loss = cross_entropy(network, batch)
                gradients = torch.autograd.grad(loss, list(seen.values()))
        finally:
            for p, learns in learning.items():
                p.requires_grad_(learns)
        for (name, a), gradient in zip(seen.items(), gradients):
            totals[name] = totals.get(name, 0) + units(a.detach() * gradient).abs().sum(0)
    return totals


def per_example(x: Tensor) -> Tensor:
    """Sums over positions: (batch, …, inputs) to (batch, inputs)."""
    return x.flatten(1, -2).sum(1) if x.ndim > 2 else x
