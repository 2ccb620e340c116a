"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divides each vector by its root mean square and multiplies by a learnt gain.

    Args:
        d_model: Width of the vectors.
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
        """Normalises the last axis; the output has the input's dtype."""
        # The gain in the input's dtype: mixed dtypes would leave torch's fused kernel.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
