"""Encoders of transformers with heads that read all tokens: their mean, or a comparison with another text's tokens."""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.models.pretrained_network import FullPrecision

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class Head(nn.Module, ABC):
    """Computes logits from an encoder's output in two steps: `read`, without parameters, and `forward`, with them.

    Args:
        d_model: Width of the encoder.
        num_classes: Width of the logits.
        dropout: Dropout probability of each layer's input.
    """

    @abstractmethod
    def __init__(self, d_model: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)

    @staticmethod
    @abstractmethod
    def read(
        hidden: Float[Tensor, "batch seq d_model"],
        first: Int[Tensor, "batch seq"],
        second: Int[Tensor, "batch seq"],
    ) -> dict[str, Tensor]:
        """The arguments of `forward` by name; no parameter of the head takes part, so they can be cached.

        Args:
            hidden: The encoder's output at each token.
            first: 1 on the tokens of the first, or only, text; else 0.
            second: 1 on the tokens of the second text; else 0.
        """

    def reset(self) -> None:
        """Initialises parameters that belong to no layer."""

    @abstractmethod
    def forward(self, **read: Tensor) -> Float[Tensor, "batch classes"]:
        """Logits of the output of `read`."""


class MeanHead(Head):
    """A linear layer on the mean of all tokens.

    Args:
        d_model: As in `Head`.
        num_classes: As in `Head`.
        dropout: As in `Head`.
    """

    def __init__(self, d_model: int, num_classes: int, dropout: float) -> None:
        super().__init__(d_model, num_classes, dropout)
        self.out = FullPrecision(d_model, num_classes)

    @staticmethod
    def read(
        hidden: Float[Tensor, "batch seq d_model"],
        first: Int[Tensor, "batch seq"],
        second: Int[Tensor, "batch seq"],
    ) -> dict[str, Tensor]:
        """The mean of all tokens that are not padding."""
        return {"pooled": _mean(hidden.float(), first + second)}

    def forward(self, pooled: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch classes"]:
        """Logits of the mean."""
        return self.out(self.dropout(pooled))


class AlignedHead(Head):
    """Compares each token of two texts with the similar tokens of the other text; see `PairClassifier`.

    Args:
        d_model: As in `Head`.
        num_classes: As in `Head`.
        dropout: As in `Head`.
    """

    sharpness = 16.0
    """Initial factor on cosines: an identical token weighs thousands of times more than an unrelated one."""

    def __init__(self, d_model: int, num_classes: int, dropout: float) -> None:
        super().__init__(d_model, num_classes, dropout)
        self.compare = nn.Linear(4 * d_model, d_model)
        self.aggregate = FullPrecision(2 * d_model, num_classes)
        self.scale = nn.Parameter(torch.empty(1))
        self.reset()

    def reset(self) -> None:
        """Initialises the scale."""
        nn.init.constant_(self.scale, math.log(self.sharpness))

    @staticmethod
    def read(
        hidden: Float[Tensor, "batch seq d_model"],
        first: Int[Tensor, "batch seq"],
        second: Int[Tensor, "batch seq"],
    ) -> dict[str, Tensor]:
        """All arguments; `hidden` is called `last_hidden_state`."""
        return {"last_hidden_state": hidden, "first": first, "second": second}

    def forward(
        self,
        last_hidden_state: Float[Tensor, "batch seq d_model"],
        first: Int[Tensor, "batch seq"],
        second: Int[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch classes"]:
        """Logits of a pair of texts."""
        hidden = last_hidden_state.float()
        direction = nn.functional.normalize(hidden, dim=-1)
        alike = self.scale.exp() * (direction @ direction.mT).float()
        u, v = first.bool(), second.bool()
        across = (u[:, :, None] & v[:, None]) | (v[:, :, None] & u[:, None])
        weights = alike.masked_fill(~across, -1e4).softmax(dim=-1)  # not -inf: no NaN without a second text
        other = ((weights * across) @ hidden).float()
        pairs = torch.cat([hidden, other, (hidden - other).abs(), hidden * other], dim=-1)
        compared = self.compare(self.dropout(pairs).to(self.compare.weight.dtype)).relu()
        means = torch.cat([_mean(compared.float(), mask) for mask in (first, second)], dim=-1)
        return self.aggregate(self.dropout(means))


class PooledClassifier(PretrainedClassifier, ABC):
    """An encoder with a head that reads all tokens.

    Transformers has no such head: only this package opens its model directory. The encoder's weights keep the names of
    transformers. An encoder's own pooler is removed.

    Args:
        num_classes: As in `PretrainedClassifier`.
        path: As in `PretrainedClassifier`; only the encoder is loaded if the model has a different head.
        config: As in `PretrainedClassifier`.
        strict: As in `PretrainedClassifier`.
        activation_checkpointing: As in `PretrainedClassifier`.

    Raises:
        FileNotFoundError: As in `PretrainedClassifier`.
        ValueError: As in `PretrainedClassifier`; also when the architecture is an encoder-decoder, or reads no text.
    """

    tasks: ClassVar[dict[str, str]] = {"AutoModel": "MODEL_MAPPING_NAMES"}
    description = "an encoder of texts"

    hf_architectures: ClassVar[tuple[str, ...]] = ()
    """Values of `architectures` that the class opens: its own name only, not those of plain encoders."""

    @property
    @abstractmethod
    def head(self) -> type[Head]:
        """The head's class: a class attribute of each subclass."""

    @classmethod
    def read_config(cls, config: str | dict[str, Any], name: str = "config") -> PretrainedConfig:
        """As `Pretrained.read_config`; refuses architectures that are not text encoders."""
        made = super().read_config(config, name)
        if made.is_encoder_decoder or _encoder(type(made)).main_input_name != "input_ids":
            raise ValueError(f"model_type must be that of {cls.description}, but is {made.model_type}")
        return made

    @classmethod
    def _auto(cls, config: PretrainedConfig) -> type[PreTrainedModel]:
        return _with_head(cls.head, type(config))

    def _adopt(self, model: PreTrainedModel) -> None:
        super()._adopt(model)
        self._unread = set()

    def to_hf_config(self) -> dict[str, Any]:
        """The `config.json` from which this package builds the same network."""
        return {**super().to_hf_config(), "architectures": [type(self).__name__]}

    def features(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The head's input by name: `pooled`, or the encoder's output at all tokens."""
        return self.model.read(**self._read(inputs))

    def classify(self, features: Mapping[str, Tensor]) -> Float[Tensor, "batch classes"]:
        """Logits of the output of `features`."""
        return self.model.pooled_head(**features)


class MeanClassifier(PooledClassifier):
    """An encoder with a linear head on the mean of all tokens, including special tokens.

    For encoders trained with mean pooling, such as sentence-transformers', rather than with the first position.

    Args:
        num_classes: As in `PretrainedClassifier`.
        path: As in `PooledClassifier`.
        config: As in `PretrainedClassifier`.
        strict: As in `PretrainedClassifier`.
        activation_checkpointing: As in `PretrainedClassifier`.

    Source:
        Reimers & Gurevych, 2019, "Sentence-BERT", arXiv:1908.10084, section 3 (mean pooling).

    Example:
        >>> size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> network = MeanClassifier(2, config={"model_type": "bert", "vocab_size": 10, **size}).eval()
        >>> network(input_ids=torch.tensor([[2, 5, 6, 3]])).shape
        torch.Size([1, 2])
    """

    hf_architectures = ("MeanClassifier",)
    head = MeanHead


class PairClassifier(PooledClassifier):
    """An encoder that reads two texts together, with a head that compares each token with the other text.

    For each token `a` of one text, `b` is the mean of the other text's tokens, weighted by a softmax over their cosine
    similarity to `a` times a learnt factor. A layer with ReLU reads `[a; b; |a - b|; a * b]`; its outputs are averaged
    over each text, and a linear layer reads both means. So the overlap of two texts, which an encoder trained from
    scratch takes long to learn and to move to one position, is available from the first step. The second text is
    everything after the first separator; if there is none, `b` is 0.

    Args:
        num_classes: As in `PretrainedClassifier`.
        path: As in `PooledClassifier`.
        config: As in `PretrainedClassifier`.
        strict: As in `PretrainedClassifier`.
        activation_checkpointing: As in `PretrainedClassifier`.

    Raises:
        ValueError: As in `PretrainedClassifier`; also when the tokeniser has no separator.

    Source:
        Parikh et al., 2016, "A Decomposable Attention Model", arXiv:1606.01933, eq. 1 to 5 (attend, compare,
        aggregate); the compared vector is that of Chen et al., 2017, "ESIM", arXiv:1609.06038, eq. 14. Differs in that
        the encoder reads both texts together, similarity is a cosine, and sums are means.

    Example:
        >>> size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> config = {"model_type": "bert", "vocab_size": 10, "sep_token_id": 3, **size}
        >>> network = PairClassifier(2, config=config).eval()
        >>> network(input_ids=torch.tensor([[2, 5, 6, 3, 7, 3]])).shape
        torch.Size([1, 2])
    """

    hf_architectures = ("PairClassifier",)
    head = AlignedHead
    reads_pairs = True

    def read_tokens_of(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """As `PretrainedClassifier.read_tokens_of`; also sets the separator, which ends the first text."""
        super().read_tokens_of(tokenizer)
        if tokenizer.sep_token_id is None:
            raise ValueError(
                "data.tokenizer must have a separator for a PairClassifier, which compares two texts, but has none; "
                "set model.network to lit_llm.models.pretrained_pooling.MeanClassifier"
            )
        self.config.sep_token_id = self.model.config.sep_token_id = tokenizer.sep_token_id

    def recall_tokens(self, config: Mapping[str, Any]) -> None:
        """As `PretrainedClassifier.recall_tokens`; also restores the separator."""
        super().recall_tokens(config)
        if (separator := config.get("sep_token_id")) is not None:
            self.config.sep_token_id = self.model.config.sep_token_id = separator


def _mean(x: Float[Tensor, "batch seq features"], mask: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch features"]:
    """Mean over the tokens whose mask is 1; 0 if there is none."""
    weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (x * weights[..., None]).sum(dim=1)


def _encoder(config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """Transformers' class for an architecture's encoder."""
    from transformers import MODEL_MAPPING

    found = MODEL_MAPPING[config_class]
    return found[0] if isinstance(found, tuple) else found


@functools.cache
def _with_head(kind: type[Head], config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """A `PreTrainedModel` class: an architecture's encoder with a head."""
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
            self.pooled_head = kind(config.hidden_size, config.num_labels, dropout)
            self.post_init()

        @classmethod
        def from_config(cls, config: PretrainedConfig, dtype: torch.dtype, **_: Any) -> PreTrainedModel:
            return cls._from_config(config, dtype=dtype)

        def _init_weights(self, module: nn.Module) -> None:
            super()._init_weights(module)
            if isinstance(module, Head):
                module.reset()

        def read(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
        ) -> dict[str, Tensor]:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            segments = with_segments and getattr(self.config, "type_vocab_size", 2) > 1
            more = {"token_type_ids": token_type_ids} if segments else {}
            hidden = self.base_model(input_ids, attention_mask=mask, **more)[0]
            separator = getattr(self.config, "sep_token_id", None)
            marks = (input_ids == (-1 if separator is None else separator)).long()
            second = ((marks.cumsum(dim=1) - marks) > 0) * mask
            return kind.read(hidden, mask - second, second)

        def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
            return SequenceClassifierOutput(logits=self.pooled_head(**self.read(**inputs)))

    return Pooled
