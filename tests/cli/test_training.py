from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule

from lit_llm.callbacks.metrics_csv import read_metrics
from lit_llm.checkpoints import load_model
from lit_llm.cli import COMMANDS, training
from lit_llm.cli.training import TrainingCLI
from lit_llm.models.llama import Llama
from tests.writing import REPOSITORY


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(lit_llm, tiny, runs) -> Path:
    """A finished run of the tiny config, made once."""
    folder = runs / "finished"
    if not folder.exists():
        outcome = lit_llm("fit", *tiny, "--run_dir", folder)
        assert outcome.code == 0, outcome.err
    return folder


def test_a_run_leaves_all_that_it_promises_and_nothing_elsewhere(run, runs):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.csv",
        "results.json",
        "learning_curve.png",
        "samples.txt",
        "checkpoints",
        "model",
        "tensorboard",
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {path.name for path in runs.iterdir()} == {"finished"}


def test_results_hold_final_best_and_test_metrics_and_the_cost(run):
    results = json.loads((run / "results.json").read_text())
    for metric in ("loss", "perplexity", "bits_per_byte"):
        assert results[f"best/val/{metric}"] <= results[f"val/{metric}"]
        assert f"test/{metric}" in results
    assert results["step"] == 6
    assert results["tokens"] == 6 * 4 * 32
    assert results["seconds"] > 0
    assert {"commit", "command", "best/step"} <= results.keys()


def test_metrics_of_a_validation_stand_at_its_step(run):
    rows = {row["step"]: row for row in read_metrics(run / "metrics.csv")}
    assert sorted(rows) == [1, 2, 3, 4, 5, 6]
    assert [step for step, row in rows.items() if "val/bits_per_byte" in row] == [3, 6]
    assert all(
        {"train/loss", "train/tokens_per_second", "train/learning_rate", "train/mfu"} <= rows[s].keys() for s in rows
    )


