"""Trains MNIST by several recipes in one interleaved run, and writes test accuracy and seconds into README.md.

    python -m experiments.mnist.run recipes --data DIR
    python -m experiments.mnist.run networks --data DIR
    python -m experiments.mnist.run few_labels --data DIR

Each run is a process of its own: `lit-llm fit` of a config, which tests its best validation once, at the end; or the
script in seed.py, which has no validation and tests its last epoch. Seconds are those of training steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from experiments.throughput.report import (
    environment,
    last_words,
    mean_and_deviation,
    run_child,
    wait_for_quiet,
    write_table,
)

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs" / "pretraining"
SEEDS_SCRIPT = "the seeds' script"
CLASSIFICATION = "lit_llm.objectives.classification.Classification"


class Recipe(NamedTuple):
    """A row of a table.

    Attributes:
        config: The run file; `None` is the seeds' script.
        flags: What is set beside it.
        accuracy: What its mean test accuracy is to reach, in percent.
        times_sooner: By which factor its training is to be shorter than the seeds' script's.
    """

    config: str | None
    flags: dict[str, object] | None = None
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

Found = dict[str, Any]


def main(words: list[str] | None = None) -> None:
    """Parses, trains, writes."""
    options = parsed(words)
    options.work.mkdir(parents=True, exist_ok=True)
    measurements = options.work / "measurements.jsonl"
    measurements.touch()
    known = [json.loads(line) for line in measurements.read_text().splitlines()]
    setting = {"threads": options.threads, "epochs": options.epochs, "max_examples": options.max_examples}
    found: dict[tuple[str, int], Found] = {
        (result["name"], result["seed"]): result
        for result in known
        if result["name"] in TABLES[options.table] and setting.items() <= result.items()
    }
    for seed in options.seeds:
        for name, recipe in TABLES[options.table].items():
            if (name, seed) in found:
                continue
            result = trained(name, recipe, seed, options)
            if result is not None:
                found[name, seed] = {"name": name, "seed": seed} | setting | result
                with measurements.open("a") as file:
                    file.write(json.dumps(found[name, seed]) + "\n")
        write_table(options.table, table(found, options), options.readme)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--data", type=Path, required=True, help="MNIST in the hub's layout, with the folder mnist")
    parser.add_argument("--seeds", type=lambda text: list(map(int, text.split(","))), default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10, help="of the seeds' script")
    parser.add_argument("--max_examples", type=int, help="to train on, for a trial")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max_wait", type=float, default=120.0, help="seconds to wait for a quiet machine, each time")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/mnist"),
        help="run folders, logs, and measurements, which are not made again",
    )
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="what the table is written into")
    options = parser.parse_args(words)
    options.work, options.data = options.work.resolve(), options.data.resolve()
    return options


def trained(name: str, recipe: Recipe, seed: int, options: argparse.Namespace) -> Found | None:
    """One run; `None`, and a line that says why, where it failed."""
    stem = f"{recipe.config or 'seed'}-{list(TABLES[options.table]).index(name)}-{seed}"
    folder, out, log = (options.work / f"{stem}{end}" for end in ("", ".json", ".log"))
    shutil.rmtree(folder, ignore_errors=True)
    out.unlink(missing_ok=True)
    others = wait_for_quiet(options.max_wait)
    command = seed_words(seed, out, options) if recipe.config is None else fit_words(recipe, seed, folder, options)
    code = run_child(command, environment(options.work, options.threads), log)
    written = out if recipe.config is None else folder / "results.json"
    if code or not written.exists():
        print(f"{name}, seed {seed}: failed: {last_words(log)} (all of it: {log})", flush=True)
        return None
    result = json.loads(written.read_text())
    if recipe.config is None:
        found = {
            "seconds": sum(result["seconds"]),
            "accuracy": result["accuracy"][-1],
            "images": options.epochs * 60000,
        }
    else:
        found = {"seconds": result["seconds"], "accuracy": result["test/accuracy"], "images": result["tokens"]}
    found |= {"others_before": others}
    print(f"{name}, seed {seed}: {found['accuracy']:.2%} after {found['seconds']:.1f} s", flush=True)
    return found


def seed_words(seed: int, out: Path, options: argparse.Namespace) -> list[str]:
    """The seeds' script."""
    given = {"data": options.data, "epochs": options.epochs, "seed": seed, "out": out}
    given |= {"max_examples": options.max_examples} if options.max_examples else {}
    return [sys.executable, "-m", "experiments.mnist.seed", *(f"--{key}={value}" for key, value in given.items())]


def run_file(name: str) -> Path:
    """Where a recipe is: among the run files, or, until it has figures, here."""
    return next(path for folder in (CONFIGS, HERE) if (path := folder / f"{name}.yaml").is_file())


def fit_words(recipe: Recipe, seed: int, folder: Path, options: argparse.Namespace) -> list[str]:
    """`lit-llm fit`; the seed draws the weights, the order, the augmentation and, where few are labelled, which."""
    given: dict[str, object] = {"config": run_file(str(recipe.config)), "run_dir": folder}
    given |= (recipe.flags or {}) | {"data.path": options.data, "data.seed": seed, "seed_everything": seed}
    given |= {"data.max_examples": options.max_examples} if options.max_examples else {}
    given |= {"trainer.enable_progress_bar": "false"}
    return [sys.executable, "-m", "lit_llm", "fit", *(f"--{key}={value}" for key, value in given.items())]


def table(found: dict[tuple[str, int], Found], options: argparse.Namespace) -> list[str]:
    """Everything measured so far as Markdown."""
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
            # Of their own recipe for as many images; of others for what it takes.
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
    """A goal and whether it is met."""
    return "" if wanted is None else f"{wanted:{form}} {'met' if reached >= wanted else '**missed**'}"


if __name__ == "__main__":
    main()
