"""Decides which errors are a user's mistake, and words them in one line."""

from __future__ import annotations

import dis
import errno
import importlib
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from traceback import walk_tb

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_llm.wording import did_you_mean

MAIN_CONFIG = "configs/pretraining/llama_stdlib.yaml"
GRAMMAR = re.compile(r"\bmust\b.*\bbut\b")
"""Form of every error raised on purpose in this package: `<name> must <rule>, but is <value>[; <remedy>]`."""

OF_LIGHTNING = {
    r"strategy `(\w+)` requires a GPU": "trainer.strategy must be one that this machine can run, but is {}, which "
    "needs a GPU; configs/strategy/fsdp.yaml runs everywhere",
    r"(DeepSpeed) strategy is only supported on CUDA": "trainer.strategy must be one that this machine can run, but is "
    "{}, which needs a GPU; configs/strategy/fsdp.yaml runs everywhere",
    r"Requirement '(torch_xla)": "trainer.accelerator must be one that this machine has, but needs {}, which is not "
    "installed",
    r"(SyncBatchNorm) layers only work with": "trainer.sync_batchnorm must be false without a GPU, but is true",
    r"invalid strategy name: `strategy=(\S+)`": "trainer.strategy must be a class path or a name of Lightning, but "
    "is {}; see configs/strategy",
    r"`val_check_interval` \((\d+)\) must be .* the number of the training batches \((\d+)\)": "trainer."
    "val_check_interval must be at most the batches of an epoch, {1}, but is {0}; "
    "--trainer.check_val_every_n_epoch null counts them from one epoch into the next",
}
"""Lightning's messages about strategies and intervals, as patterns, and the lines that replace them."""

LACKING = re.compile(r"Requirement '(([\w-]+)[^']*)' not met")
"""Lightning's message about a missing package: its errors do not carry the package's name as Python's do."""


def one_line(error: BaseException) -> str | None:
    """The line to show to the user; `None` for any other error: it is a bug, whose traceback should be shown."""
    if type(error).__name__ == "OutOfMemoryError":
        return "device memory must hold a step, but is full; lower data.batch_size or set activation_checkpointing"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" at {error.filename}" if error.filename else ""
        return f"disk must have room to write, but is full{where}; free some; earlier checkpoints are whole"
    if isinstance(error, OSError) and error.errno and error.filename:
        return f"{error.filename} must be readable and writable, but is not: {error.strerror}"
    if isinstance(error, ValueError | TypeError | OSError | ArithmeticError | ImportError):
        line = None if _is_of_a_library(error) else _in_grammar(str(error))
        if line:
            return line
    if type(error).__module__.startswith("wandb.errors"):
        return (
            f"W&B must be reachable with an account, but is not ({_flat(str(error))}); set WANDB_MODE=offline, or "
            f"leave configs/logging/wandb.yaml out"
        )
    for pattern, line in OF_LIGHTNING.items():
        if found := re.search(pattern, str(error)):
            return line.format(*found.groups())
    if isinstance(error, MisconfigurationException):
        return _flat(str(error))
    if found := LACKING.search(str(error)):
        return f"package {found[2]} must be installed for this, but is not; pip install '{found[1]}'"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("lit_llm"):
        return f"package {error.name} must be installed for this, but is not; pip install {error.name}"
    return None


def parser_line(
    message: str, known: Iterable[str] = (), words: Iterable[str] = (), error: BaseException | None = None
) -> str:
    """Rewords an error message of jsonargparse in one line of the form of `GRAMMAR`.

    Args:
        message: The message, of any length.
        known: All keys of the command, to suggest one for a misspelt key.
        words: The command line, to name a nested key as the user did.
        error: The exception, to find what stopped the import of a class's module.

    Example:
        >>> parser_line("unrecognized arguments: --trainr.max_steps 3", known=["trainer.max_steps"])
        'trainr.max_steps must be an option, but is none; did you mean trainer.max_steps?'
    """
    if line := _in_grammar(message):
        return line
    text = _flat(message)
    match = re.search(r"[Kk]ey \"(?P<key>[\w.+]+)\"", text)
    if broken := _broken_import(error):
        rule = f"{_as_written(match['key'], words)} must be a class path" if match else "class_path must name a class"
        return f"{rule}, but {broken}"
    if match:
        key = _as_written(match["key"], words)
        if found := re.search(r"File does not exist: '(.+?)'", text):
            return f"{key} must be a file, but is {found[1]}, which does not exist"
        value = re.search(r"(?:Got value|Given value): (.+)$", text)
        forms = ("Expected a path but", "import path format:", "import path string:", r"class, but(?= \S+ is abstract)")
        path = re.search(rf"(?:{'|'.join(forms)}) (\S+)", text)
        if path:
            return f"{key} must be a class path or a YAML file, but is {path[1]}, which {_fault(path[1])}"
        kinds = _kinds(text)
        if value and kinds:
            return f"{key} must be {kinds}, but is {value[1].strip()}"
    if match := re.search(r"(?:[Oo]ption|[Kk]ey) ['\"]([\w.+]+)['\"](?: is not (?:accepted|expected)|$)", text):
        return f"{_as_written(match[1], words)} must be an option, but is none{_guess(match[1], known)}"
    if match := re.search(r"[Uu]nrecognized arguments?: (.+)", text):
        option = match[1].split()[0].split("=")[0].lstrip("-")
        return f"{option} must be an option, but is none{_guess(option, known)}"
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        return f"class_path must name a class, but {match[1]} has no {match[2]}"
    if match := re.search(r"No module named '([\w.]+)'", text):
        return f"class_path must name a class, but there is no module {match[1]}"
    if match := re.search(r"Problems parsing config: (.+)", text):
        return f"config must be YAML, but is not: {match[1]}"
    if match := re.search(r"arguments are required: (.+)$|[Kk]ey (\S+) is required", text):
        names = ", ".join(
            sorted(name.split(".", 1)[-1] for name in (match[1] or match[2]).replace('"', "").split(", "))
        )
        return f"{names} must be given, but are not; start from a run file, such as --config {MAIN_CONFIG}"
    return text


