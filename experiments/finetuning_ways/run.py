"""Fine-tunes an encoder by several methods on several amounts of data, and writes scores and costs into README.md.

    python -m experiments.finetuning_ways.run --model DIR
    python -m experiments.finetuning_ways.run --model DIR --task sst2 --data DIR

Each run is `lit-llm fit` of configs/finetuning/encoder_glue.yaml with an overlay of configs/adaptation, in its own
process. Finished measurements are not repeated. The seed determines the examples, their order and the new head. Options
that --help does not list are passed to each run.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import NamedTuple

from experiments.throughput.report import REPOSITORY, mean_and_deviation, write_table
from experiments.trainings import Flags, Found, Measurements, fit_anew, parser, whole_path
from lit_llm.files import replacing

HERE = Path(__file__).parent
CONFIG = REPOSITORY / "configs/finetuning/encoder_glue.yaml"
OVERLAYS = REPOSITORY / "configs/adaptation"


class Way(NamedTuple):
    """A fine-tuning method.

    Attributes:
        overlay: Its file in configs/adaptation; `None` trains all weights at the same rate.
        lr: Its learning rate.
    """

    overlay: str | None
    lr: float


WAYS = {
    # The rate of the run file, which reaches 0.900 on all of SST-2 with it.
    "full": Way(None, 1e-4),
    # The rate of the overlay. It can be large, since nothing below the head is trained.
    "head only": Way("head_only", 1e-3),
    # Twice the rate of "full", so that the blocks learn at about that rate on average: the schedule falls while a block
    # is still frozen, and each block has 0.9 times the rate of the one above (mean over six blocks: 0.43).
    "gradual unfreezing": Way("gradual_unfreezing", 2e-4),
    # Twice, for the same reason: each layer has 0.8 times the rate of the one above (mean over six blocks: 0.49).
    "layer decay": Way("layer_decay", 2e-4),
    # Ten times the rate of "full", the best ratio for LoRA in Biderman et al., 2024, arXiv:2405.09673. The overlay has
    # half of it, for runs of more steps.
    "LoRA": Way("lora", 1e-3),
    # The rate of LoRA, so that the two differ in nothing else.
    "DoRA": Way("dora", 1e-3),
}

BATCH_SIZE = 16
WARMUP_STEPS = 10


def main(words: list[str] | None = None) -> None:
    """Parses the options, trains, and writes the table."""
    options, more = parsed(words)
    setting: Found = {"model": str(options.model), "task": options.task, "data": options.data and str(options.data)}
    setting |= {"examples_seen": options.examples_seen, "threads": options.threads, "more": more}
    measurements = Measurements(options.work / "measurements.jsonl", setting)
    for seed in options.seeds:
        for size in options.sizes:
            for way in WAYS:
                of = {"way": way, "size": size, "seed": seed}
                measurements.make(of, trained, way, size, seed, options, more)
        wanted = [one for one in measurements.found if one["size"] in options.sizes and one["seed"] in options.seeds]
        picture = options.readme.with_name("finetuning_ways.png")
        draw(picture, wanted, options)
        lines = [*table(wanted, options), "", f"![scores over examples]({picture.name})"]
        write_table("finetuning_ways", lines, options.readme)


def parsed(words: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line: the options of this script, and the rest for `lit-llm`."""
    made = parser(__doc__, HERE, threads=1)
    made.add_argument("--model", type=whole_path, required=True, help="an encoder to start from: a model directory")
    made.add_argument("--task", help="of GLUE (default: the embedded pairs of docstring and function, or any table)")
    made.add_argument("--data", type=whole_path, help="where it lies: in the hub's layout, or a table (default: hub)")
    made.add_argument("--sizes", type=sizes, default=[100, 1000, 5000], help="examples to train on, or all")
    made.add_argument("--examples_seen", type=int, default=2000, help="by each run, one after the other, at least")
    return made.parse_known_args(words)


def sizes(text: str) -> list[int | None]:
    """Numbers of examples; `None` for all."""
    return [None if word == "all" else int(word) for word in text.split(",")]


def epochs(size: int | None, options: argparse.Namespace) -> int:
    """Number of epochs: the same for all methods, more if there are few examples."""
    return 1 if size is None else max(1, round(options.examples_seen / size))


