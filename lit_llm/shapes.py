"""Tensors that have a shape and no content, of which networks are made that are only planned."""

from __future__ import annotations

from torch._guards import detect_fake_mode


def shapes_only() -> bool:
    """Whether tensors made now have no content: then there is nothing to read weights into.

    Example:
        >>> from torch._subclasses.fake_tensor import FakeTensorMode
        >>> with FakeTensorMode():
        ...     print(shapes_only())
        True
        >>> shapes_only()
        False
    """
    return detect_fake_mode() is not None
