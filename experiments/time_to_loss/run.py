"""Training time of nanoGPT's recipe and ours on Shakespeare, interleaved, with several seeds.

    python -m experiments.time_to_loss.run --text tinyshakespeare.txt
    python -m experiments.time_to_loss.run --text tinyshakespeare.txt --ablations

Both are `lit-llm fit` of a file in configs/pretraining. The loss is that of the whole validation text, in nats per
character.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

from experiments.throughput.report import write_table
from experiments.trainings import Flags, fit_anew, parser, whole_path, words_of

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs" / "pretraining"
RECIPES = {"nanoGPT's": CONFIGS / "gpt2_shakespeare_nanogpt.yaml", "ours": CONFIGS / "llama_shakespeare.yaml"}
ABLATIONS: dict[str, Flags] = {
    "all of it": {},
    "AdamW (3e-3) instead of Muon": {"model.optimizer": "torch.optim.AdamW", "model.optimizer.lr": 0.003},
    "queries and keys not normalised": {"model.network.qk_norm": "false"},
    "fp32": {"trainer.precision": "32-true"},
    "four layers": {"model.network.num_layers": 4},
    "cosine schedule": {"model.schedule": "lit_llm.schedulers.Cosine"},
    "no momentum warm-up": {"model.optimizer.momentum_warmup_steps": 0},
    "nanoGPT's network": {
        "model.network": "lit_llm.models.gpt2.GPT2",
        "model.network.d_model": 128,
        "model.network.num_layers": 4,
        "model.network.num_heads": 4,
        "model.network.max_seq_len": 64,
        "model.network.bias": "false",
    },
}


def main() -> None:
    """Parses the options, measures, and writes the table."""
    made = parser(__doc__, HERE, seeds=(1337, 1, 2))
    made.add_argument("--text", type=whole_path, required=True, help="tinyshakespeare, one file")
    made.add_argument("--ablations", action="store_true", help="our recipe with one thing different at a time")
    options = made.parse_args()
    (ablations if options.ablations else recipes)(options)


def recipes(options: argparse.Namespace) -> None:
    """Compares both recipes, interleaved."""
    found = {
        (name, seed): trained(config, seed, {}, options) for seed in options.seeds for name, config in RECIPES.items()
    }
    lines = [
        "| | seed | nats per character | seconds of training | sooner |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for seed in options.seeds:
        for name in RECIPES:
            loss, seconds = found[name, seed]
            ratio = found["nanoGPT's", seed][1] / seconds
            reached = loss <= found["nanoGPT's", seed][0]
            sooner = "" if name != "ours" else f"{ratio:.1f} ×" if reached else "not reached"
            lines.append(f"| {name} | {seed} | {loss:.4f} | {seconds:.1f} | {sooner} |")
    write_table("recipes", lines, options.readme)


def ablations(options: argparse.Namespace) -> None:
    """Measures our recipe with one change at a time, at the same number of steps."""
    lines = ["| | nats per character | seconds of training |", "| --- | ---: | ---: |"]
    whole: Flags = {"trainer.precision": "bf16-mixed"}
    for name, flags in ABLATIONS.items():
        runs = [trained(RECIPES["ours"], seed, whole | flags, options) for seed in options.seeds]
        losses, seconds = zip(*runs, strict=True)
        spread = f" ± {statistics.stdev(losses):.4f}" if len(runs) > 1 else ""
        lines.append(f"| {name} | {statistics.mean(losses):.4f}{spread} | {statistics.median(seconds):.1f} |")
    write_table("ablations", lines, options.readme)


def trained(config: Path, seed: int, flags: Flags, options: argparse.Namespace) -> tuple[float, float]:
    """Final loss and seconds of training."""
    given: Flags = {"config": config, "data.path": options.text, "seed_everything": seed, "data.seed": seed}
    results = fit_anew(given | flags, options.work / f"{config.stem}-{seed}", options)
    loss, seconds = results["val/bits_per_byte"] * math.log(2), results["seconds"]
    said = " ".join([f"{config.stem} seed {seed}", *words_of(flags)])
    print(f"{said}: {loss:.4f} nats per character in {seconds:.1f} s", flush=True)
    return loss, seconds


if __name__ == "__main__":
    main()
