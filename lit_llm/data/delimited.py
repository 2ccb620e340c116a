"""CSV and TSV files: names of their columns, and whether quotes enclose cells."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LOOKED_AT = 10_000_000
"""Number of characters of a TSV file that are inspected to decide whether quotes enclose cells."""

LINES_OF_A_CELL = 100
QUOTED_CELL = re.compile(r'(?<![^\t\n])"[^"]*(?:""[^"]*)*"(?![^\t\n])')
CELL = re.compile(r"[-+]?\d+(\.\d+)?|.{41,}", re.DOTALL)
"""A column name that looks like a cell, so that the first line is probably a row: a number or a long text."""

SEPARATOR = re.compile(r"[;,|\t]")
"""Characters in a column's name that suggest that cells were not separated."""

csv.field_size_limit(2**31 - 1)  # a cell may hold a book


def layout(files: list[Path]) -> tuple[list[str], dict[str, Any]]:
    """Names of the columns in the first of some CSV or TSV files, and pandas' options to read all of them.

    Raises:
        ValueError: When the first row has more cells than the header, for example because of commas in unquoted texts.
    """
    separator = "\t" if files[0].suffix.lower() == ".tsv" else ","
    quoting = csv.QUOTE_NONE if separator == "\t" and not all(map(_is_quoted, files)) else csv.QUOTE_MINIMAL
    with files[0].open(newline="", encoding="utf-8-sig") as file:
        filled = filter(None, csv.reader(file, delimiter=separator, quoting=quoting))
        names, first = next(filled, []), next(filled, [])
    names = [name or _nameless(place, names) for place, name in enumerate(names)]
    if len(first) > len(names):  # pandas would use the first cells as row labels
        raise ValueError(
            f"a row must have as many cells as the header, {len(names)}, but the first one has {len(first)}"
            f"{separator_remedy(names)}"
        )
    return names, {"sep": separator, "quoting": quoting}


def header_remedy(names: Iterable[str]) -> str:
    """Advice for an error that lists column names, if they look like cells of a row; otherwise an empty string.

    Example:
        >>> header_remedy(["text", "label"]), header_remedy(["3", "Wall St. Bears"])
        ('', "; the first line of a CSV or TSV file is taken for its columns' names: add a header")
    """
    taken = "; the first line of a CSV or TSV file is taken for its columns' names: add a header"
    return taken if any(map(CELL.fullmatch, names)) else ""


def separator_remedy(names: Iterable[str]) -> str:
    """Advice for an error about a table's columns, if a name looks like several; otherwise an empty string.

    Example:
        >>> separator_remedy(["text", "label"]), separator_remedy(["text;label"])
        ('', '; cells must be apart by commas in a .csv file, by tabs in a .tsv file')
    """
    apart = "; cells must be apart by commas in a .csv file, by tabs in a .tsv file"
    return apart if any(map(SEPARATOR.search, names)) else ""


def _nameless(place: int, names: list[str]) -> str:
    """The name that pandas gives to an unnamed column beside the named ones."""
    first = f"Unnamed: {place}"
    others = (f"{first}.{number}" for number in itertools.count(1))
    return next(name for name in itertools.chain([first], others) if name not in names)


def _is_quoted(file: Path) -> bool:
    """Whether quotes in a TSV file enclose cells, as CSV readers assume; in GLUE's own files they are plain text.

    All quotes must pair up around whole cells. If such a cell spans lines, all rows must also have as many cells as the
    header and, with two or more columns, the lines must not all have that many already, unless a cell that spans lines
    contains a doubled quote.
    """
    text = _from_the_first_quote(file)
    if '"' in QUOTED_CELL.sub("", text):
        return False
    apart = [cell[0] for cell in QUOTED_CELL.finditer(text) if "\n" in cell[0]]
    if not apart:
        return True
    rows = {len(row) for row in csv.reader(io.StringIO(text), delimiter="\t") if row}
    lines = {line.count("\t") + 1 for line in text.split("\n") if line}
    return len(rows) == 1 and (rows == {1} or rows != lines or any('""' in cell for cell in apart))


def _from_the_first_quote(file: Path) -> str:
    """The header, and the lines from the first quote on: at most `LOOKED_AT` characters, cut where no cell is open."""
    with file.open(encoding="utf-8-sig") as lines:
        text = next(lines, "")
        if '"' not in text:
            text += next((line for line in lines if '"' in line), "")
        text += lines.read(LOOKED_AT)
        if not lines.read(1):
            return text
    for _ in range(LINES_OF_A_CELL):
        text = text.rpartition("\n")[0]
        if text.count('"') % 2 == 0:
            break
    return text
