"""What `predict` found, as a table."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_llm.batch import IGNORE_INDEX
from lit_llm.files import replacing

log = logging.getLogger(__name__)


class DocumentScores(Callback):
    """Writes `predictions.csv`: how well each document of the split was predicted, the worst first.

    Which documents surprise a language model is a question of data quality as much as of the model. Acts on
    predictions that carry `nats` and `documents`; leaves others alone.
    """

    def __init__(self) -> None:
        self._nats: dict[int, float] = {}
        self._tokens: dict[int, int] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses several processes, of which none would see whole documents.

        Raises:
            ValueError: When there are several.
        """
        if trainer.world_size > 1:
            raise ValueError(f"trainer.devices must be 1 to predict, but there are {trainer.world_size} processes")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds a batch to the sums."""
        if not isinstance(outputs, dict) or "documents" not in outputs:
            return
        counted = (outputs["labels"] != IGNORE_INDEX).flatten().cpu().numpy()
        documents = outputs["documents"].flatten().cpu().numpy()[counted]
        nats = outputs["nats"].flatten().double().cpu().numpy()[counted]
        found, place = np.unique(documents, return_inverse=True)
        for document, total, count in zip(found, np.bincount(place, nats), np.bincount(place), strict=True):
            self._nats[int(document)] = self._nats.get(int(document), 0.0) + float(total)
            self._tokens[int(document)] = self._tokens.get(int(document), 0) + int(count)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the table."""
        if not self._nats:
            return
        split = trainer.datamodule.predict_split
        rows = []
        for document, nats in self._nats.items():
            size = int(split.documents["num_bytes"][document])
            bits = nats / math.log(2) / max(size, 1)
            rows.append((split.ids[document], size, self._tokens[document], round(bits, 4)))
        path = Path(trainer.default_root_dir) / "predictions.csv"
        with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("document", "bytes", "tokens", "bits_per_byte"))
            writer.writerows(sorted(rows, key=lambda row: -row[-1]))
        log.info(f"Scored {len(rows)} documents: {path}")
