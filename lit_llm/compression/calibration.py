"""Outputs of a network on calibration batches, and statistics of its layers' inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_llm.batch import inputs
from lit_llm.modes import evaluating


def answer(network: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The network's output on a batch, called with those fields of the batch that its `forward` accepts."""
    asked = inspect.signature(network.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in asked):
        return network(**inputs(batch))
    return network(**{p.name: batch[p.name] for p in asked if p.name in batch})


@contextmanager
def watching(
    layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None], outputs: bool = False
) -> Iterator[None]:
    """Calls `see` with each layer's name and its first input (or its output) while the network runs."""

    def before(name: str) -> Callable[..., None]:
        return lambda module, args: see(name, args[0])

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, output: see(name, output)

    handles = [
        layer.register_forward_hook(after(name)) if outputs else layer.register_forward_pre_hook(before(name))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def vectors(layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> Float[Tensor, "n inputs"]:
    """The vectors that a layer multiplies by its weight, as a matrix: a text's tokens, or a convolution's patches.

    Args:
        layer: A linear layer, a convolution without groups, or a block (for its inputs or outputs).
        x: Its input.
        mask: 1 on tokens and 0 on padding, which is left out; ignored unless `x` is `batch seq inputs` like the mask.

    Raises:
        ValueError: For a convolution with groups, or with padding other than a number of zeros.
    """
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise ValueError(
                f"layers must be convolutions without groups and padded by a number of zeros, but one is {layer}"
            )
        flat = isinstance(layer, nn.Conv1d)  # as an image one pixel high
        lead, still = ((1,), (0,)) if flat else ((), ())
        options = {
            "kernel_size": lead + layer.kernel_size,
            "dilation": lead + layer.dilation,
            "padding": still + layer.padding,
            "stride": lead + layer.stride,
        }
        return F.unfold(x.unsqueeze(-2) if flat else x, **options).mT.flatten(0, 1)
    if mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape:
        return x[mask.bool()]
    return x.flatten(0, -2)


def mask_of(batch: Mapping[str, Any]) -> Tensor | None:
    """The batch's mask for `vectors`: 1 on tokens and 0 on padding; `None` if there is none."""
    mask = batch.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


@torch.no_grad()
def gather(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    statistic: Callable[[Float[Tensor, "n inputs"]], Tensor],
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Sums a statistic of each layer's inputs over all batches, in float64, and counts the input vectors.

    Raises:
        ValueError: When a layer gets no input.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for batch in batches:
        mask = mask_of(batch)

        def see(name: str, x: Tensor, mask: Tensor | None = mask) -> None:
            read = vectors(layers[name], x, mask).float()
            sums[name] = sums.get(name, 0) + statistic(read).double()
            counts[name] = counts.get(name, 0) + len(read)

        with evaluating(network), watching(layers, see):
            answer(network, batch)
    if unread := [name for name in layers if not counts.get(name)]:
        raise ValueError(f"layers must each read something of the calibration batches, but {unread[0]} reads nothing")
    return sums, counts


def input_norms(
    network: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Float[Tensor, " inputs"]]:
    """The root mean square of each layer's inputs, per input feature."""
    sums, counts = gather(network, layers, batches, lambda read: read.square().sum(0))
    return {name: (total / counts[name]).sqrt().float() for name, total in sums.items()}


def input_covariances(
    network: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Float[Tensor, "inputs inputs"]]:
    """The mean of `x xᵀ` over each layer's inputs (not centred), in float64."""
    # In float32, directions with hardly any variance would get a negative one.
    sums, counts = gather(network, layers, batches, lambda read: read.double().T @ read.double())
    return {name: total / counts[name] for name, total in sums.items()}
