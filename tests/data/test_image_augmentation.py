import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from lit_llm.data.image_augmentation import DRAWS, Draws, ImageAugmentation

ALL = {
    "rotate": 20.0,
    "scale": 0.2,
    "shift": 0.1,
    "crop_padding": 2,
    "flip": 0.5,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "erase": 0.5,
    "randaugment": 2,
}


def pixels(count: int, channels: int = 3, size: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def changed(images: torch.Tensor, rows: Any = None, chance: tuple[int, int] = (0, 0), **options: Any) -> torch.Tensor:
    rows = np.arange(len(images)) if rows is None else np.asarray(rows)
    return ImageAugmentation(**options)(images, rows, chance)


# Randomness.


def test_draws_are_even_and_independent() -> None:
    rows = np.arange(20_000)
    draws = torch.stack([Draws((0, epoch), rows).at(place) for epoch in (0, 1) for place in (0, 1, 63)])
    assert min(stats.kstest(row, "uniform").pvalue for row in draws.numpy()) > 1e-3
    assert (torch.corrcoef(draws) - torch.eye(6)).abs().max() < 0.03
    neighbours = torch.corrcoef(torch.stack([draws[0, 1:], draws[0, :-1]]))[0, 1]
    assert neighbours.abs() < 0.03
    assert (draws >= 0).all()
    assert (draws < 1).all()


@pytest.mark.parametrize("options", [{name: value} for name, value in ALL.items()] + [ALL])
def test_an_image_is_changed_alike_in_any_company(options) -> None:
    images = pixels(9)
    together = changed(images, **options)
    for rows in ([4], [7, 2, 4], [*range(9)][::-1]):
        torch.testing.assert_close(changed(images[rows], rows, **options), together[rows], atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{name: value} for name, value in ALL.items()])
def test_each_seed_epoch_and_row_changes_it_in_its_own_way(options) -> None:
    same = pixels(1).expand(40, -1, -1, -1)
    ways = [changed(same, **options), changed(same, chance=(0, 1), **options), changed(same, chance=(1, 0), **options)]
    assert len({image.numpy().tobytes() for image in ways[0]}) > 1
    assert len({way.numpy().tobytes() for way in ways}) == 3
    assert torch.equal(changed(same, **options), ways[0])


def test_every_draw_has_a_place_of_its_own() -> None:
    draw = Draws((0,), np.array([3]))
    assert len({float(draw(name)) for name in DRAWS}) == len(DRAWS)


# Transformations.


def test_everything_stays_between_black_and_white() -> None:
    images = changed(pixels(64), mixup=0.2, **ALL)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


def test_crops_are_cut_out_of_the_padded_image_at_all_places() -> None:
    image = pixels(1, size=6)
    crops = changed(image.expand(300, -1, -1, -1), crop_padding=1)
    padded = torch.nn.functional.pad(image[0] / 255, [1] * 4)
    windows = [padded[:, top : top + 6, left : left + 6] for top in range(3) for left in range(3)]
    counts = [sum(torch.equal(crop, window) for crop in crops) for window in windows]
    assert sum(counts) == 300
    assert min(counts) > 15


