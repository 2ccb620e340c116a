"""A training run in a process of its own, monitored through the run folder that it writes."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lit_llm
from lit_llm.files import read_results

PR_SET_PDEATHSIG = 1
SECONDS_TO_SAVE = 120
INTERRUPTED = 130
"""Exit code of a training run that was interrupted and saved a checkpoint."""


class TrialRun:
    """Starts a `lit-llm fit` process whose output goes to `output.txt` in its run folder.

    It resumes from the last checkpoint in the folder; a folder without one is emptied, and the run starts anew.

    Args:
        words: The arguments of `lit-llm fit`.
        folder: The run folder.
        threads: Number of CPU threads, unless `OMP_NUM_THREADS` is set.
    """

    def __init__(self, words: list[str], folder: Path, threads: int) -> None:
        self.folder, self.started = folder, time.perf_counter()
        words = ["fit", *words, "--run_dir", str(folder)]
        if (folder / "checkpoints" / "last.ckpt").is_file():
            words += ["--ckpt_path", "last"]
        elif folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "output.txt").open("ab") as output:
            self._said_before = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lit_llm", *words],
                env=_environment(threads),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is passed on once, by the sweep
                preexec_fn=_die_with_the_sweep if sys.platform.startswith("linux") else None,
            )

    @property
    def exit_code(self) -> int | None:
        """Exit code of the process; `None` while it runs."""
        return self.process.poll()

    @property
    def seconds(self) -> float:
        """Seconds since the process was started."""
        return time.perf_counter() - self.started

    def interrupt(self) -> None:
        """Asks the process to save and end, as Ctrl-C does."""
        if self.exit_code is None:
            self.process.send_signal(signal.SIGINT)

    def wait(self) -> None:
        """Waits for the process to end, and kills it after `SECONDS_TO_SAVE`."""
        try:
            self.process.wait(SECONDS_TO_SAVE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        """The output since this process was started."""
        return (self.folder / "output.txt").read_bytes()[self._said_before :].decode("utf-8", errors="replace")

    def last_line(self) -> str:
        """The signal that killed the process, or its last line of output."""
        if (self.exit_code or 0) < 0:
            name, number = signal.strsignal(-self.exit_code), -self.exit_code
            return f"it was ended by signal {number}, {name}{'; out of memory?' if number == signal.SIGKILL else ''}"
        lines = self.said().strip().splitlines()
        return lines[-1].removeprefix("lit-llm: error: ") if lines else f"it ended with code {self.exit_code}"


def _die_with_the_sweep() -> None:
    """Makes the kernel kill the trial if its sweep dies: a resumed sweep starts it again, in the same folder."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _environment(threads: int) -> dict[str, str]:
    """The sweep's environment, changed so that trials import the same package, share the cores and need no account."""
    environment = dict(os.environ)
    for name in ("LIT_LLM_RUN_DIR", "LOCAL_RANK"):
        environment.pop(name, None)
    package = str(Path(lit_llm.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("WANDB_MODE", "offline")
    return environment


def figure_of(folder: Path, metric: str) -> float | None:
    """A run's metric at its best validation, or otherwise at its end; `None` if it was never logged."""
    from lit_llm.callbacks.metrics_csv import read_metrics

    results = read_results(folder)
    for name in (f"best/{metric}", metric):
        if isinstance(results.get(name), int | float):
            return float(results[name])
    found = [row[metric] for row in read_metrics(folder / "metrics.csv") if metric in row]
    return found[-1] if found else None


def metrics_of(folder: Path) -> list[str]:
    """The names of all metrics that a run logged, sorted."""
    from lit_llm.callbacks.metrics_csv import read_metrics

    rows = read_metrics(folder / "metrics.csv")
    found = {name for row in rows for name in row} | {name for name in read_results(folder) if "/" in name}
    return sorted(name for name in found if "/" in name and not name.startswith("best/"))
