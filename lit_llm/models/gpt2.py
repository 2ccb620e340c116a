"""GPT-2, a decoder, defined whole in this file and exported as Hugging Face's GPT-2; also nanoGPT's network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_llm.blocks import Block
from lit_llm.models.attention import KVCache, attend, document_mask
from lit_llm.models.feed_forward import linear_of_recomputed
from lit_llm.models.flops import training_flops
from lit_llm.ranges import require_at_least, require_range

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""Weights that Hugging Face's GPT-2 stores as (in, out), since its layers are `Conv1D`, not `Linear` with (out, in)."""


class GPT2Attention(nn.Module):
    """Causal multi-head self-attention with one matrix for queries, keys and values.

    Args:
        d_model: Width of the input and output.
        num_heads: Heads; divides `d_model`.
        dropout: Probability that an attention weight is dropped in training.
        bias: Whether the projections have biases.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.c_attn = nn.Linear(d_model, 3 * d_model, bias)
        self.c_proj = nn.Linear(d_model, d_model, bias)

    def forward(
        self,
        x: Float[Tensor, "batch new d_model"],
        mask: Bool[Tensor, "#batch 1 new seq"] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "batch new d_model"]:
        """Mixes positions.

        Args:
            x: The new positions.
            mask: As in `attention.attend`.
            cache: Holds the keys and values of earlier positions; the new ones are added to it.
            layer: Index of this layer in the cache.
        """
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        if self.training and self.dropout:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.dropout, is_causal=mask is None)
        else:
            y = attend(q, k, v, mask)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class GPT2FeedForward(nn.Module):
    """`c_proj(gelu(c_fc(x)))`.

    Args:
        d_model: Width of the input and output.
        d_ff: Width of the hidden layer.
        activation: As in `GPT2`.
        bias: Whether both layers have biases.

    Source:
        Hendrycks & Gimpel, 2016, "Gaussian Error Linear Units", arXiv:1606.08415, section 2.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(d_model, d_ff, bias)
        self.act = nn.GELU(approximate={"gelu_new": "tanh", "gelu": "none"}[activation])
        self.c_proj = nn.Linear(d_ff, d_model, bias)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Transforms each position on its own."""
        return linear_of_recomputed(self.c_proj, self.act, self.c_fc(x))


class GPT2Block(Block):
    """Attention and a feed-forward layer, each normalised before and added to the residual stream."""

    tensor_parallel: ClassVar[dict[str, str]] = {
        "attn.c_attn": "columns, gathered",
        "attn.c_proj": "rows, cut",
        "mlp.c_fc": "columns",
        "mlp.c_proj": "rows",
    }
    """How each linear layer is cut by tensor parallelism. Cutting the columns of the fused query-key-value matrix does
    not align with heads, so its output is all-gathered, and each device computes all heads."""

    whole_sequence: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    """Layers that need the whole sequence under sequence parallelism; the rest is computed on parts of the sequence."""

    def __init__(
        self,
        attention: GPT2Attention,
        feed_forward: GPT2FeedForward,
        d_model: int,
        norm_eps: float,
        dropout: float,
        bias: bool,
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(d_model, norm_eps, bias=bias)
        self.attn = attention
        self.ln_2 = nn.LayerNorm(d_model, norm_eps, bias=bias)
        self.mlp = feed_forward
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch new d_model"],
        mask: Bool[Tensor, "#batch 1 _ seq"] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "batch new d_model"]:
        """Adds the output of attention, then of the feed-forward layer; arguments as in `GPT2Attention.forward`."""
        x = x + self.drop(self.attn(self.ln_1(x), mask, cache, layer))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT2(nn.Module):
    """A decoder-only transformer language model: LayerNorm, learned positions, GELU, multi-head attention.

    Parameters have Hugging Face's names. With `activation: gelu` and `bias: false` it is nanoGPT's network.

    Args:
        vocab_size: Number of tokens; decided by the data.
        d_model: Width of the residual stream.
        num_layers: Number of blocks.
        num_heads: Attention heads; divides `d_model`.
        d_ff: Hidden width of the feed-forward layers; `None` is four times `d_model`.
        max_seq_len: Number of learned positions: the longest sequence the network can read.
        norm_eps: Epsilon of every LayerNorm.
        dropout: Dropout probability of embeddings, attention weights and the outputs of attention and feed-forward
            layers, in [0, 1).
        bias: Use biases in linear layers and norms. A network without them is exported with biases of zero.
        tie_embeddings: Share one matrix between input and output embeddings.
        activation: `gelu_new`, the tanh approximation that GPT-2 was trained with, or `gelu`, the exact function,
            which is several times faster on a CPU (torch 2.13).
        activation_checkpointing: Keep only each block's input and recompute the block in the backward pass: about a
            third more computation for much less memory.

    Source:
        Radford et al., 2019, "Language Models are Unsupervised Multitask Learners", section 2.3. Weights are
        initialised with a standard deviation of 0.02, matrices that write to the residual stream with
        `0.02 / sqrt(2 num_layers)`, biases with zero. Differs in the position embeddings: 0.02, as in nanoGPT and
        transformers, instead of the 0.01 of GPT-2's own code.

    Example:
        >>> network = GPT2(vocab_size=10, d_model=16, num_layers=1, num_heads=2, max_seq_len=8)
        >>> network(torch.zeros(1, 3, dtype=torch.long)).shape
        torch.Size([1, 3, 10])
    """

    hf_architectures = ("GPT2LMHeadModel",)
    hf_buffers: ClassVar[tuple[str, ...]] = (".attn.bias", ".attn.masked_bias")
    """Name endings of tensors in older model directories that are not parameters, and are skipped."""

    defers_init: ClassVar[bool] = True
    """Whether `reset_parameters` draws all weights and there are no buffers, as `deferred_init` requires."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 384,
        num_layers: int = 6,
        num_heads: int = 6,
        d_ff: int | None = None,
        max_seq_len: int = 1024,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        bias: bool = True,
        tie_embeddings: bool = True,
        activation: Literal["gelu_new", "gelu"] = "gelu_new",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "num_layers": num_layers, "num_heads": num_heads, "max_seq_len": max_seq_len}
        require_at_least(1, **sizes, d_ff=d_ff)
        if d_model % num_heads:
            raise ValueError(f"num_heads must divide d_model, but is {num_heads} with d_model {d_model}")
        require_range("in [0, 1)", dropout=dropout)
        d_ff = d_ff or 4 * d_model
        self.vocab_size, self.d_model, self.num_layers, self.num_heads = vocab_size, d_model, num_layers, num_heads
        self.d_ff, self.max_seq_len, self.norm_eps, self.dropout = d_ff, max_seq_len, norm_eps, dropout
        self.bias, self.tie_embeddings, self.activation = bias, tie_embeddings, activation
        self.activation_checkpointing = activation_checkpointing

        self.wte = nn.Embedding(vocab_size, d_model)
        self.wpe = nn.Embedding(max_seq_len, d_model)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(
            GPT2Block(
                GPT2Attention(d_model, num_heads, dropout, bias),
                GPT2FeedForward(d_model, d_ff, activation, bias),
                d_model,
                norm_eps,
                dropout,
                bias,
            )
            for _ in range(num_layers)
        )
        self.ln_f = nn.LayerNorm(d_model, norm_eps, bias=bias)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the initial weights stated in the class's `Source`."""
        if self.tie_embeddings:  # not in the constructor: moving off the meta device unties them
            self.lm_head.weight = self.wte.weight
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding) and not (self.tie_embeddings and module is self.lm_head):
                nn.init.normal_(module.weight, std=0.02 / ((2 * self.num_layers) ** 0.5 if "c_proj" in name else 1))
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

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
            if start + input_ids.shape[1] > self.max_seq_len:
                raise ValueError(
                    f"sequence length must be at most the network's max_seq_len, {self.max_seq_len}, but is "
                    f"{start + input_ids.shape[1]}"
                )
            positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
        if document_ids is not None:
            mask = document_mask(document_ids)
        x = self.drop(self.wte(input_ids) + self.wpe(positions))
        for index, block in enumerate(self.h):
            if self.activation_checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask, cache, index)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.ln_f(x)

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
            positions: Index of each token in its sequence, below `max_seq_len`; default: counted from the cache's
                length.
            mask: True where a query may attend; `None` is causal.
            cache: Keys and values of earlier tokens; the new ones are added to it.

        Raises:
            ValueError: When there are more tokens than learned positions, and `positions` is not given.
        """
        return self.lm_head(self.hidden(input_ids, document_ids, positions, mask, cache))

    def new_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """An empty cache for `forward`, for `batch_size` sequences of up to `max_seq_len` tokens."""
        return KVCache(batch_size, max_seq_len)

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of one training step per token of a row of `seq_len`; see `training_flops`."""
        return training_flops(self, 4 * self.d_model * seq_len)

    def to_hf_config(self) -> dict[str, Any]:
        """The `config.json` with which transformers builds the same network."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_embd": self.d_model,
            "n_inner": self.d_ff,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "n_positions": self.max_seq_len,
            "layer_norm_epsilon": self.norm_eps,
            "activation_function": self.activation,
            "tie_word_embeddings": self.tie_embeddings,
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), self.dropout),
            "bias": self.bias,  # transformers has no such key and keeps it
        }

    @staticmethod
    def hf_arguments(config: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments for the network that a `config.json` of transformers describes.

        Raises:
            ValueError: When the config asks for something that this network does not have.
        """
        activation = config.get("activation_function", "gelu_new").replace("gelu_pytorch_tanh", "gelu_new")  # the same
        if activation not in ("gelu_new", "gelu"):
            raise ValueError(f"activation_function in config.json must be gelu_new or gelu, but is {activation}")
        plain = {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        }
        for key, value in plain.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key} in config.json must be {value}, as in plain GPT-2, but is {config[key]}")
        dropouts = [float(config.get(key, 0.1)) for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")]
        if len(set(dropouts)) > 1:
            raise ValueError(
                f"embd_pdrop, attn_pdrop and resid_pdrop in config.json must be one number, but are {dropouts}"
            )
        return {
            "vocab_size": config["vocab_size"],
            "d_model": config["n_embd"],
            "num_layers": config["n_layer"],
            "num_heads": config["n_head"],
            "d_ff": config.get("n_inner"),
            "max_seq_len": config["n_positions"],
            "norm_eps": config.get("layer_norm_epsilon", 1e-5),
            "dropout": dropouts[0],
            "bias": config.get("bias", True),
            "tie_embeddings": config.get("tie_word_embeddings", True),
            "activation": activation,
        }

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> GPT2:
        """The network that a `config.json` of transformers describes, with fresh weights."""
        return cls(**cls.hf_arguments(config))

    @staticmethod
    def hf_name(name: str) -> str:
        """The name of a parameter in transformers' network."""
        return name if name.startswith("lm_head.") else f"transformer.{name}"

    @staticmethod
    def hf_view(name: str, parameter: Tensor) -> Tensor:
        """A view of a parameter in transformers' layout; copying into the view writes the parameter."""
        return parameter.T if name.endswith(TRANSPOSED) else parameter

    def hf_zeros(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the biases that transformers' network has in addition when this one has none."""
        if not self.bias:
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear | nn.LayerNorm) and module is not self.lm_head:
                    yield self.hf_name(f"{name}.bias"), tuple(module.weight.shape[:1])
