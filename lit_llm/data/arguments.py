"""Checks of arguments that several data modules share."""

from __future__ import annotations

from lit_llm.ranges import require_at_least


def require_counts(least: int = 1, **counts: int | None) -> None:
    """Refuses counts below `least`; `None` passes."""
    require_at_least(least, "data.", **counts)


def require_fractions(validation_fraction: int | float, test_fraction: int | float) -> None:
    """Refuses fractions of the training split that cannot be held out."""
    if validation_fraction < 0 or test_fraction < 0 or validation_fraction + test_fraction >= 1:
        raise ValueError(
            f"data.validation_fraction and data.test_fraction must be at least 0 and leave something to train on, "
            f"but are {validation_fraction} and {test_fraction}"
        )
