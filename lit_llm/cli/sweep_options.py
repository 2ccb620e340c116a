"""Checks, before anything is trained, that the runs of a sweep accept the parameters that it varies."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

from lit_llm.cli import main
from lit_llm.cli.finished_run import dotted
from lit_llm.cli.sweep_file import Sweep, written
from lit_llm.wording import did_you_mean


def require_options(plan: Sweep, more: list[str]) -> None:
    """Refuses parameters that are no options of the runs, invalid values, and parameters that later options override.

    Args:
        plan: The sweep.
        more: Further arguments of each run.
    """
    values = {parameter.key: parameter.extremes() for parameter in plan.parameters}
    # All parameters together first, which is fast; if that fails, one by one, to find which one is wrong.
    count = max(map(len, values.values()))
    together = [{key: each[:n][-1] for key, each in values.items()} for n in range(1, 1 + count)]
    configs, lines = zip(*(_parsed([*plan.words(settings), *more]) for settings in together), strict=True)
    if not any(lines):
        _require_effect(plan, values, configs[0], more)
        return
    first = {key: each[0] for key, each in values.items()}
    base, line = _parsed([*plan.words({}), *more])
    if line:
        raise ValueError(f"command of {plan.path} must be one that lit-llm fit takes, but is not: {line}")
    # Each key is tried together with those before it, since it may be an argument of a class that one of them sets.
    for number, key in enumerate(first, 1):
        settings = {name: first[name] for name in list(first)[:number]}
        for value in values[key]:
            _, line = _parsed([*plan.words(settings | {key: value}), *more])
            if line:
                known = dict(dotted(base))
                guess = "" if key in known else did_you_mean(key, known)
                raise ValueError(
                    f"parameters of {plan.path} must be options of its runs, but {key}={written(value)} is not: "
                    f"{line.split('; did you mean')[0]}{guess}"
                )
    settings, line = next((settings, line) for settings, line in zip(together, lines, strict=True) if line)
    raise ValueError(
        f"parameters of {plan.path} must be options of its runs together, but "
        f"{' '.join(f'{key}={written(value)}' for key, value in settings.items())} are not: {line}"
    )


def _require_effect(plan: Sweep, values: dict[str, tuple[Any, ...]], config: Any, more: list[str]) -> None:
    """Refuses parameters that later options override: the tables would report values that the runs did not have.

    Args:
        plan: The sweep.
        values: Values of each key; its first and last value are compared.
        config: The config that results from the first values.
        more: As in `require_options`.
    """
    if not plan.command[1] and not more:
        return
    first = {key: each[0] for key, each in values.items()}
    for key, each in values.items():
        if written(each[0]) == written(each[-1]):
            continue
        other, line = _parsed([*plan.words(first | {key: each[-1]}), *more])
        if not line and other == config:
            raise ValueError(
                f"{key} must be a parameter of {plan.path} or an option of all its runs, but is both: it would have "
                f"no effect"
            )


def _parsed(words: list[str]) -> tuple[Any, str]:
    """The config that arguments of `lit-llm fit` result in, and the error, if any (then without a config)."""
    import yaml

    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(["fit", *words, "--print_config"])
    except SystemExit as end:
        if end.code:
            return None, err.getvalue().strip().splitlines()[-1].removeprefix("lit-llm: error: ")
    finally:
        sys.argv = before
    return yaml.safe_load(out.getvalue()), ""
