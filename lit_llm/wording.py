"""Formatting of values and errors for error messages and logs."""

from __future__ import annotations

import codecs
import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def listed(values: Iterable[Any]) -> str:
    """Lists values; of more than ten only the first ten, and their number.

    Example:
        >>> listed("ab")
        "'a', 'b'"
        >>> listed(range(12))
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 … (12 in all)'
    """
    values = list(values)
    return ", ".join(map(repr, values[:10])) + (f" … ({len(values)} in all)" if len(values) > 10 else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty.

    Example:
        >>> first_line(OSError("no such place\\nTry another.")), first_line(ConnectionError())
        ('no such place', 'ConnectionError')
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip() if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word, if a known one is like it; otherwise an empty string.

    Example:
        >>> did_you_mean("metrc", ["metric", "method"]), did_you_mean("x", ["metric"])
        ('; did you mean metric?', '')
    """
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


@contextmanager
def needing(package: str, extra: str, purpose: str) -> Iterator[None]:
    """Names the extra that installs a package, if an import within does not find it.

    Raises:
        ImportError: When it does not.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"package {package} must be installed {purpose}, but is not; pip install 'lit-llm[{extra}]'"
        ) from error


def wrong_byte(wrong: UnicodeDecodeError, where: str = "where it is not") -> str:
    """What keeps a file from being UTF-8, and how to convert it: from UTF-16 if it has its mark, else from Latin-1.

    Example:
        >>> wrong_byte(UnicodeDecodeError("utf-8", b"caf\\xe9", 3, 4, "unexpected end of data"), "at offset 3")
        'has byte 0xe9 at offset 3; convert it, for example with `iconv -f latin1 -t utf-8`'
    """
    marked = wrong.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    remedy = f"convert it, for example with `iconv -f {'utf-16' if marked else 'latin1'} -t utf-8`"
    return f"has byte {wrong.object[wrong.start]:#04x} {where}; {remedy}"
