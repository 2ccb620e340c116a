from collections import Counter
from pathlib import Path

import pytest

from lit_llm.data import corpora, docmatch
from lit_llm.data.docmatch import docmatch_rows, open_docmatch

FUNCTION = '''
def {name}(self, a):
    """{docstring}

    More of it.
    """
    # A comment.
    return {name}(a) + {number}
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "site-packages"))  # skipped by the walk
    for module in range(40):
        source = "".join(
            FUNCTION.format(name=f"f{n}", docstring=f"Do {n}.", number=10**20 + 10 * module + n) for n in range(3)
        )
        (tmp_path / f"m{module:02}.py").write_text(source)
    return tmp_path


def test_each_docstring_and_each_body_comes_once_with_either_label(library: Path) -> None:
    rows = list(docmatch_rows())
    assert len(rows) == 40 * 3 * 2
    for column in ("docstring", "body"):
        counts = Counter((row["module"], row[column], row["label"]) for row in rows)
        assert set(counts.values()) == {1}
        assert len(counts) == len(rows)


def test_a_pair_belongs_together_if_its_label_says_so_and_is_of_one_module(library: Path) -> None:
    for row in docmatch_rows():
        module, function = int(row["module"][1:3]), int(row["docstring"][3])
        own = f"return f{function}(a) + {10**20 + 10 * module + function}"
        assert row["docstring"] == f"Do {function}."
        assert (row["body"] == own) == (row["label"] == 1)


def test_a_body_is_without_its_docstring_comments_and_signature(library: Path) -> None:
    (library / "m00.py").write_text(
        "".join(FUNCTION.format(name=f"g{n}", docstring=f"G {n}.", number=10**9) for n in range(2))
    )
    bodies = {row["body"] for row in docmatch_rows() if row["module"] == "m00.py"}
    assert bodies == {f"return g{n}(a) + 1000000000" for n in range(2)}


def test_what_came_before_comes_not_again(library: Path) -> None:
    source = (library / "m00.py").read_text()
    (library / "m00_copy.py").write_text(source)
    same = "".join(FUNCTION.format(name=f"h{n}", docstring="The same.", number=10**9 + n) for n in range(3))
    (library / "m00_same.py").write_text(same)
    (library / "broken.py").write_text("def f(")
    modules = {row["module"] for row in docmatch_rows()}
    assert len(modules) == 40
    assert "m00_same.py" not in modules


def test_modules_are_in_one_split_each_and_the_table_is_made_once(library: Path, monkeypatch) -> None:
    splits = open_docmatch()
    assert list(splits) == ["train", "validation", "test"]
    modules = [set(rows["module"][:]) for rows in splits.values()]
    assert sum(map(len, modules)) == len(set.union(*modules)) == 40
    assert len(modules[0]) > 25
    monkeypatch.setattr(docmatch, "docmatch_rows", lambda: pytest.fail("made again"))
    assert [len(rows) for rows in open_docmatch().values()] == [6 * len(found) for found in modules]
