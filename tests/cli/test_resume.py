from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lit_llm.callbacks.metrics_csv import read_metrics
from lit_llm.callbacks.samples import STEP
from lit_llm.checkpoint_files import read_checkpoint
from tests.writing import REPOSITORY

STEPS = 14  # past the end of an epoch
ASYNC = ["--config", str(REPOSITORY / "configs/strategy/async_checkpoints.yaml")]

EPOCHS = ["--trainer.max_steps=-1", "--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=1"]
EPOCHS += ["--test_after_fit=false", "--trainer.max_epochs"]


class Crash(Callback):
    """Fails at a step, after the checkpoint of an earlier one."""

    def __init__(self, step: int = 8) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_metrics(run / "metrics.csv") if "train/loss" in row}


@pytest.mark.parametrize(
    ("optimizer", "accumulate", "every", "report"),
    [
        ("lit_llm.optimizers.Muon", 3, 6, 4),  # there is also a validation at step 6
        pytest.param("lit_llm.optimizers.Muon", 1, 5, 1, marks=pytest.mark.slow),
        pytest.param("torch.optim.AdamW", 3, 5, 1, marks=pytest.mark.slow),
        pytest.param("torch.optim.SGD", 1, 6, 4, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_has_the_losses_of_one_never_stopped(
    lit_llm, tiny, tmp_path, optimizer, accumulate, every, report
):
    words = [
        *tiny,
        "--trainer.max_steps",
        STEPS,
        "--model.optimizer",
        optimizer,
        *(["--model.optimizer.lr", "0.01"] if optimizer.endswith("SGD") else []),
        "--checkpoint.every_n_steps",
        every,
        "--trainer.accumulate_grad_batches",
        accumulate,
        "--test_after_fit",
        "false",
        "--trainer.log_every_n_steps",
        report,
    ]
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "whole").code == 0
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--trainer.callbacks+=tests.cli.test_resume.Crash")
    assert (tmp_path / "cut/checkpoints/last.ckpt").exists()
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert sorted(whole) == sorted({*range(report, STEPS + 1, report), STEPS})
    assert cut == whole
    validations = [
        [row for row in read_metrics(tmp_path / run / "metrics.csv") if "val/loss" in row] for run in ("whole", "cut")
    ]
    kept = [[(r["step"], r["val/loss"]) for r in rows] for rows in validations]
    assert kept[0] == kept[1] != []
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "cut")]
    assert results[0]["best/step"] == results[1]["best/step"]


def test_a_resumed_run_drops_what_one_never_stopped_drops(lit_llm, tiny, tmp_path):
    """With dropout, whose random state no checkpoint stores; a validation in between does not change the losses."""
    words = [*tiny, "--model.network", "lit_llm.models.gpt2.GPT2", "--model.network.dropout", "0.3"]
    words += ["--trainer.max_steps", STEPS, "--checkpoint.every_n_steps", "5", "--trainer.log_every_n_steps", "1"]
    words += ["--test_after_fit", "false", "--trainer.accumulate_grad_batches", "2"]
    runs = {"whole": [], "cut": ["--trainer.callbacks+=tests.cli.test_resume.Crash"], "other": ["--seed_everything=7"]}
    for run, more in runs.items():
        if run == "cut":
            with pytest.raises(RuntimeError, match="crash"):
                lit_llm("fit", *words, *more, "--run_dir", tmp_path / run)
            more = ["--ckpt_path", "last"]
        outcome = lit_llm("fit", *words, *more, "--run_dir", tmp_path / run)
        assert outcome.code == 0, outcome.err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") != losses(tmp_path / "other")


