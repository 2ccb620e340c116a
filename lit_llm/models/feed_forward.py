"""Position-wise layers."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, without biases.

    Args:
        d_model: Width of the input and output.
        d_ff: Width inside; two thirds of the usual `4 * d_model` gives the parameters of an ungated layer.

    Source:
        Shazeer, 2020, "GLU Variants Improve Transformer", arXiv:2002.05202, eq. 6.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Transforms each position on its own."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
