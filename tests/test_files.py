from __future__ import annotations

import os
from pathlib import Path

import pytest

from lit_llm.files import replacing


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
