from __future__ import annotations

import optuna
import pytest
import yaml

from lit_llm.cli.sweep_file import Sweep, read_sweep
from lit_llm.cli.sweep_pictures import draw, with_values

PARAMETERS = {
    "lr": {"distribution": "log_normal", "mu": -3},
    "width": {"values": [8, 16], "probabilities": [0.5, 0.5]},
    "betas": {"values": [[0.8, 0.95], None], "probabilities": [0.5, 0.5]},
    "depth": {"min": 1, "max": 4},
    "wide": {"distribution": "q_log_normal", "mu": -3, "q": 1},
}


@pytest.fixture
def plan(tmp_path) -> Sweep:
    path = tmp_path / "sweep.yaml"
    command = ["lit-llm", "fit", "${args}"]
    metric = {"name": "val/accuracy", "goal": "maximize"}
    path.write_text(
        yaml.safe_dump({"method": "random", "metric": metric, "command": command, "parameters": PARAMETERS})
    )
    return read_sweep(path)


def searched(plan: Sweep, trials: int) -> optuna.Study:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), direction="maximize")
    for number in range(trials):
        trial = study.ask()
        settings = {parameter.key: parameter.suggest(trial) for parameter in plan.parameters}
        trial.set_user_attr("settings", settings)
        if number % 5 == 1:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, settings["lr"] * number)
    return study


def test_pictures_show_values_where_quantiles_were_drawn(plan, tmp_path):
    study = searched(plan, 12)
    shown = with_values(study, plan)
    assert shown.direction == study.direction
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    for drawn, trial in zip(complete, shown.trials, strict=True):
        settings = drawn.user_attrs["settings"]
        betas = settings["betas"] and str(settings["betas"])
        assert trial.params == settings | {"betas": betas}
        assert trial.value == drawn.value
        assert trial.distributions["lr"].log
        assert trial.distributions["depth"] == drawn.distributions["depth"]
    out = tmp_path / "out"
    out.mkdir()
    draw(study, plan, out, seed=0)
    assert {path.name for path in out.iterdir()} == {"history.png", "parallel_coordinates.png", "importance.png"}


def test_a_study_without_quantiles_is_shown_as_it_is(plan):
    study = optuna.create_study()
    study.ask()
    assert with_values(study, plan) is study
