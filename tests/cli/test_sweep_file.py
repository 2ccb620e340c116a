from __future__ import annotations

import pytest
import yaml

from lit_llm.cli.sweep_file import read_sweep
from tests.writing import exactly

BASE = {
    "method": "random",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "command": ["${env}", "lit-llm", "fit", "--config", "a.yaml", "${args}", "--config", "b.yaml"],
    "parameters": {"x": {"value": 1}},
}


@pytest.fixture
def read(tmp_path):
    def call(**content):
        path = tmp_path / "s.yaml"
        path.write_text(yaml.safe_dump(BASE | content))
        return read_sweep(path)

    return call


def test_nested_parameters_are_dotted_and_a_class_comes_before_its_arguments(read):
    content = {"model": {"parameters": {"optimizer.lr": {"value": 1}, "optimizer": {"values": ["A", "B"]}}}}
    plan = read(parameters=content)
    assert [parameter.key for parameter in plan.parameters] == ["model.optimizer", "model.optimizer.lr"]
    words = plan.words({"model.optimizer.lr": 0.1, "model.optimizer": {"class_path": "A"}})
    options = ['--model.optimizer={"class_path": "A"}', "--model.optimizer.lr=0.1"]
    assert words == ["--config", "a.yaml", *options, "--config", "b.yaml"]


def test_variables_of_the_environment_are_filled_in_and_others_refused(read, tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTS", "some/texts")
    start = ["lit-llm", "fit"]
    filled_in = read(command=[*start, "--data.path", "${envvar:TEXTS}/a", "${args}"])
    assert filled_in.words({}) == ["--data.path", "some/texts/a"]
    monkeypatch.delenv("TEXTS")
    path = tmp_path / "s.yaml"
    line = f"TEXTS must be set in the environment for the command of {path}, but is not"
    with pytest.raises(ValueError, match=exactly(line)):
        read(command=[*start, "${envvar:TEXTS}", "${args}"])
    for word in ("${TEXTS}", "${envvar:texts}", "a${args}"):
        line = f"command of {path} must have no variable but ${{args}} and ${{envvar:NAME}} after fit, but has {word}"
        with pytest.raises(ValueError, match=exactly(line)):
            read(command=[*start, word, "${args}"])


def test_what_a_command_sets_in_the_environment_is_said_to_have_no_effect(read, caplog, monkeypatch):
    caplog.set_level("INFO", "lit_llm")
    command = ["${env}", "ONE=1", "TWO=2", "lit-llm", "fit", "${args}", "--x=3"]
    monkeypatch.setenv("TWO", "2")
    read(command=command)
    [said] = caplog.messages
    assert said.startswith("ONE=1 in the command of ")


def test_a_grid_has_all_combinations(read):
    plan = read(method="grid", parameters={"a": {"values": [1, 2]}, "b": {"min": 3, "max": 4}, "c": {"value": 0}})
    assert [tuple(point.values()) for point in plan.grid()] == [(1, 3, 0), (1, 4, 0), (2, 3, 0), (2, 4, 0)]


def test_hyperband_is_first_look_and_factor(read):
    assert read(early_terminate={"type": "hyperband", "min_iter": 4}).early_terminate == (4, 3)
    assert read(early_terminate={"type": "hyperband", "max_iter": 27, "s": 2}).early_terminate == (3, 3)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"method": "hyperopt"}, "method of {path} must be grid, random or bayes, but is hyperopt"),
        (
            {"metric": {"name": "val/loss", "goal": "least"}},
            "metric of {path} must have a name, and minimize or maximize as its goal, but is "
            "{{'goal': 'least', 'name': 'val/loss'}}",
        ),
        (
            {"metric": {"name": "a", "gaol": 1}},
            "metric of {path} must have keys of name, goal, target, but has gaol; did you mean goal?",
        ),
        ({"metric": {"name": "a", "target": "low"}}, "target of metric must be a number, but is low"),
        ({"parameters": {}}, "--config must be a sweep file, with parameters, but {path} is none"),
        (
            {"early_terminate": {"type": "envelope"}},
            "early_terminate of {path} must be of type hyperband, but is {{'type': 'envelope'}}",
        ),
        (
            {"command": ["python", "train.py", "${args}"]},
            "command of {path} must be a list of lit-llm, fit, what it needs, and ${{args}} for the parameters, but is "
            "['python', 'train.py', '${{args}}']",
        ),
        ({"run_cap": 0}, "run_cap of {path} must be a whole number of at least 1, but is 0"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(read, tmp_path, content, line):
    with pytest.raises(ValueError, match=exactly(line.format(path=tmp_path / "s.yaml"))):
        read(**content)


def test_a_metric_without_a_goal_is_minimised_as_by_wandb(read):
    assert (read(metric={"name": "val/loss", "target": 0.5}).mode, read().target) == ("min", None)


def test_a_misspelt_key_has_a_guess(read):
    with pytest.raises(ValueError, match=r"but has metrics; did you mean metric\?$"):
        read(metrics={})
