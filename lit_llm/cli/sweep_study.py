"""The Optuna study of a sweep: the database that keeps its trials between commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lit_llm.cli.sweep_file import Sweep
from lit_llm.files import digest_of_yaml


def open_study(plan: Sweep, out: Path, more: list[str]) -> Any:
    """Creates a sweep's study in its folder, or opens the existing one.

    Raises:
        ValueError: When the existing study cannot be read, is of another sweep, or is missing although its runs exist.
    """
    import optuna
    from sqlalchemy.exc import DatabaseError

    from lit_llm.cli.command_line import run_files

    direction = "minimize" if plan.mode == "min" else "maximize"
    pruner = optuna.pruners.NopPruner()
    if plan.early_terminate:
        first, eta = plan.early_terminate
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=eta)
    path = out / "study.db"
    left = next((name for name in ("trials", "seeds") if (out / name).exists()), None)
    if left and not (path.is_file() and path.stat().st_size):
        raise ValueError(
            f"--out must be a new folder or one of a sweep, but {out} holds {left} without a study.db that says of "
            f"which; take a new one"
        )
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{quote(str(path))}",
            study_name="sweep",
            direction=direction,
            pruner=pruner,
            load_if_exists=True,
        )
    except DatabaseError as error:
        raise ValueError(
            f"--out must hold a study.db that can be read, but {path} cannot: {error.orig}; take a new folder"
        ) from error
    words = [*plan.words({}), *more]
    described = {
        "space": plan.space,
        "goal": plan.mode,
        "metric": plan.metric,
        "command": words,
        "files": {file: digest_of_yaml(Path(file).expanduser()) for file in run_files(words)},
    }
    trials = study.get_trials(deepcopy=False)
    none_trained = all(trial.state.name in ("FAIL", "WAITING") for trial in trials)
    free = {  # may still change, because no trial depends on it yet
        "metric": all(trial.value is None for trial in trials),
        "command": none_trained,
        "files": none_trained,
    }
    for name, value in described.items():
        before = study.user_attrs.get(name, value)
        if before != value and not free.get(name):
            other = {"space": "other parameters", "files": "run files of another content"}.get(name, f"another {name}")
            what = f" ({shlex.join(before)})" if name == "command" else ""
            if name == "files":
                what = f" ({', '.join(file for file in value if before.get(file) != value[file])})"
            raise ValueError(
                f"--out must be a new folder or one of this sweep, but {out} holds one with {other}{what}; "
                f"take a new one"
            )
        study.set_user_attr(name, value)
    return study
