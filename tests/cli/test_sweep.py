from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lit_llm.callbacks.progress import STEP_OF_TOTAL
from lit_llm.cli import main, trial_run
from lit_llm.cli.significance import verdict
from tests.writing import REPOSITORY

LR = {"model.optimizer.lr": {"distribution": "log_uniform_values", "min": 0.001, "max": 0.1}}
RUN = str(REPOSITORY / "configs/pretraining/llama_stdlib.yaml")


class Inside:
    """Replaces `subprocess.Popen`: trains at once in this process, since starting a process takes seconds."""

    environment: dict[str, str]

    def __init__(self, words, env, stdout, **_):
        Inside.environment = env
        argv = sys.argv
        with os.fdopen(os.dup(stdout.fileno()), "w") as file, contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(file))
            stack.enter_context(contextlib.redirect_stderr(file))
            try:
                main(words[3:])
                self.returncode = 0
            except SystemExit as end:
                self.returncode = end.code
            finally:
                sys.argv = argv

    def poll(self):
        return self.returncode

    wait = poll


class Pretended:
    """Replaces `subprocess.Popen`: only writes the files of a run, with a loss that is lowest at a rate of 0.01.

    Each poll takes one of four steps. Three heads are an error, five give NaN; the seed changes the loss slightly.
    """

    started: list[list[str]]
    interrupts_at: int | None

    def __init__(self, words, **_):
        Pretended.started.append(words[4:])
        self.folder, self.returncode, self.steps = Path(words[words.index("--run_dir") + 1]), None, 0
        settings = dict(word[2:].split("=", 1) for word in words if word.startswith("--model"))
        self.rate, self.breaks = float(settings.get("model.optimizer.lr", 1)), settings.get("model.network.num_heads")
        self.seed = int(words[words.index("--seed_everything") + 1]) if "--seed_everything" in words else 0
        order = int(words[words.index("--data.seed") + 1]) if "--data.seed" in words else 0
        if "--ckpt_path" in words:
            self.steps = int((self.folder / "checkpoints/last.ckpt").read_text())
        (self.folder / "config.yaml").write_text(
            yaml.safe_dump({"seed_everything": self.seed, "lr": self.rate, "data": {"seed": order}})
        )

    def poll(self):
        if self.returncode is not None:
            return self.returncode
        if self.breaks == "3":
            (self.folder / "output.txt").write_text("a warning\nlit-llm: error: num_heads must fit, but is 3\n")
            self.returncode = 2
            return 2
        self.steps = min(self.steps + 1, 4)
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        (self.folder / "checkpoints/last.ckpt").write_text(str(self.steps))
        if self.steps == Pretended.interrupts_at:
            raise KeyboardInterrupt
        loss = abs(math.log(self.rate / 0.01)) + 1 / self.steps + 0.01 * math.sin(self.seed + self.rate)
        with (self.folder / "output.txt").open("a") as output:
            output.write(f"step      {self.steps}/4  left 0:01\n")
        lines = [f"{step},{loss - 1 / self.steps + 1 / step}" for step in range(1, self.steps + 1)]
        (self.folder / "metrics.csv").write_text("\n".join(["step,val/loss", *lines]))
        if self.breaks == "5":
            loss = math.nan
        results = {"best/val/loss": loss, "val/loss": loss, "step": self.steps}
        (self.folder / "results.json").write_text(json.dumps(results))
        if self.steps >= 4:
            self.returncode = 0
        return self.returncode

    def wait(self, timeout=None):
        while self.poll() is None:
            pass
        return self.returncode

    def send_signal(self, number):
        assert number == signal.SIGINT
        self.returncode = 130


@pytest.fixture
def popen(monkeypatch):
    """Replaces the process of a trial, and the waiting time between two looks at it."""
    Pretended.started, Pretended.interrupts_at = [], None
    kind = SimpleNamespace(**vars(subprocess) | {"Popen": Pretended})
    monkeypatch.setattr(trial_run, "subprocess", kind)
    monkeypatch.setattr("lit_llm.cli.sweep.SECONDS_BETWEEN_LOOKS", 0.0)
    return kind


