"""Floating-point operations of a training step, from a network's weights and which of them are trained."""

from __future__ import annotations

from torch import nn

from lit_llm.blocks import Block


def training_flops(network: nn.Module, attention: int = 0) -> int:
    """Floating-point operations of one training step, forward and backward, per token of a row.

    A weight takes two in the forward pass. In the backward pass it takes two for the gradient of its input, if anything
    before it is trained, and two for its own gradient, if it is trained itself. Embeddings take none. Recomputation by
    activation checkpointing is not counted.

    Args:
        network: A network whose layers were created in the order in which they compute.
        attention: Operations of a block's attention scores and weighted values in the forward pass; the backward pass
            takes twice as many, if anything in the block or before it is trained.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
        >>> frozen = network[0].requires_grad_(False)
        >>> training_flops(network)
        24

    Source:
        Chowdhery et al., 2022, "PaLM", arXiv:2204.02311, app. B: if everything is trained, this is `6 N + 12 L H Q T`,
        with `N` the parameters in matmuls.
    """
    flops, learning = 0, False
    for module in network.modules():
        if isinstance(module, Block):
            returns = learning or any(p.requires_grad for p in module.parameters())
            flops += attention * (3 if returns else 1)
        for p in module.parameters(recurse=False):
            if not isinstance(module, nn.Embedding):
                flops += 2 * p.numel() * (1 + learning + p.requires_grad)
            learning = learning or p.requires_grad
    return flops
