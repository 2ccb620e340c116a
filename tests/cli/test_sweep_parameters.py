from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import scipy.stats

from lit_llm.cli.sweep_file import read_parameters
from lit_llm.cli.sweep_parameters import Parameter, label
from tests.writing import exactly


def read(options: object) -> Parameter:
    [parameter] = read_parameters({"x": options})
    return parameter


class Ends:
    """Replaces an Optuna trial: draws the smallest or the largest value, and records `log`."""

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
        ({"distribution": "inv_log_uniform", "min": -2, "max": 0}, 1.0, 7.38905609893065, True),
        ({"distribution": "inv_log_uniform_values", "min": 1e-4, "max": 0.1}, 0.0001, 0.1, True),
        ({"distribution": "q_log_uniform_values", "min": 16, "max": 256, "q": 16}, 16, 256, True),
        ({"values": [[0.8, 0.95], None]}, [0.8, 0.95], None, None),
        ({"values": ["a", "b"], "probabilities": [0.25, 0.75]}, "a", "b", False),
        ({"values": ["a", "b", "c"], "probabilities": [0.25, 0.75, 0]}, "a", "b", False),
        ({"value": "x"}, "x", "x", None),
    ],
)
def test_a_distribution_draws_between_its_ends(options, low, high, log):
    parameter = read(options)
    for at, end in enumerate((low, high)):
        trial = Ends(at)
        drawn = parameter.suggest(trial)
        assert drawn == end
        assert type(drawn) is type(end) or log
        assert getattr(trial, "log", None) == log


class Chance:
    """Replaces an Optuna trial: draws uniformly."""

    def __init__(self):
        self.random, self.names = random.Random(0), set()

    def suggest_float(self, name, low, high):
        self.names.add(name)
        return self.random.uniform(low, high)


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"distribution": "normal"}, scipy.stats.norm()),
        ({"distribution": "normal", "mu": 3, "sigma": 0.5}, scipy.stats.norm(3, 0.5)),
        ({"distribution": "log_normal", "mu": -7, "sigma": 0.5}, scipy.stats.lognorm(0.5, scale=math.exp(-7))),
        ({"distribution": "beta", "a": 2, "b": 5}, scipy.stats.beta(2, 5)),
        ({"distribution": "beta"}, scipy.stats.uniform()),
    ],
)
def test_what_optuna_cannot_draw_has_the_distribution_that_it_is_named_for(options, reference):
    parameter, trial = read(options), Chance()
    drawn = [parameter.suggest(trial) for _ in range(2000)]
    assert scipy.stats.kstest(drawn, reference.cdf).pvalue > 0.01
    assert trial.names == {"x (quantile)"}
    np.testing.assert_allclose(parameter.extremes(), reference.ppf([0.001, 0.999]), rtol=1e-6)


def test_multiples_are_of_q_in_every_shape():
    for options in (
        {"distribution": "q_normal", "mu": 128, "sigma": 64, "q": 32},
        {"distribution": "q_log_normal", "mu": 5, "q": 32},
        {"distribution": "q_beta", "a": 1, "b": 1, "q": 0.1},
    ):
        parameter, trial = read(options), Chance()
        drawn = {parameter.suggest(trial) for _ in range(200)}
        assert len(drawn) > 5
        assert all(value == float(f"{round(value / options['q']) * options['q']:.12g}") for value in drawn)
        assert {type(value) for value in drawn} == {type(options["q"])}


def test_probabilities_say_how_often_a_value_is_drawn():
    parameter, trial = read({"values": ["a", None, "c"], "probabilities": [0.7, 0.0, 0.3]}), Chance()
    counts = Counter(parameter.suggest(trial) for _ in range(2000))
    assert counts.keys() == {"a", "c"}
    assert counts["a"] / 2000 == pytest.approx(0.7, abs=0.03)


