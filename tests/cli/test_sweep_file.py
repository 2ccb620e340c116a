from __future__ import annotations

import pytest
import yaml

from lit_llm.cli.sweep_file import label, read_sweep
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


class Ends:
    """As an Optuna trial that draws the smallest or the largest value, and remembers the space."""

    def __init__(self, at):
        self.at = at

    def suggest_int(self, name, low, high, step=1):
        return (low, high)[self.at]

    def suggest_float(self, name, low, high, step=None, log=False):
        self.log = log
        return (low, high)[self.at]

    def suggest_categorical(self, name, choices):
        return choices[-self.at]


@pytest.mark.parametrize(
    ("options", "low", "high", "log"),
    [
        ({"min": 1, "max": 5}, 1, 5, None),
        ({"min": 0.5, "max": 5}, 0.5, 5, False),
        ({"distribution": "int_uniform", "min": 1, "max": 5}, 1, 5, None),
        ({"distribution": "uniform", "min": 1, "max": 5}, 1, 5, False),
        ({"distribution": "q_uniform", "min": 5, "max": 99, "q": 16}, 16, 96, None),
        ({"distribution": "q_uniform", "min": 0.1, "max": 0.6, "q": 0.25}, 0.25, 0.5, False),
        ({"distribution": "q_uniform", "min": 0, "max": 0.3, "q": 0.1}, 0.0, 0.3, False),
        ({"distribution": "q_log_uniform_values", "min": 0.1, "max": 0.7, "q": 0.1}, 0.1, 0.7, True),
        ({"distribution": "log_uniform_values", "min": "1e-4", "max": 0.1}, 0.0001, 0.1, True),
        ({"distribution": "log_uniform", "min": 0, "max": 2}, 1.0, 7.38905609893065, True),
        ({"distribution": "q_log_uniform_values", "min": 16, "max": 256, "q": 16}, 16, 256, True),
        ({"values": [[0.8, 0.95], None]}, [0.8, 0.95], None, None),
        ({"value": "x"}, "x", "x", None),
    ],
)
def test_a_distribution_draws_between_its_ends(read, options, low, high, log):
    [parameter] = read(parameters={"x": options}).parameters
    for at, end in enumerate((low, high)):
        trial = Ends(at)
        drawn = parameter.suggest(trial)
        assert drawn == end
        assert type(drawn) is type(end) or log
        assert getattr(trial, "log", None) == log


def test_nested_parameters_are_dotted_and_a_class_comes_before_its_arguments(read):
    content = {"model": {"parameters": {"optimizer.lr": {"value": 1}, "optimizer": {"values": ["A", "B"]}}}}
    plan = read(parameters=content)
    assert [parameter.key for parameter in plan.parameters] == ["model.optimizer", "model.optimizer.lr"]
    words = plan.words({"model.optimizer.lr": 0.1, "model.optimizer": {"class_path": "A"}})
    options = ['--model.optimizer={"class_path": "A"}', "--model.optimizer.lr=0.1"]
    assert words == ["--config", "a.yaml", *options, "--config", "b.yaml"]


def test_a_grid_has_all_combinations(read):
    plan = read(method="grid", parameters={"a": {"values": [1, 2]}, "b": {"min": 3, "max": 4}, "c": {"value": 0}})
    assert [tuple(point.values()) for point in plan.grid()] == [(1, 3, 0), (1, 4, 0), (2, 3, 0), (2, 4, 0)]


def test_hyperband_is_first_look_and_factor(read):
    assert read(early_terminate={"type": "hyperband", "min_iter": 4}).early_terminate == (4, 3)
    assert read(early_terminate={"type": "hyperband", "max_iter": 27, "s": 2}).early_terminate == (3, 3)


def test_text_that_is_a_number_is_read_as_one_and_said(read, caplog):
    with caplog.at_level("INFO", logger="lit_llm"):
        [parameter] = read(parameters={"x": {"min": "1e-4", "max": 0.1}}).parameters
    assert parameter.low == 1e-4
    assert "min of x is text to YAML and to W&B; write 1e-4 as 1.0e-4" in caplog.text


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
        ({"parameters": {"x": {"parameters": [1]}}}, "parameters of x must have names, but are [1]"),
        ({"parameters": {"x": {"parameters": {}}}}, "parameters of x must have names, but are {{}}"),
        ({"parameters": {"x": {"value": 1, "values": [2]}}}, "x must have value or values, but has both"),
        (
            {"parameters": {"x": {"distribution": "categorical", "min": 1, "max": 2}}},
            "x must have value or values for the distribution categorical, but has none",
        ),
        (
            {"parameters": {"x": {"distribution": "normal", "mu": 1, "sigma": 2}}},
            "distribution of x must be one of constant, categorical, int_uniform, uniform, q_uniform, log_uniform, "
            "log_uniform_values, q_log_uniform, q_log_uniform_values to be drawn here, but is normal",
        ),
        ({"parameters": {}}, "--config must be a sweep file, with parameters, but {path} is none"),
        ({"parameters": {"x": 3}}, "x must have value, values, or min and max, but is 3"),
        ({"parameters": {"x": {"min": 3}}}, "x must have value, values, or min and max, but has min"),
        ({"parameters": {"x": {"min": "low", "max": 3}}}, "min of x must be a number, but is low"),
        (
            {"parameters": {"x": {"distribution": "log_uniform_values", "min": 0, "max": 3}}},
            "min and max of x must be positive, the smaller first, but are 0 and 3 (q 1)",
        ),
        ({"parameters": {"x": {"values": 3}}}, "values of x must be a list, but are 3"),
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
    with pytest.raises(ValueError, match=r"x must have keys of .*, but has vales; did you mean values\?$"):
        read(parameters={"x": {"vales": [1]}})


def test_a_grid_over_a_range_that_cannot_be_counted_is_refused(read):
    line = "x must have values that can be counted in a grid, but has a uniform; list its values, or take the method random"
    with pytest.raises(ValueError, match=exactly(line)):
        list(read(method="grid", parameters={"x": {"min": 0.1, "max": 0.2}}).grid())


def test_a_label_tells_two_values_apart():
    assert len({label(value) for value in ([1, 2], [1, 3], {"a": 1}, None, "x")}) == 5
