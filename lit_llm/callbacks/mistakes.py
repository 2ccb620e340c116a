"""The most confident mistakes of a classifier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_llm.callbacks.best_evaluation import BestEvaluation, gather
from lit_llm.callbacks.predictions import columns_of, namer
from lit_llm.files import write_picture, write_table
from lit_llm.ranges import require_at_least


class WorstMistakes(BestEvaluation):
    """Writes the worst misclassified examples to `mistakes.csv`, and draws them as `mistakes.png` if they are images.

    The worst are those whose true class got the lowest probability; often their label is wrong. Only `count` examples
    are kept in memory.

    Args:
        count: Number of examples.
    """

    files = ("mistakes.png", "mistakes.csv")

    def __init__(self, count: int = 24) -> None:
        super().__init__()
        require_at_least(1, count=count)
        self.count = count
        self._nats: Tensor | None = None
        self._facts: Tensor | None = None

    def add(self, pl_module: LightningModule, said: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        """Merges a batch into the worst examples so far."""
        if "rows" not in batch:
            return
        wrong = said["predicted"] != said["labels"]
        nats = said["nats"].detach().float().masked_fill(~wrong, -math.inf)
        self._keep(nats, torch.stack([batch["rows"], said["labels"], said["predicted"]], dim=1))

    def _keep(self, nats: Tensor, facts: Tensor) -> None:
        if self._nats is not None:
            nats, facts = torch.cat([self._nats, nats]), torch.cat([self._facts, facts])
        self._nats, worst = nats.topk(min(self.count, len(nats)))
        self._facts = facts[worst]

    def collect(self, pl_module: LightningModule) -> list[tuple[int, int, int, float]] | None:
        """Row, true class, predicted class and probability of the true class of each example, the worst first."""
        if self._nats is None:
            return None
        if pl_module.trainer.world_size > 1:
            both = torch.cat([self._nats[:, None].double(), self._facts.double()], dim=1)
            filled = both.new_full((self.count, 4), -math.inf)
            filled[: len(both)] = both
            every = gather(pl_module, filled).flatten(0, 1)
            self._nats = self._facts = None
            self._keep(every[:, 0], every[:, 1:].nan_to_num(neginf=-1).long())
        found = zip(self._facts.tolist(), self._nats.tolist(), strict=True)
        self._nats = self._facts = None
        return [(*facts, math.exp(-nats)) for facts, nats in found if nats > -math.inf]

    def show(
        self,
        folder: Path,
        data: Any,
        found: list[tuple[int, int, int, float]],
        split: str,
        title: str,
        network: Any = None,
    ) -> None:
        """Writes the table and draws the picture; without mistakes, writes a table without rows."""
        name = namer(data, network)
        rows = [row for row, *_ in found]
        table = columns_of(data, split, rows, ["label", "predicted", "p(label)"])
        for line, (_, label, predicted, probability) in zip(table, found, strict=True):
            line |= {"label": name(label), "predicted": name(predicted), "p(label)": round(probability, 6)}
        columns = list(table[0]) if table else ["label", "predicted", "p(label)"]
        write_table(folder / "mistakes.csv", columns, ([line[column] for column in columns] for line in table))
        picture = folder / "mistakes.png"
        if not hasattr(data, "images"):
            return
        if not found:
            picture.unlink(missing_ok=True)
            return
        says = [f"{line['label']} taken for\n{line['predicted']}, p {line['p(label)']:.3f}" for line in table]
        draw_images(picture, data.images(split, rows), says, f"worst mistakes, {title}")


def draw_images(path: Path, images: UInt8[Tensor, "n channels height width"], says: list[str], title: str) -> None:
    """Draws images in rows of eight, each with a caption above it."""
    from matplotlib.figure import Figure

    across = min(8, len(images))
    down = math.ceil(len(images) / across)
    figure = Figure(figsize=(1.4 * max(across, 3), 1.7 * down + 0.5), layout="constrained")
    places = figure.subplots(down, across, squeeze=False).flatten()
    for axes in places:
        axes.set_axis_off()
    for axes, image, words in zip(places, images, says, strict=False):
        axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(words, fontsize=8, parse_math=False)  # a class may be called $5
    figure.suptitle(title)
    write_picture(path, figure)
