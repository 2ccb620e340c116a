"""Draws pictures from the tables in READMEs, so the measurements behind a table are not needed.

    python -m experiments.pictures [README.md ...]

For each README (default: those of all experiments), the pictures of `pictures.yaml` that it links are drawn next to it.
`write_table` does the same after each table that it writes.
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from lit_llm.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

HERE = Path(__file__).parent
FIGURE = r"([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)"
CELL = re.compile(rf"{FIGURE}(?: ± {FIGURE})?[^\d\[]*(?:\[{FIGURE}(?:–|, ){FIGURE}\])?[^\d]*")


class Number(NamedTuple):
    """A number in a cell with its range; if it has a standard deviation instead, one deviation to either side."""

    text: str
    value: float
    low: float
    high: float


def number(cell: str) -> Number | None:
    """The number at the start of a cell; `None` for words, empty cells, and products such as 256 × 3."""
    found = CELL.fullmatch(cell.strip())
    if found is None:
        return None
    value, deviation, *ends = (float(text.replace(",", "")) if text else None for text in found.groups())
    low, high = ends if None not in ends else (value - (deviation or 0.0), value + (deviation or 0.0))
    return Number(re.split(r" \[| \(| met| \*", cell.strip())[0], value, low, high)


class Table(NamedTuple):
    """The cells of a Markdown table as text, and the bold line above it."""

    caption: str
    header: list[str]
    rows: list[list[str]]


def tables(text: str, name: str) -> list[Table]:
    """The tables between `<!-- name -->` and `<!-- /name -->`; none if nothing has been measured yet.

    Raises:
        ValueError: If the markers are missing, or a row has more or fewer cells than its header.
    """
    section = re.search(f"<!-- {re.escape(name)} -->(.*?)<!-- /{re.escape(name)} -->", text, re.DOTALL)
    if section is None:
        raise ValueError(f"a README must have the markers <!-- {name} --> and <!-- /{name} -->, but has not both")
    found, caption = [], ""
    for block in map(str.strip, section[1].split("\n\n")):
        if bold := re.match(r"\*\*(.+?)\*\*", block):
            caption = bold[1]
        elif block.startswith("|"):
            header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
            if uneven := next((row for row in rows if len(row) != len(header)), None):
                raise ValueError(f"a row of {name} must have {len(header)} cells, but is {' | '.join(uneven)}")
            found.append(Table(caption, header, rows))
    return found


@dataclass(frozen=True)
class Panel:
    """Columns of a table side by side, with one bar per row and its range or standard deviation.

    A black line across a bar is its goal, which is in the column's name or in a next column called "goal"; bars that
    missed their goal are red.

    Args:
        table: The name in the markers. All tables between them that have these columns are drawn.
        columns: The columns to draw.
        title: Title of the panel.
        dots: Columns drawn as points instead of bars, since their axis does not begin at zero.
        labels: Number of columns on the left that name a row.
        ours: Regular expression for the rows drawn in blue; others are gray.
        each: Prefix of the columns with the single measurements behind a mean: small points on the first axis.
        within: Goal of `dots`, as a distance from zero.
        reference: A table and one of its rows, whose figures are dashed lines across `dots`.
    """

    table: str
    columns: Sequence[str]
    title: str
    dots: Sequence[str] = ()
    labels: int = 1
    ours: str = ""
    each: str = ""
    within: float | None = None
    reference: Sequence[str] = ()

    def of(self, text: str) -> list[Table]:
        """The tables to draw."""
        known = tables(text, self.table)
        found = [table for table in known if {*self.columns} <= {*table.header}]
        if known and not found:
            headers = "; ".join(", ".join(table.header) for table in known)
            raise ValueError(f"a table of {self.table} must have {', '.join(self.columns)}, but has {headers}")
        return found

    def names(self, table: Table) -> list[str]:
        """Names of the rows, wrapped."""
        return [textwrap.fill(", ".join(row[: self.labels]).replace("`", ""), 48) for row in table.rows]

    def height(self, table: Table) -> float:
        """Height of the panel, in inches."""
        longest = max((name.count("\n") for name in self.names(table)), default=0)
        return 1.1 + len(table.rows) * (0.3 + 0.16 * longest)

    def draw(self, figure: SubFigure, table: Table, text: str) -> None:
        """Draws a table as a row of axes."""
        figure.suptitle(f"{self.title} {table.caption}".strip(), fontsize=11)
        left, *_ = drawn = figure.subplots(1, len(self.columns), sharey=True, squeeze=False)[0]
        left.set_yticks(range(len(table.rows)), self.names(table), fontsize=9)
        left.set_ylim(len(table.rows) - 0.4, -0.6)
        for axis, column in zip(drawn, self.columns):
            notes = [note for y in range(len(table.rows)) for note in self.draw_row(axis, table, column, y)]
            if self.each and axis is left:
                for y, row in enumerate(table.rows):
                    seen = [number(cell) for cell, title in zip(row, table.header) if title.startswith(self.each)]
                    axis.plot([one.value for one in seen if one], [y + 0.25] * len(seen), "k.", markersize=4, zorder=5)
                notes.append(f"small points: each {self.each}")
            if self.within and column in self.dots:
                axis.axvspan(-self.within, self.within, color="tab:green", alpha=0.15)
                notes.append(f"green: the goal, {self.within:g} to either side")
            if self.reference and column in self.dots:
                source, label = self.reference
                beside = [one for one in tables(text, source) if column in one.header]
                for cell in (row[one.header.index(column)] for one in beside for row in one.rows if row[0] == label):
                    axis.axvline(number(cell).value, color="black", linestyle="--", linewidth=1, zorder=0)
                    notes.append(f"dashed: {label}")
            below = [column, *(textwrap.fill(note, 34) for note in dict.fromkeys(notes))]
            axis.set_xlabel("\n".join(below), fontsize=9)
            axis.tick_params(axis="x", labelsize=8)
            low, high = axis.get_xlim()
            axis.set_xlim(low, high + 0.17 * len(self.columns) * (high - low))  # room for the numbers
            axis.grid(axis="x", alpha=0.3)
            axis.set_axisbelow(True)

    def draw_row(self, axis: Axes, table: Table, column: str, y: int) -> list[str]:
        """Draws one bar or point with its number and goal; returns the notes for the legend."""
        row, place = table.rows[y], table.header.index(column)
        common = re.search(r"goal ([\d.]+)", column)
        goal = row[place + 1] if table.header[place + 1 : place + 2] == ["goal"] else common[1] if common else ""
        missed = "missed" in row[place] + goal
        notes = ["red: goal missed"] * missed
        shown, bound = number(row[place]), number(goal)
        if bound is not None:
            axis.plot([bound.value] * 2, [y - 0.45, y + 0.45], color="black", linewidth=2)
            notes.append("black line: goal")
        if shown is not None:
            ends = [[shown.value - shown.low], [shown.high - shown.value]] if shown.low < shown.high else None
            ours = re.search(self.ours, self.names(table)[y])
            look = {"xerr": ends, "color": "tab:red" if missed else "tab:blue" if ours else "tab:gray", "capsize": 3}
            if column in self.dots:
                axis.errorbar(shown.value, y, fmt="o", **look)
            else:
                axis.barh(y, shown.value, 0.7, alpha=0.8, **look)
            at = (max(shown.high, bound.value if bound else shown.high), y)
            plain = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.7}
            near = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axis.annotate(shown.text, at, bbox=plain, **near)
        return notes


def draw(readme: Path) -> list[Path]:
    """Draws the pictures of `pictures.yaml` that a README links, next to it; returns their paths."""
    from matplotlib.figure import Figure
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text, made = readme.read_text(encoding="utf-8"), []
    for name, panels in yaml.safe_load((HERE / "pictures.yaml").read_text(encoding="utf-8")).items():
        of = [Panel(**panel) for panel in panels] if f"]({name})" in text else []
        parts = [(panel, table) for panel in of for table in panel.of(text)]
        if not parts:
            continue
        heights = [panel.height(table) for panel, table in parts]
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        below = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, (panel, table) in zip(below, parts):
            panel.draw(part, table, text)
        figure.savefig(whole := io.BytesIO(), dpi=150)
        made.append(readme.with_name(name))
        info = PngInfo()
        info.add_text("of", hashlib.sha256(repr(parts).encode()).hexdigest())  # tells whether the tables changed
        with replacing(made[-1]) as new, Image.open(whole) as image:
            image.convert("RGB").quantize(32).save(new, optimize=True, pnginfo=info)  # a third of the size
    return made


def main(words: list[str] | None = None) -> None:
    """Draws the pictures and prints their paths."""
    given = [*map(Path, sys.argv[1:] if words is None else words)]
    for readme in given or sorted(HERE.glob("*/README.md")):
        for path in draw(readme):
            print(path)


if __name__ == "__main__":
    main()
