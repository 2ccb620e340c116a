"""A multi-layer perceptron on the pixels of an image."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_llm.blocks import Block
from lit_llm.models.image_classifier import ImageClassifier
from lit_llm.ranges import require_at_least, require_range


class PerceptronLayer(Block):
    """A linear layer, ReLU and dropout.

    Args:
        d_in: Width of the input.
        d_out: Width of the output.
        dropout: Dropout probability of the output.
    """

    def __init__(self, d_in: int, d_out: int, dropout: float) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(d_in, d_out), nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """The layer's output."""
        return self.drop(F.relu(self.linear(x)))


class MLP(ImageClassifier):
    """A multi-layer perceptron on the pixels of an image, without any notion of their position.

    Args:
        num_classes: Width of the head; decided by the data.
        channels: As in `ImageClassifier`.
        image_size: As in `ImageClassifier`.
        class_names: As in `ImageClassifier`.
        d_hidden: Width of the hidden layers.
        num_layers: Number of hidden layers; 0 is multinomial logistic regression.
        dropout: Dropout probability of the hidden layers, in [0, 1).

    Raises:
        ValueError: When a value is out of range.

    Source:
        Rumelhart, Hinton & Williams, 1986, "Learning representations by back-propagating errors"; with ReLU and dropout
        on MNIST: Srivastava et al., 2014, "Dropout", section 6.1.1.

    Example:
        >>> MLP(10, d_hidden=32)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    hf_architectures = ("MLP",)

    def __init__(
        self,
        num_classes: int,
        channels: int | None = None,
        image_size: int | list[int] | None = None,
        class_names: list[str] | None = None,
        d_hidden: int = 256,
        num_layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_classes, channels, image_size, class_names)
        require_at_least(1, d_hidden=d_hidden)
        require_at_least(0, num_layers=num_layers)
        require_range("in [0, 1)", dropout=dropout)
        self.d_hidden, self.num_layers, self.dropout = d_hidden, num_layers, dropout
        self._finish()

    def build(self) -> None:
        """Makes the layers, with torch's initial weights."""
        channels, height, width = self.image_shape
        widths = [channels * height * width, *[self.d_hidden] * self.num_layers]
        self.layers = nn.Sequential(*(PerceptronLayer(*pair, self.dropout) for pair in itertools.pairwise(widths)))
        self.fc = nn.Linear(widths[-1], self.num_classes)

    def hidden(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch d_hidden"]:
        """The last hidden layer."""
        return self.layers(torch.flatten(x, 1))

    def head(self, hidden: Float[Tensor, "batch d_hidden"]) -> Float[Tensor, "batch classes"]:
        """The last linear layer."""
        return self.fc(hidden)
