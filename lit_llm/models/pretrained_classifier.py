"""Any text or image classifier of transformers, with this package's interface."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_llm.files import model_folder
from lit_llm.models.image_classifier import Shape, require_images
from lit_llm.models.pretrained_last_layer import compute_what_is_read
from lit_llm.models.pretrained_network import FullPrecision, Pretrained, answering, noise
from lit_llm.modes import evaluating
from lit_llm.shapes import shapes_only

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

NO_NAME = re.compile(r"LABEL_\d+")
"""Transformers' name for a class without a name."""

MULTI_LABEL = "multi_label_classification"
"""Transformers' `problem_type` for classes that do not exclude each other."""

SUMMARIES = frozenset({"flaubert", "xlm", "xlnet"})
"""Architectures whose head reads the positions that `summary_type` selects, even if they are padding."""


class PretrainedClassifier(Pretrained):
    """A classifier of transformers: an encoder (or decoder) of text, or a network of images, with a head on it.

    `forward` takes the fields of a batch as keyword arguments (`input_ids`, `attention_mask`, `pixel_values`, …) and
    returns logits. With one class the logit is the predicted value of a regression.

    Args:
        num_classes: Width of the head; decided by the data, and overrides the config.
        path: What to start from: a model directory (transformers' or ours), a run folder with `model/`, or a name on
            the hub. Loads the backbone's weights, and the head's if it has this width.
        config: Instead of `path`, for random weights: the content of a `config.json`, or a directory or a name on the
            hub that has one.
        strict: Refuse a `path` without a head of this width, or whose head is for classes of other names.
        activation_checkpointing: Recompute each block in the backward pass: less memory for more computation.

    Raises:
        FileNotFoundError: When there is no model at `path`.
        ValueError: When not exactly one of `path` and `config` is given; when it describes no classifier, or one whose
            head reads padding, such as XLNet's; when `path` lacks weights of the backbone; with `strict`, when it lacks
            weights of the head, or its classes do not exclude each other.

    Source:
        Devlin et al., 2019, "BERT", arXiv:1810.04805, section 4; Wolf et al., 2019, arXiv:1910.03771.

    Example:
        >>> size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> network = PretrainedClassifier(3, config={"model_type": "bert", "vocab_size": 10, **size})
        >>> network(input_ids=torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 3])
    """

    tasks: ClassVar[dict[str, str]] = {
        "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    }
    description = "a classifier"

    def __init__(
        self,
        num_classes: int,
        path: str | None = None,
        config: str | dict[str, Any] | None = None,
        strict: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        if (path is None) == (config is None):
            given = "neither is" if path is None else "both are; set the one that is not meant to null"
            raise ValueError(f"model.network.path or model.network.config must be given, one of them, but {given}")
        self._start = None if path is None else str(model_folder(Path(path).expanduser()))  # a name on the hub stays
        self.strict = strict
        made = self.read_config(config if self._start is None else self._start, "config" if path is None else "path")
        made.num_labels = num_classes
        if strict and getattr(made, "problem_type", None) == MULTI_LABEL:
            raise ValueError(
                f"path must hold a head of classes that exclude each other with strict, but {self._start} has one for "
                f"{MULTI_LABEL}; ask it with lit-llm serve"
            )
        super().__init__(made, activation_checkpointing)

    def _build(self) -> None:
        self.head_is_new = True
        if self._start is None or shapes_only():
            super()._build()
            return
        model, found = self._read_weights(self._start, self._plain_config())
        misfits = [name for name, *_ in found["mismatched_keys"]]
        new = sorted([*found["missing_keys"], *misfits])
        backbone = f"{model.base_model_prefix}."
        # Masked language models are saved without a pooler, which is then new, like the head.
        self.head_is_new = any(not name.startswith(backbone) for name in new)
        if lacking := [name for name in new if name.startswith(backbone) and "pooler" not in name]:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise ValueError(f"path must hold the network's backbone, but {self._start} lacks {lacking[0]}{more}")
        if new:
            width = f"one of another width than {self.num_classes}" if misfits else "none"
            if self.strict:
                raise ValueError(
                    f"path must hold a head of {self.num_classes} classes with strict, but {self._start} has {width}"
                )
            log.info(f"The head is new unless a checkpoint is loaded; {self._start} has {width}: {', '.join(new)}")
        self._is_trained = True
        self._adopt(model)

    def _adopt(self, model: PreTrainedModel) -> None:
        super()._adopt(model)
        self._kept: frozenset[str] | None = None
        parameters = inspect.signature(model.forward).parameters
        segments = getattr(self.config, "type_vocab_size", 2)
        self._unread = set() if "token_type_ids" in parameters and segments > 1 else {"token_type_ids"}
        below = set(model.base_model.modules()) if model.base_model is not model else set()
        for module in set(model.modules()) - below:
            if type(module) is nn.Linear and module.out_features == self.num_classes:
                module.__class__ = FullPrecision
        if not self.activation_checkpointing:  # recomputation may run after a hook was removed, with other shapes
            compute_what_is_read(model)

    @classmethod
    def read_config(cls, config: str | dict[str, Any], name: str = "config") -> PretrainedConfig:
        """As `Pretrained.read_config`; refuses a head of transformers that would read right padding."""
        made = super().read_config(config, name)
        its_own = "AutoModelForSequenceClassification" in cls.tasks and made.model_type in SUMMARIES
        if its_own and made.summary_type != "first":
            raise ValueError(
                f"summary_type must be first in the config of a classifier of {made.model_type}, which else reads "
                f"padding, but is {made.summary_type}; set model.network to "
                f"lit_llm.models.pretrained_pooling.MeanClassifier"
            )
        return made

    @property
    def num_classes(self) -> int:
        """Width of the head."""
        return self.config.num_labels

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the logits; kept in the config as `id2label`.

        Raises:
            ValueError: When set to another number of names, or with `strict` to other names than those of `path`.
        """
        # A class named "0" becomes a number when a config is written and read again.
        return [str(self.config.id2label[index]) for index in range(self.num_classes)]

    @class_names.setter
    def class_names(self, names: list[str]) -> None:
        before = self.class_names
        if len(names) != len(before):
            raise ValueError(f"class_names must be {len(before)} names, as the head is wide, but are {len(names)}")
        if names != before and not all(map(NO_NAME.fullmatch, before)):
            if self.strict:
                raise ValueError(
                    f"path must hold a head of the classes {', '.join(names)} with strict, but {self._start} has one "
                    f"of {', '.join(before)}"
                )
            log.info(f"The classes of the head are now {', '.join(names)}; they were {', '.join(before)}")
        for config in (self.config, self.model.config):
            config.id2label = dict(enumerate(names))
            config.label2id = {name: index for index, name in enumerate(names)}

    @property
    def multi_label(self) -> bool:
        """Whether an example may have several classes, each with its own probability; kept as `problem_type`."""
        return getattr(self.config, "problem_type", None) == MULTI_LABEL

    @multi_label.setter
    def multi_label(self, several: bool) -> None:
        if self.multi_label and not several:
            log.info(f"The head was for {MULTI_LABEL}; now each example is of one class")
        for config in (self.config, self.model.config):
            config.problem_type = MULTI_LABEL if several else None

    def read_tokens_of(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Rebuilds fresh weights with a tokeniser's vocabulary size and padding token; checks weights from `path`.

        Raises:
            ValueError: When the weights from `path` have fewer tokens than the tokeniser.
        """
        size, padding = len(tokenizer), tokenizer.pad_token_id
        text = self.config.get_text_config()
        if self._start is None:
            if (text.vocab_size, text.pad_token_id) != (size, padding):
                text.vocab_size, text.pad_token_id = size, padding
                self._build()
            return
        if size > text.vocab_size:
            raise ValueError(
                f"data.tokenizer must have at most the tokens of the network, {text.vocab_size}, but has {size}"
            )

    def read_padding(self, padding: int) -> None:
        """Sets the padding token, before which a decoder's head looks for the last token of a text.

        It stays if positions are counted from its id, which then belongs to the weights.
        """
        if not (self.reads_images or self.first_position):
            self.config.get_text_config().pad_token_id = padding
            self.model.config.get_text_config().pad_token_id = padding

    def recall_tokens(self, config: Mapping[str, Any]) -> None:
        """As `Pretrained.recall_tokens`; also restores the padding token, as `read_padding` does."""
        super().recall_tokens(config)
        if (padding := config.get("pad_token_id")) is not None:
            self.read_padding(padding)

    @property
    def _of_images(self) -> PretrainedConfig:
        """The config of the image encoder; models like CLIP have another one for texts."""
        return getattr(self.config, "vision_config", self.config)

    @property
    def image_shape(self) -> Shape:
        """Channels, height and width of its images; height and width are `None` if it reads any size.

        It does if it has no position embeddings, or its config no `image_size`. Absent if the network reads no images.
        """
        if not self.reads_images:
            raise AttributeError("image_shape")
        channels, size = self._of_images.num_channels, getattr(self._of_images, "image_size", None)
        if size is None or not any("position" in name for name, _ in self.model.named_parameters()):
            return channels, None, None
        height, width = (size, size) if isinstance(size, int) else size
        return channels, height, width

    def require_images(self, image_shape: Sequence[int]) -> None:
        """Raises if images have another shape; see `image_classifier.require_images`."""
        require_images(image_shape, self.image_shape, type(self.model).__name__)

    def read_images_of(self, image_shape: Sequence[int]) -> None:
        """Rebuilds fresh weights for images of a shape; checks the shape if they are trained.

        Args:
            image_shape: Channels, height, width.

        Raises:
            ValueError: When the weights are for another shape, the patch size does not divide the image, or the network
                reads no images, or only square ones.
        """
        kind = type(self.model).__name__
        if not self.reads_images:
            raise ValueError(f"network must read images, but is a {kind}, which reads {self.model.main_input_name}")
        if self._is_trained:
            self.require_images(image_shape)
            return
        channels, height, width = image_shape
        config = self._of_images
        if config is not self.config and height != width:
            raise ValueError(
                f"data must have images as high as wide for a {kind}, but has images of {height} x {width}; set "
                f"data.image_size to one number"
            )
        patch = getattr(config, "patch_size", None)
        if isinstance(patch, int) and (height % patch or width % patch):
            raise ValueError(f"patch_size must divide the images' {height} x {width}, but is {patch}")
        size = height if height == width else [height, width]
        if (config.num_channels, getattr(config, "image_size", size)) == (channels, size):
            return
        config.num_channels = channels
        if hasattr(config, "image_size"):
            config.image_size = size
        self._build()

    @classmethod
    def hf_arguments(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments for the network that a `config.json` of transformers describes."""
        return {"num_classes": cls.read_config(config).num_labels, "config": config}

    def forward(self, **inputs: Tensor) -> Float[Tensor, "batch classes"]:
        """Logits of each example.

        Args:
            inputs: What the architecture reads, by name; `token_type_ids` are ignored if it does not read them.
        """
        return self.model(**self._read(inputs)).logits

    def _read(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        read = {name: tensor for name, tensor in inputs.items() if name not in self._unread}
        if self.reads_images:  # convolutions are faster with channels last
            read["pixel_values"] = read["pixel_values"].contiguous(memory_format=torch.channels_last)
        return read

    # `forward` in two steps, so that the features of a frozen backbone can be cached.

    @property
    def _learning_pooler(self) -> nn.Module | None:
        """The backbone's pooler if it has parameters."""
        pooler = getattr(self.model.base_model, "pooler", None)
        return pooler if pooler is not None and any(True for _ in pooler.parameters()) else None

    def features(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The backbone's output, as far as the head reads it: `classify(features(**inputs))` is `forward(**inputs)`.

        The first call tries out how little the head needs: the pooled output, the first position, both, or the whole
        sequence. In training mode the backbone's dropout is applied here, the head's in `classify`.

        Args:
            inputs: As in `forward`.

        Returns:
            Tensors by name, with one row per example. Their length depends on the batch only if the whole sequence is
            kept (`last_hidden_state`, together with the inputs).

        Raises:
            ValueError: When the architecture does not separate backbone and head, or its backbone alone does not give
                what the head reads (Longformer, CANINE).
        """
        base, inputs = self.model.base_model, self._read(inputs)
        if base is self.model:
            name = type(self.model).__name__
            raise ValueError(f"network must have a backbone apart from its head, but a {name} has none")
        given = base(**inputs)
        whole = {**inputs, "last_hidden_state": given[0]}
        pooled = {"pooler_output": given["pooler_output"]} if given.get("pooler_output") is not None else {}
        if self._learning_pooler is not None:  # counts as part of the head; `classify` runs it
            pooled = {}
        first = {"first_hidden_state": given[0][:, :1]}
        if self._kept is None:
            if inputs[self.model.main_input_name].shape[1] == given[0].shape[1] == 1:  # too short to tell
                return whole | pooled
            smaller = [found for found in (pooled, first, pooled | first, whole) if found]
            enough = (found for found in smaller if self._is_enough(found, whole | pooled))
            self._kept = frozenset(next(enough, whole | pooled))
            self._require_same_logits(inputs)
        return {name: tensor for name, tensor in (whole | pooled | first).items() if name in self._kept}

    @torch.no_grad()
    def _require_same_logits(self, inputs: dict[str, Tensor]) -> None:
        with evaluating(self.model), torch.autocast(next(iter(inputs.values())).device.type, enabled=False):
            said, expected = self.classify(self.features(**inputs)), self.model(**inputs).logits
        if not (said - expected).abs().max() <= 1e-3 * expected.abs().max() + noise(expected):
            self._kept = None
            raise ValueError(
                f"network must have a backbone that gives all that its head reads, but a {type(self.model).__name__} "
                f"has not; set model.adaptation.cache_features to false"
            )

    @torch.no_grad()
    def _is_enough(self, features: dict[str, Tensor], everything: dict[str, Tensor]) -> bool:
        """Whether the head gives the same logits for some features as for all; missing features are filled with NaN."""
        try:
            with evaluating(self.model):
                said, expected = self.classify(features), self.classify(everything)
        except Exception:  # heads fail in various ways without an input they need
            return False
        return torch.allclose(said, expected, rtol=1e-2, atol=1e-5)

    def classify(self, features: dict[str, Tensor]) -> Float[Tensor, "batch classes"]:
        """Logits of the output of `features`."""
        some = next(iter(features.values()))
        unknown = some.new_full((len(some), 1), torch.nan, dtype=self.model.dtype)
        if "first_hidden_state" in features:
            first = features["first_hidden_state"]
            hidden = torch.cat([first, torch.full_like(first, torch.nan)], dim=1)
        else:
            hidden = features.get("last_hidden_state", unknown)
        pooled = features.get("pooler_output", unknown)
        if (pooler := self._learning_pooler) is not None:
            alone = type(pooler) is nn.Linear  # as in ALBERT, whose pooler has no activation of its own
            pooled = self.model.base_model.pooler_activation(pooler(hidden[:, 0])) if alone else pooler(hidden)
        given = _Output(last_hidden_state=hidden, pooler_output=pooled)
        inputs = {name: tensor for name, tensor in features.items() if name not in {*given, "first_hidden_state"}}
        if not inputs:  # the head needs none, but `forward` of the network requires one
            inputs[self.model.main_input_name] = torch.zeros(len(some), 2, dtype=torch.long, device=some.device)
        with answering(self.model.base_model, given):
            return self.model(**inputs).logits


class _Output(dict):
    """A backbone's output, like transformers' `ModelOutput`: access by key, attribute (`None` if missing) or index."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]