def trained(name: str, size: int | None, seed: int, options: argparse.Namespace, more: list[str]) -> Found:
    """Trains once; returns the score on the whole validation split after the last step, seconds, steps, parameters."""
    way, passes = WAYS[name], epochs(size, options)
    folder = options.work / f"{name.replace(' ', '_')}-{size or 'all'}-{seed}"
    flags: Flags = {
        "config": [CONFIG] if way.overlay is None else [CONFIG, OVERLAYS / f"{way.overlay}.yaml"],
        "model.network.path": options.model,
        "model.optimizer.lr": way.lr,
        "model.schedule.warmup_steps": WARMUP_STEPS,
        "data.batch_size": BATCH_SIZE,
        "data.seed": seed,
        "seed_everything": seed,
        "trainer.max_epochs": passes,
        "trainer.val_check_interval": 1.0,
        "trainer.check_val_every_n_epoch": passes,
        "trainer.enable_checkpointing": "false",
        "trainer.callbacks+": "experiments.finetuning_ways.callbacks.TrainableParameters",
        "trainer.callbacks.path": folder / "trainable_parameters",
        "test_after_fit": "false",
    }
    given = {"data.task": options.task, "data.path": options.data, "data.max_examples": size}
    flags |= {flag: value for flag, value in given.items() if value is not None}
    results = fit_anew(flags, folder, options, *more)
    for made in ("model", "adapter"):  # to save space: each is up to the size of the pretrained model
        shutil.rmtree(folder / made, ignore_errors=True)
    found = {"metric": results["monitor"], "score": results[results["monitor"]], "seconds": results["seconds"]}
    found |= {"steps": results["step"], "parameters": int((folder / "trainable_parameters").read_text())}
    score = f"{found['metric']} {found['score']:.4f}"
    print(f"{name}, {amount(size)} examples, seed {seed}: {score} in {found['seconds']:.0f} s", flush=True)
    return found


def amount(size: int | None) -> str:
    """Formats a number of examples."""
    return "all" if size is None else f"{size:,}"


def figures(found: list[Found], way: str, size: int | None, key: str) -> list[float]:
    """One figure of a method and size, for each seed."""
    return [one[key] for one in found if (one["way"], one["size"]) == (way, size)]


def table(found: list[Found], options: argparse.Namespace) -> list[str]:
    """Formats all measurements as Markdown."""
    metric = found[0]["metric"] if found else "score"
    passes = ", ".join(f"{epochs(size, options)} over {amount(size)}" for size in options.sizes)
    seeds = ", ".join(map(str, sorted({one["seed"] for one in found})))
    heads = [f"{metric}, {amount(size)}" for size in options.sizes] + [f"s, {amount(size)}" for size in options.sizes]
    lines = [
        f"Passes: {passes} examples, in batches of {BATCH_SIZE}. Seeds {seeds}; mean ± standard deviation; seconds of "
        f"training with {options.threads} thread{'s' * (options.threads > 1)}.",
        "",
        f"| way | learning rate | trainable parameters | {' | '.join(heads)} |",
        "| --- |" + " ---: |" * (len(heads) + 2),
    ]
    for name, way in WAYS.items():
        counts = [one["parameters"] for one in found if one["way"] == name]
        cells = [name, f"{way.lr:g}", f"{max(counts):,}" if counts else ""]
        for key, form in (("score", ".3f"), ("seconds", ".0f")):
            groups = [figures(found, name, size, key) for size in options.sizes]
            cells += [mean_and_deviation(each, form) if each else "" for each in groups]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(path: Path, found: list[Found], options: argparse.Namespace) -> None:
    """Draws scores over numbers of examples, one line per method; bars are one standard deviation to either side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(WAYS):
        shift = 0.03 * (index - (len(WAYS) - 1) / 2)
        points = [(x, figures(found, name, size, "score")) for x, size in enumerate(options.sizes)]
        points = [(x + shift, scores) for x, scores in points if scores]
        means = [statistics.mean(scores) for _, scores in points]
        spreads = [statistics.stdev(scores) if len(scores) > 1 else 0.0 for _, scores in points]
        axes.errorbar([x for x, _ in points], means, yerr=spreads, marker="o", capsize=3, label=name)
    axes.set_xticks(range(len(options.sizes)), [amount(size) for size in options.sizes])
    axes.set(xlabel="examples to train on", ylabel=found[0]["metric"] if found else "score")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as new:
        figure.savefig(new, dpi=120)


if __name__ == "__main__":
    main()