def test_text_that_is_a_number_is_read_as_one_and_said(caplog):
    with caplog.at_level("INFO", logger="lit_llm"):
        assert read({"min": "1e-4", "max": 0.1}).low == 1e-4
    assert "min of x is read as text by YAML and W&B; write 1.0e-4 instead of 1e-4" in caplog.text


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"parameters": [1]}, "parameters of x must have names, but are [1]"),
        ({"parameters": {}}, "parameters of x must have names, but are {}"),
        ({"value": 1, "values": [2]}, "x must have value or values, but has both"),
        (
            {"distribution": "categorical", "min": 1, "max": 2},
            "x, which is categorical, must have keys of distribution, values, but has min",
        ),
        (
            {"distribution": "normal", "sigma": 1, "values": [2]},
            "x, which is normal, must have keys of distribution, mu, sigma, but has values",
        ),
        (
            {"min": 1, "max": 2, "q": 0.1},
            "x, which is int_uniform, must have keys of distribution, min, max, but has q",
        ),
        ({"distribution": "constant"}, "x, which is constant, must have value, but has no value"),
        (
            {"distribution": "categorical_w_probabilities", "values": [1]},
            "x, which is categorical_w_probabilities, must have values and probabilities, but has no probabilities",
        ),
        (3, "x must have value, values, or min and max, but is 3"),
        ({"min": 3}, "x, which is uniform, must have min and max, but has no max"),
        ({"min": "low", "max": 3}, "min of x must be a number, but is low"),
        ({"min": 1, "max": "inf"}, "max of x must be a number, but is inf"),
        (
            {"distribution": "log_uniform_values", "min": 0, "max": 3},
            "min of x must be positive, but is 0",
        ),
        ({"distribution": "uniform", "min": 3, "max": 3}, "min of x must be below its max, but they are 3 and 3"),
        (
            {"distribution": "int_uniform", "min": 0.5, "max": 3},
            "min and max of x must be whole numbers, but are 0.5 and 3",
        ),
        (
            {"distribution": "inv_log_uniform", "min": 1, "max": 1000},
            "min and max of x must be logarithms, but are 1 and 1000; for the values themselves the distribution is "
            "inv_log_uniform_values",
        ),
        (
            {"distribution": "log_normal", "mu": 1000},
            "mu and sigma of x must be those of the logarithm, but are 1000 and 1",
        ),
        (
            {"distribution": "q_uniform", "min": 5, "max": 6, "q": 4},
            "min and max of x must have a multiple of q between them, but are 5, 6 (q 4)",
        ),
        ({"distribution": "q_uniform", "min": 5, "max": 6, "q": 0}, "q of x must be positive, but is 0"),
        ({"values": 3}, "values of x must be a list, but are 3"),
        ({"distribution": "normal", "sigma": 0}, "sigma of x must be positive, but is 0"),
        ({"distribution": "beta", "a": 2, "b": "x"}, "b of x must be a number, but is x"),
        (
            {"values": [1, 2], "probabilities": [1]},
            "probabilities of x must be a list of 2, as its values, but are [1]",
        ),
        (
            {"values": [1, 2], "probabilities": [0.5, 0.4]},
            "probabilities of x must be at least 0 and 1 together, but are [0.5, 0.4]",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(options, line):
    with pytest.raises(ValueError, match=exactly(line)):
        read(options)


def test_a_misspelt_word_has_a_guess():
    with pytest.raises(ValueError, match=r"x must have keys of .*, but has vales; did you mean values\?$"):
        read({"vales": [1]})
    with pytest.raises(ValueError, match=r"^distribution of x must be one of constant, .*, but is gauss$"):
        read({"distribution": "gauss"})


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"min": 0.1, "max": 0.2},
            "x must have values that can be counted in a grid, but has a range; list its values, or take the method "
            "random",
        ),
        (
            {"values": [1, 2], "probabilities": [0.5, 0.5]},
            "x must have no probabilities in a grid, but has; take the method random",
        ),
    ],
)
def test_a_grid_of_what_cannot_be_counted_is_refused(options, line):
    with pytest.raises(ValueError, match=exactly(line)):
        read(options).listed()


def test_a_label_tells_two_values_apart():
    assert len({label(value) for value in ([1, 2], [1, 3], {"a": 1}, None, "x")}) == 5