def _fault(path: str) -> str:
    """What is wrong with a class path that jsonargparse refuses."""
    module, _, name = path.rpartition(".")
    try:
        unwritten = getattr(getattr(importlib.import_module(module), name), "__abstractmethods__", ())
    except Exception:  # a module can raise anything
        return "is neither"
    return f"does not write {', '.join(sorted(unwritten))}" if unwritten else "is of another kind"


def _broken_import(error: BaseException | None) -> str | None:
    """The module of a class path whose own code raised when it was imported, and its error; `None` if there is none.

    Searches the chain of causes for a traceback that passes through jsonargparse's `import_object` into a module.
    """
    while error is not None:
        steps = list(walk_tb(error.__traceback__))
        names = [frame.f_code.co_name for frame, _ in steps]
        if "import_object" in names:
            start = names.index("import_object")
            if isinstance(error, SyntaxError) or "<module>" in names[start:]:
                module = steps[start][0].f_locals["name"].rpartition(".")[0]
                places = [(frame.f_code.co_filename, line) for frame, line in steps[start + 1 :]]
                return f"{module} cannot be imported: {_with_place(error, places)}"
        error = error.__cause__ or error.__context__
    return None


def _with_place(error: BaseException, places: list[tuple[str, int]]) -> str:
    """An error's text with the last place of its traceback outside of libraries, or the place of a syntax error."""
    said = str(error)
    if isinstance(error, SyntaxError):
        said, places = error.msg, [(error.filename, error.lineno)]
    places = [(Path(file), line) for file, line in places if file and not file.startswith("<")]
    places = [place for place in places if not _in_libraries(place[0])] or places
    where = " ({}, line {})".format(*places[-1]) if places else ""
    return _flat(f"{type(error).__name__}: {said}{where}")


def _flat(text: str) -> str:
    return " ".join(text.split())


def _is_of_a_library(error: BaseException) -> bool:
    """Whether a library raised an error: its text may match `GRAMMAR` by chance, such as NumPy's on shapes."""
    traceback = error.__traceback__
    if traceback is None or error.__cause__ or error.__context__ or "\n" in str(error):
        return False  # not raised, or raised on purpose from a library's error
    while traceback.tb_next:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    said_on_purpose = dis.opname[code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"  # not so if C code raised
    return not said_on_purpose or _in_libraries(Path(code.co_filename))


def _in_libraries(path: Path) -> bool:
    """Whether code is neither the user's nor of this package."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return not path.is_relative_to(Path(__file__).parents[1]) and any(map(path.is_relative_to, libraries))


def _in_grammar(message: str) -> str | None:
    """The line of a message that matches `GRAMMAR`, however deeply a library has wrapped it; `None` if none does."""
    for line in message.splitlines():
        if GRAMMAR.search(line):
            return re.sub(r"^\s*- ", "", line).strip()
    return None


def _as_written(key: str, words: Iterable[str]) -> str:
    """A nested key as written on the command line, or unchanged if it does not come from there."""
    names = [word.split("=", 1)[0].lstrip("-") for word in words if word.startswith("--")]
    return next((name for name in names if name == key or name.endswith("." + key)), key)


def _kinds(text: str) -> str:
    """The types that jsonargparse expected, in words."""
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    found = re.findall(r"Expected an? <class '([\w.]+)'>", text)
    choices = ", ".join(re.findall(r"Expected a typing\.Literal\[(.+?)\]", text)).replace("'", "")
    words = ["one of " + ", ".join(dict.fromkeys(choices.split(", ")))] if choices else []
    words += [names.get(kind, f"a {kind.rsplit('.', 1)[-1]}") for kind in found if kind != "NoneType" and not choices]
    return " or ".join(dict.fromkeys(words))


def _guess(option: str, known: Iterable[str]) -> str:
    known = list(known)
    return did_you_mean(option, known) or did_you_mean(
        option.rpartition(".")[2], {key.rpartition(".")[2] for key in known}
    )
