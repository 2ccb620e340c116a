"""Compares two DDP processes of one thread each with one process of two threads, at the same global batch.

python -m experiments.throughput.processes
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

from experiments.throughput import run
from experiments.throughput.report import REPOSITORY, environment, last_words, run_child, wait_for_quiet, write_table

VOCAB_SIZE = 65
GOAL = 0.9
LAYOUTS = {"one process of two threads": 1, "two DDP processes of one thread": 2}


def main(words: list[str] | None = None) -> None:
    """Parses the options, measures, and writes the table."""
    options = parsed(words)
    options.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, list[float]]] = {dtype: {name: [] for name in LAYOUTS} for dtype in options.dtypes}
    busiest = 0.0
    for _ in range(options.rounds):
        for dtype, speeds in found.items():
            for name, processes in LAYOUTS.items():
                busiest = max(busiest, wait_for_quiet(options.max_wait))
                speeds[name].append(measured(processes, dtype, options))
                print(f"{dtype}, {name}: {speeds[name][-1]:,.0f} tokens/s", flush=True)
    lines = table(found, busiest, options)
    if options.table:
        write_table("processes", lines)
    else:
        print("\n".join(lines))


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=run.SIZES, default="baby")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5, help="of the steps, not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_wait", type=float, default=120.0, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--work", type=Path, default=Path("runs/throughput"), help="corpora, logs, measurements")
    parser.add_argument("--no_table", dest="table", action="store_false", help="leave README.md alone")
    options = parser.parse_args(words)
    if unknown := set(options.dtypes) - set(run.GOALS):
        parser.error(f"dtypes must be of {', '.join(run.GOALS)}, but has {', '.join(sorted(unknown))}")
    options.work, options.device, options.compile = options.work.resolve(), "cpu", False
    return options


def measured(processes: int, dtype: str, options: argparse.Namespace) -> float:
    """Tokens per second of the median step, over the global batch.

    Raises:
        RuntimeError: If a command fails.
    """
    sizes = run.SIZES[options.size]
    tokens = (options.steps + 2) * sizes["batch_size"] * sizes["seq_len"]
    folder = options.work / f"corpus-{VOCAB_SIZE}-{tokens}"
    out = options.work / f"processes-{processes}-{dtype}.json"
    log = out.with_suffix(".log")
    env = environment(options.work, 2 // processes) | {"TORCH_COMPILE_DISABLE": "1"}
    out.unlink(missing_ok=True)
    shutil.rmtree(out.with_suffix(".run"), ignore_errors=True)
    if run.prepared(folder, VOCAB_SIZE, tokens, env, log):
        words = run.fit_words(folder, out, sizes, VOCAB_SIZE, dtype, options)
        if processes > 1:
            words += [f"--config={REPOSITORY / 'configs/strategy/ddp.yaml'}", f"--trainer.devices={processes}"]
            words += [f"--data.batch_size={sizes['batch_size'] // processes}"]
        run_child(words, env, log)
    if not out.exists():
        raise RuntimeError(f"{out.stem} must end well, but ended with {last_words(log)!r} (all of it: {log})")
    return json.loads(out.read_text())["tokens_per_second"]


def table(found: dict[str, dict[str, list[float]]], busiest: float, options: argparse.Namespace) -> list[str]:
    """Formats all measurements as Markdown."""
    size = run.SIZES[options.size]
    lines = [
        f"{size['batch_size']} rows of {size['seq_len']} tokens a step; medians of {options.rounds} interleaved rounds "
        f"and their range; others used at most {busiest:.2f} cores before a run.",
        "",
        f"| | {' | '.join(LAYOUTS)} | ratio, goal {GOAL} |",
        "| --- | ---: | ---: | --- |",
    ]
    for dtype, speeds in found.items():
        one, two = (statistics.median(speeds[name]) for name in LAYOUTS)
        said = [f"{statistics.median(v):,.0f} [{min(v):,.0f}–{max(v):,.0f}]" for v in speeds.values()]
        verdict = "met" if two / one >= GOAL else "**missed**"
        lines.append(f"| {dtype}, tokens/s | {' | '.join(said)} | {two / one:.2f} {verdict} |")
    return lines


if __name__ == "__main__":
    main()
