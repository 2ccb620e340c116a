"""Files of a folder: which are tables, which split each table or text is for, and why a table cannot be read."""

from __future__ import annotations

import collections
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from lit_llm.data.json_lines import json_lines
from lit_llm.wording import wrong_byte

log = logging.getLogger(__name__)
T = TypeVar("T")

TABLE_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz")
NO_TABLES = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")
"""Files that describe the tables beside them."""

UNLABELLED_TEST = "unlabelled test"
"""Name of the source's test split if it has no labels and a labelled one is cut in addition."""

UNLABELLED = ("unlabel", "unsupervised")
"""Beginnings of the names of unlabelled tables, which are for semi-supervised training."""

SPLIT_WORD = re.compile(
    r"(?<![a-z])(?:(train|test)(?:ing)?|val(?:id(?:at(?:e|ion))?)?|eval(?:uat(?:e|ion))?|dev(?:el(?:opment)?)?)(?:set)?"
    r"(?![a-z])"
)
SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]{16})?$")
"""Ending of a file name if a split has several files; older data sets of the hub add a hash."""

SPLIT_NAME = re.compile(rf"(.*{SPLIT_WORD.pattern})({SHARD.pattern}|[\W\d_]*)")
"""A name that ends in a split's word, apart from numbers and punctuation."""

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_table(file: Path) -> bool:
    """Whether a file of a folder is a table, by its name."""
    return file.suffix.lower() in TABLE_FORMATS and file.name not in NO_TABLES


def is_packed_table(file: Path) -> bool:
    """Whether a file of a folder is a compressed table, by its name."""
    return file.suffix.lower() in PACKED and Path(file.stem).suffix.lower() in TABLE_FORMATS


def in_hub_layout(folder: Path) -> bool:
    """Whether the folder's README is a dataset card that assigns files to splits (`configs:`)."""
    card = folder / "README.md"
    return (
        card.is_file()
        and re.search(r"^configs:", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) is not None
    )


def refuse_saved(folder: Path, path: str) -> None:
    """Refuses a folder that `save_to_disk` of `datasets` wrote, for one split or several.

    Raises:
        ValueError: When it is such a folder.
    """
    saved = {"state.json": "*.arrow", "dataset_dict.json": "*/*.arrow"}
    if any((folder / name).is_file() and any(folder.glob(pattern)) for name, pattern in saved.items()):
        raise ValueError(
            f"data.path must hold files that any program reads, but {path} was written by `save_to_disk`; open it with "
            f"`datasets.load_from_disk`, and write each split with `to_parquet`"
        )


def split_kind(split: str) -> str | None:
    """What a split is for, from a word in its name; `None` if there is no such word.

    Example:
        >>> [split_kind(name) for name in ("Train", "sst2_dev", "valid.matched", "validate", "latest", "valuation")]
        ['train', 'validation', 'validation', 'validation', None, None]
    """
    found = SPLIT_WORD.search(split.lower())
    return found and (found[1] or "validation")


def table_kind(name: str) -> str | None:
    """As `split_kind`; also `unlabelled`, for tables that only semi-supervised training reads."""
    return "unlabelled" if name.startswith(UNLABELLED) else split_kind(name)


