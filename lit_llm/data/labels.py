"""Labels: learns the classes from the training split, and reads the labels of all splits by them."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from lit_llm.batch import IGNORE_INDEX, say_nothing
from lit_llm.data.delimited import separator_remedy
from lit_llm.data.stratification import with_all_splits
from lit_llm.data.tables import LABELS, Columns, Split, column_values
from lit_llm.wording import listed

log = logging.getLogger(__name__)

WHOLE = re.compile(r"[+-]?\d+")
CODE = re.compile(r"[+-]?0\d+")
"""A number with a leading zero, which is taken for a name: 01 is not 1."""

REAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
NOT_AGREED = "-"
"""Label in SNLI and MultiNLI of an example on which the annotators did not agree."""

TRUTHS = {"true": True, "false": False}
"""Truth values as text, also spelt `True` or `TRUE`."""


@dataclass(frozen=True)
class LabelReader:
    """Converts the cells of a label column to class indices or values.

    Attributes:
        path: The table, for messages.
        column: The label column.
        values: The cell that stands for each class in the training split; empty if labels are values.
        class_names: Name of each class.
    """

    path: str
    column: str
    values: tuple[Any, ...] = ()
    class_names: list[str] = field(default_factory=list)

    def read(self, found: list[Any], split: str) -> np.ndarray:
        """The labels of a split: cells are read as class names or as the cells of training, whichever knows more.

        All cells are read in the same way. If both ways know equally many, cells are names, because a name may be
        another class's number.

        Raises:
            ValueError: When a label is missing, not finite, or not known from training.
        """
        found = plain_labels(found, self.path, split, as_values=not self.values)
        if not self.values:
            if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in found):
                odd = next(value for value in found if not isinstance(value, int | float) or isinstance(value, bool))
                raise ValueError(
                    f"data.label must be a number as in training, but {self.column!r} is {odd!r} in row "
                    f"{found.index(odd)} of the {split} split of {self.path}"
                )
            with np.errstate(over="ignore"):
                labels = np.array(found, dtype=np.float32)
            if not np.isfinite(labels).all():
                row = int(np.isfinite(labels).argmin())
                raise ValueError(
                    f"data.label must be finite in 32 bits, but {self.column!r} is {found[row]!r} in row {row} of the "
                    f"{split} split of {self.path}; leave such rows out"
                )
            return labels
        ways = [self.class_names, self.values] if self.class_names != list(map(str, self.values)) else [self.values]
        kinds = [{value: number for number, value in enumerate(known)} for known in ways]
        met = set(found)
        place = max(kinds, key=lambda kind: sum(_as_known(value, kind) in kind for value in met))
        if odd := {value for value in met if _as_known(value, place) not in place}:
            row = next(row for row, value in enumerate(found) if value in odd)
            raise ValueError(
                f"data.label must be one of {listed(place)} as in training, but {self.column!r} is {found[row]!r} in "
                f"row {row} of the {split} split of {self.path}"
            )
        number = {value: place[_as_known(value, place)] for value in met}
        return np.array([number[value] for value in found], dtype=np.int64)

    @property
    def ways(self) -> tuple[LabelReader, LabelReader]:
        """A reader that knows only class names, and one that knows only the cells of training."""
        return replace(self, values=tuple(self.class_names)), replace(self, class_names=list(map(str, self.values)))


def _as_known(value: Any, known: Collection[Any]) -> Any:
    """A label in its known form: unchanged, as text (10 beside 01; 1 for 1.0), or a truth value in any spelling."""
    if value in known:
        return value
    text = str(int(value) if isinstance(value, float) and value.is_integer() and str(value) not in known else value)
    truths = (text.lower(), text.title(), text.upper(), TRUTHS[text.lower()]) if text.lower() in TRUTHS else ()
    return next((same for same in (text, *truths) if same in known), value)


def plain_labels(found: list[Any], path: str, split: str, as_values: bool = False) -> list[Any]:
    """Labels of one type: integers, real numbers, truth values or names; text that spells numbers becomes numbers.

    Spaces around text are stripped. If all labels are integers as text and one has a leading zero, they are names,
    unless `as_values`.

    Raises:
        ValueError: When a label is missing.
        TypeError: When labels are of several types, or of an unsupported one.
    """
    found = [value.strip() if isinstance(value, str) else value for value in found]
    use = ", or set data.unlabelled_ratio, for semi-supervised training" if split == "training" else ""
    for row, value in enumerate(found):
        if is_missing(value):
            raise ValueError(
                f"data.label must be there in every row, but is not in row {row} of the {split} split of {path}; leave "
                f"such rows out{use}"
            )
    if all(isinstance(value, str) for value in found):
        if all(WHOLE.fullmatch(value) for value in found):
            coded = not as_values and any(map(CODE.fullmatch, found))
            return found if coded else [int(value) for value in found]
        if all(REAL.fullmatch(value) for value in found):
            return [float(value) for value in found]
        kind_of = ["a number" if REAL.fullmatch(value) else "text" for value in found]
    else:
        words = {bool: "true or false", int: "a number", float: "a number", str: "text"}
        kind_of = [words.get(type(value), type(value).__name__) for value in found]
        if set(kind_of) == {"a number"} and any(isinstance(value, float) for value in found):
            return [float(value) for value in found]
        if other := set(kind_of) - set(words.values()):
            raise TypeError(
                f"data.label must hold a number or text, but holds {min(other)} in the {split} split of {path}"
            )
    first = {kind: row for row, kind in reversed(list(enumerate(kind_of)))}
    if len(first) > 1:
        examples = " and ".join(f"{kind} ({found[row]!r} in row {row})" for kind, row in first.items())
        raise TypeError(f"data.label must be of one type, but is {examples} in the {split} split of {path}")
    return found


def is_missing(label: Any) -> bool:
    """Whether a cell of the label column is empty.

    Example:
        >>> [is_missing(label) for label in (None, " ", float("nan"), 0, "no")]
        [True, True, True, False, False]
    """
    return label is None or label != label or (isinstance(label, str) and not label.strip())


def is_hidden(rows: Dataset, column: str) -> bool:
    """Whether a split has no labels: no such column, or only -1 or nothing in it, as in GLUE's test splits."""
    return column not in rows.column_names or say_nothing(column_values(rows, column))


