"""Compresses trained models with many methods, and writes what each costs and saves into README.md.

    python -m experiments.compression.run language_model
    python -m experiments.compression.run encoder
    python -m experiments.compression.run pretrained_encoder
    python -m experiments.compression.run images --data.path DIR

For each seed, a model is trained by its run file. Each method is then a chain of `lit-llm compress` from that model;
latencies are ratios to the original's, measured alternately with it. A repeated command does not train or compress
again what is in the work folder. Options that --help does not list are passed to each `lit-llm` command.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiments import trainings
from experiments.throughput.report import REPOSITORY, mean_and_deviation, write_table

HERE = Path(__file__).parent
COMPRESSION = "lit_llm.compression"

Stage = dict[str, Any]


def method(name: str, path: str, **options: Any) -> Stage:
    """A stage that compresses."""
    return {"name": name, "class_path": f"{COMPRESSION}.{path}", "init_args": options}


def training(name: str, *files: str, **options: Any) -> Stage:
    """A stage that trains; `__` in an option's name stands for a dot."""
    dotted = {key.replace("__", "."): value for key, value in options.items()}
    return {"name": name, "fit": [str(REPOSITORY / file) for file in files], "options": dotted}


class Goal(NamedTuple):
    """A goal of a table.

    Attributes:
        text: Description.
        figure: Computes the figure of one seed from its stages.
        least: Lowest mean of `figure` that meets the goal.
    """

    text: str
    figure: Callable[[dict[str, dict[str, Any]]], float]
    least: float


class Table(NamedTuple):
    """The methods applied to one model.

    Attributes:
        run: The run files of the model, relative to the repository's root.
        metric: Name of the metric.
        chains: For each chain its stages, or the file with them; stage names are unique in the table.
        goals: The goals.
        flags: Returns the flags that the run files leave open.
    """

    run: list[str]
    metric: str
    chains: dict[str, list[Stage] | Path]
    goals: list[Goal]
    flags: Callable[[], trainings.Flags] = dict


def metric(stages: dict[str, dict[str, Any]], name: str) -> float:
    """Score of a stage's model."""
    return stages[name]["metric"]


def faster(stages: dict[str, dict[str, Any]], name: str) -> float:
    """Speed-up of a stage's model over the original, on 32 rows."""
    return stages[name]["times_faster"]


LLAMA = ["configs/pretraining/llama_stdlib.yaml", "experiments/compression/llama_1m.yaml"]
KEEP_ZEROS = "experiments/compression/keep_zeros.yaml"
AGAIN = {"model__network": None, "model__weights": "{previous}"}
RECOVERY = {**AGAIN, "model__optimizer__lr": 0.01, "trainer__max_steps": 200, "trainer__val_check_interval": 200}
DISTILLED = {
    "model": "lit_llm.objectives.distillation.CausalLMDistillation",
    "model__teacher": "{original}",
    "model__temperature": 1.0,
    "model__inherit": True,
}

