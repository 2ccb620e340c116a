"""Trains the main config, then without one idea at a time; writes what each idea contributes into README.md.

    python -m experiments.time_to_quality.run

Each run is `lit-llm fit` of configs/pretraining/llama_stdlib.yaml in its own process, on the same number of tokens.
Finished measurements are not repeated. Options that --help does not list are passed to each run.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
from pathlib import Path
from typing import NamedTuple

from experiments.throughput.report import REPOSITORY, mean_and_deviation, write_table
from experiments.trainings import Flags, Found, Measurements, fit_anew, parser
from lit_llm.cli.significance import paired_p
from lit_llm.files import replacing

HERE = Path(__file__).parent
CONFIG = REPOSITORY / "configs/pretraining/llama_stdlib.yaml"
METRIC = "val/bits_per_byte"
WHOLE = "whole"
VALIDATIONS = 6


class Idea(NamedTuple):
    """One change to the recipe.

    Attributes:
        text: Name in the table.
        flags: The flags that make the change.
    """

    text: str
    flags: Flags


IDEAS = {
    WHOLE: Idea("the whole recipe", {}),
    "schedule": Idea("constant learning rates", {"model.schedule": "lit_llm.schedulers.Constant"}),
    # The mean rates of the schedule that falls to zero, so that the gap is not due to larger steps alone.
    "half": Idea(
        "constant learning rates, half as large",
        {
            "model.schedule": "lit_llm.schedulers.Constant",
            "model.optimizer.lr": 0.02,
            "model.optimizer.embedding_lr": 0.05,
            "model.optimizer.head_lr": 0.005,
            "model.optimizer.vector_lr": 0.005,
        },
    ),
    "warmup": Idea("no warm-up of the learning rates", {"model.schedule.warmup_steps": 0}),
    # All values are given, so that AdamW does not inherit those of Muon: its usual rate at this size, betas and decay.
    "muon": Idea(
        "AdamW (3e-3) for all instead of Muon for matrices",
        {
            "model.optimizer": "torch.optim.AdamW",
            "model.optimizer.lr": 0.003,
            "model.optimizer.betas": "[0.9, 0.95]",
            "model.optimizer.weight_decay": 0.1,
            "model.optimizer.fused": "true",
        },
    ),
    "embeddings": Idea("embeddings as slow as head and vectors (0.01)", {"model.optimizer.embedding_lr": 0.01}),
    "momentum": Idea("no warm-up of Muon's momentum", {"model.optimizer.momentum_warmup_steps": 0}),
    "betas": Idea("AdamW's betas of 0.9 and 0.95 beside Muon", {"model.optimizer.betas": "[0.9, 0.95]"}),
    "qk_norm": Idea("queries and keys not normalised", {"model.network.qk_norm": "false"}),
    "initialisation": Idea(
        "all weights from a normal of 0.02, none zero",
        {"model.network": "experiments.time_to_quality.networks.NormalLlama"},
    ),
    "rows": Idea(
        "8 rows of 256 tokens instead of 16 of 128",
        {"data.seq_len": 256, "data.batch_size": 8, "model.network.max_seq_len": 256},
    ),
    "documents": Idea("attention stays within a document", {"data.mask_documents": "true"}),
    "precision": Idea("fp32", {"trainer.precision": "32-true"}),
}


def main(words: list[str] | None = None) -> None:
    """Parses the options, trains, and writes the table."""
    options, more = parsed(words)
    setting: Found = {"steps": options.steps, "threads": options.threads, "more": more}
    measurements = Measurements(options.work / "measurements.jsonl", setting)
    for seed in options.seeds:
        for name in options.ideas:
            measurements.make({"idea": name, "seed": seed}, trained, name, seed, options, more)
        found = [one for one in measurements.found if one["idea"] in options.ideas and one["seed"] in options.seeds]
        picture = options.readme.with_name("time_to_quality.png")
        draw(picture, found)
        lines = [*table(found, options), "", f"![bits per byte over tokens]({picture.name})"]
        write_table("time_to_quality", lines, options.readme)


def parsed(words: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line: the options of this script, and the rest for `lit-llm`."""
    made = parser(__doc__, HERE, threads=1)
    made.add_argument("--steps", type=int, default=240, help="of each run, of 2,048 tokens")
    made.add_argument("--ideas", type=ideas, default=[*IDEAS], help=f"of {', '.join(IDEAS)}; {WHOLE} always is")
    return made.parse_known_args(words)


def ideas(text: str) -> list[str]:
    """Parses `--ideas`: comma-separated names; the whole recipe is always first."""
    named = text.split(",")
    if unknown := set(named) - set(IDEAS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(IDEAS)}, but has {', '.join(sorted(unknown))}")
    return [name for name in IDEAS if name in (WHOLE, *named)]


