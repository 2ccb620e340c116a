"""Corpora that need no download: Python's standard library as code, prose and instructions."""

from __future__ import annotations

import ast
import io
import json
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Document(NamedTuple):
    """One text of a corpus.

    Attributes:
        id: Where it comes from; unique in its corpus.
        text: Its content.
        split: Split given by its source (`train`, `validation`, `test`); `None` if the source has no splits.
        source: Source of a mixture that it belongs to; `None` outside mixtures.
    """

    id: str
    text: str
    split: str | None = None
    source: str | None = None


def stdlib_files() -> list[Path]:
    """Paths of all source files of the running Python's standard library, without installed packages, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - {"site-packages", "dist-packages", "__pycache__"}  # `os.walk` skips these
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def stdlib_code() -> Iterator[Document]:
    """About 31 MB of code in 1,800 documents (Python 3.11); fewer if a distribution omits Python's tests.

    A file is decoded as it declares; files that cannot be decoded (Python's own test cases for this) are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in stdlib_files():
        source = path.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
            text = source.decode(encoding)
        except (SyntaxError, UnicodeDecodeError, LookupError):
            continue
        yield Document(path.relative_to(root).as_posix(), text)


def stdlib_prose() -> Iterator[Document]:
    """About 0.5 MB of English in 80 documents: the language reference that `help()` shows."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"topics/{name}", topics[name])


def stdlib() -> Iterator[Document]:
    """The prose, then the code."""
    yield from stdlib_prose()
    yield from stdlib_code()


EMBEDDED = {"stdlib": stdlib, "stdlib-code": stdlib_code, "stdlib-prose": stdlib_prose}
"""Names of embedded corpora that a data module's `path` accepts, besides files and hub data sets."""


def stdlib_instructions() -> Iterator[Document]:
    """About 6,100 conversations of 140 characters: "What does this function do?", answered by its docstring's start.

    Each is a list of messages as JSON; the answer is the docstring's first paragraph. Tests and the library's bundled
    programs are left out.
    """
    foreign = {"test", "tests", "idlelib", "lib2to3", "turtledemo"}
    for document in stdlib_code():
        if foreign & set(document.id.split("/")):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(document.text)
        except SyntaxError:
            continue
        module = document.id.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in ast.walk(tree):
            answer = isinstance(node, ast.FunctionDef) and (ast.get_docstring(node) or "").partition("\n\n")[0].strip()
            if answer:
                question = f"What does this function of {module} do?\n\ndef {node.name}({ast.unparse(node.args)}):"
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                yield Document(f"{document.id}:{node.lineno}", json.dumps(messages, ensure_ascii=False))


INSTRUCTIONS = {"stdlib-instructions": stdlib_instructions}
"""Names of embedded corpora of conversations."""
