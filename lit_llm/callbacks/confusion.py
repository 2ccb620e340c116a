"""Confusion matrix and per-class metrics of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Int
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import ConfusionMatrix as Counts

from lit_llm.callbacks.best_evaluation import BestEvaluation
from lit_llm.data.sampling import data_parallel_rank
from lit_llm.files import write_picture, write_table

READABLE = 20
"""Largest number of classes for which the picture shows counts and names."""


class ConfusionMatrix(BestEvaluation):
    """Draws `confusion_matrix.png` and writes `classes.csv`.

    The picture has true classes as rows and predicted classes as columns, shaded by the share of the row. The table
    has the number of examples, precision, recall and F1 of each class (0 instead of a division by zero).
    """

    files = ("confusion_matrix.png", "classes.csv")

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counts | None = None

    def add(self, pl_module: LightningModule, said: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        """Counts a batch."""
        if self._counts is None:
            size = pl_module.hparams["num_classes"]
            self._counts = Counts(task="multiclass", num_classes=size, validate_args=False).to(pl_module.device)
        self._counts.update(said["predicted"], said["labels"])

    def collect(self, pl_module: LightningModule) -> Int[Tensor, "classes classes"] | None:
        """Counts of examples by true class (row) and predicted class (column)."""
        counts, self._counts = self._counts, None
        if counts is None:
            return None
        trainer = pl_module.trainer  # tensor-parallel ranks count the same rows
        return counts.compute().cpu() // (trainer.world_size // data_parallel_rank(trainer)[1])

    def show(
        self,
        folder: Path,
        data: Any,
        found: Int[Tensor, "classes classes"],
        split: str,
        title: str,
        network: Any = None,
    ) -> None:
        """Draws the matrix and writes the table."""
        names = list(getattr(data, "class_names", None) or getattr(network, "class_names", None) or [])
        names += [str(index) for index in range(len(names), len(found))]
        draw_confusion_matrix(folder / "confusion_matrix.png", found, names, title)
        write_table(
            folder / "classes.csv", ["class", "examples", "precision", "recall", "f1"], of_classes(found, names)
        )


def of_classes(counts: Int[Tensor, "classes classes"], names: list[str]) -> list[list[Any]]:
    """Name, number of examples, precision, recall and F1 of each class.

    Example:
        >>> of_classes(Tensor([[3, 1], [0, 0]]).long(), ["cat", "dog"])
        [['cat', 4, 1.0, 0.75, 0.8571], ['dog', 0, 0.0, 0.0, 0.0]]
    """
    right, true, predicted = counts.diag().double(), counts.sum(dim=1), counts.sum(dim=0)
    each = (right / predicted.clamp(min=1), right / true.clamp(min=1), 2 * right / (true + predicted).clamp(min=1))
    figures = zip(*(figure.tolist() for figure in each), strict=True)
    return [[n, t, *(round(x, 4) for x in f)] for n, t, f in zip(names, true.tolist(), figures, strict=True)]


def draw_confusion_matrix(path: Path, counts: Int[Tensor, "classes classes"], names: list[str], title: str) -> None:
    """Draws counts of examples by true class (row) and predicted class (column), shaded by the share of the row."""
    from matplotlib.figure import Figure

    size = len(counts)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = 2.5 + 0.6 * min(size, READABLE)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class")
    axes.set(title=title, xlabel="predicted", ylabel="true")
    if size <= READABLE:
        # Matplotlib takes what is between two $ for a formula, and refuses one that it cannot parse.
        axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
        axes.set_yticks(range(size), names, parse_math=False)
        for row in range(size):
            for column in range(size):
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{int(counts[row, column]):,}", ha="center", va="center", color=color)
    write_picture(path, figure)
