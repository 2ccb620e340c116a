"""Trains on MNIST by several recipes in turn, and writes test accuracy and seconds into README.md.

    python -m experiments.mnist.run recipes --data DIR
    python -m experiments.mnist.run networks --data DIR
    python -m experiments.mnist.run few_labels --data DIR

Each run is a separate process: `lit-llm fit` of a config, which tests the best checkpoint once at the end, or the
script seed.py, which has no validation and tests its last epoch. Seconds are those of training steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from experiments.throughput.report import mean_and_deviation, wait_for_quiet, write_table
from experiments.trainings import Flags, Found, Measurements, fit_anew, parser, run, whole_path, words_of

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs" / "pretraining"
SEEDS_SCRIPT = "the seeds' script"
CLASSIFICATION = "lit_llm.objectives.classification.Classification"


class Recipe(NamedTuple):
    """A row of a table.

    Attributes:
        config: Name of the run file; `None` is the original script (seed.py).
        flags: Flags that differ from the run file.
        accuracy: Goal for the mean test accuracy, in percent.
        times_sooner: Goal for the training time of the original script divided by this recipe's.
    """

    config: str | None
    flags: Flags | None = None
    accuracy: float | None = None
    times_sooner: float | None = None


TABLES: dict[str, dict[str, Recipe]] = {
    "recipes": {
        SEEDS_SCRIPT: Recipe(None),
        "their recipe": Recipe("cnn_mnist_seed", times_sooner=1 / 0.6),
        "their network, our recipe": Recipe("cnn_mnist_fast", accuracy=99.0, times_sooner=8),
        "our network": Recipe("cnn_mnist", accuracy=99.0, times_sooner=80),
        "our network, wider and longer": Recipe("cnn_mnist_best", accuracy=99.5, times_sooner=6),
    },
    "networks": {
        "ResNet-18": Recipe("resnet18_mnist", accuracy=99.3),
        "ViT": Recipe("vit_mnist", accuracy=98.5),
    },
    "few_labels": {
        "FixMatch": Recipe("cnn_mnist_fixmatch", accuracy=97.0),
        "supervised, the same 100 labels": Recipe(
            "cnn_mnist_fixmatch",
            {"model": CLASSIFICATION, "data.unlabelled_ratio": 0, "trainer.max_epochs": -1}
            | {"trainer.check_val_every_n_epoch": "null", "trainer.val_check_interval": 100, "trainer.max_steps": 500},
        ),
    },
}


def main(words: list[str] | None = None) -> None:
    """Parses the options, trains, and writes the table."""
    options = parsed(words)
    setting = {"threads": options.threads, "epochs": options.epochs, "max_examples": options.max_examples}
    measurements = Measurements(options.work / "measurements.jsonl", setting)
    recipes = TABLES[options.table]
    for seed in options.seeds:
        for name, recipe in recipes.items():
            measurements.make({"name": name, "seed": seed}, trained, name, recipe, seed, options)
        found = {(one["name"], one["seed"]): one for one in measurements.found if one["name"] in recipes}
        write_table(options.table, table(found, options), options.readme)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    made = parser(__doc__, HERE)
    made.add_argument("table", choices=list(TABLES))
    made.add_argument("--data", type=whole_path, required=True, help="MNIST in the hub's layout, with the folder mnist")
    made.add_argument("--epochs", type=int, default=10, help="of the seeds' script")
    made.add_argument("--max_examples", type=int, help="to train on, for a trial")
    made.add_argument("--max_wait", type=float, default=120.0, help="seconds to wait for a quiet machine, each time")
    return made.parse_args(words)


def trained(name: str, recipe: Recipe, seed: int, options: argparse.Namespace) -> Found:
    """Measures one run."""
    stem = f"{recipe.config or 'seed'}-{list(TABLES[options.table]).index(name)}-{seed}"
    others = wait_for_quiet(options.max_wait)
    if recipe.config is None:
        out = options.work / f"{stem}.json"
        run(seed_words(seed, out, options), options.work / f"{stem}.log", options)
        result = json.loads(out.read_text())
        found = {
            "seconds": sum(result["seconds"]),
            "accuracy": result["accuracy"][-1],
            "images": options.epochs * 60000,
        }
    else:
        result = fit_anew(flags(recipe, seed, options), options.work / stem, options)
        found = {"seconds": result["seconds"], "accuracy": result["test/accuracy"], "images": result["tokens"]}
    print(f"{name}, seed {seed}: {found['accuracy']:.2%} after {found['seconds']:.1f} s", flush=True)
    return found | {"others_before": others}


def seed_words(seed: int, out: Path, options: argparse.Namespace) -> list[str]:
    """Command line of the original script."""
    given: Flags = {"data": options.data, "epochs": options.epochs, "seed": seed, "out": out}
    given |= {"max_examples": options.max_examples} if options.max_examples else {}
    return [sys.executable, "-m", "experiments.mnist.seed", *words_of(given)]


def flags(recipe: Recipe, seed: int, options: argparse.Namespace) -> Flags:
    """Flags of `lit-llm fit`; the seed determines weights, order, augmentation and the choice of labelled images."""
    given: Flags = {"config": CONFIGS / f"{recipe.config}.yaml", **(recipe.flags or {})}
    given |= {"data.path": options.data, "data.seed": seed, "seed_everything": seed}
    return given | ({"data.max_examples": options.max_examples} if options.max_examples else {})


def table(found: dict[tuple[str, int], Found], options: argparse.Namespace) -> list[str]:
    """Formats everything measured so far as Markdown."""
    theirs = {seed: result for (name, seed), result in found.items() if name == SEEDS_SCRIPT}
    seeds = ", ".join(map(str, sorted({seed for _, seed in found})))
    lines = [
        f"Threads: {options.threads}; seeds: {seeds}; mean ± standard deviation.",
        "",
        "| | test accuracy, % | goal | training, s | "
        + ("seeds' script ÷ it | goal | " if theirs else "")
        + "s for 60,000 images |",
        "| --- | ---: | ---: | ---: | " + ("---: | ---: | " if theirs else "") + "---: |",
    ]
    for name, recipe in TABLES[options.table].items():
        runs = {seed: result for (its, seed), result in found.items() if its == name}
        if not runs:
            continue
        accuracies = [100 * run["accuracy"] for run in runs.values()]
        cells = [name, mean_and_deviation(accuracies, ".2f"), goal(recipe.accuracy, statistics.mean(accuracies), ".1f")]
        cells.append(mean_and_deviation([run["seconds"] for run in runs.values()], ".1f"))
        if theirs:
            # Their own recipe in our package: per image, as ours holds images out. Other recipes: total training time.
            same = recipe.config == "cnn_mnist_seed"
            ratios = [
                theirs[seed]["seconds"] / run["seconds"] * (run["images"] / theirs[seed]["images"] if same else 1)
                for seed, run in runs.items()
                if seed in theirs and name != SEEDS_SCRIPT
            ]
            cells.append(mean_and_deviation(ratios, ".1f") if ratios else "")
            cells.append(goal(recipe.times_sooner, statistics.mean(ratios), ".1f") if ratios else "")
        cells.append(mean_and_deviation([60000 * run["seconds"] / run["images"] for run in runs.values()], ".1f"))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def goal(wanted: float | None, reached: float, form: str) -> str:
    """Formats a goal and whether it is met."""
    return "" if wanted is None else f"{wanted:{form}} {'met' if reached >= wanted else '**missed**'}"


if __name__ == "__main__":
    main()
