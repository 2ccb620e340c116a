"""The whole pipeline runs to its end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.writing import REPOSITORY, places

STAGES = [
    "clean",
    "tokenise",
    "pre-train",
    "fine-tune",
    "evaluate",
    "distil",
    "prune",
    "quantise",
    "export",
    "generate",
]


@pytest.mark.slow
def test_the_lifecycle_leads_from_files_to_answers_and_takes_no_stage_twice(tmp_path):
    words = [sys.executable, "-m", "experiments.lifecycle.run", "--size", "tiny", "--threads", "1", "--no_table"]

    def run():
        done = subprocess.run([*words, "--work", tmp_path], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith(("|", "In all"))]

    lines = run()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:-1]]
    assert [row[0] for row in rows if row[0]] == STAGES
    assert all(int(row[4].replace(",", "")) > 0 for row in rows)
    distilled, pruned, recovered, int4, int8 = (int(row[4].replace(",", "")) for row in rows[6:11])
    assert distilled > pruned == recovered > 3 * int4 > 3 * int8
    assert (tmp_path / "tiny/generated.txt").read_text().count("-->") == 3
    assert (tmp_path / "tiny/exported/config.json").is_file()
    picture = tmp_path / "tiny/lifecycle.png"
    assert picture.stat().st_size > 5000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path != picture}
    assert run() == lines
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_lifecycles_readme_has_a_place_for_what_it_writes():
    assert all(places("lifecycle", name) == 1 for name in ("lifecycle", "generated"))
