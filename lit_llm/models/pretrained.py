"""Any causal language model of transformers, with this package's interface."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lit_llm.models.attention import document_mask
from lit_llm.models.pretrained_network import PretrainedLanguageModel, counting_from_padding, noise
from lit_llm.modes import evaluating
from lit_llm.shapes import shapes_only

if TYPE_CHECKING:
    from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ATTENTION = {"full_attention", "sliding_attention"}
"""Kinds of layers whose attention is fully determined by a mask."""


class PretrainedCausalLM(PretrainedLanguageModel):
    """A causal language model of transformers, made from its config with fresh weights.

    Trained weights are loaded by `checkpoints.load_model` or an objective's `weights`. Its repeated layers count as
    blocks. `hidden` and `lm_head` exist only if the logits are the head's output unchanged: not with scaled or capped
    logits. No code that comes with a checkpoint is run, and no pickle is read.

    Args:
        vocab_size: Number of tokens; decided by the data, and overrides the config.
        config: The content of a `config.json`, or a directory or a name on the hub that has one.
        activation_checkpointing: Recompute each block in the backward pass: less memory for more computation.

    Raises:
        FileNotFoundError: When there is no such config.
        ValueError: When it does not describe a causal language model, or one that sees later tokens, such as XLNet.

    Source:
        Wolf et al., 2019, "HuggingFace's Transformers", arXiv:1910.03771.

    Example:
        >>> size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> network = PretrainedCausalLM(10, {"model_type": "mistral", "num_key_value_heads": 1, **size})
        >>> network(torch.zeros(1, 3, dtype=torch.long)).shape
        torch.Size([1, 3, 10])
    """

    tasks: ClassVar[dict[str, str]] = {"AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"}
    description = "a causal language model"

    def _plain_config(self) -> PretrainedConfig:
        # Rows have no padding. Transformers would freeze the embedding of the padding token, which ends documents here.
        plain = copy.deepcopy(self.config)
        vars(plain.get_text_config())["pad_token_id"] = None  # not by `setattr`, which a few architectures validate
        return plain

    def _build(self) -> None:
        super()._build()
        if self._sees_ahead():
            raise ValueError(
                f"config must describe a network that sees no later token at any position, but a "
                f"{type(self.model).__name__} of it does"
            )

    def _adopt(self, model: PreTrainedModel) -> None:
        if kin := counting_from_padding(model):
            kin.padding_idx = self.config.pad_token_id
            if kin.padding_idx is None:
                raise ValueError(
                    f"pad_token_id must be in the config of a causal {self.config.model_type}, which counts positions "
                    f"from it, and less than vocab_size, but is not"
                )
        super()._adopt(model)
        self._head_is_all = self._finds_nothing_but_the_head()

    def read_tokens_of(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Rebuilds fresh weights with the tokeniser's padding token if positions are counted from it, as in RoBERTa.

        Raises:
            ValueError: When there is no padding token, or it also occurs in texts, where transformers would not count
                it as a position.
        """
        if not self.first_position:
            return
        others = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id
        if tokenizer.pad_token_id in (None, *others):
            raise ValueError(
                f"data.tokenizer must have a padding token of its own for a causal {self.config.model_type}, which "
                f"counts positions by it, but pads with {tokenizer.pad_token}"
            )
        if tokenizer.pad_token_id != self.config.pad_token_id:
            self.config.pad_token_id = tokenizer.pad_token_id
            self._build()

    def reset_parameters(self) -> None:
        """Draws the initial weights of the architecture."""
        super().reset_parameters()
        self._head_is_all = self._finds_nothing_but_the_head()

    @classmethod
    def read_config(cls, config: str | dict[str, Any], name: str = "config") -> PretrainedConfig:
        """As `Pretrained.read_config`; refuses an encoder whose config does not set `is_decoder`."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        made = super().read_config(config, name)
        encoders = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}
        if made.model_type in encoders and getattr(made, "is_decoder", True) is False:
            raise ValueError(f"is_decoder must be true in the config of a causal {made.model_type}, but is false")
        return made

    @torch.no_grad()
    def _sees_ahead(self) -> bool:
        """Whether the last token changes logits before it, found by running the network on two texts of four tokens."""
        device = next(self.model.parameters()).device
        if device.type == "meta" or shapes_only():
            return False
        ids = torch.zeros(2, 4, dtype=torch.long, device=device)
        ids[1, -1] = self.vocab_size - 1
        try:
            with evaluating(self.model):
                before, after = self(ids)[:, :-1]
        except Exception:  # networks fail in various ways on so few tokens
            return False
        return bool((after - before).abs().max() > noise(before))

    @torch.no_grad()
    def _finds_nothing_but_the_head(self) -> bool:
        """Whether the logits are `head(decoder output)` and nothing else, found by running the network once."""
        head, base = self.model.get_output_embeddings(), self.model.base_model
        if type(head) is not nn.Linear or head.bias is not None or base is self.model:
            return False
        seen: dict[str, Any] = dict.fromkeys(("decoder", "read"))
        hooks = [
            base.register_forward_hook(lambda module, args, out: seen.update(decoder=out[0])),
            head.register_forward_hook(lambda module, args, out: seen.update(read=args[0], said=out)),
        ]
        try:
            with evaluating(self.model):
                logits = self.model(torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)).logits
        except (NotImplementedError, RuntimeError):  # a network on the meta device whose code depends on values
            return False
        finally:
            for hook in hooks:
                hook.remove()
        given, read = seen["decoder"], seen["read"]
        if given is None or read is None or given.shape != read.shape:
            return False
        same = (given if given._base is None else given._base) is (read if read._base is None else read._base)
        return same and logits is seen["said"]

    @property
    def lm_head(self) -> nn.Linear:
        """The layer that turns `hidden` into logits; absent if the logits are computed in another way."""
        if not self._head_is_all:
            raise AttributeError("lm_head")
        return self.model.get_output_embeddings()

    @functools.cached_property
    def hidden(self) -> Any:
        """The head's input, as a function with the arguments of `forward`; absent if `lm_head` is.

        (Not a plain property, since FSDP replaces this attribute.)
        """
        if not self._head_is_all:
            raise AttributeError("hidden")
        return self._hidden

    def _hidden(self, *args: Any, **kwargs: Any) -> Float[Tensor, "batch new d_model"]:
        return self.model.base_model(**self._translated(*args, **kwargs))[0]

    def forward(
        self,
        input_ids: Int[Tensor, "batch new"],
        document_ids: Int[Tensor, "batch new"] | None = None,
        positions: Int[Tensor, "#batch new"] | None = None,
        mask: Bool[Tensor, "#batch 1 new seq"] | None = None,
        cache: DynamicCache | None = None,
    ) -> Float[Tensor, "batch new vocab"]:
        """Logits of the token that follows each position.

        Args:
            input_ids: Tokens.
            document_ids: Document of each token: attention is confined to it, and causal. Replaces `mask`.
            positions: Index of each token in its sequence; default: counted from the cache's length.
            mask: True where a query may attend; `None` is causal.
            cache: Keys and values of earlier tokens; the new ones are added to it.

        Raises:
            ValueError: When `document_ids`, `mask` or `cache` is given, but the network is not made of attention over
                given positions.
        """
        return self.model(**self._translated(input_ids, document_ids, positions, mask, cache)).logits

    def _translated(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> dict[str, Any]:
        """The arguments for transformers' `forward`."""
        if document_ids is not None:
            mask = document_mask(document_ids)
        words: dict[str, Any] = {"input_ids": input_ids, "use_cache": cache is not None}
        if positions is None and self.first_position:  # by default transformers counts no position for a padding token
            kept = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(kept, kept + input_ids.shape[1], device=input_ids.device)[None]
        if positions is not None:
            words["position_ids"] = positions.expand_as(input_ids) + self.first_position
        if cache is not None:
            words["past_key_values"] = cache
        if mask is not None or cache is not None:
            self._require_attention()
        if mask is not None:
            words["attention_mask"] = self._masks(mask.expand(len(input_ids), -1, -1, -1))
        return words

    def _require_attention(self) -> None:
        config = self.config.get_text_config()
        others = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION)
        taken = inspect.signature(self.model.forward).parameters
        if "position_ids" not in taken:
            others.append("no positions that can be given")
        if "past_key_values" not in taken:  # older architectures, which do not read such a mask either
            others.append("no cache of keys and values")
        if getattr(config, "alibi", False):  # computed from the padding mask, not from the given positions
            others.append("alibi")
        if others:
            raise ValueError(
                f"network must be made of attention over given positions to keep documents apart or to decode with a "
                f"cache, but a {type(self.model).__name__} has {', '.join(others)}"
            )

    def _masks(self, mask: Bool[Tensor, "batch 1 new seq"]) -> Any:
        """The mask for each kind of layer, in the form that the attention implementation takes."""
        config = self.config.get_text_config()
        kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        if window and (kinds is None or "sliding_attention" in kinds) and getattr(config, "use_sliding_window", True):
            new, seq = mask.shape[-2:]
            near = torch.ones(new, seq, dtype=torch.bool, device=mask.device).triu(seq - new - window + 1)
            sliding = self._form(mask & near)
            return {"full_attention": self._form(mask), "sliding_attention": sliding} if kinds else sliding
        return self._form(mask)

    def new_cache(self, batch_size: int, max_seq_len: int) -> DynamicCache:
        """An empty cache for `forward`, which grows as it is filled; neither size matters."""
        from transformers import DynamicCache

        self._require_attention()
        return DynamicCache()  # without a config: sliding layers would drop keys that the mask still covers
