"""Rotary position embedding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rotation = tuple[Float[Tensor, "batch 1 seq half"], Float[Tensor, "batch 1 seq half"]]


def rotation(positions: Int[Tensor, "batch seq"], d_head: int, base: float) -> Rotation:
    """Cosines and sines of the angles by which each position turns its pairs.

    Computed from the positions each time rather than kept as a buffer: once per forward pass for all layers it costs
    next to nothing, and nothing has to survive the meta device, a cast to bfloat16 or a longer sequence.

    Args:
        positions: Index of each token in its sequence, from 0.
        d_head: Width of a head; must be even.
        base: Wavelengths grow geometrically from 2π to 2π·base tokens.

    Source:
        Su et al., 2021, "RoFormer", arXiv:2104.09864, eq. 15. Differs in the pairing: component `i` turns with
        `i + d_head / 2`, not with its neighbour, as in Hugging Face's Llama, so that weights are exchanged unchanged.
    """
    half = torch.arange(0, d_head, 2, device=positions.device, dtype=torch.float32)
    frequencies = base ** (-half / d_head)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "batch heads seq d_head"], by: Rotation) -> Float[Tensor, "batch heads seq d_head"]:
    """Turns the pairs of each head; keeps the dtype of `x`.

    Example:
        >>> x = torch.randn(1, 1, 1, 4)
        >>> still = rotation(torch.zeros(1, 1, dtype=torch.long), d_head=4, base=10_000.0)
        >>> bool((rotate(x, still) == x).all())
        True
    """
    cos, sin = (part.to(x.dtype) for part in by)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
