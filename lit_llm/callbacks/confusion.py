"""Which classes a classifier takes for which others, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Int
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torchmetrics import ConfusionMatrix as Counts

from lit_llm.callbacks.run_report import RunReport
from lit_llm.files import replacing

READABLE = 20
"""Classes up to which counts and names have room in the picture."""


class ConfusionMatrix(Callback):
    """Draws `confusion_matrix.png`: a row for each true class, shaded by the share of it that each class was given.

    Of a fit the best validation is drawn, when it ends; a test, or a validation by itself, is drawn over it. Acts on
    objectives whose steps give `predicted` and `labels`, as `Classification`'s do; leaves others alone.
    """

    def __init__(self) -> None:
        self._counts: Counts | None = None
        self._drawable: tuple[Int[Tensor, "classes classes"], str] | None = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts a batch."""
        if not isinstance(outputs, dict) or "predicted" not in outputs:
            return
        if self._counts is None:
            size = pl_module.hparams["num_classes"]
            self._counts = Counts(task="multiclass", num_classes=size, validate_args=False).to(pl_module.device)
        self._counts.update(outputs["predicted"], outputs["labels"])

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds up over all processes; of a fit keeps the best."""
        if self._counts is None:
            return
        counts, self._counts = self._counts.compute().cpu(), None
        if trainer.sanity_checking:
            return
        if trainer.state.fn != "fit":
            self._drawable = counts, "test split" if trainer.testing else "validation split"
            self._draw(trainer)
            return
        report = next((c for c in trainer.callbacks if isinstance(c, RunReport)), None)
        if report is None or report.results.get("best/step") == trainer.global_step:
            self._drawable = counts, f"validation split, step {trainer.global_step}"

    on_test_end = on_validation_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the best."""
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draws the best so far, when a run is cut short."""
        self._draw(trainer)

    @rank_zero_only
    def _draw(self, trainer: Trainer) -> None:
        if self._drawable is None or trainer.fast_dev_run:
            return
        counts, title = self._drawable
        self._drawable = None
        names = list(getattr(trainer.datamodule, "class_names", None) or [])
        names += [str(index) for index in range(len(names), len(counts))]
        draw_confusion_matrix(Path(trainer.default_root_dir) / "confusion_matrix.png", counts, names, title)


def draw_confusion_matrix(path: Path, counts: Int[Tensor, "classes classes"], names: list[str], title: str) -> None:
    """Draws how often each class (a row) was taken for each (a column); shades are shares of a row."""
    import matplotlib

    matplotlib.use("Agg", force=False)
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
        axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), names)
        for row in range(size):
            for column in range(size):
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{int(counts[row, column]):,}", ha="center", va="center", color=color)
    with replacing(path) as new:
        figure.savefig(new, dpi=120)