def choose_splits(found: dict[str, T], path: str, suffix: str = "") -> dict[str, T]:
    """Chooses the splits to train, validate and test on: the first of each kind, or the one that ends in `suffix`.

    The kind is a word in the name. A split of no kind is `train` if it is the only split, and left out beside a
    `train`. A split whose name begins with `unlabel` or `unsupervised` is for semi-supervised training.

    Raises:
        ValueError: When the names do not say which split is for training.

    Example:
        >>> choose_splits({"train": 1, "dev": 2, "test_matched": 3, "test_mismatched": 4}, "x", "_mismatched")
        {'train': 1, 'validation': 2, 'test': 4}
    """
    if len(found) == 1:
        [(name, rows)] = found.items()
        return {split_kind(name) or "train": rows}
    chosen: dict[str | None, str] = {}
    for name in sorted(found, key=lambda name: not (suffix and name.endswith(suffix))):
        chosen.setdefault(table_kind(name), name)
    if None in chosen and "train" not in chosen:
        raise ValueError(f"data.path must say in a name which table is train, but {path} has {', '.join(found)}")
    taken = {kind: chosen[kind] for kind in ("unlabelled", "train", "validation", "test") if kind in chosen}
    if left := [name for name in found if name not in taken.values()]:
        say = log.warning if "train" in map(split_kind, left) else log.info
        say(f"Reading {', '.join(taken.values())} of {path}; ignoring {', '.join(left)}")
    return {kind: found[name] for kind, name in taken.items()}


def split_tables(files: list[Path], folder: Path) -> dict[str, list[Path]]:
    """Assigns the files of a folder to splits, evaluation first: of a text that is in two splits, training loses it.

    The split is the word at the end of a file's name, or of the name of a folder it is in. A word that is not at the
    end, as in `test_prep`, counts only if every file is named after a split. All other files are for training.
    """
    kinds = {file: next(filter(None, map(split_kind, _names(file, folder))), None) for file in files}
    splits: dict[str, list[Path]] = {"validation": [], "test": [], "train": []}
    for file in files:
        kind = _clear_kind(_names(file, folder)) or (kinds[file] if all(kinds.values()) else None)
        if kind is None and kinds[file]:
            log.info(f"Reading {file} for training; for {kinds[file]} its name must end in the word")
        splits[kind or "train"].append(file)
    return {kind: found for kind, found in splits.items() if found}


def split_texts(files: list[Path], folder: Path) -> dict[str, list[Path]]:
    """Assigns the texts of a folder to splits, evaluation first, if their names say so; otherwise empty.

    They do if the names of all, or of the folders they are in, end in a split's word, and if some are for training and
    others are not; the outermost name decides, so that `train/driving_test.txt` is for training. Among other files
    `test.py` is a text like any other. A `README.md` is left out.
    """
    kinds = {file: _clear_kind(_names(file, folder)[::-1]) for file in files if file.name != "README.md"}
    found = set(kinds.values())
    if "train" not in found or not found & {"validation", "test"}:
        return {}
    if None in found:
        other = next(file for file, kind in kinds.items() if kind is None)
        log.info(f"Not reading the splits of {folder} from its files' names, as {other.name} is named after none")
        return {}
    order = [kind for kind in ("validation", "test", "train") if kind in found]
    return {kind: [file for file in kinds if kinds[file] == kind] for kind in order}


def names_split(file: Path, folder: Path) -> bool:
    """Whether it is the name of a file in `folder`, and not that of a folder it is in, that ends in a split's word."""
    own, *folders = _names(file, folder)
    return _clear_kind(folders) is None and _clear_kind([own]) is not None


def _names(file: Path, folder: Path) -> list[str]:
    """The name of a file, then those of the folders it is in, from the inmost to one in `folder`."""
    return [file.stem, *reversed(file.relative_to(folder).parts[:-1])]


def _clear_kind(names: Sequence[str]) -> str | None:
    """The split that the first name that ends in a split's word stands for."""
    return next((split_kind(name) for name in names if SPLIT_NAME.fullmatch(name.lower())), None)


def why_unreadable(error: Exception, files: Sequence[Path] = ()) -> str:
    """Why tables cannot be read, in one line: the first bad line of JSON lines, else the message of the reader.

    Text that is not UTF-8 has a message of its own.
    """
    for file in files:
        if file.suffix.lower() == ".jsonl":
            try:
                collections.deque(json_lines(file), maxlen=0)
            except ValueError as wrong:
                return str(wrong)
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        return f"a table must be UTF-8 text, but {wrong_byte(cause)}"
    return " ".join(str(cause).split()) or type(error).__name__
