"""What the measuring commands share: a quiet machine, children, and tables that they write into the README."""

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
    """For a child: so many threads, no network, caches in the work folder."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
        "LIT_LLM_CACHE": str(work / "cache"),
        "PYTHONPATH": str(REPOSITORY),
        "TERM": "xterm-256color",
    }


def busy_cores(seconds: float = 1.0) -> float:
    """Cores in use, over some seconds in which this process sleeps; 0 where nothing tells."""
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
    """Waits until others use fewer than `cores`, but not longer than `at_most` seconds; what they use in the end."""
    end = time.monotonic() + at_most
    while (used := busy_cores()) > cores and time.monotonic() < end:
        time.sleep(2)
    return used


def run_child(words: list[str], env: dict[str, str], log: Path, terminal: bool = False) -> int:
    """Runs a command from the repository's root, its words in `log`; with `terminal` it believes to be on one."""
    with log.open("wb") as file:
        if not terminal:
            return subprocess.call(words, cwd=REPOSITORY, env=env, stdout=file, stderr=subprocess.STDOUT)
        ours, theirs = os.openpty()
        child = subprocess.Popen(words, cwd=REPOSITORY, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)

        def drain() -> None:
            with contextlib.suppress(OSError):  # the other end is closed
                while chunk := os.read(ours, 65536):
                    file.write(chunk)

        reader = threading.Thread(target=drain)
        reader.start()
        code = child.wait()
        reader.join()
        os.close(ours)
        return code


def last_words(log: Path) -> str:
    """The last line that a child wrote."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def mean_and_deviation(values: list[float], form: str) -> str:
    """Mean ± standard deviation, where there are several."""
    middle = format(statistics.mean(values), form)
    return middle if len(values) == 1 else f"{middle} ± {statistics.stdev(values):{form}}"


def command_line() -> str:
    """The command that is running, as a reader would repeat it; where its work lies is left out."""
    words, shown = iter(sys.orig_argv[1:]), ["python"]
    for word in words:
        if word == "--work":
            next(words, None)
        elif not word.startswith("--work="):
            shown.append(word)
    return shlex.join(shown)


def write_table(name: str, lines: list[str], readme: Path = HERE / "README.md") -> None:
    """Puts lines between `<!-- name -->` and `<!-- /name -->` of the README, under the command that made them.

    What the README shows of `experiments/pictures.yaml` is drawn anew.
    """
    from experiments.pictures import draw  # other processes, of peers, read this module as well

    text = readme.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in text or end not in text:
        raise ValueError(f"{readme} must have the markers {start} and {end}, but has not both")
    body = "\n".join(["", f"    {command_line()}", "", *lines, ""])
    text = re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}{body}{end}", text, flags=re.DOTALL)
    readme.write_text(text, encoding="utf-8")
    print("\n".join(lines), flush=True)
    draw(readme)
