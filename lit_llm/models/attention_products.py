"""Attention as plain matrix products, which beat the CPU's flash kernel up to thousands of positions."""

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
"""Queries at a time: few enough that little is computed of keys ahead of them, enough for large products."""


def products_win(
    q: Float[Tensor, "batch heads new d_head"], mask: Tensor | None, is_causal: bool, dropout: float = 0.0
) -> bool:
    """Whether `attend_by_products` is faster than torch's own attention; arguments as there.

    So it is on a CPU, up to thousands of queries in bfloat16; not for an export, which asks no size.
    """
    if q.device.type != "cpu" or torch.compiler.is_exporting():
        return False
    causal = is_causal and mask is None
    most = MAX_QUERIES.get(product_dtype(q), (0, 0))[causal]
    if dropout or torch.compiler.is_compiling() or shapes_only():  # a plan is of an accelerator's attention
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
    """Softmax attention as two matrix products.

    The probabilities of few queries are kept for the backward pass. Those of many are made again there, `ROWS` queries
    at a time: memory then grows with their number, not with its square. Where none may look ahead, those of few are
    made `ROWS` at a time too, without the half that is 0.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: True where a query may look. One that may look nowhere gets something finite.
        is_causal: Where there is no mask, whether none may look ahead; there are as many keys as queries then.
        scale: Of the scores.
        dropout: Share of the probabilities that is dropped; with any, or compiled, all are kept.

    Source:
        Rabe & Staats, 2021, "Self-attention Does Not Need O(n²) Memory", arXiv:2112.05682, section 3: blocks of queries
        alone, each with all its keys at once, so that the softmax is torch's own.
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
    """Up to how many queries shares are kept: fewer where half of them are 0 and are not even made by rows."""
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
    """How each query shares its attention out to the keys; the first query's own key has the index `first`."""
    if mask is not None:
        least = torch.finfo(q.dtype).min  # not -inf, for a query of padding that may look nowhere
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
    """Which queries, which keys they may look at, and their shares of these, if they were not kept; from the last back.

    Arguments as in `_attention_weights`.
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
    """`attend_by_products` of some queries at a time; the backward pass has kept their shares or makes them anew."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, keep: bool
    ) -> Tensor:
        """What the queries find."""
        batch, num_heads, new, _ = q.shape
        out = q.new_empty(batch, new, num_heads, v.shape[-1]).transpose(1, 2)  # as an output projection reads it
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
        """The gradients of queries, keys and values; those of keys and values are summed in float32."""
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
    """The sum over queries so far, whose first part is of all keys."""
    if total is None:
        return part
    total = total.float()
    total[:, keys] += part
    return total
