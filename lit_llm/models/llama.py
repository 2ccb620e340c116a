"""Llama, a decoder built from the shared layers, exported as Hugging Face's Llama or Qwen3."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_llm.blocks import Block
from lit_llm.models.attention import Attention, KVCache, document_mask
from lit_llm.models.feed_forward import SwiGLU
from lit_llm.models.flops import training_flops
from lit_llm.models.normalization import RMSNorm
from lit_llm.models.rotary import RopeScaling, Rotation, rope_from_hf, rotation
from lit_llm.ranges import require_at_least


class LlamaBlock(Block):
    """Attention and a gated feed-forward layer, each normalised before and added to the residual stream."""

    tensor_parallel: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "columns"),
        **dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), "heads"),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "columns"),
        **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), "rows"),
    }
    """How each linear layer is cut by tensor parallelism: a device has some of the heads and part of `d_ff`."""

    whole_sequence: ClassVar[tuple[str, ...]] = ("self_attn", "mlp")
    """Layers that need the whole sequence under sequence parallelism; the rest is computed on parts of the sequence."""

    def __init__(self, attention: Attention, feed_forward: SwiGLU, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(d_model, norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(d_model, norm_eps)
        self.mlp = feed_forward

    def forward(
        self,
        x: Float[Tensor, "batch new d_model"],
        by: Rotation,
        mask: Bool[Tensor, "#batch 1 _ seq"] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "batch new d_model"]:
        """Adds the output of attention, then of the feed-forward layer; arguments as in `Attention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), by, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A decoder-only transformer language model: RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases.

    Parameters have Hugging Face's names, so weights need no renaming, and adapters find their targets.

    Args:
        vocab_size: Number of tokens; decided by the data.
        d_model: Width of the residual stream.
        num_layers: Number of blocks.
        num_heads: Query heads; divides `d_model` unless `d_head` is given. If it does not divide, transformers opens
            the exported directory only with `qk_norm`; this package opens it in any case.
        num_kv_heads: Key-value heads; divides `num_heads`. `None` is as many as query heads.
        d_head: Width of a head; `None` is `d_model / num_heads`.
        d_ff: Hidden width of the feed-forward layers; `None` is 8/3 of `d_model`, rounded up to a multiple of 64.
        max_seq_len: Longest sequence the model is meant for; written into the exported config.
        rope_base: Base of the rotary wavelengths.
        rope_scaling: How rotary positions are extended beyond the training length (`models.rotary`); `None` for no
            extension.
        norm_eps: Epsilon of every RMSNorm.
        qk_norm: Normalise queries and keys, which makes it Qwen3's network rather than Llama's.
        tie_embeddings: Share one matrix between input and output embeddings.
        activation_checkpointing: Keep only each block's input and recompute the block in the backward pass: about a
            third more time, but the activations of only one block in memory.

    Raises:
        ValueError: When a size is less than 1, the heads do not divide, or `d_head` is odd.

    Source:
        Touvron et al., 2023, arXiv:2302.13971 (Llama 2: arXiv:2307.09288 for grouped queries). Initialisation: every
        matrix from a normal of standard deviation `1 / sqrt(d_in)` ("LeCun", which keeps the variance of activations
        at any width) except those that write to the residual stream, which start at zero so that each block begins as
        the identity (Bachlechner et al., 2020, arXiv:2003.04887 give the reason; Yang et al., 2022, arXiv:2203.03466,
        app. D.2 zero the output layer too); embeddings from a standard deviation of 0.02 when tied, else 1.

    Example:
        >>> network = Llama(vocab_size=10, d_model=16, num_layers=1, num_heads=2)
        >>> network(torch.zeros(1, 3, dtype=torch.long)).shape
        torch.Size([1, 3, 10])
    """

    hf_architectures = ("LlamaForCausalLM", "Qwen3ForCausalLM")
    hf_buffers: ClassVar[tuple[str, ...]] = (".rotary_emb.inv_freq",)
    """Name endings of tensors in older model directories that are not parameters, and are skipped."""

    defers_init: ClassVar[bool] = True
    """Whether `reset_parameters` draws all weights and there are no buffers, as `deferred_init` requires."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 256,
        num_layers: int = 6,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        d_head: int | None = None,
        d_ff: int | None = None,
        max_seq_len: int = 2048,
        rope_base: float = 10_000.0,
        rope_scaling: RopeScaling | None = None,
        norm_eps: float = 1e-6,
        qk_norm: bool = False,
        tie_embeddings: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "num_layers": num_layers, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        require_at_least(1, **sizes, d_head=d_head, d_ff=d_ff, max_seq_len=max_seq_len)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if d_head is None and d_model % num_heads:
            raise ValueError(f"num_heads must divide d_model, but is {num_heads} with d_model {d_model}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, but is {num_kv_heads} with num_heads {num_heads}")
        d_head = d_head or d_model // num_heads
        if d_head % 2:
            raise ValueError(f"d_head must be even for rotary positions, but is {d_head}")
        d_ff = d_ff or -(-8 * d_model // 3 // 64) * 64
        self.vocab_size, self.d_model, self.num_layers = vocab_size, d_model, num_layers
        self.num_heads, self.num_kv_heads, self.d_head, self.d_ff = num_heads, num_kv_heads, d_head, d_ff
        self.max_seq_len, self.norm_eps = max_seq_len, norm_eps
        self.rope_base, self.rope_scaling = rope_base, rope_scaling
        self.qk_norm, self.tie_embeddings = qk_norm, tie_embeddings
        self.activation_checkpointing = activation_checkpointing

        self.embed_tokens = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            LlamaBlock(
                Attention(d_model, num_heads, num_kv_heads, d_head, qk_norm, norm_eps),
                SwiGLU(d_model, d_ff),
                d_model,
                norm_eps,
            )
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(d_model, norm_eps)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the initial weights stated in the class's `Source`."""
        if self.tie_embeddings:  # not in the constructor: moving off the meta device unties them
            self.lm_head.weight = self.embed_tokens.weight
        nn.init.normal_(self.embed_tokens.weight, std=0.02 if self.tie_embeddings else 1.0)
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear) and not (self.tie_embeddings and module is self.lm_head):
                if name.endswith(("o_proj", "down_proj", "lm_head")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def hidden(
        self,
        input_ids: Int[Tensor, "batch new"],
        document_ids: Int[Tensor, "batch new"] | None = None,
        positions: Int[Tensor, "#batch new"] | None = None,
        mask: Bool[Tensor, "#batch 1 new seq"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch new d_model"]:
        """The input of the head: the last block's output, normalised. Arguments as in `forward`."""
        start = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
        if document_ids is not None:
            mask = document_mask(document_ids)
        by = rotation(positions, self.d_head, self.rope_base, self.rope_scaling)
        x = self.embed_tokens(input_ids)
        for index, block in enumerate(self.layers):
            if self.activation_checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, by, mask, use_reentrant=False)
            else:
                x = block(x, by, mask, cache, index)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x)

    def forward(
        self,
        input_ids: Int[Tensor, "batch new"],
        document_ids: Int[Tensor, "batch new"] | None = None,
        positions: Int[Tensor, "#batch new"] | None = None,
        mask: Bool[Tensor, "#batch 1 new seq"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch new vocab"]:
        """Logits of the token that follows each position.

        Args:
            input_ids: Tokens.
            document_ids: Document of each token: attention is confined to it, and causal. Replaces `mask`.
            positions: Index of each token in its sequence; default: counted from the cache's length.
            mask: True where a query may attend; `None` is causal.
            cache: Keys and values of earlier tokens; the new ones are added to it.
        """
        return self.lm_head(self.hidden(input_ids, document_ids, positions, mask, cache))

    def new_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """An empty cache for `forward`, for `batch_size` sequences of up to `max_seq_len` tokens."""
        return KVCache(batch_size, max_seq_len)

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of one training step per token of a row of `seq_len`; see `training_flops`."""
        return training_flops(self, 4 * self.num_heads * self.d_head * seq_len)

    def to_hf_config(self) -> dict[str, Any]:
        """The `config.json` with which transformers builds the same network."""
        return {
            "architectures": ["Qwen3ForCausalLM" if self.qk_norm else "LlamaForCausalLM"],
            "model_type": "qwen3" if self.qk_norm else "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.d_head,
            "max_position_embeddings": self.max_seq_len,
            "rope_parameters": {
                **(self.rope_scaling.to_hf() if self.rope_scaling else {"rope_type": "default"}),
                "rope_theta": self.rope_base,
            },
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
        }

    @staticmethod
    def hf_arguments(config: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments for the network that a `config.json` of transformers describes.

        Raises:
            ValueError: When the config asks for something that this network does not have.
        """
        unsupported = {
            "hidden_act": config.get("hidden_act", "silu") != "silu" and config["hidden_act"],
            "attention_bias": config.get("attention_bias"),
            "attention_dropout": config.get("attention_dropout"),
            "mlp_bias": config.get("mlp_bias"),
            "use_sliding_window": config.get("use_sliding_window"),
        }
        for key, value in unsupported.items():
            if value:
                raise ValueError(f"{key} in config.json must be the default of plain Llama or Qwen3, but is {value!r}")
        rope_base, rope_scaling = rope_from_hf(config)
        qwen = config["model_type"] == "qwen3"
        return {
            "vocab_size": config["vocab_size"],
            "d_model": config["hidden_size"],
            "num_layers": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "num_kv_heads": config.get("num_key_value_heads"),
            "d_head": config.get("head_dim") or (128 if qwen else None),
            "d_ff": config["intermediate_size"],
            "max_seq_len": config["max_position_embeddings"],
            "rope_base": rope_base,
            "rope_scaling": rope_scaling,
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "qk_norm": qwen,
            "tie_embeddings": config.get("tie_word_embeddings", False),
        }

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Llama:
        """The network that a `config.json` of transformers describes, with fresh weights."""
        return cls(**cls.hf_arguments(config))

    @staticmethod
    def hf_name(name: str) -> str:
        """The name of a parameter in transformers' network."""
        return name if name.startswith("lm_head.") else f"model.{name}"