class Saves(Callback):
    """Records the steps at which checkpoints are written."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        with self.path.open("a") as file:
            file.write(f"{trainer.global_step}\n")


def test_without_a_validation_split_checkpoints_are_written_all_the_same(lit_llm, tiny, tmp_path):
    words = [*tiny, "--data.validation_fraction", "0", "--trainer.max_steps", "9", "--trainer.val_check_interval", "2"]
    words += ["--checkpoint.every_n_steps", "4", "--trainer.callbacks+", "tests.cli.test_resume.Saves"]
    outcome = lit_llm("fit", *words, "--trainer.callbacks.path", tmp_path / "steps", "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "steps").read_text().split() == ["4", "8", "9"]


def test_patience_goes_on_where_it_was_also_at_an_epochs_end(lit_llm, reviews, tmp_path):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["--config", REPOSITORY / "configs/finetuning/encoder_glue.yaml", "--data.path", reviews]
    words += ["--config", REPOSITORY / "configs/adaptation/early_stopping.yaml", "--trainer.val_check_interval", "1.0"]
    words += ["--model.network.config", json.dumps({"model_type": "bert", **size}), "--data.tokenizer", "bert-bpe-300"]
    words += ["--model.optimizer.lr", "0", "--data.max_seq_len", "32", "--data.batch_size", "4"]
    words += ["--test_after_fit", "false", "--trainer.max_epochs", "9", "--checkpoint.every_n_steps", "1"]
    ends = []
    for run, more in (("whole", []), ("cut", ["--trainer.max_epochs", "2"])):
        outcome = lit_llm("fit", *words, *more, "--run_dir", tmp_path / run)
        assert outcome.code == 0, outcome.err
        ends.append(max(row["step"] for row in read_metrics(tmp_path / run / "metrics.csv")))
    assert ends[0] == 2 * ends[1]  # the first of four validations is the best; the next three are no better
    outcome = lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last")
    assert outcome.code == 0, outcome.err
    assert max(row["step"] for row in read_metrics(tmp_path / "cut/metrics.csv")) == ends[0]


def test_epochs_of_a_limited_number_of_batches_are_all_as_long(lit_llm, tiny, tmp_path):
    words = [*tiny, *EPOCHS, "3", "--trainer.limit_train_batches", "60", "--trainer.limit_val_batches", "1"]
    words += ["--trainer.accumulate_grad_batches", "8", "--trainer.log_every_n_steps", "1"]
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "whole").code == 0
    rows = read_metrics(tmp_path / "whole/metrics.csv")
    assert [row["step"] for row in rows if "val/loss" in row] == [8, 16, 24]  # of 137 batches: 60, 60, and 17 + 43
    crash = ["--trainer.callbacks+=tests.cli.test_resume.Crash", "--trainer.callbacks.step=21"]
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm("fit", *words, "--checkpoint.every_n_steps", "20", "--run_dir", tmp_path / "cut", *crash)
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_run_goes_on_with_its_own_network_config_alone(lit_llm, reviews, tmp_path):
    size = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    words = ["--config", REPOSITORY / "configs/finetuning/encoder_glue.yaml", "--data.path", reviews]
    words += ["--data.tokenizer", "bert-bpe-300", "--data.max_seq_len", "32", "--test_after_fit", "false"]
    words += ["--run_dir", tmp_path / "run", "--trainer.max_epochs", "-1"]
    own = ["--model.network.config", json.dumps({**size, "num_hidden_layers": 1})]
    other = ["--model.network.config", json.dumps({**size, "num_hidden_layers": 3})]
    assert lit_llm("fit", *words, *own, "--trainer.max_steps", "2").code == 0
    on = ["--trainer.max_steps", "3", "--ckpt_path", "last"]
    for config in (other, ["--model.network.config.num_hidden_layers", "3"]):
        outcome = lit_llm("fit", *words, *config, *on)
        assert outcome.code == 2
        assert f"model.network.config must be as in {tmp_path / 'run/config.yaml'} where" in outcome.last_line
    for steps in ("3", "4"):
        outcome = lit_llm("fit", *words, *own, "--trainer.max_steps", steps, "--ckpt_path", "last")
        assert outcome.code == 0, outcome.err


class Results(Callback):
    """Copies results.json after each batch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.path.write_text((Path(trainer.default_root_dir) / "results.json").read_text())


