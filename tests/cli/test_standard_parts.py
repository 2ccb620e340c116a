from __future__ import annotations

import pytest

from lit_llm.cli.standard_parts import CheckpointOptions


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [("val/hinge_loss", "min"), ("val/error_rate", "min"), ("val/nll", "min"), ("val/top_5", "max"), ("val/f1", "max")],
)
def test_the_name_of_a_metric_says_which_of_two_is_better(monitor: str, mode: str) -> None:
    assert CheckpointOptions(monitor).decided(("val/accuracy", "max")).mode == mode
    assert CheckpointOptions(monitor, "max").decided(("val/accuracy", "max")).mode == "max"


def test_the_headline_metric_says_it_itself() -> None:
    assert CheckpointOptions().decided(("val/regret", "min")).mode == "min"
