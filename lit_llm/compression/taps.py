"""Hidden states and attention scores of a network's blocks, recorded by hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_llm.blocks import blocks_of
from lit_llm.products import fused_attention

UNSEEN = -1e4
"""Scores below this value are of masked positions."""


@dataclass
class Tapped:
    """The recorded values of a forward pass.

    Attributes:
        hidden: Output of each block: `batch seq d_model` for texts, possibly `batch channels height width` for images.
        attention: Attention scores of each block before the softmax, `batch heads queries keys`; below `UNSEEN` at
            masked positions. Empty unless requested.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def tapping(network: nn.Module, attention: bool = False) -> Iterator[Tapped]:
    """Records the outputs of the blocks while the network runs, with gradients if they are enabled.

    Args:
        network: Any network of blocks.
        attention: Also record attention scores, whichever way attention is computed.
    """
    tapped, handles, now = Tapped(), [], _Now()

    def before(index: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            now.block, now.batch = index, len(args[0]) if args else 0

        return see

    def after(index: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tapped.hidden[index] = output if isinstance(output, Tensor) else output[0]
            now.block = None

        return see

    for index, block in enumerate(blocks_of(network)):
        handles += [block.register_forward_pre_hook(before(index)), block.register_forward_hook(after(index))]
    try:
        if attention:
            with _Scores(tapped, now), fused_attention():  # matmuls by rows would show one chunk of queries
                yield tapped
        else:
            yield tapped
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Now:
    """The block that is running, and its batch size."""

    block: int | None = None
    batch: int = 0


class _Scores(TorchFunctionMode):
    """Intercepts torch functions that compute attention: the fused one, or a softmax of a 3D or 4D tensor."""

    def __init__(self, tapped: Tapped, now: _Now) -> None:
        super().__init__()
        self.tapped, self.now = tapped, now

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.now.block is not None:
            if func is F.scaled_dot_product_attention:
                self.tapped.attention[self.now.block] = _scores(*args, **kwargs)
            elif func in (F.softmax, torch.softmax, Tensor.softmax) and args[0].ndim in (3, 4):
                x = args[0]
                self.tapped.attention[self.now.block] = x if x.ndim == 4 else x.unflatten(0, (self.now.batch, -1))
        return func(*args, **kwargs)


def _scores(
    query: Float[Tensor, "batch heads queries d_head"],
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads queries keys"]:
    """The scores of which `torch.nn.functional.scaled_dot_product_attention` takes the softmax."""
    if query.shape[1] != key.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -math.inf)
    return scores + attn_mask
