"""The whole pipeline on text that every machine has: from raw files to a small model that answers questions.

    python -m experiments.lifecycle.run

The stages clean, tokenise, pre-train, fine-tune, evaluate, distil, prune, quantise, export and generate are each a
command of the package with a config of the package, and each is measured. A stage whose result is in the work folder is
not run again, and interrupted training resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import trainings
from experiments.throughput.report import REPOSITORY, environment, write_table
from experiments.trainings import Flags
from lit_llm.files import replacing

HERE = Path(__file__).parent
PRETRAINING = REPOSITORY / "configs/pretraining/llama_stdlib.yaml"
FINETUNING = REPOSITORY / "configs/finetuning/llama_instructions.yaml"
METRIC = "bits_per_byte"
QUESTIONS = (
    "What does this function of shutil do?\n\ndef copyfile(src, dst, *, follow_symlinks=True):",
    "What does this function of os do?\n\ndef remove_all(path):",
    "What does this function of json do?\n\ndef to_json(obj):",
)

Row = dict[str, Any]

SPLITS: Flags = {"data.validation_fraction": 0.2, "data.test_fraction": 0.2, "data.batch_size": 4}
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "documents": None,
        "pretraining": {"trainer.max_steps": 400, "trainer.val_check_interval": 200},
        "finetuning": {"trainer.max_steps": 150, "trainer.val_check_interval": 50},
        "instructions": {},
        "compression": {"trainer.val_check_interval": 50},
    },
    "tiny": {
        "documents": 40,
        "pretraining": SPLITS | {"data.tokenizer": "bpe-300", "trainer.max_steps": 2, "trainer.precision": "32-true"},
        "finetuning": {"trainer.max_steps": 2},
        "instructions": SPLITS | {"data.max_documents": 100, "data.overlong": "cut", "trainer.precision": "32-true"},
        "compression": {"trainer.max_steps": 2},
    },
}
"""Amount of data, and the flags that differ from the configs. `tiny` is for the test."""


def main(words: list[str] | None = None) -> None:
    """Parses the options, runs the stages, and writes tables and picture."""
    options = parsed(words)
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ.update(environment(options.work, options.threads))
    rows = [row for name, stage in STAGES.items() for row in outcome(name, stage, options)]
    lines = table(rows, options)
    draw(options.work / "lifecycle.png", rows, options)
    if not options.table:
        print("\n".join(lines))
        return
    write_table("lifecycle", [*lines, "", "![bits per byte along the way](lifecycle.png)"], HERE / "README.md")
    text = (options.work / "generated.txt").read_text(encoding="utf-8").rstrip()
    write_table("generated", [f"    {line}".rstrip() for line in text.splitlines()], HERE / "README.md")
    shutil.copy(options.work / "lifecycle.png", HERE / "lifecycle.png")


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny is to try it out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/lifecycle"), help="all that the stages write")
    parser.add_argument("--no_table", dest="table", action="store_false", help="leave README.md and picture alone")
    options = parser.parse_args(words)
    options.work = options.work.resolve() / options.size
    return options


def outcome(name: str, stage: Callable[[argparse.Namespace], list[Row]], options: argparse.Namespace) -> list[Row]:
    """Table rows of a stage: read from the work folder, or made by running the stage."""
    place = options.work / f"{name}.json"
    if place.is_file():
        return json.loads(place.read_text(encoding="utf-8"))
    print(name, flush=True)
    earlier, started = options.work / f"{name}.seconds", time.perf_counter()
    before = float(earlier.read_text(encoding="utf-8")) if earlier.is_file() else 0.0
    try:
        rows = stage(options)
    finally:
        spent = round(before + time.perf_counter() - started, 1)
        earlier.write_text(f"{spent}\n", encoding="utf-8")
    for row in rows:
        row.setdefault("seconds", spent)
    rows[-1]["spent"] = spent
    with replacing(place) as new:
        new.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def command(name: str, flags: Flags, log: str, options: argparse.Namespace, *more: str) -> Path:
    """Runs `lit-llm name` with its output in a log file; returns the path of that file."""
    said = options.work / f"{log}.log"
    trainings.lit_llm([name, *trainings.words_of(flags), *more], said, options)
    return said


def size(folder: Path) -> Row:
    """Number of parameters of a model directory, and bytes of its weights."""
    from lit_llm.checkpoints import load_model
    from lit_llm.compression.report import count_parameters
    from lit_llm.weights import bytes_on_disk

    return {"parameters": count_parameters(load_model(folder)[0]), "bytes": bytes_on_disk(folder)}


# The stages. Each writes the input of the next one to the work folder.


def clean(options: argparse.Namespace) -> list[Row]:
    """Turns raw files into a table of cleaned documents."""
    from lit_llm.data.cleaning import Cleaning
    from lit_llm.data.documents import open_corpus

    corpus, limit, dropped, kept = open_corpus("stdlib"), SIZES[options.size]["documents"], Counter(), 0
    corpus = corpus if limit is None else corpus.head(limit)
    with replacing(options.work / "clean.jsonl") as new, new.open("w", encoding="utf-8") as file:
        for document, _ in Cleaning().documents(corpus.read(None), dropped):
            file.write(json.dumps({"text": document.text}) + "\n")
            kept += 1
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none"
    what = f"{kept:,} of {kept + dropped.total():,} files and help topics of Python's library"
    return [
        {
            "stage": "clean",
            "what": what,
            "metric": f"left out: {left_out}",
            "bytes": (options.work / "clean.jsonl").stat().st_size,
        }
    ]


def pretraining(options: argparse.Namespace) -> Flags:
    """Flags for pre-training at this size on the cleaned documents."""
    return {"data.path": options.work / "clean.jsonl", **SIZES[options.size]["pretraining"]}


def tokenise(options: argparse.Namespace) -> list[Row]:
    """Prepares the pre-training data: splits by content, a BPE trained on the training split, tokens on disk."""
    from lit_llm.cli.training import read_run

    flags = pretraining(options)
    data = read_run(["--config", str(PRETRAINING), *(f"--{name}={value}" for name, value in flags.items())]).datamodule
    data.prepare_data()
    data.setup("fit")
    found = data.manifest["splits"]
    tokens, text = (sum(split[key] for split in found.values()) for key in ("tokens", "bytes"))
    counts = " / ".join(f"{found[name]['documents']:,}" for name in ("train", "validation", "test"))
    files = (file for file in (options.work / "cache" / "tokens").rglob("*.tokens"))
    return [
        {
            "stage": "tokenise",
            "what": f"{counts} documents to train, validate, test on; BPE of {data.manifest['vocab_size']:,} tokens",
            "metric": f"{text / tokens:.2f} bytes a token",
            "bytes": sum(file.stat().st_size for file in files),
        }
    ]


def pretrain(options: argparse.Namespace) -> list[Row]:
    """Trains from random weights."""
    flags = {"config": PRETRAINING, **pretraining(options)}
    results = trainings.fit(flags, options.work / "pretrained", options)
    return [
        {
            "stage": "pre-train",
            "what": f"Llama from random weights, {results['step']:,} steps, {results['tokens']:,} tokens",
            "metric": f"{results[f'best/val/{METRIC}']:.3f} bits per byte of files to validate on",
            **size(options.work / "pretrained" / "model"),
        }
    ]


def instructions(options: argparse.Namespace) -> Flags:
    """Flags for the data of fine-tuning, evaluation and compression, with the pre-trained model's tokeniser."""
    return {"data.tokenizer": options.work / "pretrained" / "model", **SIZES[options.size]["instructions"]}


