"""Compares what `lit-llm plan` predicts for small runs with measurements, and writes the tables into README.md.

python -m experiments.planning.run
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.throughput.report import REPOSITORY, environment, last_words, run_child, wait_for_quiet, write_table

HERE = Path(__file__).parent
CONFIG = REPOSITORY / "configs/pretraining/llama_stdlib.yaml"
GRID = [
    {"d_model": d_model, "num_layers": num_layers, "batch_size": batch_size, "seq_len": 128}
    for d_model in (256, 384, 512)
    for num_layers in (3, 6)
    for batch_size in (16, 32)
]
TINY = [{"d_model": d, "num_layers": 1, "batch_size": b, "seq_len": 32} for d, b in ((32, 2), (32, 4), (64, 4))]
"""For the test."""

DEVICES = 2
STRATEGIES = {
    "ddp": ("ddp", []),
    "fsdp": ("fsdp", []),
    "fsdp, checkpointed": ("fsdp", ["--model.network.activation_checkpointing=true"]),
}
"""By row name: the strategy, which is also its overlay's name, and further flags."""

GOALS = {"memory": 0.10, "strategies": 0.10, "time": 0.15}
MEMORY_STEPS = 6
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Makes the C library map each tensor separately and return it to the system when it is freed."""

Found = dict[str, Any]


def main(words: list[str] | None = None) -> None:
    """Parses the options, measures, and writes the table."""
    options = parsed(words)
    options.work.mkdir(parents=True, exist_ok=True)
    probed(options.grid[0], options, 2)  # prepares the corpus; a run that does so keeps that memory and reuses it
    for name, (measure, table) in TABLES.items():
        if options.only in (None, name):
            found = [(setting, runs) for setting in options.grid if (runs := measure(setting, options))]
            if options.table:
                write_table(f"planning-{name}", table(found, options), HERE / "README.md")


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TABLES), help="leave the others out")
    parser.add_argument("--width", type=int, nargs="+", help="leave settings of other widths out")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each setting whose time is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--max_wait", type=float, default=120.0, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--tiny", dest="grid", action="store_const", const=TINY, default=GRID, help="to try it out")
    parser.add_argument("--work", type=Path, default=Path("runs/planning"), help="caches, logs, measurements")
    parser.add_argument("--no_table", dest="table", action="store_false", help="leave README.md alone")
    options = parser.parse_args(words)
    options.work = options.work.resolve()
    options.grid = [setting for setting in options.grid if not options.width or setting["d_model"] in options.width]
    return options


def plan_words(setting: dict[str, int], out: Path, precision: str, steps: int, more: Sequence[str] = ()) -> list[str]:
    """Command line of `lit-llm plan --probe` for one setting of the grid, with more flags."""
    flags = {
        "config": CONFIG,
        "json": out,
        "model.network.d_model": setting["d_model"],
        "model.network.num_layers": setting["num_layers"],
        "model.network.d_ff": 3 * setting["d_model"],
        "model.optimizer": "torch.optim.AdamW",
        "data.batch_size": setting["batch_size"],
        "data.seq_len": setting["seq_len"],
        "trainer.precision": precision,
    }
    given = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "lit_llm", "plan", *given, *more, "--probe", str(steps)]


def probed(
    setting: dict[str, int], options: argparse.Namespace, steps: int, more: Sequence[str] = (), **surroundings: str
) -> Found | None:
    """Plans one setting with a probe of `steps` steps, in its own process; `None` if it failed."""
    name = "-".join(map(str, setting.values()))
    out, log = options.work / f"{name}.json", options.work / f"{name}.log"
    out.unlink(missing_ok=True)
    words = plan_words(setting, out, options.precision, steps, more)
    run_child(words, environment(options.work, options.threads) | surroundings, log)
    if out.exists():
        return json.loads(out.read_text())
    print(f"{name}: failed: {last_words(log)} (all of it: {log})", flush=True)
    return None


def measured_memory(setting: dict[str, int], options: argparse.Namespace) -> list[Found]:
    """Two plans of a setting: probed with freed memory returned to the system, and with freed memory kept."""
    runs = [probed(setting, options, MEMORY_STEPS, **surroundings) for surroundings in (MAPPED, {})]
    return runs if all(runs) else []


def measured_strategies(setting: dict[str, int], options: argparse.Namespace) -> list[Found]:
    """Plans for two processes under each strategy, with the first process measured; only every fourth setting."""
    if options.grid.index(setting) % 4 != 2:
        return []
    among = [f"--trainer.devices={DEVICES}", "--trainer.accelerator=cpu", "--devices", str(DEVICES)]
    overlays = [
        [f"--config={REPOSITORY / 'configs/strategy' / name}.yaml", *more] for name, more in STRATEGIES.values()
    ]
    runs = [probed(setting, options, MEMORY_STEPS, [*overlay, *among], **MAPPED) for overlay in overlays]
    return runs if all(runs) else []


def measured_time(setting: dict[str, int], options: argparse.Namespace) -> list[Found]:
    """Plans of a setting, each with a probe of 20 steps, after waiting for a quiet machine."""
    runs = []
    for _ in range(options.rounds):
        wait_for_quiet(options.max_wait)
        runs.append(probed(setting, options, 20))
    return runs if all(runs) else []


def memory_table(found: list[tuple[dict[str, int], list[Found]]], options: argparse.Namespace) -> list[str]:
    """Formats planned and measured memory as Markdown."""
    lines = [
        f"{options.threads} threads, {options.precision}, {MEMORY_STEPS} steps. Handed back: every tensor is mapped by "
        "itself. Kept: the heap keeps what is freed, as runs do for speed.",
        "",
        "| width × layers | batch | planned | handed back | planned is off | kept | over the plan |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    worst, holes = 0.0, []
    for setting, (mapped, kept) in found:
        planned, taken, held = costs(mapped)[2], mapped["probe"]["peak"], kept["probe"]["peak"]
        worst = max(worst, abs(planned / taken - 1))
        holes.append(held / planned - 1)
        lines.append(
            f"| {named(setting)} | {planned / 2**20:,.0f} MiB | {taken / 2**20:,.0f} MiB | {planned / taken - 1:+.1%} "
            f"| {held / 2**20:,.0f} MiB | {holes[-1]:+.1%} |"
        )
    if not found:
        return ["Too little was measured."]
    return [
        *lines,
        "",
        f"{verdict('memory', worst)}. A heap that keeps what is freed holds {min(holes):.0%} to {max(holes):.0%} more.",
    ]


def strategies_table(found: list[tuple[dict[str, int], list[Found]]], options: argparse.Namespace) -> list[str]:
    """Formats planned and measured memory of several processes as Markdown."""
    lines = [
        f"{DEVICES} processes, {options.threads} threads, {options.precision}, {MEMORY_STEPS} steps. The bytes of the "
        "first process, freed tensors handed back; the batch is that of each.",
        "",
        "| | width × layers | batch | planned | measured | planned is off |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    worst = 0.0
    for setting, runs in found:
        for (name, (strategy, _)), run in zip(STRATEGIES.items(), runs, strict=True):
            planned, taken = run["memory"]["as configured"][strategy]["peak"], run["probe"]["peak"]
            worst = max(worst, abs(planned / taken - 1))
            lines.append(
                f"| {name} | {named(setting)} | {planned / 2**20:,.0f} MiB | {taken / 2**20:,.0f} MiB | "
                f"{planned / taken - 1:+.1%} |"
            )
    return [*lines, "", f"{verdict('strategies', worst)}."] if found else ["Too little was measured."]


def time_table(found: list[tuple[dict[str, int], list[Found]]], options: argparse.Namespace) -> list[str]:
    """Formats planned and measured seconds as Markdown.

    The seconds per operation and per byte that operations move are calibrated on the first and the last setting, which
    therefore do not count for the goal.
    """
    if len(found) < 3:
        return ["Too little was measured."]
    rows = [(setting, costs(runs[0])[:2], seconds_of(runs)) for setting, runs in found]
    per_operation, per_byte = calibrated(rows[0], rows[-1])
    lines = [
        f"{options.threads} threads, {options.precision}, medians of {options.rounds} runs of 20 steps. Calibrated on "
        f"the first and last row: {1 / per_operation:.3g} operations/s"
        + (f" and {1 / per_byte:.3g} bytes/s." if per_byte else "."),
        "",
        "| width × layers | batch | step planned | measured | off |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    worst = 0.0
    for index, (setting, (flops, moved), seconds) in enumerate(rows):
        planned = flops * per_operation + moved * per_byte
        off, judged = planned / seconds - 1, 0 < index < len(rows) - 1
        worst = max(worst, abs(off)) if judged else worst
        lines.append(
            f"| {named(setting)} | {planned:.3f} s | {seconds:.3f} s | {off:+.1%}{'' if judged else ' (calibrates)'} |"
        )
    return [*lines, "", f"{verdict('time', worst)}."]


def named(setting: dict[str, int]) -> str:
    """Formats a setting as the first columns of a row."""
    return f"{setting['d_model']} × {setting['num_layers']} | {setting['batch_size']} × {setting['seq_len']}"


def verdict(name: str, worst: float) -> str:
    """Says whether a goal was met."""
    met = "met" if worst <= GOALS[name] else "**missed**"
    return f"{name}: at most {worst:.1%} off, goal {GOALS[name]:.0%}: {met}"


def costs(plan: Found) -> tuple[float, float, float]:
    """Operations of a step, bytes that it moves, and the planned peak memory in bytes."""
    step = plan["steps"]["as configured"]
    return step["flops"], step["moved"], step["weights"] + step["optimizer"] + max(step["passes"], step["stepping"])


def seconds_of(runs: list[Found]) -> float:
    """Median seconds per step over the runs."""
    return statistics.median(run["probe"]["seconds_per_step"] for run in runs)


def calibrated(first: Any, last: Any) -> tuple[float, float]:
    """Seconds per operation and per byte from two settings; if one would be negative, operations alone."""
    (_, (f1, m1), s1), (_, (f2, m2), s2) = first, last
    determinant = f1 * m2 - f2 * m1
    if determinant:
        per_operation, per_byte = (s1 * m2 - s2 * m1) / determinant, (f1 * s2 - f2 * s1) / determinant
        if per_operation > 0 and per_byte >= 0:
            return per_operation, per_byte
    return (s1 + s2) / (f1 + f2), 0.0


TABLES = {
    "memory": (measured_memory, memory_table),
    "strategies": (measured_strategies, strategies_table),
    "time": (measured_time, time_table),
}

if __name__ == "__main__":
    main()
