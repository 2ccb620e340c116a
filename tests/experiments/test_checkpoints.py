from __future__ import annotations

import json

import pytest

from experiments.checkpoints import run as checkpoints
from tests.writing import REPOSITORY


@pytest.mark.slow
def test_the_time_that_saving_takes_is_seen_in_runs_of_the_command_line(lit_llm, texts, tmp_path):
    options = checkpoints.parsed(["--size", "tiny", "--saves", "2", "--every", "2", "--rounds", "1", "--no_table"])
    few = ["--data.path", texts, "--data.tokenizer", "bytes", "--data.validation_fraction", "0.1"]
    found = {}
    for variant in checkpoints.VARIANTS:
        out = tmp_path / f"{variant}.json"
        outcome = lit_llm(*checkpoints.fit_words(variant, out, options)[3:], *few)
        assert outcome.code == 0, outcome.err
        found[variant] = json.loads(out.read_text())
        assert len(found[variant]["saves"]) == (0 if variant == "never" else 2)
        assert sum(found[variant]["saves"]) < found[variant]["seconds"]


def test_saves_of_either_kind_are_compared(tmp_path):
    def run(seconds: float, *saves: float) -> list[dict]:
        return [{"seconds": seconds, "saves": list(saves), "bytes": 2**21, "others": 0.1}]

    found = {"never": run(10.0), "sync": run(11.2, 0.5, 0.6), "async": run(10.3, 0.1, 0.1)}
    lines = checkpoints.table(found, checkpoints.parsed(["--rounds", "1"]))
    assert lines[-2].startswith("| written at once | 550 ms [500–600] | 100% |  | 600 ms [")
    assert lines[-1].startswith("| written while training goes on | 100 ms [100–100] | 18% | 20% met | 150 ms [")
    text = (REPOSITORY / "experiments/checkpoints/README.md").read_text(encoding="utf-8")
    assert text.count("<!-- stall -->") == text.count("<!-- /stall -->") == 1