LANGUAGE_MODEL = Table(
    run=LLAMA,
    metric="val/bits_per_byte",
    chains={
        "magnitude": [
            method("magnitude 50 %", "sparsity.Magnitude", sparsity=0.5),
            training("magnitude 50 %, recovered", *LLAMA, KEEP_ZEROS, **RECOVERY),
        ],
        "wanda": [
            method("Wanda 50 %", "sparsity.Wanda", sparsity=0.5),
            training("Wanda 50 %, recovered", *LLAMA, KEEP_ZEROS, **RECOVERY),
        ],
        "wanda_2_4": [
            method("Wanda 2:4", "sparsity.Wanda", pattern="2:4"),
            training("Wanda 2:4, recovered", *LLAMA, KEEP_ZEROS, **RECOVERY),
        ],
        "svd": [method("SVD to half", "low_rank.SVD", parameters=0.5)],
        "activation_svd": [
            method("activation-aware SVD to half", "low_rank.ActivationSVD", parameters=0.5),
            training("activation-aware SVD, recovered", *LLAMA, **RECOVERY),
        ],
        "structured": [
            method("half of the heads", "structured.Heads", sparsity=0.5, importance="activation"),
            method("and half of the neurons", "structured.Neurons", sparsity=0.5, importance="activation"),
            training("heads and neurons, recovered", *LLAMA, **RECOVERY),
        ],
        "int8": [method("int8", "quantization.Int8WeightOnly")],
        "int8_dynamic": [method("int8, activations too", "quantization.Int8Dynamic")],
        "int4": [method("int4", "quantization.Int4WeightOnly", group_size=64)],
        "qat": [training("int4, trained with it", *LLAMA, "configs/compression/qat_int4.yaml", **RECOVERY)],
        "alone": [training("two blocks, alone", *LLAMA, model__network__num_layers=2)],
        "distilled": [training("two blocks, with its teacher", *LLAMA, model__network__num_layers=2, **DISTILLED)],
    },
    goals=[
        Goal(
            "magnitude - Wanda at 50 %, bits per byte",
            lambda s: metric(s, "magnitude 50 %") - metric(s, "Wanda 50 %"),
            0.0,
        ),
        Goal(
            "the same, recovered",
            lambda s: metric(s, "magnitude 50 %, recovered") - metric(s, "Wanda 50 %, recovered"),
            0.0,
        ),
        Goal(
            "plain - activation-aware SVD at equal parameters, bits per byte",
            lambda s: metric(s, "SVD to half") - metric(s, "activation-aware SVD to half"),
            0.0,
        ),
        Goal(
            "half of the blocks' parameters: times faster",
            lambda s: faster(s, "and half of the neurons"),
            1.6,
        ),
        Goal(
            "part of what int4 loses that training with it recovers",
            lambda s: (
                (metric(s, "int4") - metric(s, "int4, trained with it")) / (metric(s, "int4") - metric(s, "original"))
            ),
            2 / 3,
        ),
        Goal(
            "alone - with a teacher, two blocks, bits per byte",
            lambda s: metric(s, "two blocks, alone") - metric(s, "two blocks, with its teacher"),
            0.0,
        ),
    ],
)

MNIST = ["configs/pretraining/cnn_mnist_fast.yaml"]
EPOCH = {**AGAIN, "model__optimizer__lr": 1e-3, "trainer__max_epochs": 1}

IMAGES = Table(
    run=MNIST,
    metric="val/accuracy",
    chains={
        "sparse": [
            training("90 % sparse, in two epochs", *MNIST, "experiments/compression/sparse_90.yaml", **AGAIN),
        ],
        "int8": [method("int8", "quantization.Int8WeightOnly", layers=["*"])],
        "low_rank": [
            method("low-rank, half of the parameters", "low_rank.ActivationSVD", parameters=0.5),
            training("low-rank, recovered", *MNIST, **EPOCH),
        ],
    },
    goals=[
        Goal(
            "90 % sparse: points of accuracy won (lost: below 0)",
            lambda s: 100 * (metric(s, "90 % sparse, in two epochs") - metric(s, "original")),
            -0.3,
        ),
        Goal("int8: points won", lambda s: 100 * (metric(s, "int8") - metric(s, "original")), -0.2),
        Goal(
            "low-rank: points won",
            lambda s: 100 * (metric(s, "low-rank, recovered") - metric(s, "original")),
            -0.3,
        ),
    ],
)

DOCMATCH = ["configs/finetuning/encoder_docmatch.yaml"]
CHAIN = REPOSITORY / "configs/compression/chain_encoder.yaml"
STUDENT = yaml.safe_load(CHAIN.read_text(encoding="utf-8"))["stages"][0]["options"]["model.network.config"]

