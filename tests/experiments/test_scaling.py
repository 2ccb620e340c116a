"""A scaling law is fitted and predicts the next run."""

from __future__ import annotations

import pytest

from experiments.scaling import run as scaling
from tests.writing import places


def test_a_scaling_law_is_found_again_in_losses_made_by_it_and_has_no_floor_below_zero():
    sizes = [1e5, 3e5, 1e6, 3e6, 1e7]
    for made in (scaling.Law(1.2, 30.0, 0.3), scaling.Law(0.0, 8.0, 0.1)):
        law = scaling.fitted(sizes, [made.loss(n) for n in sizes])
        assert law.exponent == pytest.approx(made.exponent, rel=0.01)
        assert law.loss(1e8) == pytest.approx(made.loss(1e8), rel=0.01)
    falling_ever_faster = scaling.fitted(sizes, [5.0, 4.9, 4.5, 3.5, 1.0])
    assert falling_ever_faster.floor == 0
    assert scaling.fitted(sizes, [1.0, 2.0, 3.0, 4.0, 5.0]).scale == 0
    options = scaling.parsed(["--seeds", "0,1"])
    law, small = scaling.Law(1.0, 4.0, 0.5), [scaling.Trained(32, 4, [3.0, 3.2]), scaling.Trained(64, 16, [2.0, 2.0])]
    lines = scaling.table(scaling.AXES["full"]["model"], small, law, scaling.Trained(96, 64, [1.6, 1.7]), options)
    assert "| 96 | 64 | 1.6000 | 1.7000 | 1.6500 | 1.5000 (predicted) |" in lines
    assert (
        "The last came out +0.1500 from what was predicted, 10.00% of it; seeds of one row differ by 0.0707"
        in lines[-1]
    )
    assert places("scaling", "model") == places("scaling", "data") == 1


@pytest.mark.slow
def test_networks_and_lengths_are_trained_once_and_the_next_is_predicted(tmp_path, capsys):
    words = ["--size", "tiny", "--seeds", "0", "--threads", "1", "--work", str(tmp_path), "--no_table"]
    scaling.main(words)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.split("|")[1:3]] for row in rows]
    assert [first for first, _ in cells] == [
        "width",
        "---:",
        "32",
        "64",
        "96",
        "128",
        "steps",
        "---:",
        "1",
        "2",
        "3",
        "4",
    ]
    one, *others = (int(tokens.replace(",", "")) for _, tokens in cells[8:])
    assert others == [2 * one, 3 * one, 4 * one]
    assert rows[5].endswith("(predicted) |")
    assert rows[-1].endswith("(predicted) |")
    assert all((tmp_path / f"tiny/{name}.png").stat().st_size > 5000 for name in ("model", "data"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    assert len(before) == 8
    scaling.main(words)
    assert before == {path: path.stat().st_mtime_ns for path in before}
