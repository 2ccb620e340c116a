"""The attention with which networks of transformers are trained here."""

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
    """Has a network that attends by torch's `scaled_dot_product_attention` take two matrix products where they win.

    That is on a CPU, up to as many queries as `products_win` says, and in bfloat16 in training alone, so that an
    evaluation is transformers' own to the last bit. What is saved does not tell.
    Networks made of several, and those whose code asks for attention by its name, stay as they are.
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
    """As transformers calls it: (batch, heads, seq, d_head) in, (batch, seq, heads, d_head) out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    trains = torch.is_grad_enabled() or product_dtype(query) != torch.bfloat16
    wins = trains and products_win(query, attention_mask, is_causal, dropout)  # first, since an export asks no size
    plain = wins and (attention_mask is None or attention_mask.dtype == torch.bool)
    plain = plain and len(query) == len(key) and query.shape[2] == key.shape[2]
    if not (plain and all(more.get(name) is None for name in ("position_bias", "softcap", "s_aux"))):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **more
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (queries := query.shape[1] // key.shape[1]) > 1:  # to each key
        key, value = (t.repeat_interleave(queries, dim=1) for t in (key, value))
    found = attend_by_products(query, key, value, attention_mask, is_causal, scale, dropout)
    return found.transpose(1, 2).contiguous(), None
