from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lit_llm.cli import run_folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in (run_folder.VARIABLE, "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_a_run_is_named_by_its_config_and_the_time():
    folder = run_folder.choose("fit", None, Path("configs/pretraining/x.yaml"), None)
    assert re.fullmatch(r"runs/x/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", str(folder))


def test_runs_that_begin_in_one_second_have_folders_of_their_own(monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "2026-01-31_12-00-00")
    names = []
    for _ in range(3):
        folder = run_folder.choose("fit", None, Path("x.yaml"), None)
        run_folder.make(folder, starts_anew=True, trains=True)
        names.append(folder.name)
    assert names == ["2026-01-31_12-00-00", "2026-01-31_12-00-00-2", "2026-01-31_12-00-00-3"]


def test_a_repeated_run_has_the_name_of_the_first():
    folder = run_folder.choose("fit", None, Path("runs/x/2026-01-31_12-00-00/config.yaml"), None)
    assert folder.parent == Path("runs/x")


def test_last_without_a_folder_is_the_newest_run_of_that_config():
    for age, name in enumerate(("2026-01-03_00-00-00", "10000", "9999", "2026-01-01_00-00-00")):
        last = Path("runs/x") / name / "checkpoints/last.ckpt"
        last.parent.mkdir(parents=True)
        last.touch()
        os.utime(last, (1000 - age, 1000 - age))
    assert run_folder.choose("fit", None, Path("x.yaml"), "last") == Path("runs/x/2026-01-03_00-00-00")
    Path("runs/x/9999/checkpoints/best.ckpt").touch()
    assert run_folder.choose("test", None, Path("x.yaml"), "best") == Path("runs/x/9999")
    with pytest.raises(FileNotFoundError, match=r"^ckpt_path must be in a run folder, but runs/y holds none with last"):
        run_folder.choose("fit", None, Path("y.yaml"), "last")


def test_last_and_best_are_those_of_the_run_whose_config_is_named():
    for age, name in enumerate(("new", "old")):
        last = Path("runs/x") / name / "checkpoints/last.ckpt"
        last.parent.mkdir(parents=True)
        last.touch()
        os.utime(last, (1000 - age, 1000 - age))
        (last.parents[1] / "config.yaml").touch()
    for command, ckpt_path in (("test", "best"), ("fit", "last")):
        for name in ("old", "new"):
            assert run_folder.choose(command, None, Path(f"runs/x/{name}/config.yaml"), ckpt_path) == Path(
                "runs/x", name
            )
    assert run_folder.choose("fit", None, Path("runs/x/old/config.yaml"), None).name not in ("old", "new")


def test_processes_of_one_job_share_a_folder(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert run_folder.choose("fit", None, Path("x.yaml"), None) == Path("runs/x/77")
    monkeypatch.setenv(run_folder.VARIABLE, "elsewhere")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_folder.choose("fit", None, Path("x.yaml"), None) == Path("elsewhere")


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are():
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/last.ckpt").touch()
    assert run_folder.find_checkpoint(Path("run"), "last") == Path("run/checkpoints/last.ckpt")
    message = "ckpt_path must be a checkpoint in run/checkpoints (there: last), but is best; take --ckpt_path last"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        run_folder.find_checkpoint(Path("run"), "best")
    Path("run/checkpoints/good.ckpt").touch()
    for there, named in (("last", "last"), ("best", "best"), ("good", "run/checkpoints/good.ckpt")):
        with pytest.raises(ValueError, match=re.escape(f"go on with --ckpt_path {named}, or")):
            run_folder.make(Path("run"), starts_anew=True, trains=True)
        Path(f"run/checkpoints/{there}.ckpt").unlink()
        if there == "last":
            Path("run/checkpoints/best.ckpt").touch()
    os.environ.pop(run_folder.VARIABLE, None)
