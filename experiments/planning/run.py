"""Compares what `lit-llm plan` says of small runs with what they take, and writes the table into README.md.

python -m experiments.planning.run
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
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

GOALS = {"memory": 0.10, "time": 0.15}

Found = dict[str, Any]


def main(words: list[str] | None = None) -> None:
    """Parses, measures, writes."""
    options = parsed(words)
    options.work.mkdir(parents=True, exist_ok=True)
    found = [(setting, runs) for setting in options.grid if (runs := measured(setting, options))]
    if options.table:
        write_table("planning", table(found, options), HERE / "README.md")


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--max_wait", type=float, default=120.0, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--tiny", dest="grid", action="store_const", const=TINY, default=GRID, help="to try it out")
    parser.add_argument("--work", type=Path, default=Path("runs/planning"), help="caches, logs, measurements")
    parser.add_argument("--no_table", dest="table", action="store_false", help="leave README.md alone")
    options = parser.parse_args(words)
    options.work = options.work.resolve()
    return options


def plan_words(setting: dict[str, int], out: Path, precision: str) -> list[str]:
    """`lit-llm plan --probe` of one setting of the grid."""
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
    return [sys.executable, "-m", "lit_llm", "plan", *given, "--probe"]


def measured(setting: dict[str, int], options: argparse.Namespace) -> list[Found]:
    """The plans of one setting, each with a probe, in processes of their own."""
    name = "-".join(map(str, setting.values()))
    runs = []
    for _ in range(options.rounds):
        out, log = options.work / f"{name}.json", options.work / f"{name}.log"
        out.unlink(missing_ok=True)
        wait_for_quiet(options.max_wait)
        run_child(plan_words(setting, out, options.precision), environment(options.work, options.threads), log)
        if not out.exists():
            print(f"{name}: failed: {last_words(log)} (all of it: {log})", flush=True)
            return []
        runs.append(json.loads(out.read_text()))
    return runs


def table(found: list[tuple[dict[str, int], list[Found]]], options: argparse.Namespace) -> list[str]:
    """Everything measured as Markdown.

    The speed is calibrated on the first and the last setting: seconds are so many per operation, and so many per byte
    that operations move. Those two are not judged.
    """
    if len(found) < 3:
        return ["Too little was measured."]
    rows = [(setting, costs(runs[0]), measured_of(runs)) for setting, runs in found]
    per_operation, per_byte = calibrated(rows[0], rows[-1])
    lines = [
        f"{options.threads} threads, {options.precision}, medians of {options.rounds} runs of 20 steps. Calibrated on "
        f"the first and last row: {1 / per_operation:.3g} operations/s"
        + (f" and {1 / per_byte:.3g} bytes/s." if per_byte else "."),
        "",
        "| width × layers | batch | memory planned | measured | off | step planned | measured | off |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    worst = {"memory": 0.0, "time": 0.0}
    for index, (setting, (flops, moved, peak), (bytes_taken, seconds)) in enumerate(rows):
        planned = flops * per_operation + moved * per_byte
        memory_off, time_off = peak / bytes_taken - 1, planned / seconds - 1
        judged = 0 < index < len(rows) - 1
        worst["memory"] = max(worst["memory"], abs(memory_off))
        worst["time"] = max(worst["time"], abs(time_off)) if judged else worst["time"]
        lines.append(
            f"| {setting['d_model']} × {setting['num_layers']} | {setting['batch_size']} × {setting['seq_len']} "
            f"| {peak / 2**20:,.0f} MiB | {bytes_taken / 2**20:,.0f} MiB | {memory_off:+.1%} "
            f"| {planned:.3f} s | {seconds:.3f} s | {time_off:+.1%}{'' if judged else ' (calibrates)'} |"
        )
    verdicts = [
        f"{name}: at most {worst[name]:.1%} off, goal {goal:.0%}: {'met' if worst[name] <= goal else '**missed**'}"
        for name, goal in GOALS.items()
    ]
    return [*lines, "", "; ".join(verdicts) + "."]


def costs(plan: Found) -> tuple[float, float, float]:
    """Operations and moved bytes of a step, and the bytes that it was planned to hold at once."""
    step = plan["steps"]["as configured"]
    return step["flops"], step["moved"], step["weights"] + step["optimizer"] + max(step["passes"], step["stepping"])


def measured_of(runs: list[Found]) -> tuple[float, float]:
    """Peak bytes and seconds of a step: medians."""
    probes = [run["probe"] for run in runs]
    return statistics.median(p["peak"] for p in probes), statistics.median(p["seconds_per_step"] for p in probes)


def calibrated(first: Any, last: Any) -> tuple[float, float]:
    """Seconds per operation and per byte that explain two settings; where one would be negative, operations alone."""
    (_, (f1, m1, _), (_, s1)), (_, (f2, m2, _), (_, s2)) = first, last
    determinant = f1 * m2 - f2 * m1
    if determinant:
        per_operation, per_byte = (s1 * m2 - s2 * m1) / determinant, (f1 * s2 - f2 * s1) / determinant
        if per_operation > 0 and per_byte >= 0:
            return per_operation, per_byte
    return (s1 + s2) / (f1 + f2), 0.0


if __name__ == "__main__":
    main()
