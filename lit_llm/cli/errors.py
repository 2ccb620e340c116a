"""Which errors are a user's mistake, and how each is said in one line."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

from lightning.fabric.utilities.exceptions import MisconfigurationException

GRAMMAR = re.compile(r"\bmust\b.*\bbut\b", re.DOTALL)
"""What every error raised on purpose in this package says: `<name> must <rule>, but is <value>[; <remedy>]`."""


def one_line(error: BaseException) -> str | None:
    """What to tell the user; `None` for an error that is ours, whose traceback should be seen."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"disk must have room to write, but is full at {error.filename}; free some, the last checkpoint is whole"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{error.filename} must be writable, but is not: {error.strerror}"
    if GRAMMAR.search(text) and isinstance(error, ValueError | TypeError | OSError | ArithmeticError | ImportError):
        return text
    if isinstance(error, MisconfigurationException):
        return text
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("lit_llm"):
        return f"package {error.name} must be installed for this, but is not; pip install {error.name}"
    return None


def parser_line(message: str, known: Iterable[str] = ()) -> str:
    """Says in our grammar, in one line, what jsonargparse found wrong.

    Args:
        message: Its message, of any length.
        known: All keys that the command has, to guess what a misspelt one was meant to be.
    """
    text = " ".join(message.split())
    if match := re.search(r"[Kk]ey \"([\w.+]+)\".*?Expected an? (?:<class '([\w.]+)'>|([\w.]+)).*?Got value: (.+?)(?: - |$)", text):
        key, kind, other, value = match.groups()
        return f"{_short(key)} must be {_article(kind or other)}, but is {value.strip()}"
    if match := re.search(r"Option '([\w.+]+)' is not accepted|does not accept option '([\w.+]+)'|[Kk]ey '([\w.+]+)' is not expected", text):
        option = next(filter(None, match.groups()))
        owner = re.search(r"class_path '([\w.]+)'", text)
        where = f"an option of {owner[1]}" if owner else "an option"
        return f"{option} must be {where}, but is none{_guess(option, known)}"
    if match := re.search(r"[Uu]nrecognized arguments?: (.+)", text):
        option = match[1].split()[0].split("=")[0]
        return f"{option} must be an option, but is none{_guess(option.lstrip('-'), known)}"
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        return f"class_path must name a class, but {match[1]} has no {match[2]}"
    if match := re.search(r"No module named '([\w.]+)'", text):
        return f"class_path must name a class, but there is no module {match[1]}"
    if match := re.search(r"Key \"([\w.]+)\" is required", text):
        return f"{match[1]} must be given, but is not; start from a config, for example --config configs/pretraining/llama_stdlib.yaml"
    return text


def _short(key: str) -> str:
    return re.sub(r"\.init_args\b", "", key)


def _article(kind: str) -> str:
    kind = kind.rsplit(".", 1)[-1]
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}.get(kind, f"a {kind}")


def _guess(option: str, known: Iterable[str]) -> str:
    known = list(known)
    last = option.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(option, known, n=1) or difflib.get_close_matches(
        last, {key.rsplit(".", 1)[-1] for key in known}, n=1
    )
    return f"; did you mean {close[0]}?" if close else ""
