from __future__ import annotations

import optuna

from lit_llm.cli.sweep_parameters import read_parameters
from lit_llm.cli.sweep_pictures import draw, with_values

PARAMETERS = {
    "lr": {"distribution": "log_normal", "mu": -3},
    "width": {"values": [8, 16], "probabilities": [0.5, 0.5]},
    "betas": {"values": [[0.8, 0.95], None], "probabilities": [0.5, 0.5]},
    "depth": {"min": 1, "max": 4},
}


def searched(trials: int) -> optuna.Study:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), direction="maximize")
    for number in range(trials):
        trial = study.ask()
        settings = {parameter.key: parameter.suggest(trial) for parameter in read_parameters(PARAMETERS)}
        trial.set_user_attr("settings", settings)
        study.tell(trial, settings["lr"] * number)
    return study


def test_pictures_show_values_where_quantiles_were_drawn(tmp_path):
    study = searched(12)
    shown = with_values(study)
    assert shown.direction == study.direction
    for drawn, trial in zip(study.trials, shown.trials, strict=True):
        settings = drawn.user_attrs["settings"]
        betas = settings["betas"] and str(settings["betas"])
        assert trial.params == settings | {"betas": betas}
        assert trial.value == drawn.value
    draw(study, "val/accuracy", tmp_path, seed=0)
    assert {path.name for path in tmp_path.iterdir()} == {"history.png", "parallel_coordinates.png", "importance.png"}


def test_a_study_without_quantiles_is_shown_as_it_is():
    study = optuna.create_study()
    study.ask()
    assert with_values(study) is study
