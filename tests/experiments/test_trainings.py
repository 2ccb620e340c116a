"""Finished runs are not repeated, and failures are reported."""

from __future__ import annotations

import argparse
import json

import pytest

from experiments import trainings
from experiments.trainings import Measurements
from tests.writing import REPOSITORY, exactly


def test_a_measurement_is_made_once_in_each_setting(tmp_path):
    path, asked = tmp_path / "work/measurements.jsonl", []

    def measure(figure: int) -> dict[str, object]:
        asked.append(figure)
        return {"figure": figure}

    for threads, figure in ((1, 10), (1, 11), (2, 12)):
        Measurements(path, {"threads": threads, "more": ["--x=1"]}).make({"seed": 0}, measure, figure)
    assert asked == [10, 12]
    again = Measurements(path, {"threads": 1, "more": ["--x=1"]})
    assert again.found == [{"seed": 0, "threads": 1, "more": ["--x=1"], "figure": 10}]
    assert Measurements(path, {"threads": 1, "more": []}).found == []


def test_what_failed_is_said_and_made_the_next_time(tmp_path, capsys):
    made = Measurements(tmp_path / "measurements.jsonl", {})

    def fail() -> dict[str, object]:
        raise RuntimeError("run must end well, but ended with 'error' (all of it: x.log)")

    made.make({"name": "full", "seed": 0}, fail)
    assert capsys.readouterr().out == "full, 0: run must end well, but ended with 'error' (all of it: x.log)\n"
    assert not made.found
    made.make({"name": "full", "seed": 0}, dict)
    assert made.found == [{"name": "full", "seed": 0}]


def test_a_training_is_begun_gone_on_with_or_left_alone(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(trainings, "lit_llm", lambda words, log, options: said.append((words, log)))
    folder, options = tmp_path / "lr-0.5", argparse.Namespace(work=tmp_path, threads=1)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"step": 3}))
    assert trainings.fit({"config": ["a", "b"]}, folder, options, "--x=1") == {"step": 3}
    words, log = said.pop()
    assert words[:3] == ["fit", "--config=a", "--config=b"]
    assert words[-1] == "--x=1"
    assert f"--run_dir={folder}" in words
    assert not any("ckpt_path" in word for word in words)
    assert log == tmp_path / "lr-0.5.log"
    (folder / "checkpoints/last.ckpt").touch()
    trainings.fit({}, folder, options)
    assert "--ckpt_path=last" in said.pop()[0]
    (folder / "model").mkdir()
    (folder / "model/config.json").touch()
    assert trainings.fit({}, folder, options) == {"step": 3}
    assert not said
    with pytest.raises(FileNotFoundError):  # it discards the folder, and the replaced command runs nothing
        trainings.fit_anew({}, folder, options)
    assert not folder.exists()


def test_a_command_that_fails_ends_with_its_last_words(tmp_path):
    options = argparse.Namespace(work=tmp_path, threads=1)
    trainings.run(["sh", "-c", "echo $OMP_NUM_THREADS $PWD"], tmp_path / "logs/good.log", options)
    assert (tmp_path / "logs/good.log").read_text() == f"1 {REPOSITORY}\n"
    message = f"bad must end well, but ended with 'no' (all of it: {tmp_path / 'bad.log'})"
    with pytest.raises(RuntimeError, match=exactly(message)):
        trainings.run(["sh", "-c", "echo yes; echo no; exit 3"], tmp_path / "bad.log", options)


def test_every_experiment_is_in_the_index():
    index = (REPOSITORY / "experiments/README.md").read_text(encoding="utf-8")
    folders = {path.parent.name for path in (REPOSITORY / "experiments").glob("*/README.md")}
    assert len(folders) > 10
    assert all(index.count(f"\n| [{name}]({name}/README.md) | ") == 1 for name in folders)
