"""The progress display of a sweep, with trials that are folders written by the test."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from lit_llm.cli import sweep_progress
from lit_llm.cli.sweep_progress import SECONDS_BETWEEN_LINES, SweepProgress
from lit_llm.cli.trial_run import TrialRun


class Trial(TrialRun):
    """A trial with a hundred steps, of which some are done."""

    def __init__(self, folder, first=0):
        self.folder, self.text, self.first = folder, "", first
        folder.mkdir()

    def said(self):
        return self.text

    def at(self, step, rows=""):
        self.text = self.text or f"step {self.first:>6}/100\n"
        self.text += f"a warning\nstep {step:>6}/100  loss 1.234\nstep {step:>6}  val/loss 1.2345\n"
        (self.folder / "metrics.csv").write_text(f"step,train/loss,val/loss\n{rows}")


@pytest.fixture
def clock(monkeypatch):
    """The clock that the display reads."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(sweep_progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def terminal(monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)


def test_where_no_terminal_is_a_line_comes_every_fifteen_seconds_at_most(tmp_path, clock, capsys):
    one, two = (Trial(tmp_path / name) for name in ("one", "two"))
    with SweepProgress("val/loss", wanted=4) as progress:
        progress.begin("trial 0", one)
        progress.begin("trial 1", two)
        one.at(20, "10,2.5,\n20,2.25,1.5\n")
        for _ in range(40 * 5):
            clock.now += 0.2
            progress.look()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"0 of 4 ended, {left} left: trial 0  step 20/100  val/loss 1.5000  train/loss 2.2500; trial 1  starts"
        for left in ("0:04:45", "0:09:30")
    ]


def test_what_is_only_logged_counts_and_a_row_that_is_being_written_waits(tmp_path, clock, capsys):
    trial = Trial(tmp_path / "one")
    with SweepProgress("train/loss", wanted=1) as progress:
        progress.begin("trial 0", trial)
        trial.at(20, "10,2.5,\n30,2.25,\n")
        clock.now += SECONDS_BETWEEN_LINES
        progress.look()
        trial.at(40, "10,2.5,\n30,2.25,\n40,-")
        clock.now += SECONDS_BETWEEN_LINES
        progress.look()
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "trial 0  step 30/100  train/loss 2.2500",
        "trial 0  step 40/100  train/loss 2.2500",
    ]


def test_the_time_left_goes_by_what_was_done_here_and_not_before_an_interruption(tmp_path, clock):
    trial = Trial(tmp_path / "one", first=50)
    progress = SweepProgress("val/loss", wanted=4, ended=2)
    with progress:
        progress.begin("trial 2", trial)
        for step in (50, 75):
            trial.at(step)
            clock.now += SECONDS_BETWEEN_LINES
            progress.look()
        # A quarter of a trial took 30 s; one and a quarter are left.
        assert str(progress) == "2 of 4 ended, 0:02:30 left"
        progress.end("trial 2")
        assert str(progress) == "3 of 4 ended, 0:01:00 left"


def test_on_a_terminal_each_trial_has_a_bar_which_ends_with_it(tmp_path, clock, capsys, terminal):
    one, two = (Trial(tmp_path / name) for name in ("one", "two"))
    with SweepProgress("val/loss", wanted=4) as progress:
        progress.begin("trial 0", one)
        progress.begin("trial 1", two)
        one.at(20, "20,2.25,1.5\n")
        clock.now += 1
        capsys.readouterr()
        progress.look()
        shown = capsys.readouterr().err
        progress.look()
        assert capsys.readouterr().err == ""  # too soon after the last line
        assert re.search(r"sweep .*━.* 0 of 4 ended, 0:00:19 left ", shown)
        assert re.search(r"trial 0 .*━.* step 20/100  val/loss 1.5000  train/loss 2.2500", shown)
        assert re.search(r"trial 1 .* starts", shown)
        progress.end("trial 0")
        progress.say("1 of 4: trial 0 done", "green")
        clock.now += 1
        progress.look()
        shown = capsys.readouterr().err
        assert "1 of 4: trial 0 done" in shown
        assert "step 20/100" not in shown.partition("done")[2]
    assert "\x1b[?25h" in capsys.readouterr().err


def test_a_stream_that_is_closed_ends_no_sweep(tmp_path, clock, monkeypatch):
    def write(_):
        raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=write, flush=lambda: None, isatty=lambda: False))
    with SweepProgress("val/loss", wanted=1) as progress:
        progress.begin("trial 0", Trial(tmp_path / "one"))
        clock.now += SECONDS_BETWEEN_LINES
        progress.look()
        progress.say("1 of 1: trial 0 done")
