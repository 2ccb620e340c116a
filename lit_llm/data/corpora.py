"""The corpora every machine already has: Python's own standard library as code, and its manual's topics as prose."""

from __future__ import annotations

import io
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Document(NamedTuple):
    """One text of a corpus.

    Attributes:
        id: Where it came from, unique in its corpus.
        text: What it says.
        split: The split its source puts it in (`train`, `validation`, `test`); `None` where the source has none.
    """

    id: str
    text: str
    split: str | None = None


def stdlib_files() -> list[Path]:
    """Every source file of the running Python's standard library, without installed packages, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - {"site-packages", "dist-packages", "__pycache__"}  # not walked through
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def stdlib_code() -> Iterator[Document]:
    """About 31 MB of code in 1,800 documents (Python 3.11); fewer where a distribution leaves out its tests.

    A file is read in the encoding that it declares. Those that cannot be, which are there to test just that, are left
    out.
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
    """About half a megabyte of English in 80 documents: the language reference that `help()` shows."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"topics/{name}", topics[name])


def stdlib() -> Iterator[Document]:
    """The prose, then the code."""
    yield from stdlib_prose()
    yield from stdlib_code()


EMBEDDED = {"stdlib": stdlib, "stdlib-code": stdlib_code, "stdlib-prose": stdlib_prose}
"""Names that a data module's `path` understands besides files and hub data sets."""