def test_the_model_directory_opens_in_transformers_with_the_same_logits(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lit_llm.checkpoints import load_model

    theirs = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ours, _ = load_model(run)
    ids = torch.tensor([tokenizer.encode("the 猫 sat")])
    assert torch.allclose(theirs(ids).logits, ours(ids), atol=1e-5)
    assert "validation" in (run / "model/README.md").read_text()


def test_the_exported_model_is_that_of_the_best_validation(run):
    from lit_llm.checkpoints import load_model

    exported, _ = load_model(run / "model")
    best, _ = load_model(run / "checkpoints/best.ckpt")
    for name, p in exported.state_dict().items():
        assert torch.equal(p, best.state_dict()[name])


def test_the_saved_config_repeats_the_run(lit_llm, run, tmp_path):
    assert lit_llm("fit", "--config", run / "config.yaml", "--run_dir", tmp_path / "again").code == 0
    first, again = (json.loads((f / "results.json").read_text()) for f in (run, tmp_path / "again"))
    assert {k: v for k, v in first.items() if k.startswith("val/")} == {
        k: v for k, v in again.items() if k.startswith("val/")
    }


def test_a_run_folder_with_a_run_is_refused(lit_llm, tiny, run):
    before = (run / "checkpoints/last.ckpt").read_bytes()
    outcome = lit_llm("fit", *tiny, "--run_dir", run)
    assert outcome.code == 2
    assert outcome.last_line == (
        f"lit-llm: error: run_dir must be a new folder, but {run} holds a run; go on with --ckpt_path last, or choose "
        f"another"
    )
    assert (run / "checkpoints/last.ckpt").read_bytes() == before


def test_a_run_folder_with_a_run_is_refused_to_one_that_goes_on_from_another(lit_llm, tiny, run, tmp_path):
    other = tmp_path / "other"
    assert lit_llm("fit", *tiny, "--run_dir", other, "--trainer.max_steps", 3).code == 0
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    outcome = lit_llm("fit", "--run_dir", other, "--ckpt_path", run / "checkpoints/last.ckpt")
    assert outcome.last_line == (
        f"lit-llm: error: run_dir must be a new folder, but {other} holds a run; go on with --ckpt_path last, or choose "
        f"another"
    )
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before
    own = other / "checkpoints" / ".." / "checkpoints" / "last.ckpt"
    outcome = lit_llm("fit", "--run_dir", other, "--ckpt_path", own, "--trainer.max_steps", 4)
    assert outcome.code == 0, outcome.err


def test_a_run_goes_on_under_an_overlay_but_to_no_step_that_is_past_and_no_callback_twice(lit_llm, tiny, tmp_path):
    folder, overlay = tmp_path / "run", REPOSITORY / "configs/strategy/spike_recovery.yaml"
    assert lit_llm("fit", *tiny, "--run_dir", folder, "--trainer.max_steps", 2).code == 0
    again = ["fit", "--run_dir", folder, "--ckpt_path", "last", "--config", overlay, "--trainer.max_steps"]
    outcome = lit_llm(*again, 4)
    assert outcome.code == 0, outcome.err
    assert json.loads((folder / "results.json").read_text())["step"] == 4
    config = (folder / "config.yaml").read_text()
    assert "SpikeRecovery" in config
    assert lit_llm(*again, 6).last_line == (
        "lit-llm: error: trainer.callbacks must have one SpikeRecovery, but have 2; leave out an overlay that the run's "
        "config has already"
    )
    outcome = lit_llm("fit", "--run_dir", folder, "--ckpt_path", "last", "--trainer.max_steps", 3)
    assert outcome.last_line == (
        "lit-llm: error: trainer.max_steps must be at least the checkpoint's step, 4, to go on from it, but is 3"
    )
    assert (folder / "config.yaml").read_text() == config


def test_a_run_that_is_refused_as_its_checkpoint_is_read_keeps_its_config(lit_llm, tiny, tmp_path):
    folder = tmp_path / "run"
    assert lit_llm("fit", *tiny, "--run_dir", folder, "--trainer.max_steps", 2).code == 0
    config = (folder / "config.yaml").read_text()
    on = ["--run_dir", folder, "--ckpt_path", "last", "--trainer.max_steps", 4]
    refused = lit_llm("fit", *on, "--data.tokenizer", "bpe-300")
    assert refused.code == 2
    assert "vocab_size" in refused.last_line
    assert (folder / "config.yaml").read_text() == config
    assert lit_llm("fit", *on).code == 0
    assert "max_steps: 4" in (folder / "config.yaml").read_text()


def test_the_model_of_a_run_is_not_overwritten_where_its_checkpoints_are_gone(lit_llm, tiny, tmp_path):
    (tmp_path / "run/model").mkdir(parents=True)
    outcome = lit_llm("fit", *tiny, "--run_dir", tmp_path / "run")
    assert outcome.code == 2
    assert outcome.last_line == (
        f"lit-llm: error: run_dir must be a new folder, but {tmp_path / 'run'} holds the model of a run; choose another"
    )


def test_a_run_file_in_a_run_folder_is_not_overwritten_by_what_the_run_comes_to(lit_llm, tiny, tmp_path):
    config = tmp_path / "run/config.yaml"
    config.parent.mkdir()
    config.write_text("# By hand.\ntrainer: {max_steps: 2}")
    for words in (["--config", config], []):
        outcome = lit_llm("fit", *tiny, *words, "--run_dir", tmp_path / "run")
        assert outcome.last_line == (
            f"lit-llm: error: run_dir must be a new folder, but {tmp_path / 'run'} holds a config.yaml that no run has "
            f"written; choose another, or rename that file"
        )
    assert config.read_text() == "# By hand.\ntrainer: {max_steps: 2}"


def test_a_run_that_failed_before_it_saved_is_begun_anew_in_its_folder(lit_llm, tiny, tmp_path):
    fit = ["fit", *tiny, "--run_dir", tmp_path / "run", "--trainer.max_steps", 4, "--trainer.log_every_n_steps", 1]
    assert "must be finite" in lit_llm(*fit, "--model.optimizer.lr", 1e30).last_line
    outcome = lit_llm(*fit)
    assert outcome.code == 0, outcome.err


def test_a_model_is_tested_as_often_as_one_likes_in_one_folder(lit_llm, tiny, run, tmp_path):
    for _ in range(2):
        words = ["--model.network", "null", "--model.weights", run / "model", "--run_dir", tmp_path / "tested"]
        outcome = lit_llm("test", *tiny, *words)
        assert outcome.code == 0, outcome.err


def test_a_run_whose_checkpoints_are_gone_is_not_taken_for_what_it_started_from(lit_llm, tiny, run, tmp_path):
    begun = tmp_path / "begun"
    start = ["--model.network", "null", "--model.weights", run / "model", "--trainer.max_steps", "1"]
    assert lit_llm("fit", *tiny, *start, "--run_dir", begun).code == 0
    shutil.rmtree(begun / "checkpoints")
    before = (begun / "results.json").read_bytes()
    for command in ("validate", "test", "predict"):
        outcome = lit_llm(command, "--run_dir", begun)
        assert outcome.code == 2
        assert outcome.last_line == (
            f"lit-llm: error: ckpt_path must be a checkpoint in {begun / 'checkpoints'} (there: none), but is best"
        )
    assert (begun / "results.json").read_bytes() == before
    assert not (begun / "predictions.csv").exists()


def test_a_run_that_started_from_weights_is_evaluated_by_its_config_rather_than_they(
    lit_llm, tiny, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = [*tiny, "--model.network", "null", "--model.weights", run / "model", "--run_dir", tmp_path / "onward"]
    assert lit_llm("fit", *words).code == 0
    results = json.loads((tmp_path / "onward/results.json").read_text())
    outcome = lit_llm("test", "--config", tmp_path / "onward/config.yaml")
    assert outcome.code == 0, outcome.err
    assert f"{results['test/loss']:.4f}" in outcome.out
    assert not (tmp_path / "runs").exists()


def test_a_runs_best_checkpoint_is_not_evaluated_by_the_name_of_its_last(lit_llm, run):
    outcome = lit_llm("test", "--run_dir", run, "--model.weights", run / "checkpoints/last.ckpt")
    assert outcome.code == 2
    assert "where that run's checkpoint is evaluated" in outcome.last_line


def test_weights_in_a_file_that_no_training_left_are_refused_in_one_line(lit_llm, run, tmp_path):
    whole = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    foreign, bare = tmp_path / "foreign.ckpt", tmp_path / "bare.ckpt"
    torch.save({"epoch": 1, "state_dict": whole["state_dict"]}, foreign)
    torch.save({name: part for name, part in whole.items() if name != "optimizer_states"}, bare)
    fit = ("fit", "--config", run / "config.yaml", "--trainer.max_steps", "50", "--run_dir", tmp_path / "on")
    for words in (("test", "--run_dir", run), fit):
        assert lit_llm(*words, "--ckpt_path", foreign).last_line == (
            f"lit-llm: error: ckpt_path must be a checkpoint that Lightning wrote, but {foreign} does not say of which "
            f"version"
        )
    assert lit_llm(*fit, "--ckpt_path", bare).last_line == (
        f"lit-llm: error: ckpt_path must hold the optimiser's state to train on, but {bare} holds none; a new run takes "
        f"its weights with --model.weights {bare}"
    )
    assert not (run / "evaluations").exists()
    assert not (tmp_path / "on").exists()


def test_a_run_does_not_go_on_with_other_weights_than_it_began_with(lit_llm, tiny, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        assert lit_llm("fit", *tiny, "--trainer.max_steps", "2", "--run_dir", folder).code == 0
    outcome = lit_llm("fit", "--run_dir", run, "--ckpt_path", "last", "--model.weights", other / "model")
    assert outcome.code == 2
    assert (
        f"model.weights must be as in {run / 'config.yaml'}, None, where that run's checkpoint is" in outcome.last_line
    )
    assert outcome.last_line.endswith("to start from that, take another --run_dir, and no --ckpt_path")
    assert lit_llm("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", "3").code == 0


def test_a_runs_checkpoint_is_not_evaluated_by_the_name_of_another_model(lit_llm, tiny, run, tmp_path):
    for words in (["--model.weights", tmp_path], [f"--model.init_args.weights={tmp_path}"]):
        for config in ([], tiny):
            outcome = lit_llm("test", *config, "--run_dir", run, *words)
            assert outcome.code == 2
            assert outcome.last_line == (
                f"lit-llm: error: model.weights must be as in {run / 'config.yaml'}, None, where that run's checkpoint "
                f"is evaluated, but is {tmp_path}; to evaluate that, take --config {run / 'config.yaml'} "
                f"--model.network null --model.weights {tmp_path} and another --run_dir"
            )
    other = ["--config", run / "config.yaml", "--model.network", "null", "--model.weights", run / "model"]
    outcome = lit_llm("test", *other, "--run_dir", tmp_path / "other")
    assert outcome.code == 0, outcome.err


def test_a_run_is_evaluated_by_its_own_model_with_and_without_its_checkpoints(lit_llm, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    words = ["test", "--config", copy / "config.yaml", "--run_dir", copy, "--model.weights", f"{copy}/model/"]
    assert lit_llm(*words).code == 0
    with_them = json.loads((copy / "results.json").read_text())["test/loss"]
    shutil.rmtree(copy / "checkpoints")
    outcome = lit_llm(*words, "--model.network", "null")
    assert outcome.code == 0, outcome.err
    found = [json.loads(path.read_text()) for path in copy.rglob("results.json")]
    assert [one["test/loss"] for one in found if "test/loss" in one] == pytest.approx(
        [with_them] * len(found), abs=1e-5
    )


@pytest.mark.slow
def test_going_on_with_more_steps_uses_the_runs_own_config(lit_llm, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert lit_llm("fit", "--run_dir", copy, "--ckpt_path", "last", "--trainer.max_steps", "8").code == 0
    results = json.loads((copy / "results.json").read_text())
    assert results["step"] == 8
    assert results["tokens"] == 8 * 4 * 32
    assert [row["step"] for row in read_metrics(copy / "metrics.csv")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_an_explicit_flag_beats_what_a_checkpoint_stores(lit_llm, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    words = ["--run_dir", copy, "--ckpt_path", "last", "--trainer.max_steps", "7"]
    assert (
        lit_llm(
            "fit",
            *words,
            "--model.optimizer.lr",
            "0.5",
            "--model.schedule",
            "lit_llm.schedulers.Constant",
            "--model.schedule.warmup_steps",
            "0",
        ).code
        == 0
    )
    rows = read_metrics(copy / "metrics.csv")
    assert rows[-1]["train/learning_rate"] == 0.5


@pytest.mark.parametrize(("warmup", "is_cut"), [(4, True), (3, False)])
def test_a_warm_up_that_does_not_fit_into_the_run_is_said_to_be_cut(lit_llm, tiny, tmp_path, warmup, is_cut):
    words = [*tiny, "--trainer.max_steps", "6", "--trainer.limit_val_batches", "0", "--run_dir", tmp_path / "run"]
    outcome = lit_llm("fit", *words, "--model.schedule.warmup_steps", warmup)
    assert outcome.code == 0, outcome.err
    assert (
        "The warm-up of 4 steps is cut to half of the run's 6; few examples need more epochs" in outcome.err
    ) == is_cut


@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_a_checkpoint_is_measured_as_it_was_in_training(lit_llm, run, command, split, capsys):
    outcome = lit_llm(command, "--run_dir", run, "--ckpt_path", "best")
    assert outcome.code == 0, outcome.err
    results = json.loads((run / "results.json").read_text())
    wanted = results[f"best/{split}/loss" if split == "val" else "test/loss"]
    assert f"{wanted:.4f}"[:5] in outcome.out


def test_predict_scores_each_document_of_the_test_split(lit_llm, run):
    import csv

    assert lit_llm("predict", "--run_dir", run, "--ckpt_path", "best").code == 0
    rows = list(csv.DictReader((run / "predictions.csv").open(encoding="utf-8")))
    (run / "predictions.csv").unlink()
    results = json.loads((run / "results.json").read_text())
    size = sum(int(row["bytes"]) for row in rows)
    bits = sum(float(row["bits_per_byte"]) * int(row["bytes"]) for row in rows)
    assert bits / size == pytest.approx(results["test/bits_per_byte"], rel=1e-3)


def test_print_config_shows_what_a_run_comes_to(lit_llm, tiny):
    outcome = lit_llm("fit", *tiny, "--model.network.d_ff", "48", "--print_config")
    assert outcome.code == 0
    config = yaml.safe_load(outcome.out)
    network = config["model"]["init_args"]["network"]
    assert network["class_path"] == "lit_llm.models.llama.Llama"
    assert network["init_args"]["d_ff"] == 48


def test_a_second_config_is_laid_over_the_first(lit_llm, tiny, tmp_path):
    (tmp_path / "over.yaml").write_text("trainer:\n  max_steps: 77\n")
    outcome = lit_llm("fit", *tiny[:2], "--config", tmp_path / "over.yaml", "--print_config")
    assert yaml.safe_load(outcome.out)["trainer"]["max_steps"] == 77


def test_a_mixture_of_corpora_is_one_run(lit_llm, tiny, texts, corpus, tmp_path):
    mixture, folder = {f"{texts}/": 3, str(corpus): 1}, tmp_path / "run"
    outcome = lit_llm("fit", *tiny, "--data.path", json.dumps(mixture), "--run_dir", folder)
    assert outcome.code == 0, outcome.err
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]["path"] == mixture
    results = json.loads((folder / "results.json").read_text())
    for split in ("best/val", "val", "test"):
        for metric in ("loss", "bits_per_byte"):
            low, high = sorted(results[f"{split}/{str(path).strip('/')}/{metric}"] for path in mixture)
            assert low < results[f"{split}/{metric}"] < high
    assert f'"weights": {{\n    "{texts}/": 3.0,' in (folder / "model/README.md").read_text()
    again = lit_llm("fit", "--config", folder / "config.yaml", "--run_dir", tmp_path / "again")
    assert again.code == 0, again.err
    repeated = json.loads((tmp_path / "again/results.json").read_text())
    assert all(repeated[name] == value for name, value in results.items() if name.startswith("best/val"))
    for path, wrong in (({str(texts): "x"}, f"{texts} has 'x'"), ({str(texts): 0}, f"{texts} has 0")):
        refused = lit_llm("fit", *tiny, "--data.path", json.dumps(path), "--run_dir", tmp_path / "refused")
        assert refused.last_line.endswith(f"data.path must give each source a finite weight above 0, but {wrong}")


def test_classes_of_the_working_directory_can_be_named(lit_llm, tiny, tmp_path, monkeypatch):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/narrow.py").write_text(
        "from lit_llm.models.llama import Llama\n\n\nclass Narrow(Llama):\n"
        "    def __init__(self, vocab_size: int):\n        super().__init__(vocab_size, d_model=8, num_layers=1)\n"
    )
    words = [
        word.replace("configs/", f"{REPOSITORY}/configs/") if word.startswith("configs/") else word for word in tiny
    ]
    words = [
        w
        for i, w in enumerate(words)
        if not (w.startswith("--model.network") or words[i - 1].startswith("--model.network"))
    ]
    (tmp_path / "narrow.yaml").write_text(
        "model:\n  init_args:\n    network: {class_path: experiments.narrow.Narrow}\n"
    )
    monkeypatch.chdir(tmp_path)
    import sys

    monkeypatch.delitem(sys.modules, "experiments", raising=False)
    outcome = lit_llm("fit", *words, "--config", "narrow.yaml", "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err


def test_a_run_without_validation_still_ends_with_a_model(lit_llm, tiny, tmp_path):
    outcome = lit_llm("fit", *tiny, "--data.validation_fraction", "0", "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run/model/model.safetensors").exists()
    tested = json.loads((tmp_path / "run/results.json").read_text())["test/loss"]
    outcome = lit_llm("test", "--run_dir", tmp_path / "run")  # tests the only checkpoint, last.ckpt
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "run/evaluations").exists()
    assert json.loads((tmp_path / "run/results.json").read_text())["test/loss"] == pytest.approx(tested)
    assert lit_llm("predict", "--run_dir", tmp_path / "run").code == 0
    shutil.rmtree(tmp_path / "run/model")
    assert isinstance(load_model(tmp_path / "run")[0], Llama)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("--trainer.max_steps 5 --trainer.val_check_interval 4", [4, 5]),
        (
            "--trainer.max_steps -1 --trainer.max_epochs 2 --trainer.limit_train_batches 5 "
            "--trainer.check_val_every_n_epoch 1 --trainer.val_check_interval 3",
            [3, 8, 10],
        ),
        (
            "--trainer.max_steps -1 --trainer.max_epochs 3 --trainer.limit_train_batches 2 "
            "--trainer.check_val_every_n_epoch 2 --trainer.val_check_interval 1.0",
            [4, 6],
        ),
    ],
)
def test_the_last_step_is_validated_wherever_the_interval_falls(lit_llm, tiny, tmp_path, words, steps):
    outcome = lit_llm("fit", *tiny, *words.split(), "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert validated(tmp_path / "run") == steps
    assert json.loads((tmp_path / "run/results.json").read_text())["finished"]


def validated(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run / "metrics.csv") if "val/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("every", [5, 100])
def test_a_run_by_epochs_that_ended_between_two_validations_is_resumed_at_its_end(lit_llm, tiny, tmp_path, every):
    words = f"--checkpoint.every_n_steps {every} --trainer.max_steps -1 --trainer.max_epochs 2 --trainer.limit_train_batches 5"
    words += " --trainer.check_val_every_n_epoch 1 --trainer.val_check_interval 3"
    assert lit_llm("fit", *tiny, *words.split(), "--run_dir", tmp_path / "run").code == 0
    again = ("fit", "--run_dir", tmp_path / "run", "--ckpt_path", "last")
    assert lit_llm(*again).code == 0
    assert validated(tmp_path / "run") == [3, 8, 10]
    assert lit_llm(*again, "--trainer.max_epochs", "3").code == 0
    assert validated(tmp_path / "run") == [3, 8, 10, 13, 15]
    rows = read_metrics(tmp_path / "run/metrics.csv")
    assert max(row["step"] for row in rows) == 15


def test_fast_dev_run_writes_nothing_but_an_empty_folder(lit_llm, tiny, tmp_path):
    assert lit_llm("fit", *tiny, "--trainer.fast_dev_run", "true", "--run_dir", tmp_path / "run").code == 0
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "config.yaml"]


def test_a_profiler_by_name_reports_to_the_run_folder(lit_llm, tiny, tmp_path):
    outcome = lit_llm("fit", *tiny, "--trainer.profiler", "simple", "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert f"{tmp_path}/run/*-profile*.txt" in outcome.err
    for stage, step in (("fit", "training_step"), ("test", "test_step")):
        assert step in (tmp_path / f"run/{stage}-profile.txt").read_text()


@pytest.mark.slow
def test_wandb_joins_by_one_overlay_and_stays_in_the_run_folder(lit_llm, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    overlay = REPOSITORY / "configs/logging/wandb.yaml"
    outcome = lit_llm("fit", *tiny, "--config", overlay, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert (tmp_path / "run/metrics.csv").exists()


@pytest.mark.parametrize(("command", "split"), [("validate", "validation"), ("test", "test"), ("predict", "test")])
def test_an_evaluation_of_nothing_is_refused(lit_llm, run, tmp_path, command, split):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    outcome = lit_llm(command, "--run_dir", copy, "--data.validation_fraction", 0, "--data.test_fraction", 0)
    assert outcome.code == 2
    assert outcome.last_line == (
        f"lit-llm: error: data must have a {split} split for lit-llm {command}, but have none to read; set "
        f"data.{split}_fraction"
    )
    assert json.loads((copy / "results.json").read_text()) == json.loads((run / "results.json").read_text())


def test_lightnings_own_loggers_write_into_the_run_folder_and_the_run_is_read_again(lit_llm, tiny, tmp_path):
    kinds = ("CSVLogger", "TensorBoardLogger")
    loggers = [{"class_path": f"lightning.pytorch.loggers.{kind}", "init_args": {"save_dir": "."}} for kind in kinds]
    (tmp_path / "loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    run, again = tmp_path / "run", tmp_path / "again"
    short = ["--trainer.max_steps", 2, "--test_after_fit", "false"]
    outcome = lit_llm("fit", *tiny, *short, "--config", tmp_path / "loggers.yaml", "--run_dir", run)
    assert outcome.code == 0, outcome.err
    for words in (
        ("test", "--run_dir", run),
        ("fit", "--run_dir", run, "--ckpt_path", "last", "--trainer.max_steps", 3),
        ("fit", "--config", run / "config.yaml", "--run_dir", again, *short),
    ):
        outcome = lit_llm(*words)
        assert outcome.code == 0, outcome.err
    for folder in (run, again):
        assert list(folder.rglob("lightning_logs/version_0/metrics.csv"))


def test_a_network_that_cannot_write_trains_without_samples(lit_llm, tiny, tmp_path, monkeypatch):
    (tmp_path / "readers.py").write_text(
        "from torch import nn\n\n\nclass Reader(nn.Sequential):\n    def __init__(self, vocab_size: int):\n"
        "        super().__init__(nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size))\n\n"
        "    def forward(self, input_ids, **_):\n        return super().forward(input_ids)\n"
    )
    words = [REPOSITORY / word if str(word).startswith("configs/") else word for word in tiny]
    words = [
        w for i, w in enumerate(words) if not any("--model.network" in str(x) for x in words[max(0, i - 1) : i + 1])
    ]
    monkeypatch.chdir(tmp_path)
    outcome = lit_llm("fit", *words, "--model.network", "readers.Reader", "--run_dir", "run")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("No samples: a Reader has no new_cache to write texts with") == 1
    assert not (tmp_path / "run/samples.txt").exists()


def test_what_another_evaluation_finds_is_not_taken_for_the_runs_own(lit_llm, run, tmp_path):
    copy, before = tmp_path / "copy", json.loads((run / "results.json").read_text())
    shutil.copytree(run, copy)
    outcome = lit_llm("test", "--run_dir", copy, "--data.batch_size", "8")
    assert outcome.code == 0, outcome.err
    assert not (copy / "evaluations").exists()
    for more in (["--trainer.limit_test_batches", "1"], ["--ckpt_path", "last"], ["--data.test_fraction", "0.3"]):
        outcome = lit_llm("test", "--run_dir", copy, *more)
        assert outcome.code == 0, outcome.err
        assert "Data, options or checkpoint are not the run's own, so what is found goes to" in outcome.err
    after = json.loads((copy / "results.json").read_text())
    assert {
        name: pytest.approx(value, rel=1e-5) if "test/" in name else value for name, value in before.items()
    } == after
    found = [json.loads(path.read_text()) for path in (copy / "evaluations").glob("test-*/results.json")]
    assert len(found) == 3
    assert all("test/loss" in each and " test " in each["command"] for each in found)
    outcome = lit_llm("test", "--run_dir", copy, "--trainer.limit_test_batches", "1")
    assert len(list((copy / "evaluations").iterdir())) == 3


@pytest.fixture(scope="module")
def two_corpora(tmp_path_factory) -> tuple[Path, Path]:
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    for folder, text in zip(folders, ("a quick brown fox, number {0}", "encore une fois, et {0} fois de plus")):
        for n in range(40):
            (folder / f"{n}.txt").write_text(text.format(n))
    return folders


def test_other_texts_are_read_with_the_runs_tokeniser_not_one_learnt_from_them(lit_llm, tiny, two_corpora, tmp_path):
    own, other = two_corpora
    run = tmp_path / "run"
    learnt = ["--data.path", own, "--data.tokenizer", "bpe-280", "--data.seq_len", 8, "--test_after_fit", "false"]
    outcome = lit_llm("fit", *tiny, *learnt, "--run_dir", run)
    assert outcome.code == 0, outcome.err
    for command in ("validate", "test", "predict"):
        outcome = lit_llm(command, "--run_dir", run, "--data.path", other)
        assert outcome.code == 0, outcome.err
    [found] = (run / "evaluations").glob("test-*/results.json")
    outcome = lit_llm("test", "--run_dir", run, "--data.path", other, "--data.tokenizer", run / "model")
    assert outcome.code == 0, outcome.err
    [named] = set((run / "evaluations").glob("test-*/results.json")) - {found}
    assert json.loads(found.read_text())["test/loss"] == json.loads(named.read_text())["test/loss"]
    refused = lit_llm("test", "--run_dir", run, "--data.path", other, "--data.tokenizer", "bpe-270")
    assert "vocab_size must be that of the checkpoint" in refused.last_line


@pytest.mark.parametrize("command", ["test", "validate"])
def test_measuring_a_run_leaves_its_metrics_alone(lit_llm, run, command):
    before = (run / "metrics.csv").read_bytes()
    assert lit_llm(command, "--ckpt_path", run / "checkpoints/best.ckpt").code == 0
    assert (run / "metrics.csv").read_bytes() == before


def test_going_on_with_another_batch_size(lit_llm, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    words = ["--run_dir", copy, "--ckpt_path", "last", "--trainer.max_steps", "8", "--data.batch_size", "40"]
    outcome = lit_llm("fit", *words)
    assert outcome.code == 0, outcome.err
    assert read_metrics(copy / "metrics.csv")[-1]["step"] == 8


def test_a_callback_whose_default_is_of_an_enumeration_can_be_named_and_named_again(lit_llm, tiny, tmp_path):
    words = [*tiny, "--run_dir", tmp_path / "run", "--trainer.max_steps", "2"]
    timer = ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration", "00:01:00:00"]
    outcome = lit_llm("fit", *words, *timer)
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    [*_, timer] = config["trainer"]["callbacks"]
    assert timer["init_args"] == {"duration": "00:01:00:00", "interval": "step", "verbose": True}
    words = ["--run_dir", tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps", "4"]
    assert lit_llm("fit", *words).code == 0


def test_a_run_may_end_by_the_clock_alone(lit_llm, tiny, tmp_path):
    words = [*tiny, "--trainer.max_steps", "-1", "--trainer.max_time", "00:00:00:01", "--run_dir", tmp_path / "run"]
    outcome = lit_llm("fit", *words)
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "run/results.json").read_text())["step"] > 0
    assert "inf" not in outcome.err
    outcome = lit_llm(
        "fit", *words[:-1], tmp_path / "other", "--config", REPOSITORY / "configs/compression/pruning.yaml"
    )
    assert outcome.err.splitlines()[-1] == (
        "lit-llm: error: trainer.max_steps or trainer.max_epochs must be given where something begins after 10% of the "
        "run, but both are -1"
    )


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["enable_progress_bar", "enable_checkpointing"])
def test_the_trainers_own_switches_are_obeyed(lit_llm, tiny, tmp_path, flag):
    outcome = lit_llm("fit", *tiny, f"--trainer.{flag}", "false", "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run/checkpoints").exists() == (flag == "enable_progress_bar")


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_help_says_what_for_and_shows_examples_before_it_lists_the_options(lit_llm, command):
    outcome = lit_llm(command, "--help")
    assert "\n  lit-llm fit --config configs/pretraining/llama_stdlib.yaml\n" in outcome.out
    usage, _, what = outcome.out.splitlines()[:3]
    assert (usage, what) == (
        f"usage: lit-llm {command} [--config FILE]... [--dotted.name VALUE]...",
        COMMANDS[command][1].capitalize() + ".",
    )


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(lit_llm, tiny, tmp_path):
    """The rows of a step, split over two processes, give the same losses; each validation row is counted once."""
    import os
    import subprocess
    import sys

    assert lit_llm("fit", *tiny, "--run_dir", tmp_path / "one").code == 0
    words = [*tiny, "--data.batch_size", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    words += ["--trainer.strategy", "ddp", "--run_dir", tmp_path / "two"]

    def by_two(*command: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "lit_llm", command[0], *words, *command[1:]],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr

    by_two("fit")
    one, two = (read_metrics(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert len(one) == len(two)
    for mine, theirs in zip(one, two, strict=True):
        for metric in ("train/loss", "val/loss", "val/bits_per_byte"):
            assert (metric in mine) == (metric in theirs)
            assert mine.get(metric, 0.0) == pytest.approx(theirs.get(metric, 0.0), rel=1e-4), metric
    by_two("test", "--data.test_fraction", "0.3")
    [other] = (tmp_path / "two/evaluations").iterdir()
    assert json.loads((other / "results.json").read_text())["test/loss"] > 0


def test_a_run_of_a_network_that_transformers_does_not_know_leaves_all_but_a_model_directory(lit_llm, tiny, tmp_path):
    run = tmp_path / "run"
    network = ("--model.network", "lit_llm.models.recurrent.LSTM", "--model.network.d_model", "16")
    outcome = lit_llm("fit", *tiny, *network, "--trainer.max_steps", "2", "--run_dir", run)
    assert outcome.code == 0, outcome.err
    assert "No model directory: transformers has no class for a LSTM" in outcome.err
    assert {"results.json", "learning_curve.png", "samples.txt"} <= {path.name for path in run.iterdir()}
    assert not (run / "model").exists()
    assert lit_llm("generate", "--model", run, "--prompt", "the", "--max_new_tokens", "2").code == 0


def test_only_hooks_that_do_nothing_are_passed_over_in_a_step() -> None:
    from lightning.pytorch.callbacks import Callback, LambdaCallback

    from lit_llm.cli.lean_loop import HOOKS_OF_A_STEP, skip_empty_hooks

    class Counting(Callback):
        def on_train_batch_end(self, *args: object) -> None: ...

    own, given = Counting(), LambdaCallback(on_after_backward=print)
    for callback in (own, given):
        skip_empty_hooks(callback, Callback)
    kept = [{name for name in HOOKS_OF_A_STEP if getattr(callback, name)} for callback in (own, given)]
    assert kept == [{"on_train_batch_end"}, {"on_after_backward"}]


@pytest.mark.slow
def test_a_notebook_is_told_nothing_and_asks_for_the_results(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py"])
    words = ["fit", *tiny, "--run_dir", str(tmp_path / "run"), "--trainer.enable_progress_bar", "false"]
    fitted = training.run(words, summary=False)
    assert capsys.readouterr().out == ""
    assert fitted.results == json.loads((fitted.run_dir / "results.json").read_text())
    assert {"val/loss", "test/loss", "seconds"} <= fitted.results.keys()


def test_data_without_a_test_split_of_their_own_are_not_tested():
    class Spirals(LightningDataModule):
        pass

    class Tested(Spirals):
        def test_dataloader(self):
            return [1]

    has_test = [TrainingCLI._has_test(SimpleNamespace(datamodule=kind())) for kind in (Spirals, Tested)]
    assert has_test == [False, True]