@pytest.fixture
def started(popen):
    return Pretended.started


@pytest.fixture
def sweep(lit_llm, tmp_path, popen):
    """Runs a sweep file with simulated trials; keywords are keys of the file."""

    def call(trials=2, more=(), **content):
        path = tmp_path / "sweep.yaml"
        base = {"method": "random", "metric": {"name": "val/loss", "goal": "minimize"}, "parameters": LR}
        base["command"] = ["${env}", "lit-llm", "fit", "--config", RUN, "${args}"]
        path.write_text(yaml.safe_dump(base | content))
        words = ["--trials", trials] if trials is not None else []
        return lit_llm("sweep", "--config", path, *words, "--out", tmp_path / "out", *more)

    return call


def rows(tmp_path):
    with (tmp_path / "out/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_leaves_run_folders_a_best_run_file_a_table_and_pictures(sweep, tmp_path, lit_llm, popen, tiny):
    popen.Popen = Inside
    outcome = sweep(2, method="bayes", more=[*tiny[2:], "--trainer.max_steps", "2", "--test_after_fit", "false"])
    assert outcome.code == 0, outcome.err
    out = tmp_path / "out"
    found = {json.loads((out / f"trials/{n:03d}/results.json").read_text())["best/val/loss"] for n in range(2)}
    assert {float(row["val/loss"]) for row in rows(tmp_path)} == found
    best = min(rows(tmp_path), key=lambda row: float(row["val/loss"]))
    config = yaml.safe_load((out / "best.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == float(best["model.optimizer.lr"])
    said = (out / "trials/000/output.txt").read_text()
    assert STEP_OF_TOTAL.findall(said)[0] == ("0", "2")  # from which the sweep reads the progress
    assert {"history.png", "parallel_coordinates.png", "importance.png"} <= {path.name for path in out.iterdir()}
    assert len(re.findall(r"^\d of 2: trial   \d  done .*val/loss \d.*lr=", outcome.err, re.MULTILINE)) == 2
    assert f"The best trial {best['trial']} is ahead of the runner-up" in outcome.out
    assert "one seed cannot tell" in outcome.out
    again = lit_llm("fit", "--config", out / "best.yaml", "--run_dir", tmp_path / "again")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "again/results.json").read_text())["best/val/loss"] == float(best["val/loss"])


@pytest.mark.slow
def test_a_larger_number_goes_on_and_the_same_number_trains_nothing(sweep, tmp_path, started):
    values = {"model.optimizer.lr": {"values": ["1e-3", 0.01]}, "seed_everything": {"values": [1, 2]}}
    for number, trained in ((1, 1), (3, 3), (None, 4), (9, 4)):
        assert sweep(number, method="grid", parameters=values).code == 0
        assert len(started) == trained
    found = [(row["model.optimizer.lr"], row["seed_everything"]) for row in rows(tmp_path)]
    assert found == [("1e-3", "1"), ("1e-3", "2"), ("0.01", "1"), ("0.01", "2")]


def test_a_grid_lacks_no_point_after_another_method_drew_some(sweep, tmp_path, started):
    values = {"model.optimizer.lr": {"values": ["0.01", "0.02", "0.03"]}}
    assert sweep(3, method="random", parameters=values).code == 0
    assert [row["model.optimizer.lr"] for row in rows(tmp_path)] == ["0.03", "0.02", "0.03"]
    for _ in range(2):
        assert sweep(None, method="grid", parameters=values).code == 0
        assert [row["model.optimizer.lr"] for row in rows(tmp_path)] == ["0.03", "0.02", "0.03", "0.01"]
    assert len(started) == 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "bayes"])