def test_flips_mirror_left_to_right_as_pillow_does() -> None:
    images = pixels(200, size=5)
    flipped = changed(images, flip=0.25)
    mirrored = (flipped != images / 255).flatten(1).any(dim=1)
    assert 30 < mirrored.sum() < 70
    for image, result in zip(images[mirrored], flipped[mirrored], strict=True):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert np.array_equal((result * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize(("option", "value"), [("rotate", 15.0), ("scale", 0.25), ("shift", 0.2)])
def test_what_is_done_goes_up_to_what_was_asked(option, value) -> None:
    """Measures position, orientation and size of a bar."""
    bar = torch.zeros(400, 1, 41, 41, dtype=torch.uint8)
    bar[:, :, 19:22, 10:31] = 255
    images = changed(bar, **{option: value})[:, 0].double()
    y, x = (axis - 20 for axis in torch.meshgrid(torch.arange(41.0), torch.arange(41.0), indexing="ij"))
    mass = images.sum(dim=(1, 2))
    if option == "shift":
        found = (images * x).sum(dim=(1, 2)) / mass / 41
    elif option == "scale":
        found = mass / mass.median()
    else:
        xx, xy = ((images * x * other).sum(dim=(1, 2)) for other in (x, y))
        found = torch.atan2(xy, xx).rad2deg()
    low, high = {"rotate": (-15, 15), "scale": (0.75**2, 1.25**2), "shift": (-0.2, 0.2)}[option]
    span = high - low
    assert low - 0.05 * span < found.min() < low + 0.07 * span
    assert high - 0.07 * span < found.max() < high + 0.05 * span


def test_erasing_blackens_one_rectangle_of_two_to_thirty_three_percent() -> None:
    images = pixels(300, channels=1, size=32)
    black = changed(images, erase=0.5)[:, 0] == 0
    hit = black.flatten(1).any(dim=1)
    assert 110 < hit.sum() < 190
    shares = black[hit].flatten(1).double().mean(dim=1)
    assert shares.min() > 0.01
    assert 0.28 < shares.max() < 0.36
    for mask in black[hit]:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert torch.equal(mask, rows[:, None] & columns[None, :])
        assert rows.nonzero()[-1] - rows.nonzero()[0] == rows.sum() - 1


# Mixing.


def numpy_mixup(images: np.ndarray, partners: np.ndarray, own: np.ndarray) -> np.ndarray:
    mixed = np.empty_like(images)
    for row in range(len(images)):
        mixed[row] = own[row] * images[row] + (1 - own[row]) * partners[row]
    return mixed


def test_mixup_adds_images_in_shares_of_a_beta_distribution() -> None:
    rows, augmentation = np.arange(3000), ImageAugmentation(mixup=0.4)
    images, partners = torch.rand(3000, 1, 2, 2), torch.rand(3000, 1, 2, 2)
    mixed, own = augmentation.mix(images, partners, rows, (0, 0))
    np.testing.assert_allclose(mixed, numpy_mixup(images.numpy(), partners.numpy(), own.numpy()), atol=1e-6)
    assert stats.kstest(own, "beta", args=(0.4, 0.4)).pvalue > 1e-3


def test_cutmix_pastes_a_rectangle_whose_share_the_label_has() -> None:
    rows, augmentation = np.arange(400), ImageAugmentation(cutmix=1.0)
    images, partners = torch.ones(400, 1, 30, 30), torch.zeros(400, 1, 30, 30)
    mixed, own = augmentation.mix(images, partners, rows, (0, 0))
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), own)
    assert set(mixed.unique().tolist()) == {0.0, 1.0}
    for mask in mixed[:, 0] == 0:
        assert torch.equal(mask, mask.any(dim=1)[:, None] & mask.any(dim=0)[None, :])
    assert own.min() < 0.1
    assert own.max() > 0.9


def test_with_both_each_image_has_one_of_them() -> None:
    images, partners = torch.ones(400, 1, 20, 20), torch.zeros(400, 1, 20, 20)
    augmentation = ImageAugmentation(mixup=1.0, cutmix=1.0)
    mixed, own = augmentation.mix(images, partners, np.arange(400), (0, 0))
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), own)
    added = ((mixed > 0) & (mixed < 1)).flatten(1).all(dim=1)
    assert 160 < added.sum() < 240


def test_partners_come_from_all_of_the_split_whatever_the_batch() -> None:
    augmentation = ImageAugmentation(mixup=1.0)
    found = augmentation.partners(np.arange(5000), 50, (0, 0))
    assert np.bincount(found, minlength=50).min() > 60
    assert found.max() == 49
    assert augmentation.partners(np.array([17, 3]), 50, (0, 0)).tolist() == [found[17], found[3]]


# Views and refusals.


def test_the_weak_view_only_moves_and_is_drawn_by_itself() -> None:
    strong = ImageAugmentation(mixup=0.2, cutmix=1.0, **ALL)
    weak = strong.weak
    used = {name for name, value in vars(weak).items() if value and name not in ("magnitude", "stream")}
    assert used == {"shift", "crop_padding", "flip"}
    rows = np.arange(50)
    assert not torch.equal(weak.draws(rows, (0, 0))("crop_x"), strong.draws(rows, (0, 0))("crop_x"))
    assert not strong.without_mixing.mixes
    assert strong.mixes
    assert strong.without_mixing.randaugment == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "augmentation must change something, but all of it is 0"),
        ({"magnitude": 0.5}, "augmentation must change something, but all of it is 0"),
        ({"flip": 1.5}, "augmentation.flip must be at least 0 and at most 1, but is 1.5"),
        ({"scale": 1.0}, "augmentation.scale must be at least 0 and below 1, but is 1.0"),
        ({"mixup": -0.1}, "augmentation.mixup must be at least 0, but is -0.1"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ImageAugmentation(**options)
