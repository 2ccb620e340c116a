"""LeNet, modernised: a convolutional network for small images that trains in seconds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lit_llm.blocks import Block
from lit_llm.models.image_classifier import ImageClassifier
from lit_llm.ranges import require_at_least, require_range


class ConvolutionLayer(Block):
    """A convolution, batch normalisation and ReLU.

    Args:
        channels: Input channels.
        width: Output channels.
        kernel: Side of the kernel, odd; edges are padded with zeros.
        stride: Stride of the convolution.
    """

    def __init__(self, channels: int, width: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)  # the norm has a bias
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out_channels high wide"]:
        """The layer's output."""
        return F.relu(self.norm(self.conv(x)))


class LeNet(ImageClassifier):
    """Convolutions with growing receptive fields and channels, then one linear layer.

    The first layer has a stride of 2, since most of the time would be spent there; two poolings follow. It has 29,434
    parameters for 10 classes of 28 x 28 images in one channel, with the default width.

    Args:
        num_classes: Width of the head; decided by the data.
        channels: As in `ImageClassifier`.
        image_size: As in `ImageClassifier`; at least 7.
        class_names: As in `ImageClassifier`.
        width: Channels of the first convolution; twice as many before the first pooling, four times before the second.
        num_layers: Convolutions before each pooling, in addition to the first convolution.
        dropout: Dropout probability of the head's input, in [0, 1).

    Raises:
        ValueError: When a value is out of range.

    Source:
        LeCun et al., 1998, "Gradient-based learning applied to document recognition", section II.B. Differs in batch
        normalisation (Ioffe & Szegedy, 2015, arXiv:1502.03167), ReLU, 3 x 3 kernels after the first, max-pooling, and
        one linear layer instead of three.

    Example:
        >>> network = LeNet(10)
        >>> network(torch.zeros(2, 1, 28, 28)).shape, sum(p.numel() for p in network.parameters())
        (torch.Size([2, 10]), 29434)
    """

    hf_architectures = ("LeNet",)

    def __init__(
        self,
        num_classes: int,
        channels: int | None = None,
        image_size: int | list[int] | None = None,
        class_names: list[str] | None = None,
        width: int = 16,
        num_layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_classes, channels, image_size, class_names)
        require_at_least(1, width=width, num_layers=num_layers)
        require_range("in [0, 1)", dropout=dropout)
        self.width, self.num_layers, self.dropout = width, num_layers, dropout
        self._finish()

    def build(self) -> None:
        """Makes the layers, with torch's initial weights."""
        channels, height, width = self.image_shape
        require_at_least(7, image_size=min(height, width))
        layers: list[nn.Module] = [ConvolutionLayer(channels, self.width, 5, stride=2)]
        here = self.width
        for wide in (2 * self.width, 4 * self.width):
            for _ in range(self.num_layers):
                layers.append(ConvolutionLayer(here, wide))
                here = wide
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.drop = nn.Dropout(self.dropout)
        self.fc = nn.Linear(here * ((height + 1) // 8) * ((width + 1) // 8), self.num_classes)  # halved three times

    def hidden(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch d_hidden"]:
        """The flattened output of the last pooling."""
        return torch.flatten(self.layers(x), 1)

    def head(self, hidden: Float[Tensor, "batch d_hidden"]) -> Float[Tensor, "batch classes"]:
        """Dropout and the last linear layer."""
        return self.fc(self.drop(hidden))
