"""Attention as plain matmuls, which on a CPU beat the flash kernel up to thousands of queries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lit_llm.derivatives import differentiable_once
from lit_llm.products import MAX_QUERIES, product_dtype
from lit_llm.shapes import shapes_only

ROWS = 128
"""Queries per chunk: few enough that little is computed for keys ahead of them, enough for large matmuls."""


def products_win(
    q: Float[Tensor, "batch heads new d_head"], mask: Tensor | None, is_causal: bool, dropout: float = 0.0
) -> bool:
    """Whether `attend_by_products` is faster than torch's own attention; arguments as there.

    It is on a CPU, up to the number of queries in `MAX_QUERIES`, or up to fewer with dropout or compiled, where all
    weights are kept. False in an export, which must not read sizes.
    """
    if q.device.type != "cpu" or torch.compiler.is_exporting():
        return False
    causal = is_causal and mask is None
    most = MAX_QUERIES.get(product_dtype(q), (0, 0))[causal]
    if dropout or torch.compiler.is_compiling() or shapes_only():  # a plan assumes an accelerator's attention
        most = min(most, _most_kept(q, causal))
    return most > 0 and q.shape[2] <= most


def attend_by_products(
    q: Float[Tensor, "batch heads new d_head"],
    k: Float[Tensor, "batch heads seq d_head"],
    v: Float[Tensor, "batch heads seq d_value"],
    mask: Bool[Tensor, "#batch #heads #new seq"] | None,
    is_causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads new d_value"]:
    """Softmax attention as two matmuls.

    With few queries, the attention weights are kept for the backward pass. With many, they are recomputed there, `ROWS`
    queries at a time, so that memory grows linearly with their number instead of quadratically. Causal attention works
    on `ROWS` queries at a time in both cases, and so skips the half of the weights that is 0.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: True where a query may attend. The output of a query that may attend to nothing is arbitrary but finite.
        is_causal: Whether attention without a mask is causal, which needs as many keys as queries.
        scale: Factor on the scores.
        dropout: Dropout probability of the attention weights. With dropout, or compiled, all weights are kept.

    Source:
        Rabe & Staats, 2021, "Self-attention Does Not Need O(n²) Memory", arXiv:2112.05682, section 3. Differs in that
        only queries are chunked: each chunk reads all its keys at once, so the softmax is torch's own.
    """
    dtype, is_causal = product_dtype(q), is_causal and mask is None
    q, k, v = (t.to(dtype) for t in (q, k, v))
    keep = q.shape[2] <= _most_kept(q, is_causal)
    in_rows = q.shape[2] > ROWS if is_causal else not keep
    if in_rows and not dropout and not torch.compiler.is_compiling():
        return _ByRows.apply(q, k, v, mask, is_causal, scale, keep)
    num_heads = q.shape[1]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    shares = F.dropout(_attention_weights(q, k, mask, is_causal, scale, num_heads), dropout, training=dropout > 0)
    return torch.bmm(shares, v).unflatten(0, (-1, num_heads))


def _most_kept(q: Tensor, causal: bool) -> int:
    """Largest number of queries whose attention weights are kept: fewer if causal, since chunks skip half of them."""
    return (512 if causal else 1024) // product_dtype(q).itemsize


def _attention_weights(
    q: Float[Tensor, "batch_heads new d_head"],
    k: Float[Tensor, "batch_heads seq d_head"],
    mask: Bool[Tensor, "#batch #heads #new seq"] | None,
    is_causal: bool,
    scale: float,
    num_heads: int,
    first: int = 0,
) -> Float[Tensor, "batch_heads new seq"]:
    """The attention weights of each query; `first` is the index of the first query's own key."""
    if mask is not None:
        least = torch.finfo(q.dtype).min  # not -inf: a padding query may attend to nothing
        bias = q.new_zeros(mask.shape).masked_fill_(~mask, least)
        bias = bias.expand(len(q) // num_heads, num_heads, q.shape[1], -1).flatten(0, 1)
    elif is_causal:
        bias = q.new_full((q.shape[1], k.shape[1]), -math.inf).triu(first + 1)
    else:
        bias = q.new_zeros(1)
    scores = torch.baddbmm(bias, q, k.mT, alpha=scale)
    if scores.requires_grad:
        return scores.softmax(dim=-1)
    return torch.softmax(scores, dim=-1, out=scores)


def _by_rows(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    num_heads: int,
    kept: Sequence[Tensor] = (),
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields the last chunk first: a slice of queries, the slice of keys they may attend to, and attention weights.

    Arguments as in `_attention_weights`; the weights are taken from `kept` if it is not empty, else computed.
    """
    for index, first in enumerate(reversed(range(0, q.shape[1], ROWS))):
        rows = slice(first, min(first + ROWS, q.shape[1]))
        keys = slice(0, rows.stop if is_causal else k.shape[1])
        if kept:
            yield rows, keys, kept[index]
            continue
        part = mask[:, :, rows] if mask is not None and mask.shape[2] > 1 else mask
        yield rows, keys, _attention_weights(q[:, rows], k[:, keys], part, is_causal, scale, num_heads, first)


class _ByRows(torch.autograd.Function):
    """`attend_by_products` in chunks of queries; the backward pass has kept attention weights or recomputes them."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, keep: bool
    ) -> Tensor:
        """The output for each query."""
        batch, num_heads, new, _ = q.shape
        out = q.new_empty(batch, new, num_heads, v.shape[-1]).transpose(1, 2)  # layout for the output projection
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        kept = []
        for rows, keys, shares in _by_rows(q, k, mask, is_causal, scale, num_heads):
            out[:, :, rows] = torch.bmm(shares, v[:, keys]).unflatten(0, (batch, num_heads))
            kept += [shares] * keep
        ctx.save_for_backward(q, k, v, mask, *kept)
        ctx.how = (is_causal, scale, num_heads)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of queries, keys and values; those of keys and values are accumulated in float32."""
        q, k, v, mask, *kept = ctx.saved_tensors
        is_causal, scale, num_heads = ctx.how
        grad, grad_q = grad.flatten(0, 1), torch.empty_like(q)
        grad_k = grad_v = None
        for rows, keys, shares in _by_rows(q, k, mask, is_causal, scale, num_heads, kept):
            grad_v = _plus(grad_v, keys, torch.bmm(shares.mT, grad[:, rows]))
            grad_shares = torch.bmm(grad[:, rows], v[:, keys].mT)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_shares, shares, -1, shares.dtype).mul_(scale)
            grad_q[:, rows] = torch.bmm(grad_scores, k[:, keys])
            grad_k = _plus(grad_k, keys, torch.bmm(grad_scores.mT, q[:, rows]))
        grads = (grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype))
        return *(t.unflatten(0, (-1, num_heads)) for t in grads), None, None, None, None


def _plus(total: Tensor | None, keys: slice, part: Tensor) -> Tensor:
    """Adds a chunk's gradient to the sum so far; the first chunk covers all keys."""
    if total is None:
        return part
    total = total.float()
    total[:, keys] += part
    return total
