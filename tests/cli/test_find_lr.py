"""`lit-llm fit --find_lr true` from the command line."""

from __future__ import annotations

import csv
import shlex

import pytest
import yaml

from lit_llm.callbacks.learning_rate_finder import STEPS
from lit_llm.callbacks.metrics_csv import read_metrics


@pytest.mark.slow
def test_it_suggests_rates_in_the_configs_proportions_and_the_next_run_is_none_the_wiser(lit_llm, tiny, tmp_path):
    assert lit_llm("fit", *tiny, "--run_dir", tmp_path / "alone").code == 0
    found = lit_llm("fit", *tiny, "--run_dir", tmp_path / "run", "--find_lr", "true")
    assert found.code == 0, found.err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lr_find.csv", "lr_find.png"]
    with (tmp_path / "run/lr_find.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert 20 < len(rows) <= STEPS
    assert float(rows[0]["learning_rate"]) == pytest.approx(0.04 * float(rows[0]["factor"])) == pytest.approx(4e-5)
    [line] = [line for line in found.out.splitlines() if line.startswith("to use it")]
    flags = shlex.split(line.removeprefix("to use it"))
    outcome = lit_llm("fit", *tiny, *flags, "--print_config")
    assert outcome.code == 0, outcome.err
    rates = yaml.safe_load(outcome.out)["model"]["init_args"]["optimizer"]["init_args"]
    factor = rates["lr"] / 0.04
    for name, configured in {"embedding_lr": 0.1, "head_lr": 0.01, "vector_lr": 0.01}.items():
        assert rates[name] == pytest.approx(configured * factor, rel=0.02)
    outcome = lit_llm("fit", *tiny, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    alone, after = (read_metrics(tmp_path / name / "metrics.csv") for name in ("alone", "run"))
    assert [row.get("train/loss") for row in alone] == [row.get("train/loss") for row in after]
    assert "find_lr" not in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.slow
def test_an_objectives_own_optimiser_is_named_with_all_that_it_is(lit_llm, tiny, tmp_path):
    words = [*tiny, "--model.optimizer", "null"]
    found = lit_llm("fit", *words, "--run_dir", tmp_path / "run", "--find_lr", "true")
    assert found.code == 0, found.err
    [line] = [line for line in found.out.splitlines() if line.startswith("to use it")]
    flags = shlex.split(line.removeprefix("to use it"))
    outcome = lit_llm("fit", *tiny, *flags, "--print_config")
    assert outcome.code == 0, outcome.err
    optimizer = yaml.safe_load(outcome.out)["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert optimizer["init_args"]["betas"] == [0.9, 0.95]
    assert optimizer["init_args"]["weight_decay"] == 0.1


@pytest.mark.slow
def test_a_run_that_goes_on_is_refused(lit_llm, tiny, tmp_path):
    outcome = lit_llm("fit", *tiny, "--run_dir", tmp_path, "--ckpt_path", "last", "--find_lr", "true")
    assert outcome.code == 2
    assert "ckpt_path must be left out with --find_lr true, but is last" in outcome.last_line
