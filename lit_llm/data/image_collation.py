"""Batches of decoded images, gathered, augmented and normalised as whole batches."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from lit_llm.batch import ImageBatch
from lit_llm.data.image_augmentation import ImageAugmentation


class ImageCollation:
    """The images of one split.

    Args:
        pixels: Decoded images, from 0 to 255: places × channels × height × width.
        places: Index of each row's image in `pixels`.
        labels: Class index of each row; `None` if there are no labels.
        num_classes: Number of classes.
        mean: Mean of each channel, of pixels from 0 to 1.
        std: Standard deviation of each channel, likewise.

    Example:
        >>> pixels = np.full((3, 1, 2, 2), 255, dtype=np.uint8)
        >>> images = ImageCollation(pixels, np.arange(3), np.array([0, 1, 0]), 2, mean=[0.5], std=[0.25])
        >>> images.batch(np.array([2, 1]))["pixel_values"].flatten(1)
        tensor([[2., 2., 2., 2.],
                [2., 2., 2., 2.]])
    """

    def __init__(
        self,
        pixels: np.ndarray,
        places: np.ndarray,
        labels: np.ndarray | None,
        num_classes: int | None,
        mean: list[float],
        std: list[float],
    ) -> None:
        self.pixels, self.places, self.labels, self.num_classes = pixels, places, labels, num_classes
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.places)

    def images(self, rows: np.ndarray) -> UInt8[Tensor, "batch channels height width"]:
        """The images of some rows, unchanged."""
        return torch.from_numpy(self.pixels[self.places[rows]])

    def batch(
        self, rows: np.ndarray, augmentation: ImageAugmentation | None = None, chance: tuple[int, int] = (0, 0)
    ) -> ImageBatch:
        """Makes a batch of images.

        Args:
            rows: Indices of the images.
            augmentation: Augmentation of each image; if it mixes images, their labels are mixed too, and classes become
                probabilities.
            chance: Seed and epoch, which together with the row determine the augmentation.
        """
        labels = None if self.labels is None else torch.from_numpy(self.labels[rows])
        if augmentation is None:
            pixels = self.images(rows).float().div_(255)
        else:
            pixels = augmentation(self.images(rows), rows, chance)
            if augmentation.mixes and labels is not None:
                others = augmentation.partners(rows, len(self), chance)
                partners = augmentation(self.images(others), others, chance)
                pixels, own = augmentation.mix(pixels, partners, rows, chance)
                pairs = self._numbers(torch.from_numpy(self.labels[others])), self._numbers(labels)
                labels = torch.lerp(*pairs, own.view(-1, *[1] * (pairs[0].ndim - 1)))
        batch: ImageBatch = {
            "pixel_values": pixels.sub_(self.mean).div_(self.std),
            "rows": torch.from_numpy(rows.astype(np.int64)),
        }
        if labels is not None:
            batch["labels"] = labels
        return batch

    def _numbers(self, labels: Tensor) -> Tensor:
        """What can be mixed of labels: values, or of classes a probability of each."""
        return labels if labels.is_floating_point() else F.one_hot(labels, self.num_classes).float()
