"""Rotary position embedding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx

Rotation = tuple[Float[Tensor, "#batch 1 _ half"], Float[Tensor, "#batch 1 _ half"]]


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


class _CPURotate(torch.autograd.Function):
    """The plain formula of `rotate` in half the passes over memory, into a contiguous output, undone by its inverse."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turns by the angle."""
        ctx.save_for_backward(cos, sin)
        out = torch.empty(x.shape, dtype=x.dtype)
        (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        """Turns back."""
        cos, sin = ctx.saved_tensors
        return _CPURotate.apply(grad, cos, -sin), None, None


def rotate(x: Float[Tensor, "batch heads seq d_head"], by: Rotation) -> Float[Tensor, "batch heads seq d_head"]:
    """Turns the pairs of each head; keeps the dtype of `x`.

    Example:
        >>> x = torch.randn(1, 1, 1, 4)
        >>> still = rotation(torch.zeros(1, 1, dtype=torch.long), d_head=4, base=10_000.0)
        >>> bool((rotate(x, still) == x).all())
        True
    """
    cos, sin = (part.to(x.dtype) for part in by)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _CPURotate.apply(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
