"""The pictures of a sweep."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

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
