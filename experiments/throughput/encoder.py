"""Samples per second of fine-tuning an encoder on short sentences: `lit-llm fit` and the Hugging Face Trainer.

    python -m experiments.throughput.encoder --peers_python PEERS_VENV/bin/python

BERT of 6 layers, 384 wide, 30,522 tokens, from random weights; batches of 32 sentences of random words with SST-2's
lengths (mean 13 tokens, at most 64). The rate is that of a whole epoch without its first two steps, so that every
length counts. `hf-128` pads to 128 tokens, as the Trainer's examples do; `hf-dynamic` pads to the longest sentence of a
batch; `hf-group` also groups by length. `ours` is a run of the command line with all its callbacks and the Trainer's
head, which reads one position, so the last layer computes only that one; `ours-mean` has the head of encoder_glue.yaml,
which reads all positions.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

from experiments.throughput.report import environment, last_words, run_child, wait_for_quiet, write_table

CONFIG = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
BATCH_SIZE = 32
GOALS = {"hf-group": 1.15, "hf-128": 10.0}
HEADS = {
    "ours": "lit_llm.models.pretrained_classifier.PretrainedClassifier",
    "ours-mean": "lit_llm.models.pretrained_pooling.MeanClassifier",
}
WAYS = (*HEADS, "hf-group", "hf-dynamic", "hf-128")


def main() -> None:
    """Parses the options, measures, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=3200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--max_wait", type=float, default=120.0)
    parser.add_argument("--peers_python", default="runs/peers/bin/python", help="interpreter that has transformers")
    parser.add_argument("--work", type=Path, default=Path("runs/throughput"))
    parser.add_argument("--no_table", dest="table", action="store_false", help="leave README.md alone")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work = options.work.resolve()
    if options.one:
        trainer(options)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options.work / "sentences", options.examples)
    lines: list[str] = []
    for dtype in options.dtypes.split(","):
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        busiest = 0.0
        for _ in range(options.rounds):
            for way in WAYS:
                busiest = max(busiest, wait_for_quiet(options.max_wait))
                found[way].append(measure(way, dtype, options))
                print(dtype, way, found[way][-1], flush=True)
        lines += table(dtype, found, busiest)
    if options.table:
        write_table("encoder", lines)


def prepare(folder: Path, examples: int) -> None:
    """Writes `train.jsonl`, `validation.jsonl`, a tokeniser with one token per word, and `config.json`."""
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{index}" for index in range(CONFIG["vocab_size"] - len(special)))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "tokenizer")
    chance = np.random.default_rng(0)
    for split, count in (("train", examples), ("validation", BATCH_SIZE)):
        lengths = np.clip(np.round(chance.gamma(1.6, 6.7, count)), 1, 62).astype(int)
        rows = [
            {"text": " ".join(f"w{w}" for w in chance.integers(0, 30000, n)), "label": int(chance.integers(2))}
            for n in lengths
        ]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def measure(way: str, dtype: str, options: argparse.Namespace) -> dict[str, float]:
    """Measures one run in its own process."""
    out, log = options.work / f"encoder-{way}-{dtype}.json", options.work / f"encoder-{way}-{dtype}.log"
    out.unlink(missing_ok=True)
    if way in HEADS:
        shutil.rmtree(out.with_suffix(".run"), ignore_errors=True)
        words = [sys.executable, "-m", "lit_llm", *fit_words(way, out, dtype, options)]
    else:
        python = str(Path(options.peers_python).absolute())
        words = [python, "-m", "experiments.throughput.encoder", "--one", way, "--dtype", dtype, "--out", str(out)]
        words += ["--work", str(options.work)]
    run_child(words, environment(options.work, options.threads), log)
    if not out.exists():
        raise RuntimeError(f"{way} must write {out}, but did not: {last_words(log)}")
    return json.loads(out.read_text())


