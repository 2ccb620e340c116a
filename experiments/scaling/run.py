"""Two small scaling laws: fitted to smaller networks or fewer tokens, they predict the next run, which is then trained.

    python -m experiments.scaling.run

Each run is `lit-llm fit` of configs/pretraining/llama_stdlib.yaml with another width or number of steps. The loss is
modelled as E + A/x^alpha, where x is the number of parameters in the blocks' matrices, or of tokens (Kaplan et al.,
2020, arXiv:2001.08361, whose laws have no E; Hoffmann et al., 2022, arXiv:2203.15556, one of its two terms at a time).
Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.throughput.report import REPOSITORY, write_table
from experiments.trainings import Flags, fit, whole_numbers
from lit_llm.files import replacing

HERE = Path(__file__).parent
PRETRAINING = REPOSITORY / "configs/pretraining/llama_stdlib.yaml"
METRIC = "best/val/bits_per_byte"
HEAD_WIDTH = 32


class Axis(NamedTuple):
    """The quantity that grows from run to run.

    Attributes:
        unit: What x counts, as the column title.
        setting: What the flags set: `width` or `steps`.
        fitted: Values to which the law is fitted.
        next: Value whose loss is predicted.
        flags: Flags common to all runs.
    """

    unit: str
    setting: str
    fitted: tuple[int, ...]
    next: int
    flags: Flags

    def flags_of(self, value: int) -> Flags:
        """Flags of the run with this width, or with this many steps and a validation after the last."""
        if self.setting == "steps":
            return self.flags | {"trainer.max_steps": value, "trainer.val_check_interval": value}
        return self.flags | _wide(value)


def _wide(width: int) -> Flags:
    return {
        "model.network.d_model": width,
        "model.network.d_ff": 3 * width,
        "model.network.num_heads": width // HEAD_WIDTH,
    }


TINY: Flags = {
    "data.max_documents": 40,
    "data.tokenizer": "bpe-300",
    "data.validation_fraction": 0.2,
    "data.test_fraction": 0.2,
    "data.batch_size": 4,
    "trainer.precision": "32-true",
}
AXES: dict[str, dict[str, Axis]] = {
    "full": {
        "model": Axis(
            "parameters in blocks",
            "width",
            (64, 96, 128, 160, 192),
            256,
            {"trainer.max_steps": 300, "trainer.val_check_interval": 300},
        ),
        "data": Axis("tokens", "steps", (75, 125, 200, 350, 600), 1200, _wide(128)),
    },
    "tiny": {
        "model": Axis("parameters in blocks", "width", (32, 64, 96), 128, TINY | {"trainer.max_steps": 2}),
        "data": Axis("tokens", "steps", (1, 2, 3), 4, TINY | _wide(32)),
    },
}
"""The runs. `tiny` is for the test."""


class Law(NamedTuple):
    """`loss = floor + scale / amount ** exponent`."""

    floor: float
    scale: float
    exponent: float

    def loss(self, amount: float) -> float:
        """Predicted loss for this number of parameters or tokens."""
        return self.floor + self.scale / amount**self.exponent


class Trained(NamedTuple):
    """The losses of one setting, one per seed, and its number of parameters or tokens."""

    setting: int
    amount: int
    losses: list[float]

    @property
    def mean(self) -> float:
        """Mean loss over the seeds."""
        return statistics.mean(self.losses)


def main(words: list[str] | None = None) -> None:
    """Parses the options; for each axis, trains, fits the law, trains the next run, and writes table and picture."""
    options = parsed(words)
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.axes:
        axis = AXES[options.size][name]
        small = [trained(axis, value, options) for value in axis.fitted]
        law = fitted([run.amount for run in small], [run.mean for run in small])
        last = trained(axis, axis.next, options)
        lines = table(axis, small, law, last, options)
        picture = f"{name}.png"
        draw(options.work / picture, axis, small, law, last)
        if not options.table:
            print("\n".join(lines))
            continue
        write_table(name, [*lines, "", f"![bits per byte over {axis.unit}]({picture})"], HERE / "README.md")
        shutil.copy(options.work / picture, HERE / picture)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=AXES, default="full", help="tiny is to try it out")
    parser.add_argument("--axes", nargs="+", choices=AXES["full"], default=[*AXES["full"]], help="what grows")
    parser.add_argument("--seeds", type=whole_numbers, default=[0, 1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/scaling"), help="all that is trained")
    parser.add_argument("--no_table", dest="table", action="store_false", help="leave README.md and pictures alone")
    options = parser.parse_args(words)
    options.work = options.work.resolve() / options.size
    return options


def trained(axis: Axis, value: int, options: argparse.Namespace) -> Trained:
    """Trains a setting with each seed."""
    losses, amount = [], 0
    for seed in options.seeds:
        folder = options.work / f"{axis.setting}-{value}-{seed}"
        flags: Flags = {"config": PRETRAINING, "trainer.callbacks": "null", "seed_everything": seed}
        results = fit(flags | axis.flags_of(value), folder, options)
        losses.append(results[METRIC])
        amount = results["tokens"] if axis.setting == "steps" else in_blocks(folder / "model")
        print(f"{axis.setting} {value} seed {seed}: {losses[-1]:.4f} in {results['seconds']:.0f} s", flush=True)
    return Trained(value, amount, losses)


def in_blocks(folder: Path) -> int:
    """Number of parameters in the blocks' matrices, without embeddings and head, which scale differently."""
    from lit_llm.checkpoints import load_model
    from lit_llm.optimizers import parameter_groups

    groups = parameter_groups(load_model(folder)[0])
    return next(sum(p.numel() for p in group["params"]) for group in groups if group["role"] == "matrices")


