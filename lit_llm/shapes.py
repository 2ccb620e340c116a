"""Detects fake tensors, which have shapes but no data and are used to plan a run."""

from __future__ import annotations

from torch._guards import detect_fake_mode


def shapes_only() -> bool:
    """Whether new tensors are fake, so that there is nothing to read weights into.

    Example:
        >>> from torch._subclasses.fake_tensor import FakeTensorMode
        >>> with FakeTensorMode():
        ...     print(shapes_only())
        True
        >>> shapes_only()
        False
    """
    return detect_fake_mode() is not None
