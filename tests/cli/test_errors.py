from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lit_llm.cli.errors import one_line
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
