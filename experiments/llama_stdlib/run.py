"""Trains the main config and variants of it that differ in one thing each, and writes the table into README.md.

    python experiments/llama_stdlib/run.py [--steps 400] [--out runs/llama_stdlib_variants]

Every variant has the same number of steps and of tokens a step, so bits per byte compare; seconds are as they came.
A variant that has results is not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs/pretraining/llama_stdlib.yaml"
ADAMW = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.betas", "[0.9,0.95]"]
ADAMW += ["--model.optimizer.weight_decay", "0.1"]
VARIANTS: dict[str, list[str]] = {
    "the recipe": [],
    "another seed": ["--seed_everything", "1", "--data.seed", "1"],
    "AdamW 1e-3 for Muon": [*ADAMW, "--model.optimizer.lr", "0.001"],
    "AdamW 3e-3 for Muon": [*ADAMW, "--model.optimizer.lr", "0.003"],
    "AdamW 1e-2 for Muon": [*ADAMW, "--model.optimizer.lr", "0.01"],
    "cosine for linear decay": ["--model.schedule", "lit_llm.schedulers.Cosine"],
    "constant for linear decay": ["--model.schedule", "lit_llm.schedulers.Constant"],
    "no normalised queries and keys": ["--model.network.qk_norm", "false"],
    "tied embeddings": ["--model.network.tie_embeddings", "true"],
    "attention within documents": ["--data.mask_documents", "true"],
    "1,024 tokens in the vocabulary": ["--data.tokenizer", "bpe-1024"],
    "4,096 tokens in the vocabulary": ["--data.tokenizer", "bpe-4096"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/llama_stdlib_variants"))
    options = parser.parse_args()
    rows = ["| variant | val/bits_per_byte | training seconds |", "| --- | ---: | ---: |"]
    for name, flags in VARIANTS.items():
        folder = options.out / f"{options.steps}" / name.replace(" ", "_").replace(",", "")
        if not (folder / "model").exists():
            words = ["fit", "--config", str(CONFIG), "--run_dir", str(folder), "--test_after_fit", "false"]
            steps = ["--trainer.max_steps", str(options.steps), "--trainer.val_check_interval", str(options.steps)]
            subprocess.run([sys.executable, "-m", "lit_llm", *words, *steps, *flags], check=True)
        results = json.loads((folder / "results.json").read_text())
        rows.append(f"| {name} | {results['val/bits_per_byte']:.4f} | {results['seconds']:.0f} |")
    readme = HERE / "README.md"
    head, _, rest = readme.read_text().partition("<!-- table -->\n")
    tail = rest.partition("<!-- end -->\n")[2]
    readme.write_text(head + "<!-- table -->\n" + "\n".join(rows) + "\n<!-- end -->\n" + tail)


if __name__ == "__main__":
    main()
