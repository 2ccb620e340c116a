import ast
import json
import sysconfig
from pathlib import Path

import pytest

from lit_llm.data import corpora
from lit_llm.data.corpora import (
    EMBEDDED,
    INSTRUCTIONS,
    Document,
    stdlib,
    stdlib_code,
    stdlib_files,
    stdlib_instructions,
    stdlib_prose,
)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def write(root: Path, name: str, content: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_code_is_the_running_pythons_and_leaves_out_installed_packages() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in stdlib_files()]
    assert {"ast.py", "json/decoder.py", "heapq.py"} <= set(names)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    assert names == sorted(names)


def test_code_documents_are_the_files_word_for_word() -> None:
    found = {document.id: document.text for document in stdlib_code()}
    assert found["ast.py"] == Path(ast.__file__).read_bytes().decode()
    assert len(found) > 500


def test_code_is_read_in_the_encoding_that_it_declares(library: Path) -> None:
    write(library, "latin.py", "# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
    write(library, "marked.py", b"\xef\xbb\xbfx = 1\n")
    texts = {document.id: document.text for document in stdlib_code()}
    assert texts == {"latin.py": "# -*- coding: latin-1 -*-\n# é\n", "marked.py": "x = 1\n"}


def test_code_that_cannot_be_decoded_is_left_out(library: Path) -> None:
    write(library, "a.py", b"a = 1\n")
    write(library, "bad_bytes.py", b"x = '\xff'\n")
    write(library, "bad_cookie.py", b"# coding: no-such-encoding\n")
    write(library, "bad_later.py", b"# coding: utf-8\n" + b"#\n" * 5 + b"\xff\n")
    write(library, "site-packages/foreign.py", b"b = 1\n")
    write(library, "test/__pycache__/c.py", b"c = 1\n")
    assert [document.id for document in stdlib_code()] == ["a.py"]


def test_prose_is_the_language_reference() -> None:
    documents = {document.id: document.text for document in stdlib_prose()}
    assert "topics/while" in documents
    assert "while" in documents["topics/while"]
    assert sum(map(len, documents.values())) > 300_000


def test_stdlib_is_the_prose_and_then_the_code() -> None:
    parts = [*stdlib_prose(), *stdlib_code()]
    assert list(stdlib()) == parts
    assert len({document.id for document in parts}) == len(parts)


@pytest.mark.parametrize("name", EMBEDDED | INSTRUCTIONS)
def test_an_embedded_corpus_has_documents_without_a_split(name: str) -> None:
    first = next((EMBEDDED | INSTRUCTIONS)[name]())
    assert isinstance(first, Document)
    assert first.text
    assert first.split is None


def test_instructions_ask_what_documented_functions_do(library: Path) -> None:
    source = b'''
def plain(a): return a
def empty(): """  """
class Heap:
    def push(self, item, *, key=None):
        """Put it in.

        More of it.
        """
'''
    write(library, "a/b.py", source)
    write(library, "test/c.py", source)
    write(library, "d.py", b"def broken(")
    write(library, "e/__init__.py", b"def f(x, /): '\\d'")
    found = {document.id: json.loads(document.text) for document in stdlib_instructions()}
    assert found == {
        "a/b.py:5": [
            {
                "role": "user",
                "content": "What does this function of a.b do?\n\ndef push(self, item, *, key=None):",
            },
            {"role": "assistant", "content": "Put it in."},
        ],
        "e/__init__.py:1": [
            {"role": "user", "content": "What does this function of e do?\n\ndef f(x, /):"},
            {"role": "assistant", "content": "\\d"},
        ],
    }