def test_what_is_drawn_does_not_depend_on_an_interruption(sweep, tmp_path, started, method):
    assert sweep(3, method=method).code == 0
    whole = [row["model.optimizer.lr"] for row in rows(tmp_path)]
    (tmp_path / "out").rename(tmp_path / "first")
    Pretended.interrupts_at = 3
    assert sweep(3, method=method).code == 130
    Pretended.interrupts_at = None
    assert sweep(2, method=method).code == 0
    assert sweep(3, method=method).code == 0
    assert [row["model.optimizer.lr"] for row in rows(tmp_path)] == whole
    assert [row["state"] for row in rows(tmp_path)] == ["complete"] * 3
    again = [words[-2:] == ["--ckpt_path", "last"] for words in started[3:]]
    assert again == [False, True, False, False]


@pytest.mark.slow
def test_trials_that_fall_behind_are_stopped_and_the_others_not(sweep, tmp_path):
    values = {"model.optimizer.lr": {"values": [0.01, 0.02, 0.5, 0.011]}}
    early = {"type": "hyperband", "min_iter": 2, "eta": 2}
    assert sweep(None, method="grid", parameters=values, early_terminate=early).code == 0
    assert [row["state"] for row in rows(tmp_path)] == ["complete", "pruned", "pruned", "complete"]
    steps = [json.loads((tmp_path / f"out/trials/{n:03d}/results.json").read_text())["step"] for n in range(4)]
    assert [step < 4 for step in steps] == [False, True, True, False]


