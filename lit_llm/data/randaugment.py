"""RandAugment on whole batches: each image has its own operations and strengths."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]
Amounts = Float[Tensor, " batch"]

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma: ITU-R 601, as in Pillow."""


def affine(images: Images, inverse: Float[Tensor, "batch 2 2"], shift: Float[Tensor, "batch 2"]) -> Images:
    """Transforms images about their centre with bilinear interpolation; pixels from outside are black.

    Args:
        images: The images to transform.
        inverse: Matrix that maps coordinates (x, y) of the result to those of the image, in pixels from the centre.
        shift: Translation (x, y) of the result, in pixels.
    """
    height, width = images.shape[-2:]
    x, y = (torch.arange(length) - (length - 1) / 2 for length in (width, height))
    first = -(inverse @ shift[:, :, None])
    # The same as `affine_grid`, which uses a matrix product and takes twice as long.
    grid = torch.empty(len(images), height, width, 2)
    for axis, length in enumerate((width, height)):
        along, across = inverse[:, axis, 0, None] * x, inverse[:, axis, 1, None] * y + first[:, axis]
        torch.add(along[:, None, :] * (2 / length), across[:, :, None] * (2 / length), out=grid[..., axis])
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def rotation(degrees: Amounts, scale: Amounts | None = None) -> Float[Tensor, "batch 2 2"]:
    """The inverse matrix of an anticlockwise rotation and an enlargement by `scale`."""
    angle = degrees.deg2rad()
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=-2)
    return matrix if scale is None else matrix / scale[:, None, None]


def blend(images: Images, other: Tensor | float, factor: Amounts) -> Images:
    """`other` at a factor of 0, the images at 1, extrapolated away from `other` above 1; clamped to [0, 1]."""
    return torch.lerp(torch.as_tensor(other).expand_as(images), images, factor[:, None, None, None]).clamp_(0, 1)


def grey(images: Images) -> Float[Tensor, "batch 1 height width"]:
    """The luma of each pixel."""
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)


def brightness(images: Images, factor: Amounts) -> Images:
    """Black at a factor of 0, unchanged at 1."""
    return blend(images, 0.0, factor)


def contrast(images: Images, factor: Amounts) -> Images:
    """The mean grey of each image at a factor of 0, unchanged at 1."""
    return blend(images, grey(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def saturation(images: Images, factor: Amounts) -> Images:
    """Without colour at a factor of 0, unchanged at 1."""
    return images if images.shape[1] == 1 else blend(images, grey(images), factor)


def sharpness(images: Images, factor: Amounts) -> Images:
    """Smoothed over the neighbouring pixels at a factor of 0, unchanged at 1; the outermost pixels never change."""
    kernel = images.new_ones(images.shape[1], 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel / 13, groups=images.shape[1])
    return blend(images, smooth, factor)


def autocontrast(images: Images) -> Images:
    """Stretches each channel so that its darkest value is black and its lightest white."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    span = high - low
    return torch.where(span > 0, (images - low) / span.clamp(min=1e-6), images)


def equalize(images: Images) -> Images:
    """Equalises the histogram of each channel, over 256 intensities."""
    levels = (images * 255).round_().long().flatten(2)
    counts = torch.zeros(*images.shape[:2], 256, dtype=torch.long)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    brightest = counts.gather(2, levels.amax(dim=2, keepdim=True))
    step = (levels.shape[2] - brightest) // 255
    table = (counts.cumsum(dim=2) - counts + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    even = table.gather(2, levels).view_as(images) / 255
    return torch.where(step[..., None] > 0, even, images)


def posterize(images: Images, bits: Amounts) -> Images:
    """Keeps the given number of bits of each intensity; both are rounded down."""
    step = (2 ** (8 - bits.floor()))[:, None, None, None]
    return ((images * 255).round_() / step).floor_() * step / 255


def solarize(images: Images, threshold: Amounts) -> Images:
    """Inverts intensities at or above the threshold."""
    return torch.where(images >= threshold[:, None, None, None], 1 - images, images)


def _sheared(images: Images, amount: Amounts, row: int) -> Images:
    inverse = torch.eye(2).repeat(len(images), 1, 1)
    inverse[:, row, 1 - row] = amount
    return affine(images, inverse, torch.zeros(len(images), 2))


def _moved(images: Images, amount: Amounts, axis: int) -> Images:
    shift = torch.zeros(len(images), 2)
    shift[:, axis] = amount * images.shape[3 - axis]
    return affine(images, torch.eye(2).expand(len(images), 2, 2), shift)


# Each takes images and an amount per image from -1 to 1; the sign matters if an operation has two directions.
OPERATIONS: dict[str, Callable[[Images, Amounts], Images]] = {
    "identity": lambda images, amount: images,
    "autocontrast": lambda images, amount: autocontrast(images),
    "equalize": lambda images, amount: equalize(images),
    "rotate": lambda images, amount: affine(images, rotation(30 * amount), torch.zeros(len(images), 2)),
    "solarize": lambda images, amount: solarize(images, 1 - amount.abs()),
    "color": lambda images, amount: saturation(images, 1 + 0.9 * amount),
    "posterize": lambda images, amount: posterize(images, 8 - 4 * amount.abs()),
    "contrast": lambda images, amount: contrast(images, 1 + 0.9 * amount),
    "brightness": lambda images, amount: brightness(images, 1 + 0.9 * amount),
    "sharpness": lambda images, amount: sharpness(images, 1 + 0.9 * amount),
    "shear_x": lambda images, amount: _sheared(images, 0.3 * amount, 0),
    "shear_y": lambda images, amount: _sheared(images, 0.3 * amount, 1),
    "translate_x": lambda images, amount: _moved(images, 0.3 * amount, 0),
    "translate_y": lambda images, amount: _moved(images, 0.3 * amount, 1),
}
"""The fourteen operations of the paper's section 4, with the strengths of FixMatch's table 12."""


def randaugment(images: Images, choices: Float[Tensor, "batch times"], amounts: Float[Tensor, "batch times"]) -> Images:
    """Applies several operations in turn, chosen for each image.

    Args:
        images: Pixels from 0 to 1.
        choices: Choice of each operation, in [0, 1): equal parts of that range stand for `OPERATIONS` in order.
        amounts: Strength of each operation, from -1 to 1.

    Source:
        Cubuk et al., 2019, "RandAugment", arXiv:1909.13719, section 4; Sohn et al., 2020, "FixMatch",
        arXiv:2001.07685, appendix E.
    """
    images = images.clone()
    for turn in range(choices.shape[1]):
        chosen = (choices[:, turn] * len(OPERATIONS)).long()
        for number, operation in enumerate(OPERATIONS.values()):
            mine = (chosen == number).nonzero()[:, 0]
            if len(mine):
                images[mine] = operation(images[mine], amounts[mine, turn])
    return images
