import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from lit_llm.data.randaugment import (
    OPERATIONS,
    affine,
    autocontrast,
    brightness,
    contrast,
    equalize,
    posterize,
    randaugment,
    rotation,
    saturation,
    sharpness,
    solarize,
)


def pictures(channels: int = 3, height: int = 12, width: int = 10) -> torch.Tensor:
    """Three pictures; the last one has a single colour."""
    pixels = torch.randint(20, 220, (3, channels, height, width), generator=torch.Generator().manual_seed(0))
    pixels[2] = 100
    return pixels / 255


def pillow(images: torch.Tensor) -> list[Image.Image]:
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array) for array in arrays]


def close_to_pillow(ours: torch.Tensor, theirs: list[Image.Image], levels: float) -> None:
    arrays = np.stack([np.asarray(image).reshape(*image.size[::-1], -1) for image in theirs]).transpose(0, 3, 1, 2)
    assert np.abs(ours.numpy() * 255 - arrays).max() <= levels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (brightness, ImageEnhance.Brightness),
        (contrast, ImageEnhance.Contrast),
        (saturation, ImageEnhance.Color),
        (sharpness, ImageEnhance.Sharpness),
    ],
)
@pytest.mark.parametrize("factor", [0.1, 1.0, 1.9])
def test_colours_change_as_in_pillow(ours, theirs, factor, channels) -> None:
    images = pictures(channels)
    expected = [theirs(image).enhance(factor) for image in pillow(images)]
    close_to_pillow(ours(images, torch.full((3,), factor)), expected, levels=2.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_histograms_change_as_in_pillow(channels) -> None:
    images = pictures(channels, 40, 40)
    close_to_pillow(equalize(images), [ImageOps.equalize(image) for image in pillow(images)], levels=1e-3)
    close_to_pillow(autocontrast(images), [ImageOps.autocontrast(image) for image in pillow(images)], levels=1.0)


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_bits_are_left_out_as_in_pillow(bits) -> None:
    images = pictures()
    expected = [ImageOps.posterize(image, bits) for image in pillow(images)]
    close_to_pillow(posterize(images, torch.full((3,), bits + 0.5)), expected, levels=1e-3)


def test_bright_pixels_are_inverted_as_in_pillow() -> None:
    images = pictures()
    expected = [ImageOps.solarize(image, 128) for image in pillow(images)]
    close_to_pillow(solarize(images, torch.full((3,), 128 / 255)), expected, levels=1e-3)


@pytest.mark.parametrize("degrees", [-30.0, 10.0, 90.0])
def test_images_turn_as_in_pillow(degrees) -> None:
    images = pictures(1, 20, 20)
    images = torch.nn.functional.pad(images, [6] * 4)  # Pillow does not interpolate at the edge
    turned = affine(images, rotation(torch.full((3,), degrees)), torch.zeros(3, 2))
    expected = [image.rotate(degrees, Image.Resampling.BILINEAR) for image in pillow(images)]
    close_to_pillow(turned, expected, levels=2.0)


def test_turning_scaling_and_moving_at_once_is_scipys_affine_map() -> None:
    images = torch.nn.functional.pad(pictures(1, 14, 20), [9] * 4)
    degrees, scale, shift = torch.tensor([20.0, -5.0, 0.0]), torch.tensor([0.8, 1.1, 1.0]), torch.tensor([[3.0, -2.0]])
    ours = affine(images, rotation(degrees, scale), shift.expand(3, 2))
    for image, got, angle, size in zip(images.numpy(), ours.numpy(), degrees.deg2rad().tolist(), scale.tolist()):
        # scipy uses (row, column), so the anticlockwise rotation matrix is transposed
        matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / size
        middle = (np.array(image.shape[1:]) - 1) / 2
        offset = middle - matrix @ (middle + shift[0].numpy()[::-1])
        expected = ndimage.affine_transform(image[0], matrix, offset, order=1, mode="grid-constant")
        np.testing.assert_allclose(got[0], expected, atol=1e-4)


def test_each_image_is_changed_by_its_own_operation_as_alone() -> None:
    images = pictures().repeat(5, 1, 1, 1)[: len(OPERATIONS)]
    choices = ((torch.arange(len(OPERATIONS)) + 0.5) / len(OPERATIONS))[:, None]
    amounts = torch.linspace(-1, 1, len(OPERATIONS))[:, None]
    before = images.clone()
    changed = randaugment(images, choices, amounts)
    for number, operation in enumerate(OPERATIONS.values()):
        torch.testing.assert_close(changed[number], operation(before[number, None], amounts[number])[0])
    assert torch.equal(images, before)
    assert (changed - before).flatten(1).abs().amax(dim=1).count_nonzero() >= 10


def test_of_nothing_nothing_changes() -> None:
    images = pictures()
    for name, operation in OPERATIONS.items():
        if name not in ("autocontrast", "equalize"):
            torch.testing.assert_close(operation(images, torch.zeros(3)), images, atol=1e-5, rtol=0, msg=name)