def test_a_run_that_is_extended_is_not_finished_meanwhile_nor_has_it_the_test_of_before(lit_llm, tiny, tmp_path):
    run = tmp_path / "run"
    assert lit_llm("fit", *tiny, "--run_dir", run).code == 0
    before = json.loads((run / "results.json").read_text())
    assert before["finished"]
    assert "test/loss" in before
    words = ["--trainer.max_steps", "9", "--test_after_fit", "false"]
    words += ["--trainer.callbacks+", "tests.cli.test_resume.Results", "--trainer.callbacks.path", tmp_path / "x.json"]
    assert lit_llm("fit", "--run_dir", run, "--ckpt_path", "last", *words).code == 0
    assert not json.loads((tmp_path / "x.json").read_text())["finished"]
    after = json.loads((run / "results.json").read_text())
    assert after["finished"]
    assert after["step"] == 9
    assert "test/loss" not in after
    assert "test/loss" not in (run / "model/README.md").read_text()


def test_what_was_best_is_so_still_where_the_run_folder_was_moved(lit_llm, tiny, tmp_path):
    words = [*tiny, "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "first").code == 0
    (tmp_path / "first").rename(tmp_path / "second")
    worse = ["--model.optimizer.lr", "1000", "--trainer.max_steps", "9", "--test_after_fit", "false"]
    outcome = lit_llm("fit", "--run_dir", tmp_path / "second", "--ckpt_path", "last", *worse)
    assert outcome.code == 0, outcome.err
    results = json.loads((tmp_path / "second/results.json").read_text())
    assert results["val/loss"] > results["best/val/loss"]
    assert read_checkpoint(tmp_path / "second/checkpoints/best.ckpt")["global_step"] == results["best/step"] == 6
    card = (tmp_path / "second/model/README.md").read_text()  # whose weights are the best ones
    assert (
        f"| metric, at step 6 | value |\n| --- | ---: |\n| val/bits_per_byte | {results['best/val/bits_per_byte']:.4f} |"
        in card
    )
    onward = ["--ckpt_path", tmp_path / "second/checkpoints/last.ckpt", "--trainer.max_steps", "12"]
    outcome = lit_llm("fit", "--config", tmp_path / "second/config.yaml", *onward, "--run_dir", tmp_path / "third")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "third/results.json").read_text())["best/step"] == 12  # the best of its own folder


def test_what_was_best_is_judged_by_the_metric_that_a_run_goes_on_with(lit_llm, tiny, tmp_path):
    run = tmp_path / "run"
    words = [*tiny, "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--test_after_fit", "false"]
    assert lit_llm("fit", *words, "--checkpoint.monitor", "val/loss", "--run_dir", run).code == 0
    worse = ["--model.optimizer.lr", "1000", "--trainer.max_steps", "9", "--checkpoint.monitor", "val/perplexity"]
    outcome = lit_llm("fit", "--run_dir", run, "--ckpt_path", "last", *worse)
    assert outcome.code == 0, outcome.err
    results = json.loads((run / "results.json").read_text())
    assert results["monitor"] == "val/perplexity"
    assert results["val/perplexity"] > results["best/val/perplexity"]
    assert read_checkpoint(run / "checkpoints/best.ckpt")["global_step"] == results["best/step"] == 6


def test_a_run_goes_on_with_its_own_optimiser_and_adaptation_alone(lit_llm, tiny, tmp_path):
    run = tmp_path / "run"
    words = [*tiny, "--test_after_fit", "false", "--trainer.max_steps", "3", "--run_dir", run]
    words += ["--model.network.num_layers", "2"]
    assert lit_llm("fit", *words, "--model.optimizer", "torch.optim.Adam").code == 0
    onward = [*words, "--ckpt_path", "last", "--trainer.max_steps", "6"]
    for option, value, message in (
        ("optimizer", "lit_llm.optimizers.Muon", "that of the checkpoint, torch.optim.Adam, but is Muon"),
        ("adaptation", "lit_llm.adaptation.LayerDecay", "train what the checkpoint's optimiser has, groups of ["),
    ):
        same = ["--model.optimizer", "torch.optim.Adam"]
        outcome = lit_llm("fit", *onward, *same, f"--model.{option}", value)
        assert outcome.code == 2, outcome.err
        assert f"model.{option} must {'be ' * (option == 'optimizer')}{message}" in outcome.last_line
        assert outcome.last_line.endswith("; a new run takes its weights with --model.weights")
    outcome = lit_llm("fit", *onward, "--model.optimizer", "torch.optim.AdamW")  # its state has the form of Adam's
    assert outcome.code == 0, outcome.err


