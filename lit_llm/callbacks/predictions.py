"""Tables of what `predict` returns."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_llm.batch import IGNORE_INDEX, say_nothing
from lit_llm.data.table_files import UNLABELLED_TEST
from lit_llm.files import write_table

log = logging.getLogger(__name__)


class PredictionTable(Callback):
    """Writes `predictions.csv` from the predictions of all batches."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses several processes, since none of them would see all predictions."""
        if trainer.world_size > 1:
            raise ValueError(f"trainer.devices must be 1 to predict, but there are {trainer.world_size} processes")

    def write(self, trainer: Trainer, columns: list[str], rows: list[list[Any]], what: str) -> None:
        """Writes the table and logs its path; `what` names its rows."""
        path = Path(trainer.default_root_dir) / "predictions.csv"
        write_table(path, columns, rows)
        log.info(f"Scored {len(rows)} {what}: {path}")


class DocumentScores(PredictionTable):
    """Writes the bits per byte of each document of the split, the worst first.

    Which documents surprise a language model is a question of data quality as much as of the model. Acts on
    predictions that carry `nats` and `documents`; ignores others.
    """

    def __init__(self) -> None:
        self._nats: dict[int, float] = {}
        self._tokens: dict[int, int] = {}

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
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
        ids, sizes = trainer.datamodule.predict_split.ids, trainer.datamodule.predict_bytes
        rows = []
        for document, nats in self._nats.items():
            size = float(sizes[document])
            bits = nats / math.log(2) / (size or 1)
            written = int(size) if size.is_integer() else round(size, 2)  # a fraction for documents that are cut
            rows.append([ids[document], written, self._tokens[document], round(bits, 4)])
        rows.sort(key=lambda row: -row[-1])
        self.write(trainer, ["document", "bytes", "tokens", "bits_per_byte"], rows, "documents")


class ExamplePredictions(PredictionTable):
    """Writes the prediction for each example of the split, next to the example's columns in the source.

    One row per example, in the order of the split: the source's columns or an image's name (see `source_of`), `label`
    if it is known (if no label is, the source's own column stays), `predicted`, and for classes the probability of
    each as `p(<class>)`. A source column with one of these names becomes `<name> (source)`. For a GLUE task, also
    writes the submission file under the name that the leaderboard requires. Acts on predictions that carry
    `probabilities` or `values`, and `rows` (without them examples are numbered in order); ignores others.
    """

    def __init__(self) -> None:
        self._said: dict[int, list[float]] = {}
        self._labels: dict[int, float] = {}
        self._of_classes = False

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keeps the predictions of a batch."""
        if not isinstance(outputs, dict) or not {"probabilities", "values"} & outputs.keys():
            return
        self._of_classes = "probabilities" in outputs
        said = outputs["probabilities"] if self._of_classes else outputs["values"][:, None]
        rows, come = outputs.get("rows"), len(self._said)
        rows = range(come, come + len(said)) if rows is None else rows.tolist()
        self._said |= zip(rows, said.tolist())
        if "labels" in batch:
            labels = batch["labels"]
            known = labels != IGNORE_INDEX if self._of_classes else ~labels.isnan()
            self._labels |= {
                row: label for row, label, is_known in zip(rows, labels.tolist(), known.tolist()) if is_known
            }

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the table and the submission file."""
        if not self._said:
            return
        data, rows = trainer.datamodule, sorted(self._said)
        said, split = [self._said[row] for row in rows], getattr(data, "predict_split", None)
        name = namer(data, pl_module.network) if self._of_classes else lambda x: float(str(np.float32(x)))  # 0.1 as 0.1
        # Of equal probabilities the first, as `argmax` does.
        best = [p.index(max(p)) for p in said] if self._of_classes else [value for [value] in said]
        added = ["label"] * bool(self._labels) + ["predicted"]
        added += [f"p({name(index)})" for index in range(len(said[0]))] if self._of_classes else []
        table = columns_of(data, split, rows, added)
        for line, row, prediction, p in zip(table, rows, best, said, strict=True):
            if self._labels:
                line["label"] = name(self._labels[row]) if row in self._labels else ""
            line["predicted"] = name(prediction)
            if self._of_classes:
                line |= {f"p({name(index)})": round(value, 6) for index, value in enumerate(p)}
        columns = list(table[0])
        self.write(trainer, columns, [[line[column] for column in columns] for line in table], "examples")
        submission = getattr(data, "submission", None)
        if submission is not None and split in ("test", UNLABELLED_TEST):
            path = Path(trainer.default_root_dir) / submission.file
            low, high = submission.limits
            values = (f"{min(max(value, low), high):.3f}" for value in best)
            says = {"index": best, "name": map(name, best), "value": values}
            write_table(path, ["index", "prediction"], list(zip(rows, says[submission.labels])), delimiter="\t")
            log.info(f"Submission file: {path}")


class GeneratedTexts(PredictionTable):
    """Writes the text generated for each example of the split, next to the example's columns in the source.

    One row per example, in the order of the split: the source's columns and `predicted`. Acts on predictions that
    carry `rows` and `texts`; ignores others.
    """

    def __init__(self) -> None:
        self._written: dict[int, str] = {}

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keeps the generated texts of a batch."""
        if isinstance(outputs, dict) and "texts" in outputs:
            self._written |= zip(outputs["rows"].tolist(), outputs["texts"], strict=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the table."""
        if not self._written:
            return
        data, rows = trainer.datamodule, sorted(self._written)
        lines = set_apart(source_of(data, getattr(data, "predict_split", None), rows), ["predicted"])
        table = [line | {"predicted": self._written[row]} for line, row in zip(lines, rows, strict=True)]
        self.write(trainer, list(table[0]), [list(line.values()) for line in table], "examples")


def namer(data: Any, network: Any = None) -> Callable[[int], str]:
    """A function from class index to name: by the data, or, if it has no names, the network, or else the index."""
    if hasattr(data, "label_name") and getattr(data, "class_names", True):
        return data.label_name
    names = getattr(data, "class_names", None) or getattr(network, "class_names", None) or ()
    return lambda index: names[index] if index < len(names) else str(index)


def source_of(data: Any, split: str | None, rows: list[int]) -> list[dict[str, Any]]:
    """The source's columns of some examples; if the data has no `texts`, only their row numbers."""
    return data.texts(split, rows) if hasattr(data, "texts") else [{"row": row} for row in rows]


def columns_of(data: Any, split: str | None, rows: list[int], added: list[str]) -> list[dict[str, Any]]:
    """The source's columns of some examples (names, for images), without a label that is replaced or empty.

    Args:
        data: The data module.
        split: The split.
        rows: Row numbers of the examples in the split.
        added: Names of columns that will be added; see `set_apart`.
    """
    lines = source_of(data, split, rows)
    # Unless the source's labels are in another column.
    is_label = getattr(getattr(data, "columns", None), "label", "label") == "label"
    if is_label and ("label" in added or say_nothing(line.get("label") for line in lines)):
        lines = [{name: value for name, value in line.items() if name != "label"} for line in lines]
    return set_apart(lines, added)


def set_apart(lines: list[dict[str, Any]], added: list[str]) -> list[dict[str, Any]]:
    """Renames columns that clash with columns to be added: `<name> (source)`."""
    names = {name: f"{name} (source)" for name in (lines[0] if lines else ()) if name in added}
    if names:
        log.info(f"Renamed columns of the source that clash with predictions: {', '.join(names.values())}")
    return [{names.get(name, name): value for name, value in line.items()} for line in lines]
