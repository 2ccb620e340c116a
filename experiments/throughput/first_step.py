"""Seconds from the start of `lit-llm fit` to the end of its first step, compared with `import torch, lightning`.

    python -m experiments.throughput.first_step
    python -m experiments.throughput.first_step --profile     # where the time goes

Uses the main config with a token cache that exists already (a first run, not counted, makes it).
"""

from __future__ import annotations

import argparse
import pstats
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from experiments.throughput.report import environment, last_words, run_child, wait_for_quiet, write_table

GOAL = 1.5
IMPORTS = "import torch, lightning, time; print(time.time())"


def main() -> None:
    """Parses the options, measures, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/pretraining/llama_stdlib.yaml"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max_wait", type=float, default=120.0)
    parser.add_argument("--work", type=Path, default=Path("runs/throughput"))
    parser.add_argument("--no_table", dest="table", action="store_false", help="leave README.md alone")
    parser.add_argument("--profile", action="store_true", help="print cProfile's view of one run instead")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    first_step(options, [])
    if options.profile:
        file = options.work / "first_step.pstats"
        print(f"{first_step(options, ['-m', 'cProfile', '-o', str(file)]):.2f} s under the profiler, and then the end")
        for order in ("cumtime", "tottime"):
            pstats.Stats(str(file)).sort_stats(order).print_stats(60)
        return
    found: list[tuple[float, float]] = []
    busiest = 0.0
    for _ in range(options.rounds):
        busiest = max(busiest, wait_for_quiet(options.max_wait))
        found.append((imports(options), first_step(options, [])))
        print(f"import torch, lightning {found[-1][0]:.2f} s, first step {found[-1][1]:.2f} s", flush=True)
    if options.table:
        write_table("first_step", table(found, options, busiest))


def imports(options: argparse.Namespace) -> float:
    """Seconds to start Python and import both."""
    started = time.time()
    env = environment(options.work, options.threads)
    return float(subprocess.check_output([sys.executable, "-c", IMPORTS], env=env, text=True)) - started


def first_step(options: argparse.Namespace, before: list[str]) -> float:
    """Seconds from the start of the process to the end of the first step."""
    out, log = options.work / "first_step.txt", options.work / "first_step.log"
    out.unlink(missing_ok=True)
    shutil.rmtree(out.with_suffix(".run"), ignore_errors=True)
    flags = {
        "config": options.config,
        "run_dir": out.with_suffix(".run"),
        "test_after_fit": "false",
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 2,
        "trainer.callbacks+": "experiments.throughput.callbacks.FirstStep",
        "trainer.callbacks.path": out,
    }
    words = [sys.executable, *before, "-m", "lit_llm", "fit", *(f"--{name}={value}" for name, value in flags.items())]
    started = time.time()
    run_child(words, environment(options.work, options.threads), log)
    if not out.exists():
        raise SystemExit(f"first_step: failed: {last_words(log)} (all of it: {log})")
    return float(out.read_text()) - started


def table(found: list[tuple[float, float]], options: argparse.Namespace, busiest: float) -> list[str]:
    """Formats the results as Markdown."""

    def cell(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} [{min(values):.2f}–{max(values):.2f}]"

    more = [step - imports for imports, step in found]
    met = "met" if statistics.median(more) <= GOAL else "**missed**"
    return [
        f"Seconds, `{options.config}`, median of {len(found)} interleaved rounds and their range; others used at most "
        f"{busiest:.2f} cores before a round.",
        "",
        "| | seconds | goal |",
        "| --- | ---: | ---: |",
        f"| `import torch, lightning` | {cell([imports for imports, _ in found])} | |",
        f"| `lit-llm fit`, first step done | {cell([step for _, step in found])} | |",
        f"| difference | {cell(more)} | {GOAL} {met} |",
    ]


if __name__ == "__main__":
    main()
