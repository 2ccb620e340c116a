"""Grouped-query self-attention with rotary positions and a key-value cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lit_llm.models.attention_products import attend_by_products, products_win
from lit_llm.models.normalization import RMSNorm
from lit_llm.models.rotary import Rotation, rotate


class KVCache:
    """Keys and values of the tokens already read, for all layers of a network.

    Args:
        batch_size: Number of sequences.
        max_seq_len: Maximum number of tokens of a sequence.
    """

    def __init__(self, batch_size: int, max_seq_len: int) -> None:
        self.batch_size = batch_size
        self.max_seq_len = max_seq_len
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, layer: int, k: Float[Tensor, "batch kv_heads new d_head"], v: Float[Tensor, "batch kv_heads new d_head"]
    ) -> tuple[Float[Tensor, "batch kv_heads seq d_head"], Float[Tensor, "batch kv_heads seq d_head"]]:
        """Stores the new keys and values of a layer, and returns all of that layer's so far.

        The network advances `length` after all its layers have written.

        Raises:
            ValueError: When the sequence outgrows the cache.
        """
        end = self.length + k.shape[2]
        if end > self.max_seq_len:
            raise ValueError(
                f"sequence length must be at most {self.max_seq_len}, the size of the key-value cache, but is {end}"
            )
        if layer not in self._layers:
            shape = (self.batch_size, k.shape[1], self.max_seq_len, k.shape[3])
            self._layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


def document_mask(document_ids: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch 1 seq seq"]:
    """A causal mask within documents: true where a position may attend.

    Example:
        >>> document_mask(torch.tensor([[0, 0, 1]]))[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()


def attend(
    q: Float[Tensor, "batch heads new d_head"],
    k: Float[Tensor, "batch kv_heads seq d_head"],
    v: Float[Tensor, "batch kv_heads seq d_head"],
    mask: Bool[Tensor, "#batch 1 new seq"] | None,
) -> Float[Tensor, "batch heads new d_head"]:
    """Softmax attention, scaled by `1 / sqrt(d_head)`.

    Args:
        q: Queries; each group of `heads / kv_heads` of them shares a key-value head.
        k: Keys.
        v: Values.
        mask: True where a query may attend; `None` is causal, with the queries at the last `new` of `seq` positions.

    Source:
        Vaswani et al., 2017, arXiv:1706.03762, eq. 1; grouped queries: Ainslie et al., 2023, arXiv:2305.13245.
    """
    num_heads, new = q.shape[1:3]
    num_kv_heads, seq = k.shape[1:3]
    if mask is None and new != seq:
        mask = torch.ones(new, seq, dtype=torch.bool, device=q.device).tril(seq - new)[None, None]
    if not products_win(q, mask, is_causal=True):
        gqa = num_heads != num_kv_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    if num_heads != num_kv_heads:
        k, v = (t.repeat_interleave(num_heads // num_kv_heads, dim=1) for t in (k, v))
    return attend_by_products(q, k, v, mask, is_causal=True, scale=q.shape[-1] ** -0.5)


class Attention(nn.Module):
    """Causal self-attention with grouped queries, rotary positions and optional normalised queries and keys.

    Args:
        d_model: Width of the input and output.
        num_heads: Query heads.
        num_kv_heads: Key-value heads; divides `num_heads`. 1 is multi-query, `num_heads` is multi-head attention.
        d_head: Width of a head; even.
        qk_norm: Normalise each head's queries and keys before rotation, which bounds the attention logits and allows
            larger learning rates (Henry et al., 2020, arXiv:2010.04245; with RMSNorm and a gain, as in Qwen3).
        norm_eps: Epsilon of those norms.
    """

    def __init__(
        self, d_model: int, num_heads: int, num_kv_heads: int, d_head: int, qk_norm: bool, norm_eps: float
    ) -> None:
        super().__init__()
        self.d_head = d_head
        self.q_proj = nn.Linear(d_model, num_heads * d_head, bias=False)
        self.k_proj = nn.Linear(d_model, num_kv_heads * d_head, bias=False)
        self.v_proj = nn.Linear(d_model, num_kv_heads * d_head, bias=False)
        self.o_proj = nn.Linear(num_heads * d_head, d_model, bias=False)
        self.q_norm = RMSNorm(d_head, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(d_head, norm_eps) if qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "batch new d_model"],
        by: Rotation,
        mask: Bool[Tensor, "#batch 1 new seq"] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "batch new d_model"]:
        """Mixes positions.

        Args:
            x: The new positions.
            by: Rotation of their positions, from `rotary.rotation`.
            mask: As in `attend`.
            cache: Holds the keys and values of earlier positions; the new ones are added to it.
            layer: Index of this layer in the cache.
        """
        q, k, v = (proj(x).unflatten(-1, (-1, self.d_head)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q.transpose(1, 2), by), rotate(k.transpose(1, 2), by), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))
