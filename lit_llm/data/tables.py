"""Opens tables of examples (one or two texts and a label) in any format, and finds their columns."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets, disable_progress_bars, load_dataset
from datasets.info import DatasetInfosDict
from datasets.utils.logging import set_verbosity

from lit_llm.data.cache import cache_folder, cache_name, new_cache, read_manifest, stamps
from lit_llm.data.delimited import header_remedy, layout, separator_remedy
from lit_llm.data.json_lines import is_in_lines, json_lines
from lit_llm.data.table_files import (
    HUB_NAME,
    PACKED,
    SHARD,
    SPLIT_NAME,
    TABLE_FORMATS,
    UNLABELLED,
    choose_splits,
    in_hub_layout,
    is_packed_table,
    is_table,
    refuse_saved,
    table_kind,
    why_unreadable,
)
from lit_llm.wording import listed

log = logging.getLogger(__name__)

LABELS = ("label", "labels", "target", "class", "category", "score")
PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
)
SINGLES = ("text", "sentence")
NUMBERS = re.compile(r"idx|id|index|Unnamed: 0(\.\d+)?")
"""Names of columns of row numbers; pandas adds `.1`, `.2`, … to `Unnamed: 0` when it writes a table again."""

SPLIT = "split"
"""Column that says which split a row of a lone table belongs to."""

ROWS_AT_ONCE = 10_000
NUMBER = re.compile(rf"{SHARD.pattern}|([-_.]?\d)+$")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold an example.

    Attributes:
        text: Column of the text, or of the first of two.
        text_pair: Column of the second text; `None` if there is only one text.
        label: Column of the label; `None` if there is none.
    """

    text: str
    text_pair: str | None
    label: str | None

    @property
    def texts(self) -> dict[str, str | None]:
        """Columns of the texts, by the names that error messages use."""
        return {"text": self.text, "text_pair": self.text_pair}


@dataclass(frozen=True)
class Split:
    """The examples of a split.

    Attributes:
        rows: All columns, memory-mapped.
        labels: Class index (int64) or value (float32) of each example; `None` if there are no labels.
    """

    rows: Dataset
    labels: np.ndarray | None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """The values of one column."""
        return column_values(self.rows, name)

    def select(self, rows: np.ndarray) -> Split:
        """Some of the examples, in the given order."""
        return Split(self.rows.select(rows), None if self.labels is None else self.labels[rows])


def both(first: Split, second: Split) -> Split:
    """Two splits as one without labels, with the columns that both have; `string` and `large_string` are one type."""
    here, there = first.rows.features, second.rows.features
    shared = [n for n in here if here[n] == there.get(n) or (_is_text(here[n]) and _is_text(there.get(n)))]
    one, other = (split.rows.select_columns(shared) for split in (first, second))
    if other.features != one.features:
        other = other.cast(one.features)
    return Split(concatenate_datasets([one, other]), None)


def open_table(
    path: str,
    subset: str | None = None,
    suffix: str = "",
    kinds: str = "a table, a folder of them or a hub data set",
) -> dict[str, Dataset]:
    """The splits of a table that `choose_splits` selects, by purpose; a single file is `train`.

    Other files of a folder are not even read, so they may be of any kind. A table for training that is the only one is
    split by its column `split`, if that has one.

    Args:
        path: A file (`.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv`), a folder of them with `train`,
            `validation` (`val`, `dev`, `eval`) or `test` in the names, a folder in the hub's layout, or a data set on
            the hub. Files whose names differ only in their numbers (`train_0.csv`, `train_1.csv`) are one split.
        subset: Configuration of a hub data set, or folder beneath `path`.
        suffix: End of the name of the split to use, if there are several for one purpose.
        kinds: What `path` may be, for messages.

    Raises:
        FileNotFoundError: When there is nothing at `path`.
        ValueError: When there is something, but no table, or the names do not say which table is for training.
    """
    found = _open(path, subset, suffix, kinds)
    return _by_column(found["train"], path, suffix) if list(found) == ["train"] else found


