"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from lit_llm.derivatives import differentiable_once
from lit_llm.products import product_dtype


class _CPURMSNorm(torch.autograd.Function):
    """RMSNorm whose backward pass uses the kernel of LayerNorm.

    Torch has no such kernel for RMSNorm on a CPU, and makes a dozen passes over memory instead.

    With the mean set to 0, the backward pass of LayerNorm is `(g - mean(g) - x̂ mean(g x̂)) / rms`, where `g` is the
    gradient times the gain. Adding `mean(g) / rms`, one number per vector, makes it that of RMSNorm (LayerNorm: Ba et
    al., 2016, arXiv:1607.06450, eq. 4; RMSNorm: Zhang & Sennrich, eq. 4).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Normalises in float32; `dtype` is the output's."""
        size = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(size).add_(eps).rsqrt_()
        y = (x * scale if x.dtype == torch.float32 else x.float().mul_(scale)).mul_(weight)
        ctx.save_for_backward(x, scale, weight)
        return y.to(dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the input and the gain."""
        x, scale, weight = ctx.saved_tensors
        grad, size = grad.to(x.dtype).contiguous(), x.shape[-1]
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x.contiguous(), [size], torch.zeros_like(scale), scale, weight, None, [True, True, False]
        )
        mean = (grad.view(-1, size) @ weight.to(grad.dtype)).div_(size).view_as(scale)
        return grad_x.add_((mean * scale).to(grad_x.dtype)), grad_weight, None, None


class RMSNorm(nn.Module):
    """Divides each vector by its root mean square and multiplies it by a learnt gain.

    Args:
        d_model: Length of the vectors.
        eps: Added to the mean square, so that a zero vector stays zero.

    Source:
        Zhang & Sennrich, 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467, eq. 4.

    Example:
        >>> RMSNorm(4)(torch.tensor([2.0, -2.0, 2.0, -2.0])).round(decimals=3).tolist()
        [1.0, -1.0, 1.0, -1.0]
    """

    def __init__(self, d_model: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Normalises the last axis; the output has the dtype of matmuls (`product_dtype`)."""
        dtype = product_dtype(x)
        if x.device.type == "cpu" and self.weight.dtype == torch.float32 and not torch.compiler.is_compiling():
            return _CPURMSNorm.apply(x, self.weight, self.eps, dtype)
        # The gain is cast to the input's dtype, since torch has no fused kernel for mixed dtypes.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(dtype)
