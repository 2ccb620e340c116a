from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_llm.data.image_augmentation import ImageAugmentation
from lit_llm.data.image_collation import ImageCollation


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_values_of_mixed_images_are_mixed_as_numbers(how: str) -> None:
    values = np.linspace(-3, 5, 20, dtype=np.float32)
    pixels = np.zeros((20, 1, 6, 6), dtype=np.uint8)
    images = ImageCollation(pixels, np.arange(20), values, None, mean=[0.0], std=[1.0])
    augmentation, rows, chance = ImageAugmentation(**{how: 1.0}), np.array([2, 7, 19]), (0, 1)
    batch = images.batch(rows, augmentation, chance)
    _, own = augmentation.mix(batch["pixel_values"], batch["pixel_values"], rows, chance)
    partners = torch.from_numpy(values[augmentation.partners(rows, 20, chance)])
    torch.testing.assert_close(batch["labels"], own * torch.from_numpy(values[rows]) + (1 - own) * partners)
    assert batch["labels"].shape == (3,)
