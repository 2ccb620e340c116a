"""Faster attention on the CPU for networks of transformers."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_llm.models.attention_products import attend_by_products, products_win
from lit_llm.products import product_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lit-llm"


def attend_faster(model: PreTrainedModel) -> None:
    """Replaces torch's `scaled_dot_product_attention` in a network by two matmuls where these are faster.

    That is on a CPU, up to the number of queries that `products_win` allows; in bfloat16 only with gradients enabled,
    so that evaluation equals transformers' to the last bit. A saved config does not show it. Composite networks, and
    those whose code compares the name of the attention implementation with "sdpa", are left unchanged.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    simple = model.config._attn_implementation == "sdpa" and not model.config.sub_configs
    simple = simple and model._can_set_attn_implementation()
    if simple and '"sdpa"' not in inspect.getsource(sys.modules[type(model.base_model).__module__]):
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Transformers' interface: (batch, heads, seq, d_head) in, (batch, seq, heads, d_head) out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    trains = torch.is_grad_enabled() or product_dtype(query) != torch.bfloat16
    wins = trains and products_win(query, attention_mask, is_causal, dropout)  # first: an export reads no size
    plain = wins and (attention_mask is None or attention_mask.dtype == torch.bool)
    plain = plain and len(query) == len(key) and query.shape[2] == key.shape[2]
    if not (plain and all(more.get(name) is None for name in ("position_bias", "softcap", "s_aux"))):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **more
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (queries := query.shape[1] // key.shape[1]) > 1:  # per key
        key, value = (t.repeat_interleave(queries, dim=1) for t in (key, value))
    found = attend_by_products(query, key, value, attention_mask, is_causal, scale, dropout)
    return found.transpose(1, 2).contiguous(), None
