"""Values as errors and logs name them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def listed(values: Iterable[Any]) -> str:
    """Values in words, the first ten of many.

    Example:
        >>> listed("ab")
        "'a', 'b'"
        >>> listed(range(12))
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 … (12 in all)'
    """
    values = list(values)
    return ", ".join(map(repr, values[:10])) + (f" … ({len(values)} in all)" if len(values) > 10 else "")
