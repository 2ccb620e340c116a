"""Evaluations report how much they evaluated, and confidence intervals."""

from __future__ import annotations

import json

import pytest

from lit_llm.callbacks.metrics_csv import read_metrics


def test_a_language_models_test_counts_rows_and_tokens_and_gives_intervals(lit_llm, tiny, tmp_path):
    outcome = lit_llm("fit", *tiny, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    results = json.loads((tmp_path / "run/results.json").read_text())
    for name in ("loss", "bits_per_byte"):
        low, value, high = (results[f"test/{name}{end}"] for end in ("_low", "", "_high"))
        assert low < value < high
        assert high - low < 0.5 * value
    assert 32 * (results["test/count"] - 1) < results["test/tokens"] <= 32 * results["test/count"]
    assert not [name for row in read_metrics(tmp_path / "run/metrics.csv") for name in row if name == "val/count"]
    outcome = lit_llm("validate", "--run_dir", tmp_path / "run", "--data.batch_size", "3")  # any batch size
    first = {line.split()[0]: float(line.split()[1]) for line in outcome.out.splitlines() if line.startswith("val/")}
    outcome = lit_llm("validate", "--run_dir", tmp_path / "run", "--data.batch_size", "5")
    again = {line.split()[0]: float(line.split()[1]) for line in outcome.out.splitlines() if line.startswith("val/")}
    assert first == pytest.approx(again, abs=2e-4)
    assert {"val/count", "val/tokens", "val/loss_low", "val/loss_high"} <= first.keys()
    assert first["val/loss_low"] < first["val/loss"] < first["val/loss_high"]