@pytest.mark.slow
def test_a_trial_that_ends_before_it_hears_that_it_is_to_stop_has_come_to_its_end(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(Pretended, "send_signal", lambda self, number: None)
    values = {"model.optimizer.lr": {"values": [0.01, 0.5]}}
    early = {"type": "hyperband", "min_iter": 2, "eta": 2}
    assert sweep(None, method="grid", parameters=values, early_terminate=early).code == 0
    assert [row["state"] for row in rows(tmp_path)] == ["complete", "complete"]


@pytest.mark.slow
def test_a_crashed_trial_is_kept_and_marked_and_the_sweep_goes_on(sweep, tmp_path):
    outcome = sweep(None, method="grid", parameters={"model.network.num_heads": {"values": [3, 2]}})
    assert outcome.code == 0, outcome.err
    assert [row["state"] for row in rows(tmp_path)] == ["fail", "complete"]
    assert (tmp_path / "out/trials/000/output.txt").exists()
    assert re.search(r"^1 of 2: trial   0  failed .*num_heads must fit, but is 3$", outcome.err, re.MULTILINE)
    assert "Only one trial finished" in outcome.out


@pytest.mark.slow
def test_a_trial_that_ends_at_no_number_is_marked_and_the_sweep_goes_on(sweep, tmp_path):
    outcome = sweep(None, method="grid", parameters={"model.network.num_heads": {"values": [5, 2]}})
    assert outcome.code == 0, outcome.err
    assert [row["state"] for row in rows(tmp_path)] == ["fail", "complete"]
    assert re.search(r"^1 of 2: trial   0  failed .*val/loss must be a number, but is nan$", outcome.err, re.MULTILINE)


def test_a_file_that_is_no_yaml_is_refused_in_one_line(lit_llm, tmp_path):
    (tmp_path / "sweep.yaml").write_text("method: random\nmetric: {name: [\n")
    outcome = lit_llm("sweep", "--config", tmp_path / "sweep.yaml", "--out", tmp_path / "out")
    assert outcome.code == 2
    line = f"lit-llm: error: --config must be YAML, but {tmp_path / 'sweep.yaml'} is not: "
    assert outcome.last_line.startswith(line)
    assert "line 3" in outcome.last_line


def test_a_sweep_of_which_all_trials_crash_says_why(sweep):
    assert sweep(1, parameters={"model.network.num_heads": {"value": 3}}).last_line == (
        "lit-llm: error: a sweep must have a trial that finishes, but has none; the last: num_heads must fit, but is 3"
    )


@pytest.mark.parametrize(
    ("key", "guess"),
    [
        ("model.optimizr.lr", "; did you mean model.optimizer.lr?"),
        ("model.network.num_layer", "; did you mean model.network.num_layers?"),
        ("trainer.max_stepz", "; did you mean trainer.max_steps?"),
    ],
)
def test_a_key_that_no_run_has_is_named_before_anything_is_trained(sweep, started, key, guess, tmp_path):
    line = sweep(parameters={key: {"values": [1, 2]}}).last_line
    begin = f"lit-llm: error: parameters of {tmp_path / 'sweep.yaml'} must be options of its runs, but {key}=1 is not: "
    assert line.startswith(begin)
    assert line.endswith(guess)
    assert started == []


def test_a_value_that_no_run_takes_is_named_before_anything_is_trained(sweep, started):
    assert (
        "trainer.max_steps=many is not: " in sweep(parameters={"trainer.max_steps": {"values": [2, "many"]}}).last_line
    )
    assert started == []


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("model.optimizer.lr", [0.1, 0.2], ["--model.optimizer.lr", "0.02"]),
        ("model.optimizer.lr", [0.1, 0.2], ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr=1e-1"]),
        ("model.optimizer.init_args.lr", [0.1, 0.2], ["--model.optimizer.lr", "0.02"]),
        (
            "model.optimizer",
            [{"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}} for lr in (0.1, 0.2)],
            ["--model.optimizer.lr", "0.02"],
        ),
    ],
)
def test_what_is_varied_and_set_for_all_is_refused_before_anything_is_trained(
    sweep, started, tmp_path, key, values, words
):
    line = (
        f"lit-llm: error: {key} must be a parameter of {tmp_path / 'sweep.yaml'} or an option of all its runs, but is "
        f"both: it would have no effect"
    )
    varied = {key: {"values": values}}
    assert sweep(parameters=varied, more=words).last_line == line
    command = ["lit-llm", "fit", "--config", RUN, "${args}", *words]
    assert sweep(parameters=varied, command=command).last_line == line
    assert started == []


def test_what_is_not_varied_may_be_set_for_all_and_what_is_varied_added_to(sweep, started):
    steps = {"trainer.max_steps": {"value": 100}}
    assert sweep(parameters=LR | steps, more=["--trainer.max_steps", "5"]).code == 0
    assert len(started) == 2


@pytest.mark.parametrize("classes", [["lit_llm.optimizers.Muon", "torch.optim.AdamW"], ["torch.optim.AdamW"] * 2])
def test_an_argument_that_one_of_the_classes_lacks_is_named_before_anything_is_trained(sweep, started, classes):
    values = {"model.optimizer": {"values": classes}, "model.optimizer.embedding_lr": {"values": [0.1, 0.2]}}
    line = sweep(parameters=values).last_line
    assert "must be options of its runs" in line
    assert "embedding_lr" in line
    assert started == []


def test_a_multiple_of_what_is_no_whole_number_is_tried_as_it_is_drawn(sweep, started):
    steps = {"distribution": "q_uniform", "min": 0, "max": 20, "q": 5.0}
    assert (
        "model.schedule.warmup_steps=0.0 is not: " in sweep(parameters={"model.schedule.warmup_steps": steps}).last_line
    )
    assert started == []


def test_how_many_trials_has_to_be_said(sweep):
    line = sweep(None).last_line
    assert line.startswith("lit-llm: error: --trials must be given where ")
    assert line.endswith(" has no run_cap, but is not")


@pytest.mark.slow
def test_a_metric_that_no_run_logs_is_named_and_costs_no_second_training(sweep, started, tmp_path):
    outcome = sweep(2, metric={"name": "val/los", "goal": "minimize"})
    assert outcome.last_line == (
        f"lit-llm: error: metric.name of {tmp_path / 'sweep.yaml'} must be one that its runs log (val/loss), but is "
        f"val/los; did you mean val/loss?"
    )
    assert len(started) == 1
    assert sweep(1).code == 0
    assert started[1][-2:] == ["--ckpt_path", "last"]


@pytest.mark.slow
def test_more_seeds_tell_the_best_from_its_runner_up(sweep, tmp_path, started):
    values = {"model.optimizer.lr": {"values": [0.0001, 0.01]}}
    for _ in range(2):
        outcome = sweep(None, method="grid", parameters=values, more=["--seeds", "3"])
        assert outcome.code == 0, outcome.err
        assert "The best trial 1 differs from the runner-up 0 by more than seeds do: " in outcome.out
        assert "over 3 new seeds, p = " in outcome.out
        assert len(started) == 2 + 6
    found = {path.name for path in (tmp_path / "out/seeds").iterdir()}
    assert found == {f"{n:03d}_seed{seed}" for n in (0, 1) for seed in (1338, 1339, 1340)}
    again = yaml.safe_load((tmp_path / "out/seeds/000_seed1338/config.yaml").read_text())
    assert again["seed_everything"] == again["data"]["seed"] == 1338  # the order of the data is random too


def test_a_verdict_depends_on_the_spread():
    names = "best trial 1", "runner-up 0", "min"
    assert "does not differ from" in verdict([1.0, 1.2, 0.9], [1.1, 1.15, 1.0], *names)
    assert "(and is worse with them)" in verdict([2.0, 2.1, 2.3], [1.0, 1.1, 1.2], *names)


def test_a_trial_that_dies_silently_is_not_blamed_for_what_was_said_before(tmp_path, popen, monkeypatch):
    monkeypatch.setattr(Pretended, "poll", lambda self: -9)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").write_text("1")
    (tmp_path / "output.txt").write_text("all is well\n")
    assert trial_run.TrialRun([], tmp_path, 1).last_line() == "it was ended by signal 9, Killed; out of memory?"


def test_workers_share_the_cores_and_log_nowhere_else(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    found = trial_run._environment(threads=3)
    wanted = {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "offline"}
    assert wanted.items() <= found.items()


@pytest.mark.slow
def test_two_workers_train_two_at_a_time(sweep, tmp_path):
    outcome = sweep(4, more=["--workers", "2"])
    assert outcome.code == 0, outcome.err
    assert [row["state"] for row in rows(tmp_path)] == ["complete"] * 4


@pytest.fixture
def looks(monkeypatch):
    """Makes a sweep report the progress of its trials at each look."""
    monkeypatch.setattr("lit_llm.cli.sweep_progress.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("lit_llm.cli.sweep_progress.SECONDS_BETWEEN_MOVES", 0.0)


def test_trials_under_way_are_told_of_where_no_terminal_is(sweep, looks):
    outcome = sweep(2)
    assert outcome.code == 0, outcome.err
    for number in range(2):
        line = rf"^{number} of 2 ended, 0:00:\d\d left: trial {number}  step 2/4  val/loss \d+\.\d{{4}}$"
        assert len(re.findall(line, outcome.err, re.MULTILINE)) == 1, outcome.err


@pytest.mark.slow
def test_seeds_that_are_trained_at_the_end_are_told_of_too(sweep, looks):
    outcome = sweep(2, more=["--seeds", "2", "--workers", "2"])
    assert outcome.code == 0, outcome.err
    assert re.search(r"^0 of 2 ended.*: trial 0  step 2/4 .*; trial 1  step 2/4 ", outcome.err, re.MULTILINE)
    assert re.search(r"^3 of 4 ended.*: trial \d with seed 1339  step 3/4 ", outcome.err, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["failed", "stopped", "interrupted"])
def test_on_a_terminal_a_bar_ends_however_its_trial_does(sweep, looks, monkeypatch, ends):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Pretended, "interrupts_at", 3 if ends == "interrupted" else None)
    heads = {"model.network.num_heads": {"values": [2, 3]}}
    rates = {"model.optimizer.lr": {"values": [0.01, 0.5]}}
    early = {"type": "hyperband", "min_iter": 2, "eta": 2} if ends == "stopped" else None
    content = {"method": "grid", "parameters": heads if ends == "failed" else rates, "early_terminate": early}
    outcome = sweep(None, **content)
    assert outcome.code == (130 if ends == "interrupted" else 0), outcome.err
    assert "trial 0 " in outcome.err
    assert "step 2/4  val/loss " in outcome.err
    assert outcome.err.count("\x1b[?25l") == outcome.err.count("\x1b[?25h") == 1  # the cursor is hidden and shown again
    after = outcome.err.rpartition("\x1b[?25h")[2]
    assert "step " not in after
    if ends != "interrupted":
        assert f"2 of 2: trial   1  {ends}" in outcome.err


@pytest.mark.slow
def test_another_sweep_does_not_go_on_in_the_folder_of_one(sweep, tmp_path):
    assert sweep(1).code == 0
    assert sweep(1, parameters={"seed_everything": {"values": [1, 2]}}).last_line == (
        f"lit-llm: error: --out must be a new folder or one of this sweep, but {tmp_path / 'out'} holds one with other "
        f"parameters; take a new one"
    )


@pytest.mark.slow
def test_a_trial_with_other_options_does_not_join_those_without(sweep, tmp_path, started):
    options = ["--trainer.max_steps", "3"]
    broken = {"parameters": {"model.network.num_heads": {"values": [3, 2]}}, "method": "grid"}
    assert sweep(1, more=["--trainer.max_steps", "2"], **broken).code == 2  # nothing is scored yet
    assert sweep(2, more=options, **broken).code == 0
    line = sweep(3, **broken).last_line
    assert line.startswith("lit-llm: error: --out must be a new folder or one of this sweep, but ")
    assert line.endswith(f" holds one with another command (--config {RUN} --trainer.max_steps 3); take a new one")
    assert len(started) == 2


@pytest.mark.slow
def test_a_trial_of_an_edited_run_file_does_not_join_those_of_before(sweep, tmp_path, started):
    overlay = tmp_path / "overlay.yaml"
    command = ["lit-llm", "fit", "--config", RUN, f"--config={overlay}", "${args}"]
    overlay.write_text("trainer: {max_steps: 2}")
    assert sweep(1, command=command).code == 0
    overlay.write_text("# Edited.\ntrainer: {max_steps: 2}")
    assert sweep(2, command=command).code == 0
    overlay.write_text("trainer: {max_steps: 3}")
    assert sweep(3, command=command).last_line == (
        f"lit-llm: error: --out must be a new folder or one of this sweep, but {tmp_path / 'out'} holds one with run "
        f"files of another content ({overlay}); take a new one"
    )
    assert len(started) == 2


@pytest.mark.slow
def test_a_trial_that_was_interrupted_is_not_gone_on_with_by_other_options(sweep):
    Pretended.interrupts_at = 2
    assert sweep(1).code == 130
    Pretended.interrupts_at = None
    assert "holds one with another command" in sweep(1, more=["--trainer.max_steps", "9"]).last_line
    assert sweep(1).code == 0


@pytest.mark.slow
def test_a_trial_that_fell_behind_when_the_sweep_was_interrupted_is_not_trained_again(
    sweep, tmp_path, started, monkeypatch
):
    def cut(self, number):
        self.returncode = 130
        raise KeyboardInterrupt

    values = {"model.optimizer.lr": {"values": [0.01, 0.5]}}
    options = {
        "parameters": values,
        "method": "grid",
        "early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 2},
    }
    monkeypatch.setattr(Pretended, "send_signal", cut)
    cut_off = sweep(None, **options)
    assert (cut_off.code, cut_off.last_line) == (130, "Stopped: run the same command again to resume.")
    assert sweep(None, **options).code == 0
    assert [row["state"] for row in rows(tmp_path)] == ["complete", "pruned"]
    assert len(started) == 2


@pytest.mark.slow
def test_a_trial_that_is_stopped_from_outside_is_gone_on_with(sweep, tmp_path, started, monkeypatch):
    poll = Pretended.poll
    monkeypatch.setattr(Pretended, "poll", lambda self: poll(self) and None if self.steps < 2 else 130)
    outcome = sweep(1)
    assert "trial 0 was interrupted: run the same command again to resume it" in outcome.err
    assert outcome.last_line == (
        "lit-llm: error: a sweep must have a trial that finishes, but all of them were interrupted; run the same "
        "command again to resume"
    )
    monkeypatch.setattr(Pretended, "poll", poll)
    assert sweep(1).code == 0
    assert [row["state"] for row in rows(tmp_path)] == ["complete"]
    assert started[1][-2:] == ["--ckpt_path", "last"]


@pytest.mark.slow
def test_a_search_ends_when_its_target_is_reached(sweep, tmp_path):
    values = {"model.optimizer.lr": {"values": [0.5, 0.01, 0.02]}}
    metric = {"name": "val/loss", "target": 1.0}
    outcome = sweep(None, method="grid", parameters=values, metric=metric)
    assert outcome.err.count("val/loss has reached its target of 1.0") == 1
    assert [row["model.optimizer.lr"] for row in rows(tmp_path)] == ["0.5", "0.01"]


@pytest.mark.slow
def test_a_folder_with_signs_of_an_address_in_its_name_is_the_only_one_that_is_written_to(sweep, tmp_path):
    out = tmp_path / "a 4#x?y%20z"
    assert sweep(1, more=["--out", out]).code == 0
    assert (out / "study.db").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {out.name, "sweep.yaml"}


@pytest.mark.slow
def test_what_was_removed_or_damaged_in_a_folder_is_said_or_does_not_matter(sweep, tmp_path):
    assert sweep(1).code == 0
    before = rows(tmp_path)
    shutil.rmtree(tmp_path / "out/trials/000")
    assert sweep(2).code == 0
    assert rows(tmp_path)[0] == before[0]
    assert "trials/000 is gone" in sweep(2, more=["--seeds", "2"]).last_line
    (tmp_path / "out/study.db").write_text("nothing of the kind" * 99)
    line = sweep(2).last_line
    begin = f"lit-llm: error: --out must hold a study.db that can be read, but {tmp_path / 'out/study.db'} cannot: "
    assert line.startswith(begin)
    assert line.endswith("; take a new folder")


@pytest.mark.parametrize("left", ["trials", "seeds"])
def test_runs_that_no_study_knows_are_not_taken_for_those_of_a_new_one(sweep, tmp_path, started, left):
    (tmp_path / "out" / left / "000").mkdir(parents=True)
    for database in (None, ""):
        if database is not None:
            (tmp_path / "out/study.db").write_text(database)
        assert sweep(1).last_line == (
            f"lit-llm: error: --out must be a new folder or one of a sweep, but {tmp_path / 'out'} holds {left} without "
            f"a study.db that says of which; take a new one"
        )
    assert not started


def command(tmp_path, tiny, *words):
    """Starts a sweep in its own process, with trials that take some seconds."""
    content = {
        "method": "random",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "command": ["lit-llm", "fit", "--config", RUN, "${args}"],
        "parameters": LR,
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    where = ["--config", tmp_path / "sweep.yaml", "--out", tmp_path / "out"]
    line = [sys.executable, "-m", "lit_llm", "sweep", *where, *tiny[2:], *words]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([str(word) for word in line], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_sweep_loses_no_trial_and_repeats_none(tmp_path, tiny):
    long = ["--trainer.max_steps", "120", "--trainer.val_check_interval", "60", "--checkpoint.every_n_steps", "5"]
    first = command(tmp_path, tiny, "--trials", "2", *long)
    last = tmp_path / "out/trials/000/checkpoints/last.ckpt"
    until = time.monotonic() + 120
    while not last.exists() and time.monotonic() < until:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = command(tmp_path, tiny, "--trials", "2", *long)
    _, said = second.communicate(timeout=300)
    assert second.returncode == 0, said
    assert len(rows(tmp_path)) == 2
    steps = [json.loads((tmp_path / f"out/trials/00{n}/results.json").read_text())["step"] for n in (0, 1)]
    assert steps[0] == 120
    assert "--ckpt_path last" in json.loads((tmp_path / "out/trials/000/results.json").read_text())["command"]
