"""Base class of data modules of labelled examples, text or images: classes, splits, batches, resuming."""

from __future__ import annotations

import functools
import logging
from abc import abstractmethod
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from datasets import Dataset

from lit_llm.data.arguments import require_counts
from lit_llm.data.labels import (
    LabelReader,
    is_missing,
    label_column,
    labelled_splits,
    read_labels,
    require_labels,
    require_seen,
)
from lit_llm.data.sampling import BatchLoader, data_parallel_rank
from lit_llm.data.split_data import SplitData
from lit_llm.data.stratification import few_of, some_of
from lit_llm.data.tables import Columns, Split, both, column_values

log = logging.getLogger(__name__)

CLASSES_SAID = 20
"""Maximum number of classes for which the log lists the number of examples of each."""


@runtime_checkable
class Readable(Protocol):
    """The examples of one split, ready to be cut into batches."""

    labels: np.ndarray | None

    def __len__(self) -> int:
        """Number of examples."""

    def batch(self, rows: np.ndarray, augmentation: Any = None, chance: tuple[int, int] = (0, 0)) -> Any:
        """A batch of some examples; `chance` (seed and epoch) and the row determine the augmentation."""


class ExampleData(SplitData):
    """Examples with a label: a class, or a real number.

    A subclass defines the splits of a source and how rows of a split become batches, and documents the arguments.

    Raises:
        ValueError: When a value is out of range.
    """

    columns: Columns
    """Columns of the text or image and of the label; available once `splits` has been read."""

    def __init__(
        self,
        path: str,
        subset: str | None,
        batch_size: int,
        validation_fraction: float,
        test_fraction: float,
        max_examples: int | None,
        labels_per_class: int | None,
        unlabelled_ratio: int,
        balance_classes: bool,
        augmentation: Any,
        seed: int,
    ) -> None:
        super().__init__(path, subset, batch_size, validation_fraction, test_fraction, seed)
        require_counts(max_examples=max_examples, labels_per_class=labels_per_class)
        if unlabelled_ratio < 0:
            raise ValueError(f"data.unlabelled_ratio must be at least 0, but is {unlabelled_ratio}")
        self.max_examples, self.balance_classes = max_examples, balance_classes
        self.labels_per_class, self.unlabelled_ratio = labels_per_class, unlabelled_ratio
        self.augmentation = augmentation
        self.reader: LabelReader | None = None

    # Defined by subclasses.

    @abstractmethod
    def _make_readable(self, split: Split) -> Readable:
        """The examples of a split, ready to be cut into batches."""

    def _lengths(self, readable: Any) -> np.ndarray | None:
        """Length of each example, to batch examples of similar length; `None` to ignore lengths."""
        return None

    def _views(self) -> tuple[Any, Any, Any]:
        """Augmentations in semi-supervised training: of labelled examples, of the first and of the second view."""
        return None, None, self.augmentation

    # Facts that objectives, callbacks and model directories ask for.

    @property
    def class_names(self) -> list[str]:
        """Names of the classes by index; empty if labels are values. Available, like all facts, from `setup` on."""
        return self.reader.class_names if self.reader else []

    @property
    def num_classes(self) -> int | None:
        """Number of classes; `None` if labels are values."""
        return len(self.class_names) or None

    @property
    def num_targets(self) -> int | None:
        """1 if labels are values; `None` if they are classes."""
        return None if self.reader is None or self.class_names else 1

    @property
    def class_counts(self) -> list[int]:
        """Number of labelled training examples of each class."""
        return np.bincount(self.splits["train"].labels, minlength=len(self.class_names)).tolist()

    @property
    def mean_label(self) -> float | None:
        """Mean of the training labels; `None` if they are classes."""
        return float(self.splits["train"].labels.mean(dtype=np.float64)) if self.num_targets else None

    @property
    def std_label(self) -> float | None:
        """Standard deviation of the training labels; `None` if they are classes."""
        return float(self.splits["train"].labels.std(dtype=np.float64)) if self.num_targets else None

    def label_name(self, index: int) -> str:
        """Name of a class; `LABEL_<index>` if the network has more classes than the data."""
        return self.class_names[index] if index < len(self.class_names) else f"LABEL_{index}"

    # Splits.

    def _labelled(
        self, found: dict[str, Dataset], unlabelled: Dataset | None, names: tuple[str, ...] = ()
    ) -> dict[str, Split]:
        """Reads labels, cuts missing splits out of the training split, and subsamples the training examples.

        Where training is to learn from unlabelled examples, training rows without a label are among those.
        """
        apart = [] if unlabelled is None else [Split(unlabelled, None)]
        if self.unlabelled_ratio and "train" in found:
            rows = found["train"]
            empty = np.array(list(map(is_missing, column_values(rows, label_column(rows, self.columns, self.path)))))
            if empty.any():
                apart.append(Split(rows.select(np.flatnonzero(empty)), None))
                found = found | {"train": rows.select(np.flatnonzero(~empty))}
        fractions = (self.validation_fraction, self.test_fraction)
        # A regression objective takes integers as values.
        as_values = getattr(getattr(self.trainer, "lightning_module", None), "size_name", None) == "num_targets"
        splits, self.reader = labelled_splits(found, self.columns, self.path, names, *fractions, as_values)
        if self.max_examples is not None:
            classes = len(np.unique(splits["train"].labels)) if self.class_names else 1
            if self.max_examples < classes:
                raise ValueError(
                    f"data.max_examples must be at least the number of classes, {classes}, but is {self.max_examples}"
                )
            splits["train"] = some_of(splits["train"], self.max_examples, self.seed)
            require_seen(splits, self.reader)
        if self.labels_per_class is not None:
            splits["train"], rest = few_of(splits["train"], self.labels_per_class, self.seed, self.path)
            apart.insert(0, rest)
        return splits | ({"unlabelled": functools.reduce(both, apart)} if apart else {})

    @property
    def _testable(self) -> bool:
        return "test" in self.splits and self.splits["test"].labels is not None

    # Lightning's hooks.

    def setup(self, stage: str) -> None:
        """Refuses data that does not suffice for `stage`.

        Raises:
            ValueError: When there is too little to train on, or nothing to validate or to test on.
        """
        if stage == "test" and "train" in self.splits and not self._testable:
            raise ValueError(
                f"data.path must hold a test split with labels to test on, but {self.path} has none; raise "
                f"data.test_fraction where the checkpoint was trained, or call a table that is only to test on test"
            )
        super().setup(stage)
        if stage != "fit":
            return
        if 0 < len(self.class_names) <= CLASSES_SAID:
            counts = ", ".join(f"{name}: {count:,}" for name, count in zip(self.class_names, self.class_counts))
            log.info(f"Training examples of each class: {counts}")
        if self.unlabelled_ratio:
            devices = data_parallel_rank(self.trainer)[1]
            unlabelled = len(self.splits["unlabelled"]) if "unlabelled" in self.splits else 0
            if unlabelled < self.unlabelled_ratio * self.batch_size * devices:
                raise ValueError(
                    f"data.unlabelled_ratio must leave a batch of data.batch_size within the unlabelled examples, but "
                    f"is {self.unlabelled_ratio} with batches of {self.batch_size} on {devices} "
                    f"device{'s' * (devices > 1)} where {self.path} has {unlabelled}; lower one, or set "
                    f"data.labels_per_class"
                )
            if self.augmentation is None:
                log.warning(
                    "data.augmentation must make two views of an unlabelled example differ, but is null: only the "
                    "network's dropout makes predictions disagree"
                )
        if self.balance_classes and not self.class_names:
            raise ValueError("data.balance_classes must be false where labels are real numbers, but is true")

    def train_dataloader(self) -> BatchLoader:
        """Training batches, reshuffled each epoch; with unlabelled examples if `unlabelled_ratio` is set."""
        if not self.unlabelled_ratio:
            return super().train_dataloader()
        labelled, read, unlabelled = self._loader("train", self.seed), self._read("train"), self._read("unlabelled")
        of_labelled, first, second = self._views()

        def cut(rows: np.ndarray) -> Any:
            number, chance = loader.epoch * len(loader) + loader.batch, (self.seed, loader.epoch)
            batch = read.batch(labelled.rows(number), of_labelled, (self.seed, number // len(labelled)))
            batch["unlabelled"] = unlabelled.batch(rows, first, chance)
            batch["unlabelled_strong"] = unlabelled.batch(rows, second, chance)
            return batch

        size, lengths = self.batch_size * self.unlabelled_ratio, self._lengths(unlabelled)
        loader = BatchLoader(cut, len(unlabelled), size, self.seed, *data_parallel_rank(self.trainer), lengths)
        return loader

    def test_dataloader(self) -> BatchLoader | list[Any]:
        """All examples of the test split, as in validation; none if it has no labels."""
        return super().test_dataloader() if self._testable else []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to name its classes and to recognise the data that it was trained on."""
        return {"labels": [list(self.reader.values), list(self.reader.class_names)], **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Checks that the checkpoint's classes are those of the data.

        A table without a training split adopts the checkpoint's classes. For evaluation, the data's classes may be in
        another order: they are matched by name and renumbered.

        Raises:
            ValueError: When the checkpoint's classes are not this data's, or training would resume with another order.
        """
        super().load_state_dict(state_dict)
        values, names = state_dict["labels"]
        if "train" not in self.splits:
            [(name, split)] = self.splits.items()
            column = self.columns.label if self._predicting else label_column(split.rows, self.columns, self.path)
            self.reader = LabelReader(self.path, column or "", tuple(values), names)
            read = read_labels if self._predicting else require_labels
            self.splits[name] = Split(split.rows, read(split.rows, self.reader, name))
        elif self.class_names != names:
            if self._stage == "fit" or set(self.class_names) != set(names):
                raise ValueError(
                    f"data.label must have the checkpoint's classes, {', '.join(names) or 'none'}, but has "
                    f"{', '.join(self.class_names) or 'none'} in {self.path}"
                )
            self._put_classes_in_order(names)

    def _put_classes_in_order(self, names: list[str]) -> None:
        value_of = dict(zip(self.class_names, self.reader.values, strict=True))
        new_of = np.array([names.index(name) for name in self.class_names], dtype=np.int64)
        for name, split in self.splits.items():
            if split.labels is not None:
                self.splits[name] = Split(split.rows, new_of[split.labels])
        self.reader = replace(self.reader, values=tuple(value_of[name] for name in names), class_names=names)
        self._readable = {}

    # How batches are made.

    def _loader(self, name: str, seed: int | None = None, share: bool = True) -> BatchLoader:
        readable = self._read(name)
        augmentation = None if seed is None else self.augmentation

        def cut(rows: np.ndarray) -> Any:
            return readable.batch(rows, augmentation, (self.seed, loader.epoch))

        # Grouped by length, a few labelled examples would always share batches with the same others, and a rare class
        # of a length of its own would fill batches by itself, where weights of classes are no different from none.
        weighted = getattr(getattr(self.trainer, "lightning_module", None), "class_weights", None) is not None
        few = self.labels_per_class is not None or self.unlabelled_ratio > 0
        apart = name == "train" and seed is not None and (few or weighted)
        lengths = None if apart else self._lengths(readable)
        classes = readable.labels if self.balance_classes and seed is not None else None
        mine = data_parallel_rank(self.trainer) if share else (0, 1)
        loader = BatchLoader(cut, len(readable), self.batch_size, seed, *mine, lengths, classes)
        return loader