def fitted(amounts: Sequence[float], losses: Sequence[float]) -> Law:
    """Least-squares fit with a floor of at least 0: a search over exponents, with a linear fit for each."""
    n, y = np.asarray(amounts, dtype=float), np.asarray(losses, dtype=float)
    found = []
    for exponent in np.geomspace(0.01, 3, 3000):
        x = n**-exponent
        scale = max(0.0, float(np.dot(x - x.mean(), y - y.mean()) / np.dot(x - x.mean(), x - x.mean())))
        floor = float(y.mean() - scale * x.mean())
        if floor < 0:
            floor, scale = 0.0, float(np.dot(x, y) / np.dot(x, x))
        found.append((float(((floor + scale * x - y) ** 2).sum()), Law(floor, scale, float(exponent))))
    return min(found)[1]


def table(axis: Axis, small: list[Trained], law: Law, last: Trained, options: argparse.Namespace) -> list[str]:
    """Formats all runs as Markdown, with the predicted and the measured loss."""
    seeds = " | ".join(f"seed {seed}" for seed in options.seeds)
    columns = len(options.seeds) + 4
    lines = [f"| {axis.setting} | {axis.unit} | {seeds} | mean | of the law |", "|" + " ---: |" * columns]
    for run in (*small, last):
        each = " | ".join(f"{loss:.4f}" for loss in run.losses)
        predicted = " (predicted)" * (run is last)
        expected = law.loss(run.amount)
        lines.append(f"| {run.setting} | {run.amount:,} | {each} | {run.mean:.4f} | {expected:.4f}{predicted} |")
    off = last.mean - law.loss(last.amount)
    spread = [statistics.stdev(run.losses) for run in (*small, last) if len(run.losses) > 1]
    apart = f"; seeds of one row differ by {statistics.mean(spread):.4f} (standard deviation)" if spread else ""
    return [
        *lines,
        "",
        f"Fitted to the first {len(small)}: {law.floor:.4f} + {law.scale:.5g} / x^{law.exponent:.5f} bits per byte. "
        f"The last came out {off:+.4f} from what was predicted, {abs(off) / law.loss(last.amount):.2%} of it{apart}.",
    ]


def draw(path: Path, axis: Axis, small: list[Trained], law: Law, last: Trained) -> None:
    """Draws the law, the runs it was fitted to, and the predicted run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    curve = np.geomspace(small[0].amount * 0.8, last.amount * 1.25, 100)
    label = f"{law.floor:.2f} + {law.scale:.3g} / x^{law.exponent:.2f}"
    axes.plot(curve, [law.loss(x) for x in curve], color="tab:gray", label=label)
    for runs, colour, name in ((small, "tab:blue", "fitted to"), ([last], "tab:red", "predicted, then trained")):
        points = [(run.amount, loss) for run in runs for loss in run.losses]
        axes.plot(*zip(*points, strict=True), "o", color=colour, label=name)
    axes.set(xscale="log", xlabel=axis.unit, ylabel="bits per byte in validation")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    with replacing(path) as new:
        figure.savefig(new, dpi=120)


if __name__ == "__main__":
    main()