class Fail(Callback):
    """Fails before the first step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise RuntimeError("before the first step")


def test_a_finished_run_stays_so_where_going_on_fails_before_its_first_step(lit_llm, tiny, tmp_path):
    run = tmp_path / "run"
    words = [*tiny, "--test_after_fit", "false", "--run_dir", run]
    assert lit_llm("fit", *words).code == 0
    before = (run / "results.json").read_text()
    onward = [*words, "--ckpt_path", "last", "--trainer.max_steps", "12"]
    with pytest.raises(RuntimeError, match="before the first step"):
        lit_llm("fit", *onward, "--trainer.callbacks+=tests.cli.test_resume.Fail")
    assert (run / "results.json").read_text() == before
    with pytest.raises(RuntimeError, match="crash"):
        lit_llm("fit", *onward, "--trainer.callbacks+=tests.cli.test_resume.Crash")
    assert json.loads((run / "results.json").read_text())["finished"] is False


def test_a_run_that_stopped_early_stays_so_until_it_is_told_to_be_more_patient(lit_llm, tiny, tmp_path):
    words = [*tiny, "--config", REPOSITORY / "configs/adaptation/early_stopping.yaml", "--trainer.max_steps", "12"]
    run, patience = tmp_path / "run", ["--trainer.callbacks.min_delta", "10", "--trainer.callbacks.patience"]
    assert lit_llm("fit", *words, *patience, "1", "--run_dir", run).code == 0
    before = json.loads((run / "results.json").read_text())
    assert before["step"] == 6  # stopped at the second validation
    outcome = lit_llm("fit", "--run_dir", run, "--ckpt_path", "last")
    assert outcome.code == 0, outcome.err
    assert "val/loss was no better 1 times in a row; to go on, be more patient" in outcome.err
    after = json.loads((run / "results.json").read_text())
    assert {name: after[name] for name in before if name not in ("command", "seconds")} == {
        name: before[name] for name in before if name not in ("command", "seconds")
    }
    outcome = lit_llm("fit", *words, *patience, "2", "--run_dir", run, "--ckpt_path", "last")
    assert outcome.code == 0, outcome.err
    assert json.loads((run / "results.json").read_text())["step"] == 9


class Interrupt(Callback):
    """Presses Ctrl-C before a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("batch", [11, 12])  # the last of step 6, before a validation; the first of step 7
def test_a_run_interrupted_before_a_validation_or_within_a_step_goes_on_exactly(lit_llm, tiny, tmp_path, batch):
    words = [*tiny, "--trainer.max_steps", "9", "--trainer.accumulate_grad_batches", "2", "--test_after_fit", "false"]
    words += ["--trainer.val_check_interval", "6", "--trainer.log_every_n_steps", "1"]
    words += ["--checkpoint.every_n_steps", "1000"]
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "whole").code == 0
    stopped = ["--trainer.callbacks+", "tests.cli.test_resume.Interrupt", "--trainer.callbacks.batch", batch]
    assert lit_llm("fit", *words, *stopped, "--run_dir", tmp_path / "cut").code == 130
    step = read_checkpoint(tmp_path / "cut/checkpoints/last.ckpt")["global_step"]
    assert step == batch // 2 + 1
    assert json.loads((tmp_path / "cut/results.json").read_text())["tokens"] == step * 2 * 4 * 32
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    whole, cut = (read_metrics(tmp_path / run / "metrics.csv") for run in ("whole", "cut"))
    for name in ("train/loss", "val/loss"):
        found = [{row["step"]: row[name] for row in rows if name in row} for rows in (whole, cut)]
        assert found[0] == found[1] != {}, name