ENCODER = Table(
    run=DOCMATCH,
    metric="val/accuracy",
    chains={
        "chain": CHAIN,
        "alone": [training("the student, alone", *DOCMATCH, model__network__config=STUDENT)],
    },
    goals=[
        Goal(
            "the student's parameters less than its teacher's, %",
            lambda s: 100 * (1 - s["distilled"]["parameters"] / s["original"]["parameters"]),
            40.0,
        ),
        Goal("the student's score by its teacher's", lambda s: metric(s, "distilled") / metric(s, "original"), 0.97),
        Goal(
            "with a teacher - alone, points of accuracy",
            lambda s: 100 * (metric(s, "distilled") - metric(s, "the student, alone")),
            0.0,
        ),
        Goal("the chain: times smaller", lambda s: s["int8"]["times_smaller"], 8.0),
        Goal("the chain: score by the original's", lambda s: metric(s, "int8") / metric(s, "original"), 0.95),
    ],
)

PAIRS = ["configs/finetuning/encoder_pairs.yaml"]
TWO_BLOCKS = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 256,
    "layer_norm_eps": 1e-12,
}
OF_TWO_BLOCKS = {"model__network__config": TWO_BLOCKS, "data__tokenizer": "{original}", "model__optimizer__lr": 3e-4}
TAUGHT = {
    "model": "lit_llm.objectives.distillation.ClassificationDistillation",
    "model__teacher": "{original}",
    "model__teacher_precision": "bf16-mixed",
    "model__cache_top_k": 2,
    "model__inherit": True,
}
FASTER = OF_TWO_BLOCKS | {"model__optimizer__lr": 1e-3}

PRETRAINED = Table(
    run=PAIRS,
    flags=lambda: {"model.network.path": trainings.minilm()},
    metric="val/accuracy",
    chains={
        "taught": [
            training("two blocks, with their teacher", *PAIRS, **TAUGHT, **OF_TWO_BLOCKS),
            method("and half of their neurons", "structured.Neurons", sparsity=0.5, importance="taylor"),
        ],
        "begun": [
            training("two blocks, begun as the teacher's", *PAIRS, **TAUGHT, **OF_TWO_BLOCKS, model__teacher_weight=0.0)
        ],
        "alone": [training("two blocks, alone", *PAIRS, **OF_TWO_BLOCKS)],
        "alone_faster": [training("two blocks, alone, at 0.001", *PAIRS, **FASTER)],
    },
    goals=[
        Goal(
            "the student's parameters less than its teacher's, %",
            lambda s: 100 * (1 - s["and half of their neurons"]["parameters"] / s["original"]["parameters"]),
            40.0,
        ),
        Goal(
            "the student's score by its teacher's",
            lambda s: metric(s, "and half of their neurons") / metric(s, "original"),
            0.97,
        ),
        Goal(
            "with a teacher - alone, the better of both, points of accuracy",
            lambda s: (
                100
                * (
                    metric(s, "and half of their neurons")
                    - max(metric(s, "two blocks, alone"), metric(s, "two blocks, alone, at 0.001"))
                )
            ),
            0.0,
        ),
    ],
)

TABLES = {"language_model": LANGUAGE_MODEL, "encoder": ENCODER, "pretrained_encoder": PRETRAINED, "images": IMAGES}


def main(words: list[str] | None = None) -> None:
    """Parses the options, trains, compresses, and writes the table."""
    options, more = parsed(words)
    given, rows = TABLES[options.table], {}
    for seed in options.seeds:
        model = trained(given, seed, options, more)
        for name, stages in given.chains.items():
            if options.chains and name not in options.chains:
                continue
            for row in compressed(name, stages, given, model, seed, options, more):
                rows.setdefault(row["name"], {})[seed] = row
        write_table(options.table, lines(given, rows, options), options.readme)


