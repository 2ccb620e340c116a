"""The plots of a sweep."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lit_llm.cli.sweep_file import Sweep
from lit_llm.cli.sweep_parameters import QUANTILE, ByQuantile, Normal, Parameter, label
from lit_llm.files import write_picture


def draw(study: Any, plan: Sweep, out: Path, seed: int) -> None:
    """Plots the optimisation history, parallel coordinates and the importance of the parameters (fANOVA).

    Parallel coordinates need a parameter that varies; importance also needs trials with different results.

    Args:
        study: The sweep's trials, an Optuna study.
        plan: The sweep.
        out: Folder for the plots.
        seed: Seed of the random forest that estimates the importance.
    """
    import matplotlib
    import optuna

    if matplotlib.get_backend(auto_select=False) is None:  # else a notebook has set one
        matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as pictures

    shown, metric = with_values(study, plan), plan.metric
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    varied = {name for trial in complete for name in trial.params}
    drawn = {"history": lambda: pictures.plot_optimization_history(study, target_name=metric)}
    if varied:
        drawn["parallel_coordinates"] = lambda: pictures.plot_parallel_coordinate(shown, target_name=metric)
    if varied and len({trial.value for trial in complete}) > 1:
        drawn["importance"] = lambda: pictures.plot_param_importances(
            shown, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=seed), target_name=metric
        )
    for name, make in drawn.items():
        with warnings.catch_warnings(), matplotlib.rc_context():  # Optuna changes the global style
            warnings.simplefilter("ignore")  # Optuna marks these plots as experimental
            axes = make()
        write_picture(out / f"{name}.png", axes.figure, bbox_inches="tight")
        pyplot.close(axes.figure)


def with_values(study: Any, plan: Sweep) -> Any:
    """The study, or, if quantiles were drawn, a copy of its complete trials with values in place of quantiles."""
    import optuna

    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    shaped = [p for p in plan.parameters if any(p.key + QUANTILE in trial.params for trial in trials)]
    if not shaped:
        return study
    made = optuna.create_study(direction=study.direction)
    values = {p.key: [label(trial.user_attrs["settings"][p.key]) for trial in trials] for p in shaped}
    spaces = {p.key: _space(p, values[p.key]) for p in shaped}
    for index, trial in enumerate(trials):
        params, spaces_of_trial = (
            {name: value for name, value in of.items() if not name.endswith(QUANTILE)}
            for of in (trial.params, trial.distributions)
        )
        params |= {key: each[index] for key, each in values.items()}
        made.add_trial(
            optuna.trial.create_trial(value=trial.value, params=params, distributions=spaces_of_trial | spaces)
        )
    return made


def _space(parameter: Parameter, values: list[Any]) -> Any:
    """An Optuna distribution that covers the given values of a parameter."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(parameter, ByQuantile):
        is_log = isinstance(parameter, Normal) and parameter.is_log and min(values) > 0
        return FloatDistribution(min(values), max(values), log=is_log)
    return CategoricalDistribution(sorted(set(values), key=str))