def _open(path: str, subset: str | None, suffix: str, kinds: str) -> dict[str, Dataset]:
    """As `open_table`, without regard to a column `split`."""
    disable_progress_bars()
    set_verbosity(logging.CRITICAL)  # errors are reported once, below
    where = Path(path).expanduser()
    if where.is_file():
        if where.suffix.lower() not in TABLE_FORMATS:
            what = f"{path} is packed; unpack it" if where.suffix.lower() in PACKED else f"is {path}"
            raise ValueError(f"data.path must be a table ({', '.join(TABLE_FORMATS)}), but {what}")
        return {"train": _load_files([where], path)}
    if where.is_dir() and not in_hub_layout(where):
        folder = where / subset if subset and (where / subset).is_dir() else where
        refuse_saved(folder, path)
        files = sorted(file for file in folder.iterdir() if is_table(file) and not file.name.startswith("."))
        tables: dict[str, list[Path]] = {}
        for file in files:
            tables.setdefault(_table_name(file.stem), []).append(file)
        if tables:
            chosen, classes = choose_splits(tables, path, suffix), _known_classes(where, subset)
            return _with_classes({kind: _load_files(parts, path) for kind, parts in chosen.items()}, classes)
        cards = where / "README.md", where / "dataset_infos.json"
        if not any(card.is_file() for card in cards):  # older cards leave the splits to the names of the folders
            packed = min(filter(is_packed_table, folder.iterdir()), default=None)
            what = f"{packed} is packed; unpack it" if packed else f"{folder} has none"
            raise ValueError(f"data.path must hold tables ({', '.join(TABLE_FORMATS)}), but {what}")
    if not where.is_dir() and (
        where.is_absolute() or where.suffix.lower() in TABLE_FORMATS or not HUB_NAME.fullmatch(path)
    ):
        raise FileNotFoundError(f"data.path must be {kinds}, but is {path}, which does not exist")
    try:
        found = load_dataset(str(where), subset)
    except Exception as error:  # the library raises dozens of kinds
        raise FileNotFoundError(
            f"data.path must be {kinds}, but is {path!r} (subset {subset!r}): {why_unreadable(error)}"
        ) from error
    return choose_splits(dict(found), path, suffix)


def _by_column(rows: Dataset, path: str, suffix: str) -> dict[str, Dataset]:
    """The splits of a table by its column `split`; `train` alone if a value of that names no split."""
    if not _is_text(rows.features.get(SPLIT)):
        return {"train": rows}
    cells = np.array(column_values(rows, SPLIT), dtype=object)
    names = dict.fromkeys(cells)
    kinds = {name: name and table_kind(name) for name in names}
    if {"train"} < set(kinds.values()):
        if all(kinds.values()):
            parts = {name: rows.select(np.flatnonzero(cells == name)) for name in names}
            log.info(f"Splitting {path} by its column {SPLIT!r}: {listed(names)}")
            return choose_splits(parts, path, suffix)
        odd = next(name for name, kind in kinds.items() if not kind)
        log.warning(f"The column {SPLIT!r} of {path} does not split it, since {odd!r} in it names no split")
    return {"train": rows}


def _table_name(stem: str) -> str:
    """The name that the files of one table share: without any number for a split, without shard numbers for others."""
    name = NUMBER.sub("", stem)
    return name if SPLIT_NAME.fullmatch(name.lower()) or name.startswith(UNLABELLED) else SHARD.sub("", stem)


def _known_classes(folder: Path, subset: str | None) -> dict[str, ClassLabel]:
    """Class names of the columns of a folder's tables, as far as its dataset card gives them."""
    try:
        cards = DatasetInfosDict.from_directory(str(folder))
    except Exception:  # a README that is not a card may hold anything
        return {}
    card = cards.get(subset or "default", next(iter(cards.values())) if len(cards) == 1 else None)
    features = (card and card.features) or {}
    return {name: feature for name, feature in features.items() if isinstance(feature, ClassLabel)}


