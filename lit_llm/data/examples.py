"""What data of examples with labels have in common, be they texts or images: classes, splits, batches, resuming."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from datasets import Dataset
from lightning.pytorch import LightningDataModule

from lit_llm.data.labels import LabelReader, few_of, labelled_splits, read_labels, require_seen, some_of
from lit_llm.data.sampling import BatchLoader, place
from lit_llm.data.tables import Columns, Split, both

log = logging.getLogger(__name__)


@runtime_checkable
class Readable(Protocol):
    """The examples of one split, ready to be cut into batches."""

    labels: np.ndarray | None

    def __len__(self) -> int:
        """Number of examples."""

    def batch(self, rows: np.ndarray, augmentation: Any = None, chance: tuple[int, int] = (0, 0)) -> Any:
        """Some of the examples; seed and epoch decide with the row how each is augmented."""


class ExampleData(LightningDataModule, ABC):
    """Examples with a label: a class, or a real number.

    A subclass says what a source's splits are, and how a split's rows become batches. Arguments are explained where
    it names them.

    Raises:
        ValueError: When a value is out of range.
    """

    columns: Columns
    """Where the source keeps what an example is; from `splits` on."""

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
        super().__init__()
        counts = {"batch_size": batch_size, "max_examples": max_examples, "labels_per_class": labels_per_class}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, but is {value}")
        if unlabelled_ratio < 0:
            raise ValueError(f"data.unlabelled_ratio must be at least 0, but is {unlabelled_ratio}")
        if validation_fraction < 0 or test_fraction < 0 or validation_fraction + test_fraction >= 1:
            raise ValueError(
                f"data.validation_fraction and data.test_fraction must be at least 0 and leave something to train on, "
                f"but are {validation_fraction} and {test_fraction}"
            )
        self.path, self.subset, self.batch_size = path, subset, batch_size
        self.validation_fraction, self.test_fraction = validation_fraction, test_fraction
        self.max_examples, self.balance_classes = max_examples, balance_classes
        self.labels_per_class, self.unlabelled_ratio = labels_per_class, unlabelled_ratio
        self.augmentation, self.seed = augmentation, seed
        self.reader: LabelReader | None = None
        self._readable: dict[str, Any] = {}
        self._trained_on: dict[str, Any] | None = None

    # What a subclass says.

    @abstractmethod
    def _find_splits(self) -> dict[str, Split]:
        """The splits, by what they are for."""

    @abstractmethod
    def _make_readable(self, split: Split) -> Readable:
        """The examples of a split, ready to be cut into batches."""

    def _lengths(self, readable: Any) -> np.ndarray | None:
        """Length of each example, where those of about one length are to come together."""
        return None

    def _views(self) -> tuple[Any, Any, Any]:
        """How semi-supervised training augments labelled examples, and unlabelled ones in the first and second view."""
        return None, None, self.augmentation

    # Facts that objectives, callbacks and model directories ask for.

    @property
    def class_names(self) -> list[str]:
        """What the classes are called, in their order; empty where labels are values. As all facts, from `setup` on."""
        return self.reader.class_names if self.reader else []

    @property
    def num_classes(self) -> int | None:
        """Number of classes; `None` where labels are values."""
        return len(self.class_names) or None

    @property
    def num_targets(self) -> int | None:
        """1 where labels are values; `None` where they are classes."""
        return None if self.reader is None or self.class_names else 1

    @property
    def class_counts(self) -> list[int]:
        """Labelled training examples of each class."""
        return np.bincount(self.splits["train"].labels, minlength=len(self.class_names)).tolist()

    @property
    def predict_split(self) -> str:
        """The split that `predict` reads: the test split, or where there is none the validation split.

        Of another source than the run's own all is a test split, and where the own has nothing else it is `train`.
        """
        return next(name for name in ("test", "validation", "train") if name in self.splits)

    def label_name(self, index: int) -> str:
        """What a class is called; a network may know more of them than the data."""
        return self.class_names[index] if index < len(self.class_names) else f"LABEL_{index}"

    def texts(self, split: str, rows: list[int]) -> list[dict[str, Any]]:
        """All columns of some examples, as the source has them."""
        return [self.splits[split].rows[row] for row in rows]

    # Splits.

    @cached_property
    def splits(self) -> dict[str, Split]:
        """The examples: `train`, `validation` and `test`, as far as there are such, and `unlabelled`."""
        return self._find_splits()

    @property
    def _is_own(self) -> bool | None:
        """Whether the source is that which a checkpoint was trained on; `None` where nothing says it."""
        if not self._trained_on:
            return None
        here, there = (Path(path).expanduser().resolve() for path in (self.path, self._trained_on["path"]))
        return (here, self.subset) == (there, self._trained_on["subset"])

    def _known_columns(self, rows: Dataset) -> dict[str, str]:
        """Columns of what was trained on, by what they are for, where a table to predict has them too."""
        known = (self._trained_on or {}).get("columns", {}) if self._predicting else {}
        return {role: name for role, name in known.items() if name in rows.column_names}

    def _whole_to_predict(self, found: dict[str, Dataset], label: str | None) -> dict[str, Split] | None:
        """A table that is predicted as a whole, as no run's own is; what its labels mean, a checkpoint says.

        Args:
            found: The tables.
            label: Their label column; decides where nothing says whether they are the run's own.
        """
        own = (len(found) > 1 and label is not None) if self._is_own is None else self._is_own
        if not self._predicting or own:
            return None
        return {"test": Split(next(reversed(found.values())), None)}

    def _labelled(
        self, found: dict[str, Dataset], unlabelled: Dataset | None, names: tuple[str, ...] = ()
    ) -> dict[str, Split]:
        """Reads labels, cuts the splits that are missing, and draws what is to be trained on."""
        fractions = (self.validation_fraction, self.test_fraction)
        # An objective that is sized by values takes whole numbers for such.
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
        if unlabelled is not None:
            splits["unlabelled"] = Split(unlabelled, None)
        if self.labels_per_class is not None:
            splits["train"], rest = few_of(splits["train"], self.labels_per_class, self.seed, self.path)
            splits["unlabelled"] = rest if unlabelled is None else both(rest, splits["unlabelled"])
        return splits

    @property
    def _testable(self) -> bool:
        return "test" in self.splits and self.splits["test"].labels is not None

    @property
    def _stage(self) -> str | None:
        """What the trainer does: `fit`, `validate`, `test` or `predict`."""
        return None if self.trainer is None else self.trainer.state.fn

    @property
    def _predicting(self) -> bool:
        return self._stage == "predict"

    # Lightning's hooks.

    def setup(self, stage: str) -> None:
        """Refuses data that cannot do what `stage` needs.

        Raises:
            ValueError: When there is too little to train on, or nothing to validate or to test on.
        """
        if stage == "test" and not self._testable:
            raise ValueError(
                f"data.path must hold a test split with labels to test on, but {self.path} has none; raise "
                f"data.test_fraction where the checkpoint was trained, or predict"
            )
        if stage != "fit":
            return
        rows, devices = len(self.splits["train"]), place(self.trainer)[1]
        if rows < self.batch_size * devices:
            raise ValueError(
                f"data.batch_size must be at most the examples there are to train on, but is {self.batch_size} on "
                f"{devices} device{'s' * (devices > 1)} where {self.path} has {rows}; lower it"
            )
        if self.unlabelled_ratio:
            unlabelled = len(self.splits["unlabelled"]) if "unlabelled" in self.splits else 0
            if unlabelled < self.unlabelled_ratio * self.batch_size * devices:
                raise ValueError(
                    f"data.unlabelled_ratio must leave a batch of data.batch_size within the unlabelled examples, but "
                    f"is {self.unlabelled_ratio} with batches of {self.batch_size} on {devices} "
                    f"device{'s' * (devices > 1)} where {self.path} has {unlabelled}; lower one, or set "
                    f"data.labels_per_class"
                )
        if self.balance_classes and not self.class_names:
            raise ValueError("data.balance_classes must be false where labels are real numbers, but is true")
        if self.validation_fraction and "validation" not in self.splits:
            raise ValueError(
                f"data.validation_fraction must leave an example to validate on, but is {self.validation_fraction}, "
                f"which takes none of the {rows} of {self.path}; raise it, or set it to 0 to go without"
            )

    def train_dataloader(self) -> BatchLoader:
        """Examples in an order drawn anew each epoch."""
        if not self.unlabelled_ratio:
            return self._loader("train", self.seed)
        labelled, read, unlabelled = self._loader("train", self.seed), self._read("train"), self._read("unlabelled")
        of_labelled, first, second = self._views()

        def cut(rows: np.ndarray) -> Any:
            number, chance = loader.epoch * len(loader) + loader.batch, (self.seed, loader.epoch)
            batch = read.batch(labelled.rows(number), of_labelled, (self.seed, number // len(labelled)))
            batch["unlabelled"] = unlabelled.batch(rows, first, chance)
            batch["unlabelled_strong"] = unlabelled.batch(rows, second, chance)
            return batch

        size, lengths = self.batch_size * self.unlabelled_ratio, self._lengths(unlabelled)
        loader = BatchLoader(cut, len(unlabelled), size, self.seed, *place(self.trainer), lengths)
        return loader

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """All examples of the validation split, the longest first, each once whatever the number of processes."""
        return self.ordered_dataloader("validation")

    def ordered_dataloader(self, split: str, share: bool = True) -> BatchLoader | list[Any]:
        """All examples of any split, the longest first and as they are; shared out among the processes, or not."""
        return self._loader(split, share=share) if split in self.splits else []

    def test_dataloader(self) -> BatchLoader | list[Any]:
        """All examples of the test split, as in validation; none where it has no labels."""
        return self.ordered_dataloader("test") if self._testable else []

    def predict_dataloader(self) -> BatchLoader | list[Any]:
        """All examples of the split to predict, with labels or without."""
        split = self.predict_split
        count = len(self.splits[split])
        if "train" not in self.splits:
            log.info(f"Predicting all {count:,} rows of {self.path}")
        else:
            alone = ", on which it was trained, as there is no other split" if split == "train" else ""
            log.info(f"Predicting the {count:,} rows of the {split} split of {self.path}{alone}")
        return self.ordered_dataloader(split)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to name classes on its own, and to know again what it was trained on."""
        trained_on = {"path": self.path, "subset": self.subset, "columns": asdict(self.columns)}
        return {"labels": [list(self.reader.values), list(self.reader.class_names)], "trained_on": trained_on}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint whose classes mean something else; a table to predict as a whole takes its classes.

        Raises:
            ValueError: When the checkpoint's classes are not this data's.
        """
        values, names = state_dict["labels"]
        self._trained_on = state_dict.get("trained_on", {})  # older checkpoints do not say it
        if self._predicting and "train" not in self.__dict__.get("splits", ["train"]):  # found before that was known
            self.__dict__.pop("splits")
            self._readable = {}
        if "train" not in self.splits:
            rows, column = self.splits["test"].rows, self.columns.label
            self.reader = LabelReader(self.path, column or "", tuple(values), names)
            self.splits["test"] = Split(rows, read_labels(rows, self.reader, "test"))
        elif self.class_names != names:
            raise ValueError(
                f"data.label must have the checkpoint's classes, {', '.join(names) or 'none'}, but has "
                f"{', '.join(self.class_names) or 'none'} in {self.path}"
            )

    # How batches are made.

    def _read(self, name: str) -> Any:
        if name not in self._readable:
            self._readable[name] = self._make_readable(self.splits[name])
        return self._readable[name]

    def _loader(self, name: str, seed: int | None = None, share: bool = True) -> BatchLoader:
        readable = self._read(name)
        augmentation = None if seed is None else self.augmentation

        def cut(rows: np.ndarray) -> Any:
            return readable.batch(rows, augmentation, (self.seed, loader.epoch))

        # A few labelled examples would by their lengths always come in the same company.
        few = name == "train" and self.labels_per_class is not None
        lengths = None if few else self._lengths(readable)
        classes = readable.labels if self.balance_classes and seed is not None else None
        mine = place(self.trainer) if share else (0, 1)
        loader = BatchLoader(cut, len(readable), self.batch_size, seed, *mine, lengths, classes)
        return loader
