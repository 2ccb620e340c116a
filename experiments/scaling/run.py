"""A small scaling law: trains networks of several widths on as many tokens each, and predicts the next.

    python -m experiments.scaling.run

Each is `lit-llm fit` of configs/pretraining/llama_stdlib.yaml, of another width. Its loss is taken to be E + A/N^alpha,
where N counts the parameters in matrices of blocks (Kaplan et al., 2020, arXiv:2001.08361, whose law has no E; Hoffmann
et al., 2022, arXiv:2203.15556, at a fixed number of tokens). A training that is done is not run again.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.throughput.report import REPOSITORY, write_table
from experiments.trainings import Flags, fit, whole_numbers
from lit_llm.files import replacing

HERE = Path(__file__).parent
PRETRAINING = REPOSITORY / "configs/pretraining/llama_stdlib.yaml"
METRIC = "best/val/bits_per_byte"
HEAD_WIDTH = 32
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "widths": (64, 96, 128, 160, 192),
        "next": 256,
        "flags": {"trainer.max_steps": 300, "trainer.val_check_interval": 300},
    },
    "tiny": {
        "widths": (32, 64, 96),
        "next": 128,
        "flags": {
            "data.max_documents": 40,
            "data.tokenizer": "bpe-300",
            "data.validation_fraction": 0.2,
            "data.test_fraction": 0.2,
            "data.batch_size": 4,
            "trainer.max_steps": 2,
            "trainer.precision": "32-true",
        },
    },
}
"""What is trained. `tiny` is for the test."""


class Law(NamedTuple):
    """`loss = floor + scale / parameters ** exponent`."""

    floor: float
    scale: float
    exponent: float

    def loss(self, parameters: float) -> float:
        """What a network of so many parameters should reach."""
        return self.floor + self.scale / parameters**self.exponent


class Trained(NamedTuple):
    """The runs of one width."""

    width: int
    parameters: int
    losses: list[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.losses)


def main(words: list[str] | None = None) -> None:
    """Parses, trains, fits, predicts, trains, writes."""
    options = parsed(words)
    options.work.mkdir(parents=True, exist_ok=True)
    size = SIZES[options.size]
    small = [trained(width, options) for width in size["widths"]]
    law = fitted([run.parameters for run in small], [run.mean for run in small])
    last = trained(size["next"], options)
    lines = table(small, law, last, options)
    draw(options.work / "scaling.png", small, law, last)
    if not options.table:
        print("\n".join(lines))
        return
    write_table("scaling", [*lines, "", "![bits per byte over parameters](scaling.png)"], HERE / "README.md")
    shutil.copy(options.work / "scaling.png", HERE / "scaling.png")


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny is to try it out")
    parser.add_argument("--seeds", type=whole_numbers, default=[0, 1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/scaling"), help="all that is trained")
    parser.add_argument("--no_table", dest="table", action="store_false", help="leave README.md and picture alone")
    options = parser.parse_args(words)
    options.work = options.work.resolve() / options.size
    return options


def trained(width: int, options: argparse.Namespace) -> Trained:
    """The networks of a width, one a seed."""
    losses = []
    for seed in options.seeds:
        folder = options.work / f"{width}-{seed}"
        flags: Flags = {"config": PRETRAINING, "model.network.d_model": width, "model.network.d_ff": 3 * width}
        flags |= {"model.network.num_heads": width // HEAD_WIDTH, "trainer.callbacks": "null", "seed_everything": seed}
        results = fit(flags | SIZES[options.size]["flags"], folder, options)
        losses.append(results[METRIC])
        print(f"{width} seed {seed}: {losses[-1]:.4f} in {results['seconds']:.0f} s", flush=True)
    return Trained(width, in_blocks(folder / "model"), losses)


def in_blocks(folder: Path) -> int:
    """Parameters in matrices of blocks: neither embeddings nor head, which grow otherwise than the rest."""
    from lit_llm.checkpoints import load_model
    from lit_llm.optimizers import parameter_groups

    groups = parameter_groups(load_model(folder)[0])
    return next(sum(p.numel() for p in group["params"]) for group in groups if group["role"] == "matrices")


def fitted(parameters: Sequence[float], losses: Sequence[float]) -> Law:
    """The law of least squares, with a floor of at least 0: a search over exponents, for each of which it is linear."""
    n, y = np.asarray(parameters, dtype=float), np.asarray(losses, dtype=float)
    found = []
    for exponent in np.geomspace(0.01, 3, 3000):
        x = n**-exponent
        scale = max(0.0, float(np.dot(x - x.mean(), y - y.mean()) / np.dot(x - x.mean(), x - x.mean())))
        floor = float(y.mean() - scale * x.mean())
        if floor < 0:
            floor, scale = 0.0, float(np.dot(x, y) / np.dot(x, x))
        found.append((float(((floor + scale * x - y) ** 2).sum()), Law(floor, scale, float(exponent))))
    return min(found)[1]


def table(small: list[Trained], law: Law, last: Trained, options: argparse.Namespace) -> list[str]:
    """All networks as Markdown, and what was predicted beside what came."""
    seeds = " | ".join(f"seed {seed}" for seed in options.seeds)
    columns = len(options.seeds) + 4
    lines = [f"| width | parameters in blocks | {seeds} | mean | of the law |", "|" + " ---: |" * columns]
    for run in (*small, last):
        each = " | ".join(f"{loss:.4f}" for loss in run.losses)
        predicted = " (predicted)" * (run is last)
        expected = law.loss(run.parameters)
        lines.append(f"| {run.width} | {run.parameters:,} | {each} | {run.mean:.4f} | {expected:.4f}{predicted} |")
    off = last.mean - law.loss(last.parameters)
    spread = [statistics.stdev(run.losses) for run in (*small, last) if len(run.losses) > 1]
    apart = f"; seeds of one width differ by {statistics.mean(spread):.4f} (standard deviation)" if spread else ""
    return [
        *lines,
        "",
        f"Fitted to the first {len(small)}: {law.floor:.3f} + {law.scale:.3g} / N^{law.exponent:.3f} bits per byte. "
        f"The last came out {off:+.4f} from what was predicted, {abs(off) / last.mean:.2%}{apart}.",
    ]


def draw(path: Path, small: list[Trained], law: Law, last: Trained) -> None:
    """The law, what it was fitted to, and what it predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    curve = np.geomspace(small[0].parameters * 0.8, last.parameters * 1.25, 100)
    label = f"{law.floor:.2f} + {law.scale:.3g} / N^{law.exponent:.2f}"
    axes.plot(curve, [law.loss(n) for n in curve], color="tab:gray", label=label)
    for runs, colour, name in ((small, "tab:blue", "fitted to"), ([last], "tab:red", "predicted, then trained")):
        points = [(run.parameters, loss) for run in runs for loss in run.losses]
        axes.plot(*zip(*points, strict=True), "o", color=colour, label=name)
    axes.set(xscale="log", xlabel="parameters in blocks", ylabel="bits per byte in validation")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    with replacing(path) as new:
        figure.savefig(new, dpi=120)


if __name__ == "__main__":
    main()
