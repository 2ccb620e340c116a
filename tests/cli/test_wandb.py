from __future__ import annotations

import os
import time

import pytest
import yaml

from lit_llm.cli.errors import one_line
from tests.writing import REPOSITORY

OVERLAY = REPOSITORY / "configs/logging/wandb.yaml"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_id_and_one_that_repeats_it_has_its_own(lit_llm, tiny, tmp_path, offline):
    short = ["--trainer.max_steps", "3", "--test_after_fit", "false"]
    outcome = lit_llm("fit", *tiny, *short, "--config", OVERLAY, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    name = (tmp_path / "run/wandb_id.txt").read_text()
    options = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["trainer"]["logger"]["init_args"]
    assert [options[key] for key in ("save_dir", "id", "resume")] == [None, None, None]
    more = ["--ckpt_path", "last", "--trainer.max_steps", "4", "--test_after_fit", "false"]
    outcome = lit_llm("fit", "--run_dir", tmp_path / "run", *more)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run/wandb_id.txt").read_text() == name
    found = [path for path in (tmp_path / "run/wandb").iterdir() if path.name.startswith("offline-run-")]
    assert found
    assert all(path.name.endswith(f"-{name}") for path in found)
    assert list((tmp_path / "run/wandb").rglob("samples*.table.json"))


@pytest.mark.slow
def test_a_run_has_all_of_its_config_its_confusions_and_its_mistakes_there(lit_llm, tmp_path, offline):
    config, steps = REPOSITORY / "configs/pretraining/cnn_digits.yaml", ["--trainer.max_steps", "4"]
    outcome = lit_llm("fit", "--config", config, *steps, "--config", OVERLAY, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    [folder] = (path for path in (tmp_path / "run/wandb").iterdir() if path.name.startswith("offline-run-"))
    names = {path.name.split("_")[0] for path in (folder / "files/media").rglob("*.*")}
    assert {"confusion", "classes", "mistakes"} <= names
    [log] = folder.glob("*.wandb")
    wanted = (b"seed_everything", b"batch_size", b"lit_llm.data.vision.VisionData", b"precision")
    end = time.monotonic() + 60  # a process of its own writes it
    while not all(said in log.read_bytes() for said in wanted) and time.monotonic() < end:
        time.sleep(0.5)
    assert [said for said in wanted if said not in log.read_bytes()] == []


def test_a_run_that_wandb_refuses_leaves_nothing(lit_llm, tiny, tmp_path, monkeypatch):
    from wandb.errors import UsageError

    def refused(*args, **kwargs):
        raise UsageError("No API key configured.")

    monkeypatch.setattr("wandb.init", refused)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")  # what is set is taken back at the end
    monkeypatch.delenv("WANDB_INIT_TIMEOUT")
    outcome = lit_llm("fit", *tiny, "--config", OVERLAY, "--run_dir", tmp_path / "run")
    assert os.environ["WANDB_INIT_TIMEOUT"] == "30"
    assert outcome.code == 2
    assert outcome.last_line.startswith("lit-llm: error: W&B must be reachable with an account, but is not (No API key")
    assert not (tmp_path / "run").exists()


def test_what_keeps_wandb_from_logging_is_one_line_with_a_way_out():
    from wandb.errors import UsageError

    assert one_line(UsageError("No API key configured. Use `wandb login` to log in.")) == (
        "W&B must be reachable with an account, but is not (No API key configured. Use `wandb login` to log in.); set "
        "WANDB_MODE=offline, or leave configs/logging/wandb.yaml out"
    )
