"""How much the units of a network matter, by what they do on calibration batches."""

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
    """For each unit, `width` inputs of a layer, how much it gives the output: `Σ E[x²] ‖column‖²` over its inputs."""
    sums, counts = gather(network, layers, batches, lambda read: read.square().sum(0))
    return {
        name: (sums[name].float() / counts[name] * layer.weight.detach().float().square().sum(0))
        .unflatten(0, (-1, width))
        .sum(1)
        for name, layer in layers.items()
    }


def cross_entropy(network: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy, in nats summed over targets, of a batch's `labels`; without them of what is most likely."""
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
    """How much the loss would change, to first order, if a unit gave nothing: `|Σ a · ∂L/∂a|`, summed over examples.

    Args:
        network: Any network.
        layers: Whose inputs, or outputs, are looked at.
        batches: With labels, where there are any.
        units: Sums the products of an example into one number a unit: from (batch, …) to (batch, units).
        outputs: Look at outputs.

    Source:
        Molchanov et al., 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference",
        arXiv:1611.06440, eq. 7; for heads Michel et al., 2019, arXiv:1905.10650, eq. 2.
    """
    totals: dict[str, Tensor] = {}
    for batch in batches:
        seen: dict[str, Tensor] = {}
        learning = {p: p.requires_grad for p in network.parameters()}
        try:
            for p in network.parameters():  # what is looked at must be on the way of a gradient
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
    """Summed over positions: (batch, …, inputs) to (batch, inputs)."""
    return x.flatten(1, -2).sum(1) if x.ndim > 2 else x