def finetune(options: argparse.Namespace) -> list[Row]:
    """Fine-tunes on questions about functions, answered by their docstrings."""
    flags = {"config": FINETUNING, **instructions(options), **SIZES[options.size]["finetuning"]}
    flags |= {"model.weights": options.work / "pretrained" / "model"}
    results = trainings.fit(flags, options.work / "finetuned", options)
    return [
        {
            "stage": "fine-tune",
            "what": f"on questions about functions, {results['step']:,} steps, {results['tokens']:,} tokens",
            "metric": f"{results[f'best/val/{METRIC}']:.3f} bits per byte of the answers to validate on",
            **size(options.work / "finetuned" / "model"),
        }
    ]


def evaluate(options: argparse.Namespace) -> list[Row]:
    """Tests the model before and after fine-tuning on the test questions, which no earlier stage reads."""
    flags: Flags = {"config": FINETUNING, **instructions(options)}
    rows = []
    for stage, model, what in (
        ("evaluate", "pretrained", "before fine-tuning, on the test questions"),
        ("", "finetuned", "after fine-tuning, on the test questions"),
    ):
        place, started = options.work / f"test_{model}", time.perf_counter()
        given = flags | {"model.weights": options.work / model / "model", "run_dir": place}
        command("test", given, place.name, options)
        results = json.loads((place / "results.json").read_text(encoding="utf-8"))
        value, low, high = (results[f"test/{METRIC}{end}"] for end in ("", "_low", "_high"))
        row = {"stage": stage, "what": what, "metric": f"{value:.3f} bits per byte [{low:.3f}, {high:.3f}]"}
        row |= size(options.work / model / "model") | {"value": value}
        rows.append(row | {"seconds": round(time.perf_counter() - started, 1)})
    return rows


CHAIN = {
    "distilled": ("distil", "a block less, taught by the fine-tuned model"),
    "pruned": ("prune", "half of the neurons of each feed-forward layer taken out"),
    "recovered": ("", "what is left, taught again"),
    "int4": ("quantise", "matrices of the blocks in 4 bits"),
    "int8": ("", "embeddings and head in 8 bits"),
}


