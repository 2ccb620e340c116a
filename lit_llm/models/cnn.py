"""A small convolutional network: PyTorch's MNIST example."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_llm.blocks import Block
from lit_llm.models.image_classifier import ImageClassifier
from lit_llm.ranges import require_at_least, require_range


class Convolution(nn.Conv2d, Block):
    """A convolution that counts as a block."""


class Dense(nn.Linear, Block):
    """A linear layer that counts as a block."""


class CNN(ImageClassifier):
    """Two convolutions and two linear layers, with ReLU, max-pooling and dropout in between.

    It has 1.2 million parameters for 28 x 28 images in one channel, 98 % of them in the first linear layer.

    Args:
        num_classes: Width of the head; decided by the data.
        channels: As in `ImageClassifier`.
        image_size: As in `ImageClassifier`; at least 6.
        class_names: As in `ImageClassifier`.
        channel_dropout: Probability that a whole channel is dropped after pooling, in [0, 1).
        dropout: Dropout probability of the head's input.

    Raises:
        ValueError: When a value is out of range.

    Source:
        PyTorch's example `mnist/main.py`, also in "Starting to develop and fine-tune large models from zero", section
        5. Differs in the output: logits instead of their log-softmax, which gives the same cross-entropy.

    Example:
        >>> network = CNN(10)
        >>> network(torch.zeros(2, 1, 28, 28)).shape, sum(p.numel() for p in network.parameters())
        (torch.Size([2, 10]), 1199882)
    """

    hf_architectures = ("CNN",)

    def __init__(
        self,
        num_classes: int,
        channels: int | None = None,
        image_size: int | list[int] | None = None,
        class_names: list[str] | None = None,
        channel_dropout: float = 0.25,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(num_classes, channels, image_size, class_names)
        require_range("in [0, 1)", channel_dropout=channel_dropout, dropout=dropout)
        self.channel_dropout, self.dropout = channel_dropout, dropout
        self._finish()

    def build(self) -> None:
        """Makes the layers, with torch's initial weights."""
        channels, height, width = self.image_shape
        require_at_least(6, image_size=min(height, width))
        self.conv1, self.conv2 = Convolution(channels, 32, 3), Convolution(32, 64, 3)
        self.dropout1, self.dropout2 = nn.Dropout2d(self.channel_dropout), nn.Dropout(self.dropout)
        self.fc1 = Dense(64 * ((height - 4) // 2) * ((width - 4) // 2), 128)
        self.fc2 = nn.Linear(128, self.num_classes)

    def hidden(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 128"]:
        """Everything below the last linear layer."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.dropout1(F.max_pool2d(x, 2))
        return F.relu(self.fc1(torch.flatten(x, 1)))

    def head(self, hidden: Float[Tensor, "batch 128"]) -> Float[Tensor, "batch classes"]:
        """Dropout and the last linear layer."""
        return self.fc2(self.dropout2(hidden))
