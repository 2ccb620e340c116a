"""The sweep over networks runs, and its comparison is written between the markers of the README."""

from __future__ import annotations

import pytest

from experiments.networks import run as networks
from tests.writing import places


def test_the_readme_has_a_place_for_the_table():
    assert places("networks", "networks") == 1


@pytest.mark.slow
def test_networks_are_swept_and_compared_and_made_once(tmp_path, texts):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- networks -->\n<!-- /networks -->\n")
    small = ["--data.path", str(texts), "--data.tokenizer", "bytes", "--data.seq_len", "16", "--data.batch_size", "2"]
    words = ["--work", str(tmp_path / "work"), "--readme", str(readme), "--trials", "2", "--more_seeds", "0", *small]
    networks.main(words)
    rows = [line for line in readme.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 4  # header, separator, and two settings
    assert all("| 1 |" in row for row in rows[2:])  # number of seeds
    assert (tmp_path / "learning_curves.png").stat().st_size > 5000
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("results.json")}
    assert len(made) == 2
    networks.main(words)
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("results.json")}
