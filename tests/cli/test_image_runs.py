"""Images from the command line: a run, its outputs, and its model directory tested, used and fine-tuned."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from lit_llm.checkpoints import load_model


@pytest.fixture
def config(tmp_path) -> str:
    """A run file with a data module of the tests."""
    content = {
        "model": {
            "class_path": "lit_llm.objectives.classification.Classification",
            "init_args": {"network": {"class_path": "lit_llm.models.lenet.LeNet"}},
        },
        "data": {"class_path": "tests.image_batches.Images"},
        "trainer": {"max_steps": 12, "max_epochs": -1, "val_check_interval": 3, "check_val_every_n_epoch": None},
    }
    (tmp_path / "images.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "images.yaml")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_and_its_model_directory_say_the_same_of_images(lit_llm, config, tmp_path) -> None:
    run, asked, tuned = tmp_path / "run", tmp_path / "asked", tmp_path / "tuned"
    outcome = lit_llm("fit", "--config", config, "--run_dir", run)
    assert outcome.code == 0, outcome.err
    results = json.loads((run / "results.json").read_text())
    assert len(table(run / "classes.csv")) == 3
    assert sum(int(line["examples"]) for line in table(run / "classes.csv")) == 11
    wrong = round(11 * (1 - results["test/accuracy"]))
    assert len(table(run / "mistakes.csv")) == wrong
    assert (run / "mistakes.png").exists() == (wrong > 0)
    network, _ = load_model(run / "model")
    assert network.image_shape == (1, 8, 8)
    assert network.class_names == ["digit 0", "digit 1", "digit 2"]

    directory = ["--config", config, "--model.network", "null", "--model.weights", run / "model"]
    outcome = lit_llm("test", *directory, "--run_dir", asked)
    assert outcome.code == 0, outcome.err
    again = json.loads((asked / "results.json").read_text())
    assert again["test/loss"] == pytest.approx(results["test/loss"], rel=1e-4)
    for options in (["--run_dir", run], [*directory, "--run_dir", asked]):
        outcome = lit_llm("predict", *options, "--data.known", "false")
        assert outcome.code == 0, outcome.err
    [of_run] = (run / "evaluations").glob("predict-*/predictions.csv")
    assert list(table(of_run)[0])[:3] == ["image", "label", "predicted"]
    assert table(of_run) == table(asked / "predictions.csv")

    outcome = lit_llm("fit", *directory, "--run_dir", tuned)
    assert outcome.code == 0, outcome.err
    outcome = lit_llm("fit", *directory, "--data.image_shape", "[3,16,16]", "--run_dir", tmp_path / "other")
    assert outcome.last_line == (
        "lit-llm: error: data must have images of 1 channel of 8 x 8, which the LeNet was made for, but has images of 3 "
        "channels of 16 x 16; set data.channels to 1 and data.image_size to 8"
    )