def fit_words(way: str, out: Path, dtype: str, options: argparse.Namespace) -> list[str]:
    """Command line of `ours` or `ours-mean`."""
    folder, place = options.work / "sentences", "experiments.throughput.encoder_callbacks"
    flags = {
        "config": "configs/finetuning/encoder_glue.yaml",
        "run_dir": out.with_suffix(".run"),
        "data.path": folder / "data",
        "data.tokenizer": folder / "tokenizer",
        "data.batch_size": BATCH_SIZE,
        "model.network": HEADS[way],
        "model.network.config": folder,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 1,
        "trainer.val_check_interval": 1.0,  # like the Trainer, which does not evaluate during these steps
        "trainer.precision": "bf16-mixed" if dtype == "bf16" else "32-true",
        "trainer.callbacks+": f"{place}.EpochClock",
        "trainer.callbacks.path": out,
        "trainer.callbacks.batch_size": BATCH_SIZE,
    }
    return ["fit", *(f"--{name}={value}" for name, value in flags.items())]


class Clock:
    """Measures samples per second from the third step of an epoch to the last."""

    def __init__(self, path: Path, batch_size: int) -> None:
        self.path, self.batch_size, self.ticks = path, batch_size, []

    def tick(self) -> None:
        """Records a step; call it after each one."""
        self.ticks.append(time.perf_counter())

    def write(self) -> None:
        """Writes the results; call it after the last step."""
        import resource

        steps = len(self.ticks) - 2
        rate = steps * self.batch_size / (self.ticks[-1] - self.ticks[1])
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.path.write_text(json.dumps({"samples_per_second": rate, "peak_bytes": peak, "steps": steps}))


def trainer(options: argparse.Namespace) -> None:
    """Trains with the Hugging Face Trainer; runs in its own process."""
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    set_seed(1337)
    folder, clock = options.work / "sentences", Clock(options.out, BATCH_SIZE)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    wide = {"padding": "max_length", "max_length": 128} if options.one == "hf-128" else {"max_length": 128}
    lines = (folder / "data" / "train.jsonl").read_text().splitlines()
    if options.one == "hf-128":
        lines = lines[: 12 * BATCH_SIZE]  # a few are enough, as each step costs the same
    examples = [json.loads(line) for line in lines]
    rows = [{**tokenizer(example["text"], truncation=True, **wide), "labels": example["label"]} for example in examples]

    class Ticks(TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            clock.tick()

    config = AutoConfig.from_pretrained(folder)
    arguments = TrainingArguments(
        str(options.out.with_suffix(".hf")),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=5e-5,
        weight_decay=0.01,
        max_grad_norm=1.0,
        warmup_steps=100,
        bf16=options.dtype == "bf16",
        use_cpu=True,
        train_sampling_strategy="group_by_length" if options.one == "hf-group" else "random",
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    network = AutoModelForSequenceClassification.from_config(config)
    collate = DataCollatorWithPadding(tokenizer)
    Trainer(network, arguments, train_dataset=rows, data_collator=collate, callbacks=[Ticks()]).train()
    clock.write()


def table(dtype: str, found: dict[str, list[dict[str, float]]], busiest: float) -> list[str]:
    """Formats the results of one precision as Markdown."""
    rounds = len(found["ours"])
    lines = [
        f"**{dtype}**, medians of {rounds} interleaved rounds, their range in brackets; others used at most "
        f"{busiest:.2f} cores before a run.",
        "",
        "| | samples/s | ours is × | goal | peak MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, runs in found.items():
        rates = [run["samples_per_second"] for run in runs]
        ratios = [
            ours["samples_per_second"] / run["samples_per_second"]
            for ours, run in zip(found["ours"], runs, strict=True)
        ]
        goal = GOALS.get(way)
        verdict = f"{goal:.2f} {'met' if statistics.median(ratios) >= goal else '**missed**'}" if goal else ""
        against = "" if way == "ours" else f"{statistics.median(ratios):.2f} [{min(ratios):.2f}–{max(ratios):.2f}]"
        peak = statistics.median(run["peak_bytes"] for run in runs) / 1e6
        lines.append(
            f"| {way} | {statistics.median(rates):.1f} [{min(rates):.1f}–{max(rates):.1f}] | {against} | {verdict} | "
            f"{peak:,.0f} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
