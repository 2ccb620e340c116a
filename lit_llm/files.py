"""Files that are never half-written, and the folder of a model's files."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to, which replaces `path` once it is complete.

    Works for files and folders. On an error, or if nothing was written, `path` stays unchanged. A file is replaced
    atomically, a folder in two steps: a process killed between those leaves the earlier folder as `old` in a folder
    beside `path` whose name begins with a dot and the name of `path`.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "x.txt") as new:
        ...     _ = new.write_text("whole")
        >>> (folder / "x.txt").read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    new, old = scratch / path.name, scratch / "old"
    try:
        yield new
        if new.is_file():
            with new.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(new, path)
        elif new.is_dir():
            while not _took_its_place(new, path, old):
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(folder: Path, option: str, use: str) -> Iterator[None]:
    """Creates a folder and keeps it from other processes; does nothing more where files cannot be locked.

    The system releases the lock, on `.lock` in the folder, however the process ends. A folder that is made here and
    stays empty is removed.

    Args:
        folder: The folder.
        option: Its name in messages.
        use: What writes to it, for messages.

    Raises:
        ValueError: When another process has locked it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{option} must be the folder of one {use}, but another process writes to {folder}; wait for it, "
                    f"or stop it"
                ) from error
        if not os.path.exists(file.name) or not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            raise ValueError(
                f"{option} must be the folder of one {use}, but another process has just left {folder}; try again"
            )
        try:
            yield
        finally:
            Path(file.name).unlink(missing_ok=True)
            with suppress(OSError):
                if is_new:
                    folder.rmdir()


def _took_its_place(new: Path, path: Path, old: Path) -> bool:
    """Moves `path`, if it exists, to `old`, and `new` to `path`; false if another process wrote `path` in between."""
    with suppress(FileNotFoundError):
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        if os.path.lexists(old):
            os.replace(old, path)
        raise
    return True


def model_folder(folder: Path, file: str = "config.json") -> Path:
    """The folder that holds a model's files: `model/` in a run folder, otherwise the folder itself.

    Example:
        >>> run = Path(tempfile.mkdtemp())
        >>> (run / "model").mkdir()
        >>> write_json(run / "model" / "config.json", {})
        >>> model_folder(run) == model_folder(run / "model") == run / "model"
        True
    """
    inside = not (folder / file).is_file() and (folder / "model" / file).is_file()
    return folder / "model" if inside else folder


def digest_of_yaml(path: Path) -> str:
    """Of what a YAML file says: comments and the order of keys are left out.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "x.yaml"
        >>> digests = {digest_of_yaml(path) for text in ("a: 1\\nb: 2", "b: 2 # Two.\\na: 1") if path.write_text(text)}
        >>> len(digests)
        1
    """
    import yaml

    said = json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()


def read_results(run: Path) -> dict[str, Any]:
    """Content of a run folder's `results.json`; empty if there is none."""
    path = run / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, content: Any) -> None:
    """Writes plain values as indented JSON."""
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_picture(path: Path, figure: Any, **options: Any) -> None:
    """Writes a figure of matplotlib as PNG."""
    with replacing(path) as new:
        figure.savefig(new, dpi=120, **options)


def write_table(path: Path, columns: list[str], rows: Iterable[Iterable[Any]], delimiter: str = ",") -> None:
    """Writes a table as delimited text with a header line."""
    with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n" if delimiter == "\t" else "\r\n")
        writer.writerow(columns)
        writer.writerows(rows)
