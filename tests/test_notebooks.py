"""Notebooks are committed with the outputs of one run from top to bottom, and run on any machine."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.writing import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

OF_A_MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|usr|opt|var|work|Users|content|kaggle)/|[A-Z]:\\\\|site-packages")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def text(lines: str | list[str]) -> str:
    return "".join(lines)


def kinds(cells: list[dict[str, Any]]) -> list[list[str]]:
    """Kinds of output of each cell: stream names, with pieces merged, or MIME types of pictures and tables."""
    shown = [[o.get("name") or " ".join(sorted(o.get("data", {}))) for o in cell["outputs"]] for cell in cells]
    return [[kind for kind, _ in groupby(each)] for each in shown]


def test_there_is_one_for_each_topic():
    assert [path.stem[:3] for path in NOTEBOOKS] == [f"{number:02d}_" for number in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) >= 6


@each
def test_it_is_short_and_committed_as_it_ran_from_top_to_bottom(path):
    cells = code(path)
    assert 5 <= len(cells) <= 14
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])


@each
def test_its_outputs_tell_nothing_of_the_machine_they_come_from(path):
    for cell in code(path):
        assert "execution" not in cell["metadata"]  # times of execution
        for output in cell["outputs"]:
            assert output.get("name") != "stderr", text(output["text"])
            shown = [
                text(output.get("text", "")),
                *(text(v) for k, v in output.get("data", {}).items() if "image" not in k),
            ]
            assert not [line for line in "\n".join(shown).splitlines() if OF_A_MACHINE.search(line)]


@each
def test_it_begins_with_a_title_and_the_cell_that_installs_the_package(path):
    title, setup = read(path)["cells"][:2]
    assert text(title["source"]).startswith("# ")
    assert text(setup["source"]) == text(code(NOTEBOOKS[0])[0]["source"])
    assert 'find_spec("lit_llm") is None' in text(setup["source"])
    assert setup["outputs"] == []


@each
def test_every_file_that_it_names_exists(path):
    for cell in read(path)["cells"]:
        source = text(cell["source"])
        for config in re.findall(r"configs/\S+?\.yaml", source):
            assert (REPOSITORY / config).is_file(), config
        for target in re.findall(r"\]\((?!http)(\S+?)\)", source) if cell["cell_type"] == "markdown" else ():
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readmes_list_all_of_them(name):
    readme = (REPOSITORY / name).read_text(encoding="utf-8")
    assert re.findall(r"\(notebooks/(\S+?)\)", readme) == [path.name for path in NOTEBOOKS]


@pytest.mark.slow
@each
def test_it_runs_from_top_to_bottom_where_nothing_was_made_before(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(tmp_path / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=place).execute()
    assert kinds([cell for cell in notebook.cells if cell.cell_type == "code"]) == kinds(code(path))
    assert {entry.name for entry in tmp_path.iterdir()} <= {"cache", "configs", "ipython", "notebooks", "runs"}
    assert not list((tmp_path / "notebooks").iterdir())