def compress(options: argparse.Namespace) -> list[Row]:
    """Distils, prunes, recovers and quantises by chain.yaml; each stage is measured on the test questions."""
    flags: Flags = {"config": HERE / "chain.yaml", "model": options.work / "finetuned" / "model"}
    flags |= {"out": options.work / "compressed", **instructions(options), **SIZES[options.size]["compression"]}
    command("compress", flags | {"trainer.enable_progress_bar": "false"}, "compressed", options)
    report = json.loads((options.work / "compressed" / "report.json").read_text(encoding="utf-8"))
    rows = []
    for found in report["stages"][1:]:
        stage, what = CHAIN[found["name"]]
        row = {"stage": stage, "what": what, "metric": f"{found['metric']:.3f} bits per byte", "value": found["metric"]}
        rows.append(row | {key: found[key] for key in ("parameters", "bytes", "seconds")})
    return rows


def export(options: argparse.Namespace) -> list[Row]:
    """Exports the smallest dense model: opens its directory with transformers and compares the logits.

    Raises:
        RuntimeError: When the logits of transformers differ.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lit_llm.checkpoints import load_model

    folder = options.work / "compressed" / "stages" / "03-recovered" / "model"
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ours = load_model(folder)[0].eval()
    ids = tokenizer(list(QUESTIONS), return_tensors="pt", padding=True).input_ids
    with torch.no_grad():
        expected, found = ours(ids), theirs(ids).logits
    difference = (expected - found).abs().max().item()
    if difference > 1e-3 * expected.abs().max().item():
        raise RuntimeError(f"transformers must give the logits of lit-llm, but differs by {difference}")
    with replacing(options.work / "exported") as new:
        shutil.copytree(folder, new)
    return [
        {
            "stage": "export",
            "what": f"the recovered model as transformers' {type(theirs).__name__}",
            "metric": f"its logits differ by at most {difference:.0e}",
            "parameters": sum(p.numel() for p in theirs.parameters()),
            "bytes": size(folder)["bytes"],
        }
    ]


def generate(options: argparse.Namespace) -> list[Row]:
    """Generates answers with the quantised model."""
    model = options.work / "compressed" / "model"
    prompts = [f"--prompt={question}" for question in QUESTIONS]
    said = command("generate", {"model": model, "temperature": 0}, "generate", options, "--chat", *prompts)
    answers = re.split(r"^--- \d+$", said.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    both = zip(QUESTIONS, map(str.strip, answers), strict=True)
    text = "\n\n".join(f"{question}\n--> {answer}" for question, answer in both) + "\n"
    (options.work / "generated.txt").write_text(text, encoding="utf-8")
    row = {"stage": "generate", "what": "the quantised model answers", "metric": f"{len(answers)} answers, below"}
    return [row | size(model) | {"load": os.getloadavg()[2]}]


STAGES: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    stage.__name__: stage for stage in (clean, tokenise, pretrain, finetune, evaluate, compress, export, generate)
}


# Results.


def table(rows: list[Row], options: argparse.Namespace) -> list[str]:
    """Formats all stages as Markdown."""
    lines = ["| stage | what | metric | parameters | bytes | seconds |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        parameters = f"{row['parameters']:,}" if "parameters" in row else ""
        lines.append(
            f"| {row['stage']} | {row['what']} | {row['metric']} | {parameters} | {row['bytes']:,} "
            f"| {row['seconds']:.0f} |"
        )
    spent, threads, load = sum(row.get("spent", 0.0) for row in rows), options.threads, rows[-1]["load"]
    others = f"that did other work too (load {load:.1f} on {os.cpu_count()} cores)"
    return [
        *lines,
        "",
        f"In all {spent / 60:.1f} minutes with {threads} thread{'s' * (threads > 1)}, starting Python and measuring "
        f"each stage included, on a machine {others if load > threads + 0.5 else 'that did nothing else'}.",
    ]


def draw(path: Path, rows: list[Row], options: argparse.Namespace) -> None:
    """Draws the losses of the four training runs in sequence, and score and size of the model after each stage."""
    from matplotlib.figure import Figure

    from lit_llm.callbacks.metrics_csv import read_metrics

    stages = options.work / "compressed" / "stages"
    trainings = {"pre-train": options.work / "pretrained", "fine-tune": options.work / "finetuned"}
    trainings |= {"distil": stages / "01-distilled", "recover": stages / "03-recovered"}
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    before = 0
    for name, folder in trainings.items():
        found = [row for row in read_metrics(folder / "metrics.csv") if f"val/{METRIC}" in row]
        left.plot([before + row["step"] for row in found], [row[f"val/{METRIC}"] for row in found], "o-", label=name)
        before += found[-1]["step"]
    left.set(xlabel="step", ylabel="bits per byte in validation")
    left.legend()
    measured = [row for row in rows if "value" in row]
    names = ["pre-trained", "fine-tuned", *CHAIN]
    right.plot([row["bytes"] for row in measured], [row["value"] for row in measured], "o-", color="tab:gray")
    for name, row in zip(names, measured, strict=True):
        right.annotate(name, (row["bytes"], row["value"]), fontsize=8, xytext=(4, 4), textcoords="offset points")
    right.set(xlabel="bytes of weights", ylabel="bits per byte of the test answers", xscale="log")
    right.margins(x=0.15)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with replacing(path) as new:
        figure.savefig(new, dpi=120)


if __name__ == "__main__":
    main()