# The 328 rows of an epoch make 10 batches of 32, 5 of 64, 20 of 16 or 2 of 128; rows of twice the length, 5 of 32.
@pytest.mark.parametrize(
    ("batch", "change", "validated"),
    [
        (4, ("batch_size", "64"), [5 + 3, 5 + 3 + 5]),
        (8, ("batch_size", "128"), [9 + 1, 9 + 1 + 2]),  # the remaining rows do not fill a batch
        (9, ("batch_size", "64"), [10, 10 + 5]),  # saved after the validation
        (14, ("batch_size", "16"), [10, 15 + 10]),
        (14, ("seq_len", "64"), [10, 15 + 5]),  # the epoch starts again
    ],
)
def test_epochs_go_on_to_their_end_and_validation_with_other_batches(lit_llm, tiny, tmp_path, batch, change, validated):
    run = tmp_path / "run"
    words = [*tiny, *EPOCHS, "2", "--data.batch_size", "32", "--run_dir", run]
    stopped = ["--trainer.callbacks+", "tests.cli.test_resume.Interrupt", "--trainer.callbacks.batch", batch]
    assert lit_llm("fit", *words, *stopped).code == 130
    outcome = lit_llm("fit", *words, "--ckpt_path", "last", f"--data.{change[0]}", change[1])
    assert outcome.code == 0, outcome.err
    assert [row["step"] for row in read_metrics(run / "metrics.csv") if "val/loss" in row] == validated


def test_further_epochs_have_the_losses_of_a_run_that_had_them_from_the_beginning(lit_llm, tiny, tmp_path):
    words = [*tiny, "--model.schedule", "lit_llm.schedulers.Constant", "--model.schedule.warmup_steps", "0"]
    words += ["--data.batch_size", "64"]
    for run, epochs, more in (("whole", 2, []), ("cut", 1, []), ("cut", 2, ["--ckpt_path", "last"])):
        outcome = lit_llm("fit", *words, *EPOCHS, epochs, *more, "--run_dir", tmp_path / run)
        assert outcome.code == 0, outcome.err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "cut")) == 10


