"""The operations of RandAugment on whole batches: each image of its own strength."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]
Amounts = Float[Tensor, " batch"]

LUMA = (0.299, 0.587, 0.114)
"""How bright red, green and blue are: ITU-R 601, as Pillow has it."""


def affine(images: Images, inverse: Float[Tensor, "batch 2 2"], shift: Float[Tensor, "batch 2"]) -> Images:
    """Maps images about their middle, bilinearly; what comes from outside is black.

    Args:
        images: What is mapped.
        inverse: Which (x, y) of the image, in pixels from its middle, is seen at (1, 0) and (0, 1), as columns.
        shift: By how many pixels (x, y) the result is moved.
    """
    height, width = images.shape[-2:]
    x, y = (torch.arange(length) - (length - 1) / 2 for length in (width, height))
    first = -(inverse @ shift[:, :, None])
    # As `affine_grid`, which multiplies matrices for it, and takes twice as long.
    grid = torch.empty(len(images), height, width, 2)
    for axis, length in enumerate((width, height)):
        along, across = inverse[:, axis, 0, None] * x, inverse[:, axis, 1, None] * y + first[:, axis]
        torch.add(along[:, None, :] * (2 / length), across[:, :, None] * (2 / length), out=grid[..., axis])
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def rotation(degrees: Amounts, scale: Amounts | None = None) -> Float[Tensor, "batch 2 2"]:
    """The inverse map of a rotation against the clock, and of what makes images `scale` times as large."""
    angle = degrees.deg2rad()
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=-2)
    return matrix if scale is None else matrix / scale[:, None, None]


def blend(images: Images, other: Tensor | float, factor: Amounts) -> Images:
    """`other` at a factor of 0, the images at 1, and away from `other` beyond."""
    return torch.lerp(torch.as_tensor(other).expand_as(images), images, factor[:, None, None, None]).clamp_(0, 1)


def grey(images: Images) -> Float[Tensor, "batch 1 height width"]:
    """How bright each pixel is."""
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)


def brightness(images: Images, factor: Amounts) -> Images:
    """Black at a factor of 0, as they are at 1."""
    return blend(images, 0.0, factor)


def contrast(images: Images, factor: Amounts) -> Images:
    """As grey as the image's mean at a factor of 0, as they are at 1."""
    return blend(images, grey(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def saturation(images: Images, factor: Amounts) -> Images:
    """Without colour at a factor of 0, as they are at 1."""
    return images if images.shape[1] == 1 else blend(images, grey(images), factor)


def sharpness(images: Images, factor: Amounts) -> Images:
    """Smoothed over the neighbours at a factor of 0, as they are at 1; the outermost pixels stay."""
    kernel = images.new_ones(images.shape[1], 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel / 13, groups=images.shape[1])
    return blend(images, smooth, factor)


def autocontrast(images: Images) -> Images:
    """Each channel from its darkest as black to its lightest as white."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    span = high - low
    return torch.where(span > 0, (images - low) / span.clamp(min=1e-6), images)


def equalize(images: Images) -> Images:
    """Each channel with as many pixels of each intensity as can be, of 256 of them."""
    levels = (images * 255).round_().long().flatten(2)
    counts = torch.zeros(*images.shape[:2], 256, dtype=torch.long)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    brightest = counts.gather(2, levels.amax(dim=2, keepdim=True))
    step = (levels.shape[2] - brightest) // 255
    table = (counts.cumsum(dim=2) - counts + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    even = table.gather(2, levels).view_as(images) / 255
    return torch.where(step[..., None] > 0, even, images)


def posterize(images: Images, bits: Amounts) -> Images:
    """With so many bits of each intensity, which are rounded down."""
    step = (2 ** (8 - bits.floor()))[:, None, None, None]
    return ((images * 255).round_() / step).floor_() * step / 255


def solarize(images: Images, threshold: Amounts) -> Images:
    """With intensities from the threshold on inverted."""
    return torch.where(images >= threshold[:, None, None, None], 1 - images, images)


def _sheared(images: Images, amount: Amounts, row: int) -> Images:
    inverse = torch.eye(2).repeat(len(images), 1, 1)
    inverse[:, row, 1 - row] = amount
    return affine(images, inverse, torch.zeros(len(images), 2))


def _moved(images: Images, amount: Amounts, axis: int) -> Images:
    shift = torch.zeros(len(images), 2)
    shift[:, axis] = amount * images.shape[3 - axis]
    return affine(images, torch.eye(2).expand(len(images), 2, 2), shift)


# Each takes images and an amount from -1 to 1 of each; the sign counts where an operation has two directions.
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
"""The fourteen of the paper's section 4, of strengths as in FixMatch's table 12."""


def randaugment(images: Images, choices: Float[Tensor, "batch times"], amounts: Float[Tensor, "batch times"]) -> Images:
    """Applies operations one after another, each image's own.

    Args:
        images: From 0 to 1.
        choices: Which operation, from 0 to below 1: equal parts of that stand for `OPERATIONS` in their order.
        amounts: How strongly, from -1 to 1.

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
