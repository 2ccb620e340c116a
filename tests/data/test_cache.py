import json
from pathlib import Path

import pytest

from lit_llm.data.cache import cache_folder, cache_name, new_cache, read_manifest


def make(folder: Path, text: str) -> None:
    with new_cache(folder) as (new, manifest):
        (new / "text").write_text(text)
        manifest["says"] = text


def test_a_cache_is_there_once_it_is_whole(tmp_path: Path) -> None:
    def break_off() -> None:
        with new_cache(tmp_path / "x") as (new, _):
            (new / "text").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        break_off()
    assert list(tmp_path.iterdir()) == []
    make(tmp_path / "x", "whole")
    assert read_manifest(tmp_path / "x") == {"says": "whole", "files": {"text": 5}}


def test_of_two_that_make_the_same_the_first_ones_stays(tmp_path: Path) -> None:
    with new_cache(tmp_path / "x") as (new, _):
        (new / "text").write_text("second")
        make(tmp_path / "x", "first")
    assert (tmp_path / "x/text").read_text() == "first"


@pytest.mark.parametrize("harm", ["gone", "short", "no json", "no manifest"])
def test_what_is_not_whole_is_no_cache_and_is_made_again(tmp_path: Path, harm: str) -> None:
    make(tmp_path / "x", "whole")
    if harm == "gone":
        (tmp_path / "x/text").unlink()
    elif harm == "short":
        (tmp_path / "x/text").write_text("w")
    else:
        (tmp_path / "x/manifest.json").write_text(json.dumps([]) if harm == "no manifest" else "{")
    assert read_manifest(tmp_path / "x") is None
    make(tmp_path / "x", "again")
    assert (tmp_path / "x/text").read_text() == "again"


def test_the_name_depends_on_every_part_and_not_on_their_order() -> None:
    names = {cache_name(a=1, b=2), cache_name(a=1, b=3), cache_name(a=1), cache_name(a=1, b={"c": 2})}
    assert len(names) == 4
    assert cache_name(a=1, b=2) == cache_name(b=2, a=1)


def test_caches_lie_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LIT_LLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/lit-llm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/lit-llm"
