"""A network so small that a step measures the loop around it, for `lit-llm fit` and for plain Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_llm.data.sampling import BatchLoader
from lit_llm.objectives.objective import Objective

BATCH_SIZE = 8


def points(steps: int) -> tuple[Tensor, Tensor]:
    """Random points and labels for `steps` batches."""
    chance = torch.Generator().manual_seed(0)
    return torch.randn(steps * BATCH_SIZE, 32, generator=chance), torch.randint(
        2, (steps * BATCH_SIZE,), generator=chance
    )


class Linear(nn.Linear):
    """A linear layer from 32 inputs to the classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(32, num_classes)


class Points(LightningDataModule):
    """Points in memory, read by this package's loader."""

    def __init__(self, steps: int = 2000) -> None:
        super().__init__()
        self.x, self.y = points(steps)
        self.num_classes = 2

    def train_dataloader(self) -> BatchLoader:
        """Returns a loader whose single epoch is the whole run."""

        def cut(rows: np.ndarray) -> tuple[Tensor, Tensor]:
            chosen = torch.from_numpy(rows)
            return self.x[chosen], self.y[chosen]

        return BatchLoader(cut, len(self.x), BATCH_SIZE, shuffle_seed=0)


class Classes(Objective):
    """Cross-entropy as an objective of this package."""

    size_name: ClassVar[str] = "num_classes"

    def __init__(self, network: Callable[..., nn.Module], num_classes: int | None = None) -> None:
        super().__init__(network, sgd)
        self.save_arguments()

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over the points, and their number."""
        x, y = batch
        return F.cross_entropy(self.network(x), y, reduction="sum"), torch.tensor(float(len(y)))


def sgd(groups: Any) -> torch.optim.Optimizer:
    """The optimiser of all variants."""
    return torch.optim.SGD(groups, lr=0.01)


class Logging(LightningModule):
    """The same training in plain Lightning, written as in its documentation."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Linear(2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logs each loss to the progress bar and the logger."""
        x, y = batch
        loss = F.cross_entropy(self.network(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns SGD."""
        return sgd(self.parameters())


def lightning_loader(steps: int) -> DataLoader:
    """A `DataLoader`, as is usual with Lightning."""
    return DataLoader(TensorDataset(*points(steps)), batch_size=BATCH_SIZE, shuffle=True)