def learn_labels(
    rows: Dataset, path: str, column: str, names: tuple[str, ...] = (), as_values: bool = False
) -> LabelReader:
    """Learns the classes from the training split; real numbers have none.

    Args:
        rows: The training split.
        path: The table, for messages.
        column: Its label column.
        names: Class names in order, if known; a `ClassLabel` column has its own. Otherwise classes are in the order of
            their values.
        as_values: Whether integers are values too, if no class names are known.

    Raises:
        ValueError: When all labels are equal, or one is a number beyond the known classes.
        TypeError: When labels are of several types.
    """
    raw = column_values(rows, column)
    found = plain_labels(raw, path, "training", as_values)
    kinds = set(found)
    if any(isinstance(value, str) and value != value.strip() for value in raw):
        log.info(f"Ignoring spaces around labels in {column!r} of {path}: there are {len(kinds)} different ones")
    if not kinds:
        raise ValueError(f"data.path must hold rows to train on, but {path} has none")
    feature = rows.features[column]
    if len(kinds) < 2:
        known = isinstance(feature, ClassLabel) and found[0] in range(len(feature.names))
        only = feature.names[found[0]] if known else found[0]
        raise ValueError(
            f"data.label must tell two classes or more apart, but is {only!r} in all {len(found)} rows of the training "
            f"split of {path}"
        )
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else names
    if names and kinds <= set(range(len(names))):
        return LabelReader(path, column, tuple(range(len(names))), list(names))
    if names and isinstance(found[0], int | float):
        odd = next(value for value in found if value not in range(len(names)))
        raise ValueError(
            f"data.label must be a class from 0 to {len(names) - 1} ({', '.join(names)}), but {column!r} is {odd!r} in "
            f"row {found.index(odd)} of the training split of {path}; leave such rows out"
        )
    if as_values and type(found[0]) is int:
        return LabelReader(path, column)
    if isinstance(found[0], float):
        if not as_values and all(value.is_integer() for value in kinds):
            log.warning(
                f"{column!r} of {path} holds real numbers, so labels are treated as values, although all are whole "
                f"({listed(sorted(kinds))}); write them as whole numbers (1, not 1.0) to use them as classes"
            )
        return LabelReader(path, column)
    if names and kinds <= set(names):
        return LabelReader(path, column, names, list(names))
    values = tuple(sorted(kinds))
    minus_one = type(values[0]) is int and values == tuple(range(-1, len(values) - 1))
    if minus_one or (NOT_AGREED in kinds and "+" not in kinds and len(kinds) > 2):
        none = -1 if minus_one else NOT_AGREED
        log.warning(
            f"{column!r} of {path} is {none!r} in {found.count(none):,} of {len(found):,} training rows, which is a "
            f"class like the others; leave such rows out if they have no label"
        )
    return LabelReader(path, column, values, [str(value) for value in values])


