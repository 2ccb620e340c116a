"""Encoders of transformers below heads that read all tokens: the mean of a text, or two texts compared."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lit_llm.models.pretrained_classifier import PretrainedClassifier

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class PooledClassifier(PretrainedClassifier, ABC):
    """An encoder below a linear head that reads what a subclass makes of all of the encoder's tokens.

    Transformers has no such head: only this package opens what it is saved as. Its encoder has transformers' names. A
    pooler that comes with an encoder is left out.

    Args:
        num_classes: As in `PretrainedClassifier`.
        path: As in `PretrainedClassifier`; of a model with another head the encoder is taken.
        config: As in `PretrainedClassifier`.
        strict: As in `PretrainedClassifier`.
        activation_checkpointing: As in `PretrainedClassifier`.

    Raises:
        FileNotFoundError: As in `PretrainedClassifier`.
        ValueError: As in `PretrainedClassifier`; and when the architecture has a decoder beside its encoder, or reads
            no text.
    """

    tasks: ClassVar[dict[str, str]] = {"AutoModel": "MODEL_MAPPING_NAMES"}
    description = "an encoder of texts"

    hf_architectures: ClassVar[tuple[str, ...]] = ()
    """A directory is one of these by its own name alone: an encoder without a head is not."""

    means: ClassVar[int]
    """How many times the encoder's width the head reads."""

    @staticmethod
    @abstractmethod
    def pool(
        hidden: Float[Tensor, "batch seq d_model"],
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        separator: int,
    ) -> Float[Tensor, "batch features"]:
        """What the head reads, in fp32.

        Args:
            hidden: What the encoder gives at each token.
            input_ids: The tokens.
            attention_mask: 0 where there is padding.
            separator: The token between two texts; -1 where the tokeniser, or the config, names none.
        """

    @classmethod
    def read_config(cls, config: str | dict[str, Any], name: str = "config") -> PretrainedConfig:
        """As `Pretrained.read_config`; refuses what is no encoder of texts."""
        made = super().read_config(config, name)
        if made.is_encoder_decoder or _encoder(type(made)).main_input_name != "input_ids":
            raise ValueError(f"model_type must be that of {cls.description}, but is {made.model_type}")
        return made

    @classmethod
    def _auto(cls, config: PretrainedConfig) -> type[PreTrainedModel]:
        return _with_head(cls, type(config))

    def _adopt(self, model: PreTrainedModel) -> None:
        super()._adopt(model)
        self._unread = set()

    def to_hf_config(self) -> dict[str, Any]:
        """The `config.json` by which this package makes the same network."""
        return {**super().to_hf_config(), "architectures": [type(self).__name__]}

    def features(self, **inputs: Tensor) -> dict[str, Tensor]:
        """What the head reads, by the name `pooled`."""
        return {"pooled": self.model.pooled(**self._read(inputs))}

    def classify(self, features: Mapping[str, Tensor]) -> Float[Tensor, "batch classes"]:
        """Logits of what `features` gave."""
        return self.model.pooled_head(features["pooled"])


class MeanClassifier(PooledClassifier):
    """An encoder below a linear head that reads the mean of all tokens, marks included.

    For encoders that were trained by such means, as sentence-transformers' are, rather than by their first position.

    Args:
        num_classes: As in `PooledClassifier`.
        path: As in `PooledClassifier`.
        config: As in `PooledClassifier`.
        strict: As in `PooledClassifier`.
        activation_checkpointing: As in `PooledClassifier`.

    Source:
        Reimers & Gurevych, 2019, "Sentence-BERT", arXiv:1908.10084, section 3 (mean pooling).

    Example:
        >>> size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> network = MeanClassifier(2, config={"model_type": "bert", "vocab_size": 10, **size}).eval()
        >>> network(input_ids=torch.tensor([[2, 5, 6, 3]])).shape
        torch.Size([1, 2])
    """

    hf_architectures = ("MeanClassifier",)
    means = 1

    @staticmethod
    def pool(
        hidden: Float[Tensor, "batch seq d_model"],
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        separator: int,
    ) -> Float[Tensor, "batch d_model"]:
        """The mean of all tokens that are not padding."""
        return _mean(hidden, attention_mask)


