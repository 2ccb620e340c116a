"""The main config's network without one of its ideas."""

from __future__ import annotations

import torch
from torch import nn

from lit_llm.models.llama import Llama


class NormalLlama(Llama):
    """Draws all matrices and embeddings from a normal of standard deviation 0.02, like the Llama of transformers.

    Unlike in `Llama`, no output to the residual stream starts at zero, nor does the head, and the standard deviation
    does not depend on the width. Arguments are those of `Llama`.

    Source:
        `initializer_range` of transformers; Radford et al., 2019, "GPT-2", without its scaling by depth.
    """

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
