"""Base class of this package's own image classifiers: image shape, class names, config."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_llm.ranges import require_at_least

Shape = tuple[int, int | None, int | None]
"""Channels, height and width of an image; `None` for any height and width."""


class ImageClassifier(nn.Module, ABC):
    """An image classifier. A subclass makes its layers in `build`, and implements `hidden` and `head`.

    Weights and images are in channels-last memory format, with which convolutions are faster.

    Args:
        num_classes: Width of the head; decided by the data.
        channels: Channels of an image: 1 for grey, 3 for colour; `None`: decided by the data, or 1 without data.
        image_size: Height and width of an image, one number or two; `None`: decided by the data, or 28 without data.
        class_names: Names of the classes, in order; decided by the data.

    Raises:
        ValueError: When a value is out of range, or the number of names is not the number of classes.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int | None = None,
        image_size: int | list[int] | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        height, width = [image_size or 28] * 2 if image_size is None or isinstance(image_size, int) else image_size
        require_at_least(1, num_classes=num_classes, channels=channels, image_size=min(height, width))
        self.num_classes = num_classes
        self._is_given = channels is not None, image_size is not None
        self.image_shape: Shape = (channels or 1, height, width)
        self._class_names = [f"LABEL_{index}" for index in range(num_classes)]
        if class_names is not None:
            self.class_names = class_names

    def _finish(self) -> None:
        """Makes the layers; a subclass's constructor calls it last."""
        self.build()
        self.to(memory_format=torch.channels_last)

    @abstractmethod
    def build(self) -> None:
        """Makes the layers for images of `image_shape`, with fresh weights."""

    @abstractmethod
    def hidden(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch d_hidden"]:
        """The head's input for each image."""

    @abstractmethod
    def head(self, hidden: Float[Tensor, "batch d_hidden"]) -> Float[Tensor, "batch classes"]:
        """Logits of the output of `hidden`."""

    def forward(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of each image.

        Raises:
            ValueError: When the images' channels or size are not those that the network was made for.
        """
        return self.classify(self.features(pixel_values))

    # `forward` in two steps, so that the features of a frozen backbone can be cached.

    def features(self, pixel_values: Float[Tensor, "batch channels height width"]) -> dict[str, Tensor]:
        """The input of `classify`."""
        self.require_images(pixel_values.shape[1:])
        return {"hidden": self.hidden(pixel_values.contiguous(memory_format=torch.channels_last))}

    def classify(self, features: dict[str, Tensor]) -> Float[Tensor, "batch classes"]:
        """Logits of the output of `features`."""
        return self.head(features["hidden"])

    def reset_parameters(self) -> None:
        """Draws torch's initial weights for every layer."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    # Decided by the data.

    def read_images_of(self, image_shape: Sequence[int]) -> None:
        """Rebuilds the layers, with fresh weights, for images of a shape if the constructor left it open.

        Args:
            image_shape: Channels, height, width.

        Raises:
            ValueError: When the constructor was given other channels or another size.
        """
        channels, size = self._is_given
        kept = (self.image_shape[0] if channels else image_shape[0], *(self.image_shape if size else image_shape)[1:])
        require_images(image_shape, kept, type(self).__name__)
        if tuple(image_shape) != self.image_shape:
            self.image_shape = tuple(image_shape)
            self._finish()

    def require_images(self, image_shape: Sequence[int]) -> None:
        """Raises if images have another shape; see the function `require_images`."""
        require_images(image_shape, self.image_shape, type(self).__name__)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.image_shape[0]

    @property
    def image_size(self) -> int | list[int]:
        """Height and width of an image; one number if they are the same."""
        _, height, width = self.image_shape
        return height if height == width else [height, width]

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the logits.

        Raises:
            ValueError: When set to another number of names.
        """
        return self._class_names

    @class_names.setter
    def class_names(self, names: list[str]) -> None:
        if len(names) != self.num_classes:
            raise ValueError(f"class_names must be {self.num_classes} names, as the head is wide, but are {len(names)}")
        self._class_names = list(names)

    # The model directory. Transformers has no such class: only this package opens it.

    @classmethod
    def _options(cls) -> list[str]:
        # `__init__`, not the class: the signature of the subclass that FSDP makes is (*args, **kwargs).
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "num_classes")]

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments but the first, as decided by the data."""
        return {name: getattr(self, name) for name in self._options()}

    def to_hf_config(self) -> dict[str, Any]:
        """A `config.json` in transformers' form, with the classes as `id2label`."""
        names = {"id2label": {str(index): name for index, name in enumerate(self.class_names)}}
        names |= {"label2id": {name: index for index, name in enumerate(self.class_names)}}
        options = {name: value for name, value in self.arguments.items() if name != "class_names"}
        return {"architectures": [type(self).__name__], "model_type": "lit-llm", **options, **names}

    @classmethod
    def hf_arguments(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments for the network that such a config describes."""
        names = [config["id2label"][str(index)] for index in range(len(config["id2label"]))]
        found = {name: config[name] for name in cls._options() if name != "class_names"}
        return {"num_classes": len(names), **found, "class_names": names}

    @staticmethod
    def hf_name(name: str) -> str:
        """The name of a parameter in a model directory: unchanged."""
        return name


def require_images(given: Sequence[int], made_for: Shape, network: str) -> None:
    """Raises if images do not have the shape that a network was made for.

    Args:
        given: Channels, height and width of the images.
        made_for: Shape that the network reads.
        network: Name of the network in the error.

    Example:
        >>> require_images((3, 32, 32), (3, None, None), "ResNet")
    """
    if all(want in (None, have) for have, want in zip(given, made_for, strict=True)):
        return
    wanted = _in_words(made_for)
    size = made_for[1] if made_for[1] == made_for[2] else list(made_for[1:])
    remedy = f"data.channels to {made_for[0]}" + (f" and data.image_size to {size}" if size is not None else "")
    raise ValueError(
        f"data must have images of {wanted}, which the {network} was made for, but has images of "
        f"{_in_words(given)}; set {remedy}"
    )


def _in_words(shape: Sequence[int | None]) -> str:
    channels, height, width = shape
    size = "of any size" if height is None else f"of {height} x {width}"
    return f"{channels} channel{'s' if channels != 1 else ''} {size}"
