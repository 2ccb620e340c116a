"""CSV and TSV files: what their columns are called, and whether quotes enclose cells."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LOOKED_AT = 10_000_000
"""Characters of a TSV file by which it is decided whether quotes enclose cells."""

LINES_OF_A_CELL = 100
QUOTED_CELL = re.compile(r'(?<![^\t\n])"[^"]*(?:""[^"]*)*"(?![^\t\n])')
CELL = re.compile(r"[-+]?\d+(\.\d+)?|.{41,}", re.DOTALL)
"""What a column is called where the first line is no header but a row: by a number, or a text."""

csv.field_size_limit(2**31 - 1)  # a cell may hold a book


def layout(files: list[Path]) -> tuple[list[str], dict[str, Any]]:
    """What the columns of CSV or TSV files are called in the first one, and how pandas tells the cells of all apart.

    Raises:
        ValueError: When the first row has more cells than the header, as where texts have commas, but no quotes.
    """
    separator = "\t" if files[0].suffix.lower() == ".tsv" else ","
    quoting = csv.QUOTE_NONE if separator == "\t" and not all(map(_is_quoted, files)) else csv.QUOTE_MINIMAL
    with files[0].open(newline="", encoding="utf-8-sig") as file:
        filled = filter(None, csv.reader(file, delimiter=separator, quoting=quoting))
        names, first = next(filled, []), next(filled, [])
    names = [name or _nameless(place, names) for place, name in enumerate(names)]
    if len(first) > len(names):  # pandas would take what is too many for names of rows
        raise ValueError(
            f"a row must have as many cells as the header, {len(names)}, but the first one has {len(first)}"
        )
    return names, {"sep": separator, "quoting": quoting}


def header_remedy(names: Iterable[str]) -> str:
    """What an error adds that lists the names of columns; nothing where a header seems to have given them.

    Example:
        >>> header_remedy(["text", "label"]), header_remedy(["3", "Wall St. Bears"])
        ('', "; the first line of a CSV or TSV file is taken for its columns' names: add a header")
    """
    taken = "; the first line of a CSV or TSV file is taken for its columns' names: add a header"
    return taken if any(map(CELL.fullmatch, names)) else ""


def _nameless(place: int, names: list[str]) -> str:
    """What pandas calls a column without a name, beside those that have one."""
    first = f"Unnamed: {place}"
    others = (f"{first}.{number}" for number in itertools.count(1))
    return next(name for name in itertools.chain([first], others) if name not in names)


def _is_quoted(file: Path) -> bool:
    """Whether quotes in a TSV file enclose cells, as its readers take them; in GLUE's own files they are text.

    A quote at the head of a cell and one at the end of another, some lines below, enclose what is between only if that
    gives all rows as many cells as the header; and in two columns and more, only if the lines do not have them already.
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
    """The header and the lines from the first with a quote on; of many megabytes some, to where no cell is open."""
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