def _with_classes(tables: dict[str, Dataset], classes: dict[str, ClassLabel]) -> dict[str, Dataset]:
    """Tables with label columns cast to `ClassLabel`; columns whose values do not fit stay as they are.

    Whether text holds the names or the numbers of classes is decided from the whole column: with classes called 1, 2
    and 3, the numbers are 0, 1 and 2. The library would decide for each value.
    """
    found = dict(tables)
    for name, feature in classes.items():
        texts = [rows for rows in tables.values() if _is_text(rows.features.get(name))]
        said = {value.strip() for rows in texts for value in rows.unique(name) if value} - {"", "-1"}
        numbers = ClassLabel(names=list(map(str, range(feature.num_classes))))
        ways = [feature], [numbers, feature]
        way_of_text = next((way for way in ways if said <= {each.strip() for each in way[0].names}), [])
        for kind, rows in tables.items():
            if isinstance(rows.features.get(name), Value):
                with contextlib.suppress(ValueError, TypeError, pa.ArrowInvalid):
                    for step in way_of_text if _is_text(rows.features[name]) else [feature]:
                        found[kind] = found[kind].cast_column(name, step)
    return found


def _load_files(files: list[Path], path: str) -> Dataset:
    """One table from files of one format; all columns of CSV and TSV are text."""
    suffix, options, names = files[0].suffix.lower(), {}, []
    kind = TABLE_FORMATS[suffix]
    formats = {".tsv" if file.suffix.lower() == ".tsv" else TABLE_FORMATS[file.suffix.lower()]: file for file in files}
    if len(formats) > 1:
        found = " and ".join(file.name for file in formats.values())
        raise ValueError(f"data.path must hold each split in one format, but {path} has {found}; convert one of them")
    try:
        if kind == "json" and all(map(is_in_lines, files)):
            return _load_json_lines(files)
        if kind == "csv":
            names, options = layout(files)
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"columns must have names of their own, but {len(twice)} are called {twice[0]!r}")
            if header_remedy(names):
                log.warning(
                    f"The first line of {files[0]} is taken for its columns' names; add a header if it is a row"
                )
            options["features"] = Features(dict.fromkeys(names, Value("string")))
            options |= {"keep_default_na": False, "na_values": [""]}
        # The library's cache tells files apart only by modification time, so each version gets its own name.
        options |= {"name": stamps(files), "data_files": [str(file) for file in files]}
        return load_dataset(kind, split="train", **options)
    except Exception as error:  # each format's reader raises its own types
        which, reason = files[0] if len(files) == 1 else path, why_unreadable(error, files)
        if "corresponds to no data" in reason or not any(file.stat().st_size for file in files):
            raise ValueError(f"data.path must hold rows, but {which} has none") from error
        reason += separator_remedy(names)
        raise ValueError(f"data.path must be a table that can be read, but {which} is not: {reason}") from error


def _load_json_lines(files: list[Path]) -> Dataset:
    """One table, read once and kept in the cache folder.

    Not read by the library, which turns text that looks like a date into a date, and infers the types of all columns
    from the first 10 MB.
    """
    folder = cache_folder() / "tables" / cache_name(files=stamps(files))
    if read_manifest(folder) is None:
        rows = [row for file in files for row in json_lines(file)]
        names = dict.fromkeys(name for row in rows for name in row)
        if not names:
            raise ValueError("a line must hold a row, but none does")
        parts = [_columns(rows[start : start + ROWS_AT_ONCE], names) for start in range(0, len(rows), ROWS_AT_ONCE)]
        alike = all(part.features == parts[0].features for part in parts)
        with new_cache(folder) as (new, _):
            (concatenate_datasets(parts) if alike else _columns(rows, names)).save_to_disk(new)
    return Dataset.load_from_disk(folder)


def _columns(rows: list[dict[str, Any]], names: Iterable[str]) -> Dataset:
    """Rows as typed columns; converting all rows at once takes several times the file's size in memory."""
    columns = {name: [_in_64_bits(row.get(name)) for row in rows] for name in names}
    return Dataset.from_dict(columns, on_mixed_types="use_json")


