"""Microseconds per step of a trivial network: a bare loop, Lightning with its defaults, and `lit-llm fit`.

    python -m experiments.throughput.step_overhead
    python -m experiments.throughput.step_overhead --profile ours      # where the time goes

Linear(32, 2), batches of 8, SGD, one thread; the mean over all steps after the warm-up, including logging.
"""

from __future__ import annotations

import argparse
import itertools
import pstats
import shutil
import statistics
import sys
import time
from pathlib import Path

from experiments.throughput.report import environment, last_words, run_child, wait_for_quiet, write_table

VARIANTS = {
    "bare": "a bare loop, batches sliced from memory",
    "lightning": "Lightning's defaults (bar, CSV or TensorBoard logger, checkpoints), `self.log(prog_bar=True)`",
    "ours": "`lit-llm fit`: its callbacks and loggers, a report every 10 steps; saves at the end, as Lightning does",
    "ours-saving": "the same, saving every 100 steps, its default",
}
GOAL = 350


def parsed(args: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max_wait", type=float, default=120.0)
    parser.add_argument("--work", type=Path, default=Path("runs/throughput"))
    parser.add_argument("--no_table", dest="table", action="store_false", help="leave README.md alone")
    parser.add_argument("--profile", choices=["lightning", "ours"], help="print cProfile's view of one run instead")
    parser.add_argument("--variant", choices=["bare", "lightning"], help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    options.work = options.work.resolve()
    return options


def main() -> None:
    """Parses the options, measures, and writes the table."""
    options = parsed()
    if options.variant == "bare":
        bare(options)
    elif options.variant == "lightning":
        lightning(options)
    elif options.profile:
        profile(options)
    else:
        measure(options)


def bare(options: argparse.Namespace) -> None:
    """Trains in a bare loop, without a framework."""
    import torch
    import torch.nn.functional as F

    from experiments.throughput.trivial import BATCH_SIZE, Linear, points, sgd

    network = Linear(2)
    optimizer = sgd(network.parameters())
    x, y = points(options.steps)
    order = torch.randperm(len(x))
    for step in range(options.steps):
        if step == options.warmup:
            started = time.perf_counter()
        chosen = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        F.cross_entropy(network(x[chosen]), y[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    Path(options.out).write_text(str(time.perf_counter() - started))


def lightning(options: argparse.Namespace) -> None:
    """Trains with Lightning's defaults."""
    from lightning.pytorch import Trainer

    from experiments.throughput.callbacks import Stamp
    from experiments.throughput.trivial import Logging, lightning_loader

    statistics_file = str(options.work / "lightning.pstats") if options.profile else None
    stamp = Stamp(options.out, options.steps, options.warmup, statistics_file)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[stamp], default_root_dir=Path(options.out).with_suffix(".run")
    )
    trainer.fit(Logging(), lightning_loader(options.steps))


def words(variant: str, options: argparse.Namespace, out: Path) -> list[str]:
    """Command line of one variant."""
    if not variant.startswith("ours"):
        given = ["--variant", variant, "--out", str(out), "--steps", str(options.steps)]
        given += ["--warmup", str(options.warmup), "--work", str(options.work)]
        given += ["--profile", variant] if options.profile else []
        return [sys.executable, "-m", "experiments.throughput.step_overhead", *given]
    place = "experiments.throughput"
    flags = {
        "model": f"{place}.trivial.Classes",
        "model.network": f"{place}.trivial.Linear",
        "data": f"{place}.trivial.Points",
        "data.steps": options.steps,
        "run_dir": out.with_suffix(".run"),
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": -1,
        "trainer.max_steps": options.steps,
        "trainer.log_every_n_steps": 10,
        "trainer.callbacks+": f"{place}.callbacks.Stamp",
        "trainer.callbacks.path": out,
        "trainer.callbacks.steps": options.steps,
        "trainer.callbacks.warmup": options.warmup,
    }
    if variant == "ours":
        flags["checkpoint.every_n_steps"] = options.steps
    if options.profile:
        flags["trainer.callbacks.profile"] = options.work / "ours.pstats"
    return [sys.executable, "-m", "lit_llm", "fit", *(f"--{name}={value}" for name, value in flags.items())]


def run(variant: str, options: argparse.Namespace, terminal: bool) -> float | None:
    """Microseconds per step; if the run failed, prints why and returns `None`."""
    options.work.mkdir(parents=True, exist_ok=True)
    out, log = options.work / f"step-{variant}.txt", options.work / f"step-{variant}.log"
    out.unlink(missing_ok=True)
    shutil.rmtree(out.with_suffix(".run"), ignore_errors=True)
    run_child(words(variant, options, out), environment(options.work, 1), log, terminal)
    if not out.exists():
        print(f"{variant}: failed: {last_words(log)} (all of it: {log})", flush=True)
        return None
    return float(out.read_text()) / (options.steps - options.warmup) * 1e6


def measure(options: argparse.Namespace) -> None:
    """Measures all variants, interleaved, on a terminal and with output to a file."""
    found: dict[tuple[str, bool], list[float]] = {}
    busiest = 0.0
    for _ in range(options.rounds):
        for variant, terminal in itertools.product(VARIANTS, (True, False)):
            busiest = max(busiest, wait_for_quiet(options.max_wait))
            micros = run(variant, options, terminal)
            if micros is not None:
                found.setdefault((variant, terminal), []).append(micros)
                print(f"{variant}{' on a terminal' if terminal else ''}: {micros:.0f} µs", flush=True)
    if options.table:
        write_table("step_overhead", table(found, options, busiest))


def table(found: dict[tuple[str, bool], list[float]], options: argparse.Namespace, busiest: float) -> list[str]:
    """Formats the results as Markdown."""
    lines = [
        f"µs a step, {options.steps - options.warmup:,} steps, median of {options.rounds} interleaved rounds and their "
        f"range; others used at most {busiest:.2f} cores before a run.",
        "",
        "| | on a terminal | into a file | goal |",
        "| --- | ---: | ---: | ---: |",
    ]
    for variant, text in VARIANTS.items():
        both = [found.get((variant, terminal), []) for terminal in (True, False)]
        shown = [f"{statistics.median(t):.0f} [{min(t):.0f}–{max(t):.0f}]" if t else "" for t in both]
        goal = ""
        if variant == "ours" and all(both):
            met = max(map(statistics.median, both)) <= GOAL
            goal = f"{GOAL} {'met' if met else '**missed**'}"
        lines.append(f"| {text} | {' | '.join(shown)} | {goal} |")
    return lines


def profile(options: argparse.Namespace) -> None:
    """Prints where the time of the counted steps goes; a step takes about twice as long under the profiler."""
    micros = run(options.profile, options, terminal=True)
    if micros is None:
        return
    print(f"{micros:.0f} µs a step under the profiler, {options.steps - options.warmup} steps")
    found = pstats.Stats(str(options.work / f"{options.profile}.pstats"))
    for order in ("tottime", "cumtime"):
        found.sort_stats(order).print_stats(45)


if __name__ == "__main__":
    main()
