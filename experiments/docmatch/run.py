"""Accuracy of encoders on the embedded pair task: from MiniLM, from scratch, from our own masked language model.

    python -m experiments.docmatch.run --threads 1
    python -m experiments.docmatch.run --threads 1 --run minilm_tokens=DIR --run small_tokens=DIR

Each run is `lit-llm fit` of a file in configs/finetuning, then a test of the checkpoint with the best validation.
Finished runs are not repeated. `--run` gives an existing run folder for a row instead of training one. Options that
--help does not list are passed to every `lit-llm fit`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from experiments import trainings
from experiments.throughput.report import REPOSITORY, mean_and_deviation, write_table
from experiments.trainings import Flags, Found

HERE = Path(__file__).parent
CONFIGS = REPOSITORY / "configs"
SMALL = CONFIGS / "finetuning" / "encoder_docmatch.yaml"
OF_TRANSFORMERS = "lit_llm.models.pretrained_classifier.PretrainedClassifier"


@dataclass(frozen=True)
class Way:
    """A row of the table.

    Args:
        text: Name in the table.
        flags: The run file, and the flags that differ from it.
        start: Initial weights: `minilm`, `masked` (our masked language model, trained once), or empty (random).
        seeds: Number of seeds to train with.
    """

    text: str
    flags: Flags
    start: str = ""
    seeds: int = 1


WAYS = {
    "minilm_plain": Way(
        "MiniLM, head of transformers",
        {
            "config": CONFIGS / "finetuning" / "encoder_glue.yaml",
            "model.network": OF_TRANSFORMERS,
            "trainer.val_check_interval": 0.25,
        },
        "minilm",
    ),
    "minilm_tokens": Way(
        "MiniLM, tokens compared", {"config": CONFIGS / "finetuning" / "encoder_pairs.yaml"}, "minilm"
    ),
    "small_plain": Way(
        "small, from zero, head of transformers",
        {"config": SMALL, "model.network": OF_TRANSFORMERS, "model.optimizer.lr": 0.0005},
    ),
    "small_tokens": Way("small, from zero, tokens compared", {"config": SMALL}, seeds=3),
    "masked_plain": Way(
        "small, from its masked language model, head of transformers",
        {
            "config": SMALL,
            "model.network": OF_TRANSFORMERS,
            "model.network.config": "null",
            "model.optimizer.lr": 0.0005,
        },
        "masked",
    ),
    "masked_tokens": Way(
        "small, from its masked language model, tokens compared",
        {"config": SMALL, "model.network.config": "null"},
        "masked",
        seeds=3,
    ),
}


def main(words: list[str] | None = None) -> None:
    """Parses the options, trains, and writes the table."""
    options, more = parsed(words)
    found: dict[str, list[Found]] = {}
    for name in options.ways:
        folders = [folder for of, folder in options.run if of == name]
        folders = folders or [trained(name, seed, options, more) for seed in options.seeds[: WAYS[name].seeds]]
        found[name] = [outcome(folder) for folder in folders]
        print(f"{name}: {', '.join(format(one['validation'], '.4f') for one in found[name])}", flush=True)
    write_table("encoders", table(found, options), options.readme)


def parsed(words: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line: the options of this script, and the rest for `lit-llm`."""
    made = trainings.parser(__doc__, HERE, seeds=(1337, 1338, 1339), threads=1)
    made.add_argument("--ways", type=ways, default=[*WAYS], help=f"some of {', '.join(WAYS)}")
    made.add_argument("--run", type=way_and_folder, action="append", default=[], help="WAY=DIR, a run that was made")
    made.add_argument("--minilm", type=trainings.whole_path, help="a model directory; by default the package's")
    return made.parse_known_args(words)


def ways(text: str) -> list[str]:
    """Parses `--ways`: comma-separated names."""
    names = text.split(",")
    if unknown := [name for name in names if name not in WAYS]:
        raise argparse.ArgumentTypeError(f"ways must be of {', '.join(WAYS)}, but has {', '.join(unknown)}")
    return names


def way_and_folder(text: str) -> tuple[str, Path]:
    """Parses `--run`, such as `small_tokens=DIR`."""
    name, _, folder = text.partition("=")
    if not folder or not (Path(folder) / "results.json").is_file():
        raise argparse.ArgumentTypeError(f"a run must be WAY=DIR with DIR/results.json, but is {text}")
    return ways(name)[0], Path(folder).resolve()


def trained(name: str, seed: int, options: argparse.Namespace, more: list[str]) -> Path:
    """Trains and tests a row with one seed, unless done before; returns the run folder."""
    way, folder = WAYS[name], options.work / f"{name}-{seed}"
    start: Flags = {"seed_everything": seed}
    if way.start == "masked":
        masked, flags = options.work / f"masked-{options.seeds[0]}", {"seed_everything": options.seeds[0]}
        trainings.fit({"config": CONFIGS / "pretraining" / "modernbert_stdlib.yaml"} | flags, masked, options, *more)
        start |= {"model.network.path": masked, "data.tokenizer": masked / "model"}
    elif way.start == "minilm":
        start |= {"model.network.path": options.minilm or trainings.minilm()}
    if "test/accuracy" not in trainings.fit(way.flags | start, folder, options, *more):
        trainings.lit_llm(["test", f"--run_dir={folder}"], folder.parent / f"{folder.name}-test.log", options)
    return folder


def outcome(folder: Path) -> Found:
    """Reads a run folder: best validation accuracy, test accuracy (`None` without a test), seconds, epochs."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    figures = {"validation": results["best/val/accuracy"], "test": results.get("test/accuracy")}
    return figures | {"seconds": results["seconds"], "epochs": config["trainer"]["max_epochs"]}


def table(found: dict[str, list[Found]], options: argparse.Namespace) -> list[str]:
    """Formats the results as Markdown."""
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    lines = [
        f"The best of each run's validations, and the test of that; mean ± standard deviation where there are several; "
        f"seconds of training with {threads}.",
        "",
        "| | epochs | seconds | validation accuracy | test accuracy |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in found.items():
        cells = [WAYS[name].text, ", ".join(dict.fromkeys(str(one["epochs"]) for one in runs))]
        for key, form in (("seconds", ",.0f"), ("validation", ".3f"), ("test", ".3f")):
            figures = [one[key] for one in runs if one[key] is not None]
            cells.append(mean_and_deviation(figures, form) if figures else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
