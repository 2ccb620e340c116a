"""Messages about data that has changed since a checkpoint was trained on it."""

from __future__ import annotations


def difference(split: str, path: str, what: str, then: list[int], now: list[int]) -> str | None:
    """How a split has changed, from its sizes and hashes of its content then and now; `None` if it has not.

    Example:
        >>> difference("train", "x.csv", "rows", [60, 1], [80, 2])
        'the train split of x.csv had 60 rows then and has 80 now'
    """
    if then[0] != now[0]:
        return f"the {split} split of {path} had {then[0]:,} {what} then and has {now[0]:,} now"
    return f"the {split} split of {path} has other {what} now" if then != now else None


def recut(path: str, then: dict[str, float], now: dict[str, float]) -> str | None:
    """How splits are cut otherwise out of the same data, of which each is a part; `None` where they are not.

    Example:
        >>> recut("x.csv", {"validation": 0.1, "test": 0}, {"validation": 0.1, "test": 0.2})
        'of x.csv 0.1 (validation), 0 (test) was cut out then and 0.1 (validation), 0.2 (test) is now'
    """
    before, after = (", ".join(f"{part:g} ({name})" for name, part in cut.items()) for cut in (then, now))
    return f"of {path} {before} was cut out then and {after} is now" if then != now else None


def refusal(what: str, change: str) -> ValueError:
    """The error that refuses to resume training, because changed data would be cut into other splits."""
    return ValueError(
        f"data.path must hold the {what} that the checkpoint was trained on to go on from it, but {change}; put those "
        f"back, or start a new run with --model.weights"
    )


def doubt(what: str, split: str, change: str) -> str:
    """The warning that metrics of a split may be too good."""
    return f"{what.capitalize()} that the checkpoint was trained on may be in the {split} split, since {change}"
