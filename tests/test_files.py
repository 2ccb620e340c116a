from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_llm.files import locked, replacing
from tests.writing import REPOSITORY


def written(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "a.txt").write_text(text)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_takes_its_place_though_another_process_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    place, replace = tmp_path / "place", os.replace
    if is_there:
        written(place, "before")

    def interrupted(source: Path, target: Path) -> None:
        if target == place:
            monkeypatch.setattr(os, "replace", replace)
            written(place, "the other's")
        replace(source, target)

    with replacing(place) as new:
        written(new, "mine")
        monkeypatch.setattr(os, "replace", interrupted)
    assert (place / "a.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_folder_that_cannot_take_its_place_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, replace = tmp_path / "place", os.replace
    written(place, "before")

    def full(source: Path, target: Path) -> None:
        if target == place and source.name == "place" and (source / "a.txt").read_text() == "mine":
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"), replacing(place) as new:
        written(new, "mine")
    assert (place / "a.txt").read_text() == "before"


HOLDER = """
import sys, time
from pathlib import Path
from lit_llm.files import locked
with locked(Path(sys.argv[1]), "x", "y"):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has locked `tmp_path / "held"`."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "held")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_locked_folder_is_refused_until_the_process_that_locked_it_is_killed(tmp_path, held):
    folder = tmp_path / "held"
    line = rf"\Ax must be the folder of one y, but another process writes to {folder}; "
    with pytest.raises(ValueError, match=line), locked(folder, "x", "y"):
        pytest.fail("two processes have the folder")
    held.kill()
    held.wait()
    with locked(folder, "x", "y"):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_lock_that_its_former_holder_removed_before_it_was_taken_keeps_no_folder(tmp_path, monkeypatch):
    folder = tmp_path / "left"
    monkeypatch.setattr("fcntl.lockf", lambda *_: (folder / ".lock").unlink())
    with (
        pytest.raises(ValueError, match=f"another process has just left {folder}; try again"),
        locked(folder, "x", "y"),
    ):
        pytest.fail("the lock is of a file that no other process finds")


@pytest.mark.parametrize("command", ["fit", "sweep", "compress"])
def test_a_command_leaves_a_folder_alone_to_which_another_process_writes(tmp_path, held, lit_llm, tiny, command):
    folder = tmp_path / "held"
    words = {
        "fit": [*tiny, "--run_dir", folder],
        "sweep": ["--config", REPOSITORY / "configs/sweeps/llama_stdlib_lr.yaml", "--trials", "1", "--out", folder],
        "compress": ["--config", REPOSITORY / "configs/compression/chain_llama.yaml", "--model", "x", "--out", folder],
    }[command]
    outcome = lit_llm(command, *words)
    assert outcome.code == 2
    assert f"but another process writes to {folder}" in outcome.last_line
    assert [path.name for path in folder.iterdir()] == [".lock"]
