"""The pictures of a sweep."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lit_llm.cli.sweep_parameters import QUANTILE, label
from lit_llm.files import replacing


def draw(study: Any, metric: str, out: Path, seed: int) -> None:
    """Draws the history, the parallel coordinates and the importance of the parameters, where there is enough.

    Args:
        study: The sweep's trials, an Optuna study.
        metric: What they are judged by.
        out: The folder for the pictures.
        seed: Of the forest that tells the importance.
    """
    import matplotlib
    import optuna

    if matplotlib.get_backend(auto_select=False) is None:  # a notebook has chosen
        matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as pictures

    study = with_values(study)
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    varied = {name for trial in complete for name in trial.params}
    drawn = {"history": lambda: pictures.plot_optimization_history(study, target_name=metric)}
    if varied:
        drawn["parallel_coordinates"] = lambda: pictures.plot_parallel_coordinate(study, target_name=metric)
    if varied and len({trial.value for trial in complete}) > 1:
        drawn["importance"] = lambda: pictures.plot_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=seed), target_name=metric
        )
    for name, make in drawn.items():
        with warnings.catch_warnings(), matplotlib.rc_context():  # Optuna changes the style of all that follows
            warnings.simplefilter("ignore")  # that these pictures are experimental
            axes = make()
        with replacing(out / f"{name}.png") as new:
            axes.figure.savefig(new, dpi=120, bbox_inches="tight")
        pyplot.close(axes.figure)


def with_values(study: Any) -> Any:
    """A study of the same trials whose parameters all have their values, where of some the quantile was drawn."""
    import optuna

    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    shaped = {name for trial in trials for name in trial.params if name.endswith(QUANTILE)}
    if not shaped:
        return study
    values = {name: [label(t.user_attrs["settings"][name.removesuffix(QUANTILE)]) for t in trials] for name in shaped}
    spaces = {
        name: optuna.distributions.FloatDistribution(min(each), max(each))
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in each)
        else optuna.distributions.CategoricalDistribution(sorted(set(each), key=str))
        for name, each in values.items()
    }
    made = optuna.create_study(direction=study.direction)
    for index, trial in enumerate(trials):
        params, distributions = dict(trial.params), dict(trial.distributions)
        for name in shaped & params.keys():
            del params[name], distributions[name]
            params[name.removesuffix(QUANTILE)] = values[name][index]
            distributions[name.removesuffix(QUANTILE)] = spaces[name]
        made.add_trial(
            optuna.trial.create_trial(value=trial.value, params=params, distributions=distributions, state=trial.state)
        )
    return made