class Stop(Callback):
    """Sets `should_stop` after a batch, as a timer does."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop |= trainer.fit_loop.epoch_loop.total_batch_idx == self.batch


def test_a_run_asked_to_stop_within_a_step_stops_after_it_and_goes_on_exactly(lit_llm, tiny, tmp_path):
    words = [*tiny, "--trainer.max_steps", "5", "--trainer.accumulate_grad_batches", "4", "--test_after_fit", "false"]
    words += ["--trainer.val_check_interval", "1000", "--model.schedule", "lit_llm.schedulers.Constant"]
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "whole").code == 0
    stopped = ["--trainer.callbacks+", "tests.cli.test_resume.Stop", "--trainer.callbacks.batch", "9"]
    assert lit_llm("fit", *words, *stopped, "--run_dir", tmp_path / "cut").code == 0
    assert json.loads((tmp_path / "cut/results.json").read_text())["step"] == 3  # batches 8 to 11
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("step", [3, 5, 8])
def test_a_run_that_stops_within_an_epoch_goes_on_within_it(lit_llm, tiny, tmp_path, step, asked):
    words = [*tiny, *EPOCHS, "3", "--data.batch_size", "64", "--model.schedule", "lit_llm.schedulers.Constant"]
    words += ["--model.schedule.warmup_steps", "0", "--trainer.log_every_n_steps", "1"]
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "whole").code == 0
    assert max(losses(tmp_path / "whole")) == 15
    stopped = ["--trainer.callbacks+", "tests.cli.test_resume.Stop", "--trainer.callbacks.batch", step - 1]
    stopped = stopped if asked else ["--trainer.max_steps", step]
    assert lit_llm("fit", *words, *stopped, "--run_dir", tmp_path / "cut").code == 0
    assert max(losses(tmp_path / "cut")) == step
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    validated = [row["step"] for row in read_metrics(tmp_path / "cut/metrics.csv") if "val/loss" in row]
    assert validated == sorted({5, 10, 15, step})


def test_a_run_goes_on_from_a_validation_within_a_step_at_its_beginning(lit_llm, tiny, tmp_path):
    run = tmp_path / "run"
    words = [*tiny, "--trainer.max_steps", "4", "--trainer.accumulate_grad_batches", "4", "--test_after_fit", "false"]
    words += ["--trainer.val_check_interval", "10", "--run_dir", run]
    stopped = ["--trainer.callbacks+", "tests.cli.test_resume.Interrupt", "--trainer.callbacks.batch", "11"]
    assert lit_llm("fit", *words, *stopped).code == 130
    shutil.copy(run / "checkpoints/best.ckpt", tmp_path / "within.ckpt")
    ends, reported = [], []
    for start_from in ("last", tmp_path / "within.ckpt"):
        assert lit_llm("fit", *words, "--ckpt_path", start_from).code == 0
        ends.append(read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"])
        assert json.loads((run / "results.json").read_text())["tokens"] == 4 * 4 * 4 * 32
        sampled = STEP.findall((run / "samples.txt").read_text())
        assert len(sampled) == len(set(sampled)) == 2
        reported.append(losses(run))
        assert sorted(reported[-1]) == [1, 2, 3, 4]
    assert reported[0] == reported[1]
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name]), name


def test_what_a_killed_export_left_half_written_goes(lit_llm, tiny, tmp_path):
    words = ["--run_dir", tmp_path, "--test_after_fit", "false"]
    assert lit_llm("fit", *tiny, *words, "--trainer.max_steps", "1").code == 0
    (tmp_path / ".model-a1b2c3d4/model").mkdir(parents=True)
    (tmp_path / ".model-e5f6a7b8/old").mkdir(parents=True)  # from replacing a complete model
    assert lit_llm("fit", *words, "--ckpt_path", "last", "--trainer.max_steps", "2").code == 0
    assert [path.name for path in tmp_path.glob(".model-*")] == [".model-e5f6a7b8"]


def start(words: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("LIT_LLM_RUN_DIR", None)
    return subprocess.Popen(
        [sys.executable, "-m", "lit_llm", *words],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(run: Path, step: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while max(losses(run), default=0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_losses_it_would_have_had(tiny, tmp_path):
    words = [
        *tiny,
        "--trainer.max_steps",
        "400",
        "--trainer.val_check_interval",
        "400",
        "--checkpoint.every_n_steps",
        "10",
        "--test_after_fit",
        "false",
    ]
    process = start(["fit", *words, "--run_dir", str(tmp_path / "run")])
    wait_for(tmp_path / "run", 25, process)
    process.kill()
    process.wait()
    before = losses(tmp_path / "run")
    again = start(["fit", "--run_dir", str(tmp_path / "run"), "--ckpt_path", "last"])
    _, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    after = losses(tmp_path / "run")
    assert max(after) == 400
    assert before == {step: after[step] for step in before}


def test_ctrl_c_saves_and_says_how_to_go_on(tiny, tmp_path):
    run = tmp_path / "run"
    process = start(
        [
            "fit",
            *tiny,
            "--trainer.max_steps",
            "100000",
            "--trainer.val_check_interval",
            "100000",
            "--checkpoint.every_n_steps",
            "100000",
            "--run_dir",
            str(run),
        ]
    )
    wait_for(run, 5, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert f"To resume: lit-llm fit --run_dir {run} --ckpt_path last" in err
    assert (run / "checkpoints/last.ckpt").exists()
    assert (run / "learning_curve.png").exists()


class InterruptEvaluation(Callback):
    """Presses Ctrl-C during an evaluation outside of `fit`."""

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.state.fn != "fit":
            os.kill(os.getpid(), signal.SIGINT)

    on_validation_batch_start = on_predict_batch_start = on_test_batch_start


def test_who_interrupts_an_evaluation_is_told_how_to_start_it_again_and_nothing_of_the_training(
    lit_llm, tiny, tmp_path
):
    run, stops = tmp_path / "a run", ["--trainer.callbacks+", "tests.cli.test_resume.InterruptEvaluation"]
    handler = signal.getsignal(signal.SIGINT)

    def stopped(*words):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
        try:
            outcome = lit_llm(*words, "--run_dir", run, *stops)
        finally:
            signal.signal(signal.SIGINT, handler)  # Lightning has replaced it
        assert outcome.code == 130, outcome.err
        assert "Traceback" not in outcome.err
        return outcome.last_line

    again = f"To start it again: lit-llm test --run_dir '{run}'"
    assert stopped("fit", *tiny) == f"Stopped before the end of test. {again}"
    assert json.loads((run / "results.json").read_text())["finished"]
    for command in ("validate", "test", "predict"):
        words = f"lit-llm {command} --config '{run}/config.yaml' --run_dir '{run}' {' '.join(stops)}"
        assert stopped(command) == f"Stopped before the end of {command}. To start it again: {words}"


class SlowWrites(Callback):
    """Delays each write until training is two steps further; the checkpoint of step `kills` kills the process."""

    def __init__(self, kills: int = 0) -> None:
        self.kills = kills

    def on_train_start(self, trainer, pl_module):
        write, current = torch.save, threading.current_thread()

        def slowly(checkpoint, path):
            assert threading.current_thread() is not current
            path.write_bytes(b"half")
            until = time.monotonic() + 3
            while trainer.global_step < checkpoint["global_step"] + 2 and time.monotonic() < until:
                time.sleep(0.01)
            if checkpoint["global_step"] == self.kills:
                assert trainer.global_step >= self.kills + 2
                os.kill(os.getpid(), signal.SIGKILL)
            write(checkpoint, path)

        torch.save = slowly


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written_it_goes_on_from_the_one_before(lit_llm, tiny, tmp_path):
    """The resumed run equals, bit for bit, an uninterrupted run with synchronous checkpoints."""
    words = [*tiny, "--trainer.max_steps", STEPS, "--checkpoint.every_n_steps", "5", "--test_after_fit", "false"]
    words += ["--trainer.val_check_interval", "7"]
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "whole").code == 0
    words += ASYNC
    killed = ["--trainer.callbacks+", "tests.cli.test_resume.SlowWrites", "--trainer.callbacks.kills", "10"]
    process = start([str(word) for word in ["fit", *words, *killed, "--run_dir", tmp_path / "cut"]])
    _, err = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, err
    assert max(losses(tmp_path / "cut")) >= 10  # a row is written with the next one, so a step was done during the save
    folder = tmp_path / "cut/checkpoints"
    assert read_checkpoint(folder / "last.ckpt")["global_step"] in (5, 7)  # of the validation, or the one before
    assert any(path.name.startswith(".last.ckpt-") for path in folder.iterdir())
    assert lit_llm("fit", *words, "--run_dir", tmp_path / "cut", "--ckpt_path", "last").code == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt"}
    ends = [read_checkpoint(tmp_path / run / "checkpoints/last.ckpt") for run in ("cut", "whole")]
    for name, weight in ends[0]["state_dict"].items():
        assert torch.equal(weight, ends[1]["state_dict"][name]), name
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("cut", "whole")]
    assert results[0]["best/step"] == results[1]["best/step"]
    assert results[0]["val/loss"] == results[1]["val/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_a_run_has_its_checkpoint_when_it_ends(tiny, tmp_path, number):
    run = tmp_path / "run"
    words = [*tiny, *ASYNC, "--trainer.callbacks+", "tests.cli.test_resume.SlowWrites"]
    words += ["--trainer.max_steps", "100000", "--trainer.val_check_interval", "100000"]
    process = start(["fit", *words, "--checkpoint.every_n_steps", "100000", "--run_dir", str(run)])
    wait_for(run, 5, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"To resume: lit-llm fit --run_dir {run} --ckpt_path last" in err
    assert read_checkpoint(run / "checkpoints/last.ckpt")["global_step"] == max(losses(run))
