"""Tables of READMEs are read and drawn, and every experiment has a picture of its current tables."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from experiments import pictures
from experiments.pictures import Panel, Table, number, tables
from experiments.throughput.report import write_table
from tests.writing import REPOSITORY, exactly

READMES = sorted((REPOSITORY / "experiments").glob("*/README.md"))
KNOWN = yaml.safe_load((REPOSITORY / "experiments/pictures.yaml").read_text(encoding="utf-8"))

MADE_UP = """# Which is faster?

<!-- speed -->
    python -m experiments.made_up

**fp32**, medians

| | tokens/s | goal | peak MB |
| --- | ---: | ---: | ---: |
| ours | 3,899 [3,848–3,950] | 4,000 **missed** | 1,175 |
| theirs | failed |  | 900 |

| seed | loss |
| --- | ---: |
| 0 | 1.5 |
<!-- /speed -->

![tokens a second](speed.png)

<!-- later -->
Not measured yet.
<!-- /later -->
"""


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        ("3,899 [3,848–3,950]", ("3,899", 3899.0, 3848.0, 3950.0)),
        ("1.649 bits per byte [1.583, 1.711]", ("1.649 bits per byte", 1.649, 1.583, 1.711)),
        ("292 ms [256–299]", ("292 ms", 292.0, 256.0, 299.0)),
        ("0.714 ± 0.069", ("0.714 ± 0.069", 0.714, 0.645, 0.783)),
        ("-0.250 ± 0.495", ("-0.250 ± 0.495", -0.25, -0.745, 0.245)),
        (" 12.3 % ", ("12.3 %", 12.3, 12.3, 12.3)),
        ("+3.9%", ("+3.9%", 3.9, 3.9, 3.9)),
        ("+0.0% (calibrates)", ("+0.0%", 0.0, 0.0, 0.0)),
        ("20% met", ("20%", 20.0, 20.0, 20.0)),
        ("1,175 **missed**", ("1,175", 1175.0, 1175.0, 1175.0)),
        ("10.0 ×", ("10.0 ×", 10.0, 10.0, 10.0)),
        ("1.59e+11", ("1.59e+11", 1.59e11, 1.59e11, 1.59e11)),
    ],
)
def test_a_cell_is_read_with_its_range(cell, found):
    text, *figures = number(cell)
    assert (text, *figures) == (found[0], *(pytest.approx(figure) for figure in found[1:]))


@pytest.mark.parametrize("cell", ["", "**missed**", "256 × 3", "at most 100", "not reached", "of 2 seeds 1.0"])
def test_a_cell_of_words_is_no_number(cell):
    assert number(cell) is None


def test_the_tables_between_markers_are_read_with_what_stands_above():
    first, second = tables(MADE_UP, "speed")
    assert first.caption == "fp32"
    assert first.header == ["", "tokens/s", "goal", "peak MB"]
    assert first.rows == [["ours", "3,899 [3,848–3,950]", "4,000 **missed**", "1,175"], ["theirs", "failed", "", "900"]]
    assert second == Table("fp32", ["seed", "loss"], [["0", "1.5"]])
    assert tables(MADE_UP, "later") == []


def test_a_table_that_is_not_whole_is_said():
    message = "a README must have the markers <!-- memory --> and <!-- /memory -->, but has not both"
    with pytest.raises(ValueError, match=exactly(message)):
        tables(MADE_UP, "memory")
    with pytest.raises(ValueError, match=exactly("a row of speed must have 4 cells, but is theirs | failed | 900")):
        tables(MADE_UP.replace("| failed |  |", "| failed |"), "speed")
    message = "a table of speed must have samples/s, loss, but has , tokens/s, goal, peak MB; seed, loss"
    with pytest.raises(ValueError, match=exactly(message)):
        Panel("speed", ["samples/s", "loss"], "How fast?").of(MADE_UP)


def test_a_table_that_is_written_is_drawn_where_the_readme_shows_it(tmp_path, monkeypatch):
    """A missed goal is red; tables without measurements give no picture."""
    (tmp_path / "pictures.yaml").write_text(
        "speed.png: [{table: speed, columns: [tokens/s], title: Fast}]\n"
        "later.png: [{table: later, columns: [tokens/s], title: Later}]\n"
        "other.png: [{table: other, columns: [tokens/s], title: Elsewhere}]\n"
    )
    monkeypatch.setattr(pictures, "HERE", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"{MADE_UP}\n![later](later.png)\n", encoding="utf-8")
    write_table("speed", ["| | tokens/s | goal |", "| --- | ---: | ---: |", "| ours | 5 ± 1 | 6 **missed** |"], readme)
    assert [path.name for path in tmp_path.glob("*.png")] == ["speed.png"]
    with Image.open(tmp_path / "speed.png") as image:
        before, colours = image.info["of"], {colour for _, colour in image.convert("RGB").getcolors()}
        assert image.width == 1500
    assert any(red > 200 and green < 120 for red, green, _ in colours)
    write_table("speed", ["| | tokens/s | goal |", "| --- | ---: | ---: |", "| ours | 7 | 6 met |"], readme)
    with Image.open(tmp_path / "speed.png") as image:
        assert image.info["of"] != before
        assert not any(r > 200 and g < 120 for _, (r, g, _) in image.convert("RGB").getcolors())


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_every_experiment_shows_a_picture_of_what_its_tables_say(readme, tmp_path):
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", readme.read_text(encoding="utf-8"))
    assert shown
    assert all((readme.parent / name).is_file() for name in shown)
    made = pictures.draw(Path(shutil.copy(readme, tmp_path)))
    assert [path.name for path in made] == [name for name in KNOWN if name in shown]
    for path in made:
        assert 5_000 < path.stat().st_size < 80_000
        with Image.open(path) as new, Image.open(readme.with_name(path.name)) as committed:
            assert new.info["of"] == committed.info["of"], f"to be drawn anew: python -m experiments.pictures {readme}"


def test_every_picture_is_shown_by_one_experiment():
    texts = [readme.read_text(encoding="utf-8") for readme in READMES]
    assert all(sum(f"]({name})" in text for text in texts) == 1 for name in KNOWN)
