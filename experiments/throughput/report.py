"""Shared by the experiments: waiting for a quiet machine, child processes, writing tables into READMEs."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def environment(work: Path, threads: int) -> dict[str, str]:
    """Environment of a child process: `threads` threads, no network, caches in the work folder."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
        "LIT_LLM_CACHE": str(work / "cache"),
        "PYTHONPATH": str(REPOSITORY),
        "TERM": "xterm-256color",
    }


def busy_cores(seconds: float = 1.0) -> float:
    """Mean number of busy cores over `seconds`, in which this process sleeps; 0 without `/proc/stat`."""
    if not Path("/proc/stat").exists():
        return 0.0

    def busy() -> float:
        user, nice, system, _idle, _waiting, interrupts, soft = map(
            int, Path("/proc/stat").read_text().split(maxsplit=8)[1:8]
        )
        return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")

    before = busy()
    time.sleep(seconds)
    return (busy() - before) / seconds


def wait_for_quiet(at_most: float, cores: float = 0.12) -> float:
    """Waits at most `at_most` seconds until others use at most `cores` cores; returns how many they use then."""
    end = time.monotonic() + at_most
    while (used := busy_cores()) > cores and time.monotonic() < end:
        time.sleep(2)
    return used


def run_child(words: list[str], env: dict[str, str], log: Path, terminal: bool = False) -> int:
    """Runs a command from the repository's root with its output in `log`, on a pseudo-terminal if `terminal`."""
    with log.open("wb") as file:
        if not terminal:
            return subprocess.call(words, cwd=REPOSITORY, env=env, stdout=file, stderr=subprocess.STDOUT)
        ours, theirs = os.openpty()
        child = subprocess.Popen(words, cwd=REPOSITORY, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)

        def drain() -> None:
            with contextlib.suppress(OSError):  # the child closed the terminal
                while chunk := os.read(ours, 65536):
                    file.write(chunk)

        reader = threading.Thread(target=drain)
        reader.start()
        code = child.wait()
        reader.join()
        os.close(ours)
        return code


def last_words(log: Path) -> str:
    """The last line of a log."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def mean_and_deviation(values: list[float], form: str) -> str:
    """Formats mean ± standard deviation, or the value if there is only one."""
    middle = format(statistics.mean(values), form)
    return middle if len(values) == 1 else f"{middle} ± {statistics.stdev(values):{form}}"


def command_line() -> str:
    """The running command as a reader would repeat it, without `--work`."""
    words, shown = iter(sys.orig_argv[1:]), ["python"]
    for word in words:
        if word == "--work":
            next(words, None)
        elif not word.startswith("--work="):
            shown.append(word)
    return shlex.join(shown)


def write_table(name: str, lines: list[str], readme: Path = HERE / "README.md") -> None:
    """Writes lines between `<!-- name -->` and `<!-- /name -->` of the README, below the command that made them.

    The pictures of `experiments/pictures.yaml` that the README links are redrawn.
    """
    from experiments.pictures import draw  # imported here, as the peers' interpreter imports this module too

    text = readme.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in text or end not in text:
        raise ValueError(f"{readme} must have the markers {start} and {end}, but has not both")
    body = "\n".join(["", f"    {command_line()}", "", *lines, ""])
    text = re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}{body}{end}", text, flags=re.DOTALL)
    readme.write_text(text, encoding="utf-8")
    print("\n".join(lines), flush=True)
    draw(readme)