def _in_64_bits(value: Any) -> Any:
    """Converts an integer that needs more than 64 bits to a float, as the library does."""
    return float(value) if type(value) is int and not -(2**63) <= value < 2**63 else value


def column_values(rows: Dataset, name: str) -> list[Any]:
    """The values of a column as Python objects."""
    if isinstance(rows.features[name], Value | ClassLabel):
        return _arrow(rows, name).to_pylist()
    return list(rows[name])


def _arrow(rows: Dataset, name: str) -> Any:
    return rows.select_columns([name]).with_format("arrow")[:][name]


def find_columns(
    rows: Dataset,
    path: str,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    usual: tuple[str, ...] = LABELS,
    usual_pairs: tuple[tuple[str, str], ...] = PAIRS,
) -> Columns:
    """Finds the columns of the texts and the label: as given, or the one obvious choice.

    The label is in the first of the `usual` columns (`label`, `labels`, `target`, …) that exists. The texts are in one
    of the usual pairs of columns, such as `sentence1` and `sentence2`, in one called `text` or `sentence`, or in the
    only other column of text.

    Raises:
        ValueError: When a column does not exist, is given twice, or the choice is not obvious.
    """
    names = rows.column_names
    remedy = header_remedy(names)
    for role, name in {"text": text, "text_pair": text_pair, "label": label}.items():
        if name is not None and name not in names:
            raise ValueError(f"data.{role} must be one of {', '.join(names)} in {path}, but is {name!r}{remedy}")
    if label is None:
        label = next((name for name in usual if name in names), None)
    roles: dict[str, str] = {}
    for role, name in {"label": label, "text": text, "text_pair": text_pair}.items():
        if name is not None and name in roles:
            raise ValueError(
                f"data.{role} must be another column than data.{roles[name]}, but is {name!r} in {path} too"
            )
        roles |= {name: role} if name is not None else {}
    if text is not None:
        return Columns(text, text_pair, label)
    taken = {label, text_pair, SPLIT, *filter(NUMBERS.fullmatch, names)}
    others = [name for name in names if name not in taken and _is_text(rows.features[name])]
    seconds = others if text_pair is None else [text_pair]
    pairs = [(first, second) for first, second in usual_pairs if first in others and second in seconds]
    singles = [name for name in SINGLES if name in others] or (others if len(others) == 1 else [])
    if not others:
        has = ", ".join(names) + remedy
        raise ValueError(f"data.path must hold a column of text to classify, but {path} has {has}")
    if pairs:
        return Columns(*pairs[0], label)
    if singles:
        return Columns(singles[0], text_pair, label)
    raise ValueError(f"data.text must be one of {', '.join(others)} in {path}, but is not given{remedy}")


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def check_texts(rows: Dataset, columns: dict[str, str | None], path: str, split: str) -> None:
    """Refuses missing texts; an empty cell of a CSV or TSV file is missing.

    Args:
        rows: A split of a table.
        columns: Columns of the texts, by the names that error messages use.
        path: Where the table is from.
        split: Its name.

    Raises:
        ValueError: When a column does not exist, or a row has no text.
        TypeError: When a column does not hold text.
    """
    for role, name in columns.items():
        if name is None:
            continue
        if name not in rows.column_names:
            raise ValueError(
                f"data.{role} must be one of {', '.join(rows.column_names)} in the {split} split of {path}, but is "
                f"{name!r}"
            )
        if not _is_text(rows.features[name]):
            kind = getattr(rows.features[name], "dtype", type(rows.features[name]).__name__)
            raise TypeError(f"data.{role} must hold text, but {name!r} holds {kind} in the {split} split of {path}")
        column = _arrow(rows, name)
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise ValueError(
                f"data.{role} must hold a text in every row, but {name!r} has none in row {row} of the {split} split "
                f"of {path}; leave such rows out"
            )