class PairClassifier(PooledClassifier):
    """An encoder that reads two texts together, below a head that compares what it makes of each.

    With `u` the mean of what it gives at the tokens of the first text, and `v` at those of the second, the head is
    linear in `[u; v; |u - v|; u * v]`. That two texts are alike, which an encoder from zero takes long to find out and
    to move to one position, can then be read off from the first step on. The second text is what comes after the first
    separator; where nothing does, `v` is 0.

    Args:
        num_classes: As in `PooledClassifier`.
        path: As in `PooledClassifier`.
        config: As in `PooledClassifier`.
        strict: As in `PooledClassifier`.
        activation_checkpointing: As in `PooledClassifier`.

    Raises:
        ValueError: As in `PretrainedClassifier`; and when the tokeniser has no separator.

    Source:
        Conneau et al., 2017, "InferSent", arXiv:1705.02364, section 3.1 (the comparison), where, as in Reimers &
        Gurevych, 2019, "Sentence-BERT", arXiv:1908.10084, each text is read alone; here each is read beside the other.

    Example:
        >>> size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> config = {"model_type": "bert", "vocab_size": 10, "sep_token_id": 3, **size}
        >>> network = PairClassifier(2, config=config).eval()
        >>> network(input_ids=torch.tensor([[2, 5, 6, 3, 7, 3]])).shape
        torch.Size([1, 2])
    """

    hf_architectures = ("PairClassifier",)
    means = 4

    def read_tokens_of(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """As `PretrainedClassifier.read_tokens_of`; and learns which token stands between two texts."""
        super().read_tokens_of(tokenizer)
        if tokenizer.sep_token_id is None:
            raise ValueError(
                "data.tokenizer must have a separator for a PairClassifier, which compares two texts, but has none; "
                "set model.network to lit_llm.models.pretrained_pooling.MeanClassifier"
            )
        self.config.sep_token_id = self.model.config.sep_token_id = tokenizer.sep_token_id

    @staticmethod
    def pool(
        hidden: Float[Tensor, "batch seq d_model"],
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        separator: int,
    ) -> Float[Tensor, "batch features"]:
        """`[u; v; |u - v|; u * v]` of the means of two texts: the first ends with the first separator."""
        marks = (input_ids == separator).long()
        second = ((marks.cumsum(dim=1) - marks) > 0).long() * attention_mask
        u, v = _mean(hidden, attention_mask - second), _mean(hidden, second)
        return torch.cat([u, v, (u - v).abs(), u * v], dim=-1)


def _mean(hidden: Float[Tensor, "batch seq d_model"], mask: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch d_model"]:
    """Over the tokens whose mask is 1, in fp32; 0 where none is."""
    weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (hidden.float() * weights[..., None]).sum(dim=1)


def _encoder(config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """Transformers' class for an architecture's encoder."""
    from transformers import MODEL_MAPPING

    found = MODEL_MAPPING[config_class]
    return found[0] if isinstance(found, tuple) else found


@functools.cache
def _with_head(kind: type[PooledClassifier], config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """The class, in transformers' manner, of an architecture's encoder with a head on it."""
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput

    encoder = _encoder(config_class)
    family = next(base for base in encoder.__mro__[1:] if issubclass(base, PreTrainedModel))
    with_segments = "token_type_ids" in inspect.signature(encoder.forward).parameters

    class Pooled(family):
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            made = encoder(config)
            if getattr(made, "pooler", None) is not None:
                made.pooler = None
            setattr(self, self.base_model_prefix, made)
            dropout = getattr(config, "classifier_dropout", None)
            dropout = getattr(config, "hidden_dropout_prob", 0.0) if dropout is None else dropout
            width = kind.means * config.hidden_size
            self.pooled_head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, config.num_labels))
            self.post_init()

        @classmethod
        def from_config(cls, config: PretrainedConfig, dtype: torch.dtype, **_: Any) -> PreTrainedModel:
            return cls._from_config(config, dtype=dtype)

        def pooled(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
        ) -> Tensor:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            segments = with_segments and getattr(self.config, "type_vocab_size", 2) > 1
            more = {"token_type_ids": token_type_ids} if segments else {}
            hidden = self.base_model(input_ids, attention_mask=mask, **more)[0]
            separator = getattr(self.config, "sep_token_id", None)
            return kind.pool(hidden, input_ids, mask, -1 if separator is None else separator)

        def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
            return SequenceClassifierOutput(logits=self.pooled_head(self.pooled(**inputs)))

    return Pooled