def read_labels(rows: Dataset, reader: LabelReader, split: str) -> np.ndarray | None:
    """The labels of a table by classes learnt from another; `None` if it has none.

    A row whose label is missing or unknown gets `IGNORE_INDEX`, or NaN if labels are values.
    """
    if not reader.column or is_hidden(rows, reader.column):
        return None
    found, reader = _by_name(rows, reader)
    try:
        return reader.read(found, split)
    except (ValueError, TypeError):  # some are missing or unknown: reads one by one, but all in the same way
        kinds = {repr(each): each for each in found}
        readings = [{kind: _read_one(value, way, split) for kind, value in kinds.items()} for way in reader.ways]
        read = max(readings, key=lambda reading: sum(label is not None for label in reading.values()))
    labels = [read[repr(value)] for value in found]
    if unknown := [row for row, label in enumerate(labels) if label is None]:
        log.info(
            f"{len(unknown):,} of {len(found):,} rows of {reader.path} have no label that is known from training, such "
            f"as {found[unknown[0]]!r} in row {unknown[0]}"
        )
    if len(unknown) == len(found):
        return None
    none, kind = (IGNORE_INDEX, np.int64) if reader.values else (np.nan, np.float32)
    return np.array([none if label is None else label for label in labels], dtype=kind)


def require_labels(rows: Dataset, reader: LabelReader, split: str) -> np.ndarray:
    """The labels of a table by classes learnt from another; every row must have a known one.

    Raises:
        ValueError: When a label is missing or unknown.
    """
    found, reader = _by_name(rows, reader)
    return reader.read(found, split)


def _by_name(rows: Dataset, reader: LabelReader) -> tuple[list[Any], LabelReader]:
    """The cells of the label column, and a reader for them.

    If a `ClassLabel` column has any of the known class names, its numbers are translated by name to the cells of
    training. Its numbers are never taken for class names.
    """
    found, feature = column_values(rows, reader.column), rows.features[reader.column]
    if not isinstance(feature, ClassLabel):
        return found, reader
    known = dict(zip(reader.class_names, reader.values))
    if known.keys() & set(feature.names):
        value_of = {number: known.get(name, name) for number, name in enumerate(feature.names)}
        found = [value_of.get(value, value) for value in found]
    return found, reader.ways[1]


def _read_one(value: Any, reader: LabelReader, split: str) -> int | float | None:
    """One label by itself; `None` if it is missing or unknown."""
    try:
        return reader.read([value], split).item()
    except (ValueError, TypeError):
        return None


def label_column(rows: Dataset, columns: Columns, path: str) -> str:
    """The name of the column of labels.

    Raises:
        ValueError: When none is known.
    """
    if columns.label is not None:
        return columns.label
    others = ", ".join(name for name in rows.column_names if name not in (columns.text, columns.text_pair))
    if not others:
        texts = [name for name in (columns.text, columns.text_pair) if name]
        raise ValueError(
            f"data.path must hold a column of labels beside the text, but {path} has only {listed(texts)}"
            f"{separator_remedy(texts)}"
        )
    raise ValueError(
        f"data.label must be given where no column is called {', '.join(LABELS)}, but is not; {path} has {others}"
    )


def labelled_splits(
    found: dict[str, Dataset],
    columns: Columns,
    path: str,
    names: tuple[str, ...],
    validation_fraction: float,
    test_fraction: float,
    as_values: bool = False,
) -> tuple[dict[str, Split], LabelReader]:
    """Reads the labels of all splits, and cuts missing splits out of the training split.

    Raises:
        ValueError: When there is no training split, a split other than `test` has no labels, or a label is missing or
            not seen in training.
    """
    if "train" not in found:
        raise ValueError(f"data.path must hold a training split, but {path} has only {', '.join(found)}")
    column = label_column(found["train"], columns, path)
    reader = learn_labels(found["train"], path, column, names, as_values)
    splits = {}
    for name, rows in found.items():
        if name == "train" or not is_hidden(rows, column):
            splits[name] = Split(rows, require_labels(rows, reader, name))
        elif name == "test":
            log.info(f"The test split of {path} has no labels, so it can only be used for predictions")
            splits[name] = Split(rows, None)
        else:
            raise ValueError(
                f"data.label must be in the {name} split of {path}, but {column!r} is missing or empty there; leave "
                f"that split out to cut one from training"
            )
    splits = with_all_splits(splits, columns, validation_fraction, test_fraction)
    require_seen(splits, reader)
    return splits, reader


def require_seen(splits: dict[str, Split], reader: LabelReader) -> None:
    """Refuses splits with classes that no training example has.

    Raises:
        ValueError: When a split has such a class.
    """
    for name, split in splits.items():
        if split.labels is None or not reader.values:
            continue
        new = np.setdiff1d(split.labels, splits["train"].labels)
        if len(new):
            raise ValueError(
                f"data.label must be seen in training before it is in the {name} split of {reader.path}, but "
                f"{reader.class_names[int(new[0])]!r} is not"
            )
