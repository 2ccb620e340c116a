from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lit_llm.cli.errors import one_line
from tests.wandb_server import Sweeps, serving
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
    assert [options[key] for key in ("save_dir", "id", "resume")] == [".", None, None]
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
    end = time.monotonic() + 60  # a separate process writes it
    while not all(said in log.read_bytes() for said in wanted) and time.monotonic() < end:
        time.sleep(0.5)
    assert [said for said in wanted if said not in log.read_bytes()] == []


@pytest.mark.slow
def test_wandbs_own_agent_runs_a_sweep_file_as_it_is(tiny, tmp_path):
    content = yaml.safe_load((REPOSITORY / "configs/sweeps/llama_stdlib_lr.yaml").read_text())
    words = [str(REPOSITORY / word) if word.startswith("configs/") else word for word in content["command"]]
    content["command"] = [*words[:-1], *map(str, tiny[2:]), "--test_after_fit=false", words[-1]]
    content["parameters"]["trainer.gradient_clip_val"] = {"values": [None, 1.0]}
    content["parameters"]["trainer.max_steps"] = {"value": 2}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    trials = [
        {"model.optimizer.lr": 0.02, "model.schedule": "lit_llm.schedulers.Linear", "trainer.gradient_clip_val": None},
        {"model.optimizer.lr": 1e-05, "model.schedule": "lit_llm.schedulers.Cosine", "trainer.gradient_clip_val": 1.0},
    ]
    sweeps = Sweeps([settings | {"trainer.max_steps": 2} for settings in trials])
    with serving(sweeps) as server:
        binaries = Path(sys.executable).parent
        environment = os.environ | server | {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        run = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 300}
        made = subprocess.run([binaries / "wandb", "sweep", "sweep.yaml"], env=environment, **run)
        assert made.returncode == 0, made.stderr
        assert sweeps.config == content
        agent = [binaries / "wandb", "agent", "us/p/s"]
        agent = subprocess.run(agent, env=environment | {"WANDB_MODE": "offline"}, **run)
    runs = sorted((tmp_path / "runs").glob("*/*/config.yaml"), key=lambda path: path.stat().st_mtime)
    assert len(runs) == 2, agent.stderr
    for number, (path, settings) in enumerate(zip(runs, trials), start=1):
        config = yaml.safe_load(path.read_text())
        init_args = config["model"]["init_args"]
        assert init_args["optimizer"]["init_args"]["lr"] == settings["model.optimizer.lr"]
        assert init_args["schedule"]["class_path"] == settings["model.schedule"]
        assert config["trainer"]["gradient_clip_val"] == settings["trainer.gradient_clip_val"]
        assert "best/val/bits_per_byte" in json.loads((path.parent / "results.json").read_text())
        assert (path.parent / "wandb_id.txt").read_text() == f"trial{number}"


def test_a_run_that_wandb_refuses_leaves_nothing(lit_llm, tiny, tmp_path, monkeypatch):
    import wandb
    from wandb.errors import UsageError

    @functools.wraps(wandb.init)  # keeps the signature, which gives the logger's options
    def refused(*args, **kwargs):
        raise UsageError("No API key configured.")

    monkeypatch.setattr("wandb.init", refused)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")  # so that monkeypatch restores it at the end
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