def trained(name: str, seed: int, options: argparse.Namespace, more: list[str]) -> Found:
    """Trains once; returns bits per byte on the whole validation split, in the end and along the way."""
    folder = options.work / f"{name}-{seed}"
    flags: Flags = {"config": CONFIG, "seed_everything": seed, "data.seed": seed, "trainer.max_steps": options.steps}
    flags |= {"trainer.val_check_interval": max(1, options.steps // VALIDATIONS), "trainer.callbacks": "null"}
    flags |= {"trainer.enable_checkpointing": "false", "test_after_fit": "false", "trainer.precision": "bf16-mixed"}
    results = fit_anew(flags | IDEAS[name].flags, folder, options, *more)
    shutil.rmtree(folder / "model", ignore_errors=True)
    a_step = results["tokens"] / results["step"]
    found = {"bits_per_byte": results[METRIC], "seconds": results["seconds"], "tokens": results["tokens"]}
    found |= {"curve": [[round(a_step * step), value] for step, value in validations(folder)]}
    print(f"{name}, seed {seed}: {found['bits_per_byte']:.4f} in {found['seconds']:.0f} s", flush=True)
    return found


def validations(folder: Path) -> list[tuple[int, float]]:
    """Step and bits per byte of each validation."""
    from lit_llm.callbacks.metrics_csv import read_metrics

    return [(row["step"], row[METRIC]) for row in read_metrics(folder / "metrics.csv") if METRIC in row]


def curve(found: list[Found], idea: str) -> list[tuple[int, float]]:
    """Tokens and bits per byte of each validation, averaged over seeds."""
    each = [one["curve"] for one in found if one["idea"] == idea]
    return [(points[0][0], statistics.mean(value for _, value in points)) for points in zip(*each)]


def tokens_to_reach(points: list[tuple[int, float]], least: float) -> str:
    """Number of tokens after which a curve falls to `least`, interpolated linearly between validations."""
    (first, value), *others = points
    if value <= least:
        return f"at most {first:,}"
    before = first, value
    for tokens, value in others:
        if value <= least:
            share = (before[1] - least) / (before[1] - value)
            return f"{round(before[0] + share * (tokens - before[0])):,}"
        before = tokens, value
    return "not reached"


def table(found: list[Found], options: argparse.Namespace) -> list[str]:
    """Formats all measurements as Markdown."""
    runs = {name: {one["seed"]: one for one in found if one["idea"] == name} for name in options.ideas}
    runs = {name: of_seed for name, of_seed in runs.items() if of_seed}
    if WHOLE not in runs:
        return ["The whole recipe was not measured."]
    ends = {name: statistics.mean(one["bits_per_byte"] for one in of_seed.values()) for name, of_seed in runs.items()}
    worst = max((end for end in ends.values() if math.isfinite(end)), default=math.nan)
    tokens = max(one["tokens"] for one in found)
    seeds = ", ".join(map(str, sorted({one["seed"] for one in found})))
    lines = [
        f"{options.steps} steps, {tokens:,} tokens; seeds {seeds}; mean ± standard deviation; seconds of training with "
        f"{options.threads} thread{'s' * (options.threads > 1)}.",
        "",
        f"| | bits per byte | against the whole recipe | p, paired by seed | s | tokens to reach {worst:.4f} |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, of_seed in runs.items():
        values = {seed: one["bits_per_byte"] for seed, one in of_seed.items()}
        pairs = [(values[seed], one["bits_per_byte"]) for seed, one in runs[WHOLE].items() if seed in values]
        away, p = "", None
        if name != WHOLE and pairs:
            away = mean_and_deviation([own - whole for own, whole in pairs], "+.4f").replace("± +", "± ")
            p = paired_p(*map(list, zip(*pairs)))
        cells = [IDEAS[name].text, mean_and_deviation([*values.values()], ".4f"), away, "" if p is None else f"{p:.2g}"]
        cells.append(mean_and_deviation([one["seconds"] for one in of_seed.values()], ".0f"))
        cells.append(tokens_to_reach(curve(found, name), worst))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(path: Path, found: list[Found]) -> None:
    """Draws bits per byte over tokens, averaged over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for index, (name, idea) in enumerate(IDEAS.items()):
        if points := curve(found, name):
            colours = {"color": f"C{index % 10}", "linestyle": "--" if index > 10 else "-"}
            look = {"color": "black", "linewidth": 2.5} if name == WHOLE else colours
            axes.plot(*zip(*points), marker=".", label=idea.text, **look)
    axes.set(xlabel="tokens", ylabel="bits per byte in validation", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=8)
    with replacing(path) as new:
        figure.savefig(new, dpi=120)


if __name__ == "__main__":
    main()
