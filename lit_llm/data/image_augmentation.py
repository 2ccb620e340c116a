"""Augmentation of training images, on whole batches of tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lit_llm.data.randaugment import affine, brightness, contrast, randaugment, rotation, saturation

DRAWS = (
    *("flip", "crop_x", "crop_y", "rotate", "scale", "shift_x", "shift_y", "brightness", "contrast", "saturation"),
    *("erase", "erase_area", "erase_shape", "erase_x", "erase_y"),
    *("partner", "mix_kind", "mix_share", "cut_x", "cut_y"),
)
"""Names of an image's random numbers, in the order of their places; the places after these are RandAugment's."""

PLACES = 64
MAX_OPERATIONS = (PLACES - len(DRAWS)) // 2
WEAK = ("shift", "crop_padding", "flip")


class Draws:
    """Random numbers for the images of a batch; each depends only on key, row and name.

    The generator is counter-based: there is no state to store or replay, an image's numbers do not depend on the rest
    of its batch, and all numbers of a batch are computed at once.

    Args:
        key: Integers, such as seed and epoch.
        rows: Index of each image.

    Source:
        Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators", doi:10.1145/2660193.2660195,
        figure 17 (SplitMix64), whose n-th number can be computed without the earlier ones.

    Example:
        >>> alone, together = Draws((0, 1), np.array([7])), Draws((0, 1), np.array([3, 7]))
        >>> bool(alone("flip")[0] == together("flip")[1]), bool(alone("flip")[0] == alone("scale")[0])
        (True, False)
    """

    def __init__(self, key: Sequence[int], rows: np.ndarray) -> None:
        self._start = np.random.SeedSequence(key).generate_state(1, np.uint64)
        self._rows = rows.astype(np.uint64) * np.uint64(PLACES)

    def __call__(self, name: str) -> Float[Tensor, " batch"]:
        """For each image, a number from 0 to below 1; the same at every call with this name."""
        return self.at(DRAWS.index(name))

    def at(self, place: int) -> Float[Tensor, " batch"]:
        """The same by place, for numbers without a name."""
        z = self._start + (self._rows + np.uint64(place + 1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        return torch.from_numpy((z >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))

    def between(self, name: str, low: float, high: float) -> Float[Tensor, " batch"]:
        """For each image, a number from `low` to below `high`."""
        return low + (high - low) * self(name)


class ImageAugmentation:
    """Augments images in this order: crop and flip; rotation, scale and shift together; colours; RandAugment; erasing.

    Mixing with another image comes last. The result depends only on seed, epoch and row, so it is the same for any
    batch size and after a resume. Pixels from outside an image are black.

    In semi-supervised training, labelled images and the first view of unlabelled ones are only shifted, cropped and
    flipped; the second view gets everything except mixing.

    Args:
        rotate: Maximum rotation in degrees, in either direction.
        scale: Maximum relative change of size, up or down.
        shift: Maximum shift as a fraction of the image's sides, in either direction.
        crop_padding: Pixels of padding around an image before a random crop of its original size; 4 is usual for
            images of 32 × 32.
        flip: Probability that an image is mirrored left to right, from 0 to 1.
        brightness: Maximum relative change of intensities, up or down.
        contrast: Maximum relative change of each pixel's distance from the image's mean brightness, up or down.
        saturation: Maximum relative change of each pixel's distance from grey, up or down.
        erase: Probability that a rectangle of 2 to 33 % of an image is blackened.
        randaugment: Number of RandAugment operations per image; 2 is usual, 0 for none.
        magnitude: Maximum strength of these operations, from 0 to 1.
        mixup: MixUp: average each image and its label with another, with a weight drawn from `Beta(mixup, mixup)`; 0.2
            is usual, 0 for none.
        cutmix: CutMix: paste a rectangle of another image, with a share of the area drawn from `Beta(cutmix, cutmix)`,
            and mix the labels accordingly; 1 is usual, 0 for none. Together with `mixup`, each image gets one of the
            two at random.

    Raises:
        ValueError: When a value is out of range, or nothing would change.

    Source:
        Erasing: Zhong et al., 2017, arXiv:1708.04896, here with black. RandAugment: Cubuk et al., 2019,
        arXiv:1909.13719, here with a strength drawn for each operation, as in FixMatch. MixUp: Zhang et al., 2017,
        arXiv:1710.09412. CutMix: Yun et al., 2019, arXiv:1905.04899. For the last two, weights and partners are drawn
        per image rather than per batch, and partners from the whole split.

    Example:
        >>> images, rows = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), np.array([5, 9])
        >>> images[:, :, 1:3, 1:3] = 255
        >>> ImageAugmentation(flip=0.5, crop_padding=1)(images, rows, (0, 0)).sum(dim=(1, 2, 3))
        tensor([4., 4.])
    """

    def __init__(
        self,
        rotate: float = 0.0,
        scale: float = 0.0,
        shift: float = 0.0,
        crop_padding: int = 0,
        flip: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        erase: float = 0.0,
        randaugment: int = 0,
        magnitude: float = 1.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        values = {name: value for name, value in locals().items() if name != "self"}
        largest = {"rotate": 180, "randaugment": MAX_OPERATIONS}
        largest |= dict.fromkeys(("crop_padding", "mixup", "cutmix"), math.inf)
        for name, value in values.items():
            high = largest.get(name, 1)
            if not 0 <= value <= high or (name == "scale" and value == 1):
                bound = "" if high == math.inf else f" and {'below' if name == 'scale' else 'at most'} {high}"
                raise ValueError(f"augmentation.{name} must be at least 0{bound}, but is {value}")
        if not any(value for name, value in values.items() if name != "magnitude"):
            raise ValueError("augmentation must change something, but all of it is 0")
        self.__dict__ |= values
        self.stream = 0

    @property
    def weak(self) -> ImageAugmentation:
        """A copy with only shift, crop and flip, whose random numbers are independent of this one's."""
        return self._changed(
            {name: 0 * value for name, value in vars(self).items() if name not in (*WEAK, "magnitude")}, 1
        )

    @property
    def without_mixing(self) -> ImageAugmentation:
        """A copy without MixUp and CutMix."""
        return self._changed({"mixup": 0.0, "cutmix": 0.0}, 0)

    def _changed(self, values: dict[str, Any], stream: int) -> ImageAugmentation:
        changed = copy.copy(self)
        changed.__dict__ |= {**values, "stream": stream}
        return changed

    def draws(self, rows: np.ndarray, chance: tuple[int, int]) -> Draws:
        """The random numbers of some rows; `chance` is seed and epoch."""
        return Draws((*chance, self.stream), rows)

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], rows: np.ndarray, chance: tuple[int, int]
    ) -> Float[Tensor, "batch channels height width"]:
        """Augments each image with its own random numbers; does not mix.

        Args:
            images: Images from 0 to 255.
            rows: Index of each image.
            chance: Seed and epoch.

        Returns:
            Images from 0 to 1.
        """
        draw = self.draws(rows, chance)
        images = self._cropped(images, draw).float().div_(255)
        if self.rotate or self.scale or self.shift:
            height, width = images.shape[-2:]
            angle = draw.between("rotate", -self.rotate, self.rotate)
            moved = [draw.between(f"shift_{axis}", -self.shift, self.shift) for axis in "xy"]
            shift = torch.stack([moved[0] * width, moved[1] * height], dim=-1)
            images = affine(images, rotation(angle, 1 + draw.between("scale", -self.scale, self.scale)), shift)
        for name, change in {"brightness": brightness, "contrast": contrast, "saturation": saturation}.items():
            if strength := getattr(self, name):
                images = change(images, 1 + draw.between(name, -strength, strength))
        if self.randaugment:
            turns = [len(DRAWS) + 2 * turn for turn in range(self.randaugment)]
            choices = torch.stack([draw.at(place) for place in turns], dim=1)
            amounts = torch.stack([draw.at(place + 1) for place in turns], dim=1)
            images = randaugment(images, choices, self.magnitude * (2 * amounts - 1))
        return self._erased(images, draw) if self.erase else images

    def _cropped(
        self, images: UInt8[Tensor, "batch channels height width"], draw: Draws
    ) -> UInt8[Tensor, "batch channels height width"]:
        if not self.crop_padding and not self.flip:
            return images
        pixels, padding = images.numpy(), self.crop_padding
        if padding:
            left, top = ((draw(name) * (2 * padding + 1)).long().numpy() for name in ("crop_x", "crop_y"))
            padded = np.pad(pixels, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
            windows = np.lib.stride_tricks.sliding_window_view(padded, pixels.shape[2:], axis=(2, 3))
            pixels = windows[np.arange(len(pixels)), :, top, left]
        if self.flip:
            flipped = (draw("flip") < self.flip).numpy()[:, None, None, None]
            pixels = np.where(flipped, pixels[..., ::-1], pixels)
        return torch.from_numpy(pixels)

    def _erased(self, images: Tensor, draw: Draws) -> Tensor:
        area = draw.between("erase_area", 0.02, 0.33)
        shape = draw.between("erase_shape", math.log(0.3), math.log(1 / 0.3)).exp()
        high, wide = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
        inside = _rectangles(images.shape[-2:], draw("erase_x"), draw("erase_y"), wide, high)
        inside &= (draw("erase") < self.erase)[:, None, None]
        return images.masked_fill(inside[:, None], 0.0)

    # Mixing.

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that labels become probabilities."""
        return self.mixup > 0 or self.cutmix > 0

    def partners(self, rows: np.ndarray, num_rows: int, chance: tuple[int, int]) -> np.ndarray:
        """The row of the split that each image is mixed with."""
        return (self.draws(rows, chance)("partner").double() * num_rows).long().numpy()

    def mix(
        self,
        images: Float[Tensor, "batch channels height width"],
        partners: Float[Tensor, "batch channels height width"],
        rows: np.ndarray,
        chance: tuple[int, int],
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, " batch"]]:
        """Mixes images with others by MixUp or CutMix.

        Args:
            images: Augmented images.
            partners: Augmented partners, one for each image.
            rows: Index of each image.
            chance: Seed and epoch.

        Returns:
            The mixed images, and the share of each that is the image's own: of intensities (MixUp) or pixels (CutMix).
        """
        from scipy.special import betaincinv

        draw = self.draws(rows, chance)
        chances, added = draw("mix_share").numpy(), draw("mix_kind") < (0.5 if self.cutmix and self.mixup else 1.0)
        added &= self.mixup > 0
        strengths = torch.where(added, self.mixup, self.cutmix).numpy()
        own = torch.from_numpy(betaincinv(strengths, strengths, chances).astype(np.float32))
        side = (1 - own).sqrt()
        inside = _rectangles(images.shape[-2:], draw("cut_x"), draw("cut_y"), side, side) & ~added[:, None, None]
        own = torch.where(added, own, 1 - inside.float().mean(dim=(1, 2)))
        weight = torch.where(added[:, None, None], own[:, None, None], (~inside).float())[:, None]
        return torch.lerp(partners, images, weight), own


def _rectangles(size: Sequence[int], x: Tensor, y: Tensor, wide: Tensor, high: Tensor) -> Tensor:
    """Masks (batch × height × width) of rectangles: position and sides are fractions of what the image allows."""
    spans = []
    for length, start, part in ((size[0], y, high), (size[1], x, wide)):
        pixels = (part * length).round()
        first = (start * (length - pixels + 1)).floor()
        place = torch.arange(length)
        spans.append((place >= first[:, None]) & (place < (first + pixels)[:, None]))
    return spans[0][:, :, None] & spans[1][:, None, :]
