"""Rows of JSON, one per line or in an array; each is read by itself, so their columns and types may differ."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_llm.wording import wrong_byte

ROWS_AT_ONCE = 512
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, one per line that is not blank, or of one array.

    Raises:
        ValueError: When a line is not JSON, not an object, or holds an unpaired surrogate; or when the file is not
            UTF-8.
    """
    for number, line in enumerate(_lines_of_array(file) or _utf8_lines(file), 1):
        if not line.strip():
            continue
        place = f"line {number} of {file.name}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as wrong:
            what = f"{wrong.msg.removesuffix(' at')} at character {wrong.pos + 1}"
            raise ValueError(f"a line must be JSON, but {place} is not ({what})") from None
        if not isinstance(row, dict):
            raise ValueError(f"a line must be a row, but {place} is {line.strip():.60}")
        if "\\u" in line and HALF_CHARACTER.search(json.dumps(row, ensure_ascii=False)):
            raise ValueError(f"a text must be of whole characters, but {place} holds one half of a surrogate pair")
        yield row


def _lines_of_array(file: Path) -> list[str] | None:
    """The rows of an array as a line of JSON each; `None` where the file holds something else."""
    if not next(filter(str.strip, _utf8_lines(file)), "").lstrip().startswith("["):
        return None
    try:
        rows = json.loads("".join(_utf8_lines(file)))
    except json.JSONDecodeError:
        return None
    return list(map(json.dumps, rows)) if all(isinstance(row, dict) for row in rows) else None


def _utf8_lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            yield from lines
    except UnicodeDecodeError as wrong:
        raise ValueError(f"JSON must be UTF-8 text, but {file.name} {wrong_byte(wrong)}") from None


def is_in_lines(file: Path) -> bool:
    """Whether a JSON file begins with a line that is a row, or is an array of rows, or is empty.

    Raises:
        ValueError: When it is not UTF-8, because other readers would pass on text that cannot be read later.
    """
    try:
        next(json_lines(file), None)
    except ValueError as error:
        if isinstance(error.__context__, UnicodeDecodeError):
            raise
        return False
    return True


def with_all_columns(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Adds null for each column that a row lacks, but an earlier row has, or one up to some hundreds of rows later.

    Example:
        >>> list(with_all_columns(iter([{"a": 1}, {"b": 2}])))
        [{'a': 1, 'b': None}, {'a': None, 'b': 2}]
    """
    columns: dict[str, None] = {}
    while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
        columns |= dict.fromkeys(itertools.chain.from_iterable(some))
        yield from (columns | row for row in some)
