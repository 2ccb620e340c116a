"""Compression methods are measured and compared with goals."""

from __future__ import annotations

import pytest

from experiments import trainings
from experiments.compression import run as compression
from tests.writing import places


@pytest.mark.slow
def test_ways_to_compress_are_measured_by_the_command_line(lit_llm, texts, tmp_path, monkeypatch):
    def inside(words, log, options):
        outcome = lit_llm(*words)
        assert outcome.code == 0, outcome.err

    monkeypatch.setattr(trainings, "lit_llm", inside)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- language_model --><!-- /language_model -->")
    few = ["--data.path", str(texts), "--data.tokenizer", "bytes", "--data.seq_len", "32", "--data.batch_size", "4"]
    few += ["--data.validation_fraction", "0.1", "--data.test_fraction", "0.1"]
    few += ["--trainer.max_steps", "4", "--trainer.val_check_interval", "4", "--trainer.precision", "32-true"]
    words = ["language_model", "--seeds", "0", "--work", str(tmp_path / "work"), "--readme", str(readme), *few]
    words += ["--chains", "wanda,structured"]
    compression.main(words)
    lines = readme.read_text().splitlines()
    chains = compression.LANGUAGE_MODEL.chains
    stages = {stage["name"] for stage in [*chains["wanda"], *chains["structured"]]}
    assert all(any(line.startswith(f"| {name} |") for line in lines) for name in {*stages, "original"})
    assert sum(line.endswith(("| met |", "| **missed** |")) for line in lines) == 1  # of half the blocks' parameters
    half = next(line for line in lines if line.startswith("| Wanda 50 % |")).split("|")
    assert int(half[3]) == 100  # parameters
    assert 50 <= int(half[4]) < 80  # not zero: half of the matrices inside blocks is
    compression.main(words)  # all results exist: nothing is trained again
    assert readme.read_text().splitlines() == lines


def test_a_goal_of_compression_is_judged_by_the_mean_of_its_seeds():
    def row(score: float) -> dict:
        one = {"metric": score, "parameters": 10, "nonzero": 10, "times_smaller": 1.0, "times_faster": 1.0}
        return one

    options, _ = compression.parsed(["images", "--seeds", "0,1"])
    rows = {"original": {0: row(0.990), 1: row(0.990)}, "int8": {0: row(0.991), 1: row(0.984)}}
    lines = compression.lines(compression.IMAGES, rows, options)
    assert "| int8 | 0.9875 ± 0.0049 | 100 ± 0 | 100 ± 0 | 1.00 ± 0.00 | 1.00 ± 0.00 |" in lines
    assert lines[-1] == "| int8: points won | -0.20 | -0.250 ± 0.495 | **missed** |"
    assert all(places("compression", name) == 1 for name in compression.TABLES)
