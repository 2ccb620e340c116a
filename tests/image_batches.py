"""A data module of small images, for tests of code that reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from lit_llm.data.sampling import BatchLoader

VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 4,
    "hidden_sizes": [4, 8, 8],
    "depths": [1, 1, 1],
    "layer_type": "basic",
}
EFFICIENTNET = {
    "model_type": "efficientnet",
    "width_coefficient": 0.125,
    "depth_coefficient": 0.25,
    "hidden_dim": 160,
    "strides": [1, 1, 2, 1, 1, 1, 1],  # for small images
    "dropout_rate": 0.0,
    "drop_connect_rate": 0.0,
}


class Images(LightningDataModule):
    """Noise with a bright square whose position is the class; 24 training images, 11 each for validation and test."""

    augmentation = None
    predict_split = "test"

    def __init__(
        self,
        num_classes: int = 3,
        image_shape: tuple[int, int, int] = (1, 8, 8),
        mixed: bool = False,
        known: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes if known else None
        self.class_names = [f"digit {index}" for index in range(num_classes)] if known else []
        self.class_counts = [8] * num_classes
        self.shape, self.mixed = image_shape, mixed
        self.image_shape = image_shape if known else None
        self.kinds = num_classes

    def images(self, split: str, rows: list[int]) -> torch.Tensor:
        start = {"train": 0, "validation": 100, "test": 200}[split]
        made = torch.empty(len(rows), *self.shape, dtype=torch.uint8)
        for image, row in zip(made, rows, strict=True):
            image.random_(0, 60, generator=torch.Generator().manual_seed(start + row))
            corner = 2 * (row % self.kinds)
            image[:, corner : corner + 3, :4] = 255
        return made

    def texts(self, split: str, rows: list[int]) -> list[dict[str, str]]:
        return [{"image": f"{split}/{row}.png"} for row in rows]

    def label_name(self, index: int) -> str:
        return self.class_names[index]

    def batch(self, split: str, rows: list[int]) -> dict[str, torch.Tensor]:
        pixels = self.images(split, rows).float() / 255
        labels = torch.tensor([row % self.kinds for row in rows])
        if split == "train" and self.mixed:  # MixUp with the previous image
            pixels = 0.75 * pixels + 0.25 * pixels.roll(1, 0)
            labels = torch.nn.functional.one_hot(labels, self.kinds).float()
            labels = 0.75 * labels + 0.25 * labels.roll(1, 0)
        return {"pixel_values": pixels, "labels": labels, "rows": torch.tensor(rows)}

    def ordered_dataloader(self, split: str, share: bool = True, seed: int | None = None) -> BatchLoader:
        def cut(rows: np.ndarray) -> dict[str, torch.Tensor]:
            return self.batch(split, rows.tolist())

        return BatchLoader(cut, 24 if split == "train" else 11, 8 if split == "train" else 4, seed)

    def train_dataloader(self) -> BatchLoader:
        return self.ordered_dataloader("train", seed=0)

    def val_dataloader(self) -> BatchLoader:
        return self.ordered_dataloader("validation")

    def test_dataloader(self) -> BatchLoader:
        return self.ordered_dataloader("test")

    def predict_dataloader(self) -> BatchLoader:
        return self.ordered_dataloader("test")

    def state_dict(self) -> dict[str, Any]:
        return {"class_names": self.class_names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.class_names = state_dict["class_names"]