def parsed(words: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line: the options of this script, and the rest for `lit-llm`."""
    made = trainings.parser(__doc__, HERE)
    made.add_argument("table", choices=list(TABLES))
    made.add_argument("--chains", type=lambda text: text.split(","), help="some of them, for a trial")
    return made.parse_known_args(words)


def trained(given: Table, seed: int, options: argparse.Namespace, more: list[str]) -> Path:
    """Trains the table's original model; returns its directory."""
    folder = options.work / f"{options.table}-{seed}"
    flags = {"config": [REPOSITORY / file for file in given.run], "seed_everything": seed}
    trainings.fit(flags | given.flags(), folder, options, *more)
    return folder / "model"


def compressed(
    name: str,
    stages: list[Stage] | Path,
    given: Table,
    model: Path,
    seed: int,
    options: argparse.Namespace,
    more: list[str],
) -> list[dict[str, Any]]:
    """Measurements of each stage of a chain, the original first."""
    out = options.work / f"{options.table}-{seed}-{name}"
    config, names = stages, {}
    if not isinstance(stages, Path):
        config, names = out.with_suffix(".yaml"), {word(stage["name"]): stage["name"] for stage in stages}
        chain = {"evaluate": [str(REPOSITORY / file) for file in given.run], "metric": given.metric, "floor": 0.0}
        chain["stages"] = [stage | {"name": word(stage["name"])} for stage in stages]
        config.write_text(yaml.safe_dump(chain, sort_keys=False))
    if not (out / "report.json").is_file():
        words = ["compress", "--config", str(config), "--model", str(model), "--out", str(out)]
        trainings.lit_llm([*words, "--seed_everything", str(seed), *more], out.with_suffix(".log"), options)
    measured = json.loads((out / "report.json").read_text())["stages"]
    first = measured[0]
    for row in measured:
        row["name"] = names.get(row["name"], row["name"])
        row["times_smaller"] = first["bytes"] / row["bytes"]
        row["times_faster"] = first["latency_ms_p50_b32"] / row["latency_ms_p50_b32"]
    said = ", ".join(f"{row['name']} {row['metric']:.4f}" for row in measured)
    print(f"seed {seed}, {name}: {said}", flush=True)
    return measured


def word(name: str) -> str:
    """Turns a name into a valid stage name."""
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")


def lines(given: Table, rows: dict[str, dict[int, dict[str, Any]]], options: argparse.Namespace) -> list[str]:
    """Formats all measurements as Markdown."""
    seeds = ", ".join(map(str, options.seeds))
    found = [
        f"Seeds {seeds}; mean ± standard deviation; {options.threads} threads.",
        "",
        f"| | {given.metric} | parameters, % | not zero, % | bytes: times smaller | 32 rows: times faster |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    original = rows["original"]
    for name, of_seed in rows.items():
        pairs = [(row, original[seed]) for seed, row in of_seed.items()]
        columns = [
            ([row["metric"] for row, _ in pairs], ".4f"),
            ([100 * row["parameters"] / first["parameters"] for row, first in pairs], ".0f"),
            ([100 * row["nonzero"] / first["parameters"] for row, first in pairs], ".0f"),
            ([row["times_smaller"] for row, _ in pairs], ".2f"),
            ([row["times_faster"] for row, _ in pairs], ".2f"),
        ]
        found.append(f"| {name} | {' | '.join(mean_and_deviation(*column) for column in columns)} |")
    found += ["", "| goal | at least | reached | |", "| --- | ---: | ---: | --- |"]
    for goal in given.goals:
        figures = []
        for seed in options.seeds:
            try:
                figures.append(goal.figure({name: of_seed[seed] for name, of_seed in rows.items() if seed in of_seed}))
            except KeyError:
                continue  # its chains were not selected (`--chains`)
        if figures:
            met = "met" if statistics.mean(figures) >= goal.least else "**missed**"
            found.append(f"| {goal.text} | {goal.least:.2f} | {mean_and_deviation(figures, '.3f')} | {met} |")
    return found


if __name__ == "__main__":
    main()
