"""How long saving a checkpoint blocks training, if written directly or in the background from a copy.

python -m experiments.checkpoints.run
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from experiments.throughput.report import REPOSITORY, environment, last_words, run_child, wait_for_quiet, write_table
from experiments.trainings import words_of

HERE = Path(__file__).parent
CONFIG = REPOSITORY / "configs/pretraining/llama_stdlib.yaml"
OVERLAY = REPOSITORY / "configs/strategy/async_checkpoints.yaml"
SIZES = {
    "small": {"d_model": 512, "num_layers": 6, "batch_size": 8, "seq_len": 128},
    "tiny": {"d_model": 32, "num_layers": 1, "batch_size": 2, "seq_len": 32},
}
VARIANTS = {"never": "not saved", "sync": "written at once", "async": "written while training goes on"}
GOAL = 0.20

Found = dict[str, list[dict[str, Any]]]


def main(words: list[str] | None = None) -> None:
    """Parses the options, measures, and writes the table."""
    options = parsed(words)
    options.work.mkdir(parents=True, exist_ok=True)
    found: Found = {variant: [] for variant in VARIANTS}
    for _ in range(options.rounds):
        for variant, runs in found.items():
            runs += measured(variant, options)
    lines = table(found, options)
    if options.table:
        write_table("stall", lines, HERE / "README.md")
    else:
        print("\n".join(lines))


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--saves", type=int, default=5, help="of a run")
    parser.add_argument("--every", type=int, default=20, help="steps from one save to the next")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max_wait", type=float, default=120.0, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--work", type=Path, default=Path("runs/checkpoints"), help="caches, logs, measurements")
    parser.add_argument("--no_table", dest="table", action="store_false", help="leave README.md alone")
    options = parser.parse_args(words)
    options.work = options.work.resolve()
    return options


def fit_words(variant: str, out: Path, options: argparse.Namespace) -> list[str]:
    """Command line of `lit-llm fit` for one variant."""
    size, every = SIZES[options.size], options.every
    steps = every * (options.saves + 1)  # the last save is not counted; the one before it is complete by then
    flags = {
        "model.network.d_model": size["d_model"],
        "model.network.num_layers": size["num_layers"],
        "model.optimizer": "torch.optim.AdamW",
        "data.batch_size": size["batch_size"],
        "data.seq_len": size["seq_len"],
        "checkpoint.every_n_steps": 10 * steps if variant == "never" else every,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "trainer.limit_val_batches": 1,
        "trainer.num_sanity_val_steps": 0,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks+": "experiments.checkpoints.callbacks.SaveClock",
        "trainer.callbacks.path": out,
        "trainer.callbacks.steps": steps,
        "trainer.callbacks.warmup": every // 2,
        "test_after_fit": "false",
        "run_dir": out.with_suffix(".run"),
    }
    overlay = [f"--config={OVERLAY}"] if variant == "async" else []
    given = [f"--config={CONFIG}", *overlay, *words_of(flags)]
    return [sys.executable, "-m", "lit_llm", "fit", *given]


def measured(variant: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measurements of one run and the size of its checkpoints; an empty list if the run failed."""
    out, log = options.work / f"{variant}.json", options.work / f"{variant}.log"
    out.unlink(missing_ok=True)
    shutil.rmtree(out.with_suffix(".run"), ignore_errors=True)
    others = wait_for_quiet(options.max_wait)
    run_child(fit_words(variant, out, options), environment(options.work, options.threads), log)
    if not out.exists():
        print(f"{variant}: failed: {last_words(log)} (all of it: {log})", flush=True)
        return []
    size = (out.with_suffix(".run") / "checkpoints/last.ckpt").stat().st_size
    shutil.rmtree(out.with_suffix(".run"))
    print(f"{variant}: {out.read_text()}", flush=True)
    return [json.loads(out.read_text()) | {"bytes": size, "others": others}]


def table(found: Found, options: argparse.Namespace) -> list[str]:
    """Formats the results as Markdown."""
    runs = [run for variant in found.values() for run in variant]
    lines = [
        f"Checkpoints of {max(run['bytes'] for run in runs) / 2**20:.0f} MiB, {options.saves} a run, "
        f"{options.threads} threads; medians of {options.rounds} interleaved rounds and their range; others used at "
        f"most {max(run['others'] for run in runs):.2f} cores before a run.",
        "",
        "| a checkpoint is | a save stops training for | of writing at once | goal | a run is longer by, a save |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    stalls = {v: [s for run in found[v] for s in run["saves"]] for v in ("sync", "async") if found[v]}
    without = statistics.median(run["seconds"] for run in found["never"]) if found["never"] else float("nan")
    for variant, saves in stalls.items():
        stall = statistics.median(saves)
        ratio = stall / statistics.median(stalls["sync"]) if "sync" in stalls else float("nan")
        met = f"{GOAL:.0%} {'met' if ratio <= GOAL else '**missed**'}" if variant == "async" else ""
        longer = [(run["seconds"] - without) / len(run["saves"]) for run in found[variant]]
        lines.append(f"| {VARIANTS[variant]} | {milliseconds(saves)} | {ratio:.0%} | {met} | {milliseconds(longer)} |")
    return lines


def milliseconds(seconds: list[float]) -> str:
    """Formats the median and range in milliseconds."""
    return f"{statistics.median(seconds) * 1e3:.0f} ms [{min(seconds) * 1e3:.0f}–{max(seconds) * 1e3:.0f}]"


if __name__ == "__main__":
    main()
