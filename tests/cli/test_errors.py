from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lit_llm.cli.errors import one_line, parser_line
from lit_llm.schedulers import Constant


def own() -> None:
    raise ValueError("fields must be two, but are three")


def error_of(work: Callable[[], object]) -> Exception:
    with pytest.raises(ValueError, match="must") as caught:
        work()
    return caught.value


@pytest.mark.parametrize(
    "work",
    [
        lambda: np.concatenate([np.zeros((2, 3)), np.zeros((2, 4))]),
        lambda: torch.nn.functional.interpolate(torch.zeros(1, 1, 2, 2), size=(1, 2, 3)),
    ],
    ids=["in C", "in Python"],
)
def test_a_librarys_error_that_sounds_like_ours_keeps_its_traceback(work) -> None:
    error = error_of(work)
    assert "must" in str(error)
    assert one_line(error) is None


@pytest.mark.parametrize("work", [own, lambda: Constant(-1)], ids=["of a user's file", "of the package"])
def test_what_is_said_on_purpose_is_said_in_one_line(work) -> None:
    error = error_of(work)
    assert one_line(error) == str(error)


def test_a_class_that_is_not_whole_is_said_to_lack_what_it_does_not_write() -> None:
    message = """Parser key "schedule":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lit_llm.schedulers.Schedule'>, <class 'NoneType'>]
  Errors:
    - Expected an instantiatable class, but lit_llm.schedulers.Schedule is abstract
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'class_path': 'lit_llm.schedulers.Schedule', 'init_args': {}}"""
    assert parser_line(message) == (
        "schedule must be a class path or a YAML file, but is lit_llm.schedulers.Schedule, which does not write "
        "after_warmup"
    )


def test_only_what_is_said_to_be_required_must_be_given() -> None:
    assert parser_line("the following arguments are required: --model, --data").startswith(
        "--data, --model must be given, but are not"
    )
    assert parser_line('Key "model.network" is required').startswith("network must be given, but are not")
    said = "a key of this word is not what it was"
    assert parser_line(said) == said


def test_a_package_that_lightning_asks_for_is_named_wherever_it_does() -> None:
    hint = "Requirement 'mlflow>=1.0.0' not met. HINT: Try running `pip install -U 'mlflow>=1.0.0'`"
    line = "package mlflow must be installed for this, but is not; pip install 'mlflow>=1.0.0'"
    for error in (ModuleNotFoundError(hint), ValueError(f"Problem with given class_path 'x':\n  {hint}")):
        assert one_line(error) == line
