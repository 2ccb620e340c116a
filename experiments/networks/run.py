"""Runs the sweep over networks and optimisers, and writes their comparison into README.md.

    python -m experiments.networks.run

It runs `lit-llm sweep` of configs/sweeps/stdlib_networks.yaml, then `lit-llm compare` of the result. An interrupted
sweep resumes, and finished trials are not repeated.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from experiments.throughput.report import REPOSITORY, last_words, write_table
from experiments.trainings import lit_llm, parser

HERE = Path(__file__).parent
SWEEP = REPOSITORY / "configs/sweeps/stdlib_networks.yaml"


def main(words: list[str] | None = None) -> None:
    """Parses the options, sweeps, compares, and writes the table."""
    made = parser(__doc__, HERE, threads=1)
    made.add_argument("--workers", type=int, default=2, help="trials at once, each with as many threads")
    made.add_argument("--more_seeds", type=int, default=2, help="for the best trial and the runner-up")
    options, more = made.parse_known_args(words)
    sweep, compared, log = (options.work / name for name in ("sweep", "compared", "sweep.log"))
    numbers = ["--workers", str(options.workers), "--seeds", str(options.more_seeds)]
    lit_llm(["sweep", "--config", str(SWEEP), "--out", str(sweep), *numbers, *more], log, options)
    verdict = last_words(log)
    lit_llm(["compare", str(sweep), "--out", str(compared)], options.work / "compare.log", options)
    shutil.copy(compared / "learning_curves.png", options.readme.with_name("learning_curves.png"))
    lines = (compared / "compare.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    write_table("networks", [*table, "", verdict, "", "![learning curves](learning_curves.png)"], options.readme)


if __name__ == "__main__":
    main()
