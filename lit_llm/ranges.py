"""Ranges of arguments."""

from __future__ import annotations

INTERVALS = {
    "above 0": lambda value: value > 0,
    "in (0, 1)": lambda value: 0 < value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
}


def require_at_least(least: int | float, owner: str = "", /, **values: int | float | None) -> None:
    """Refuses values below `least` with a `ValueError`; `None` passes. `owner` comes before their names in the message.

    Example:
        >>> require_at_least(1, "model.", width=8, depth=0)
        Traceback (most recent call last):
        ValueError: model.depth must be at least 1, but is 0
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{owner}{name} must be at least {least}, but is {value}")


def require_range(interval: str, owner: str = "", /, **values: int | float | None) -> None:
    """Refuses values outside one of `INTERVALS`, as `require_at_least` does.

    Example:
        >>> require_range("in [0, 1)", dropout=1.0)
        Traceback (most recent call last):
        ValueError: dropout must be in [0, 1), but is 1.0
    """
    for name, value in values.items():
        if value is not None and not INTERVALS[interval](value):
            raise ValueError(f"{owner}{name} must be {interval}, but is {value}")
