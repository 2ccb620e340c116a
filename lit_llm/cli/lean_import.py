"""Imports torchmetrics, which Lightning needs, without the packages that only some of its metrics need."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator

PICTURES = "matplotlib"
UNUSED = ("scipy", "transformers", PICTURES)
"""For audio, metrics of text that run a network, and `plot`: a second or two, and some 100 MB, at every start."""


def import_torchmetrics() -> None:
    """To be called before Lightning is imported.

    A callback that wants one of those metrics imports it from its own module, `torchmetrics.text.bert`, and gets it;
    `plot` of any metric imports what it draws with when it is called.
    """
    if "torchmetrics" in sys.modules:
        return
    with contextlib.suppress(ImportError, AttributeError):
        with _passing_over(UNUSED):
            import torchmetrics  # noqa: F401
        from torchmetrics.utilities import plot

        # Its functions call this first, and then find in the module what it imports.
        plot._error_on_missing_matplotlib = functools.partial(importlib.reload, plot)


@contextlib.contextmanager
def _passing_over(names: tuple[str, ...]) -> Iterator[None]:
    """Has `lightning_utilities` say of these packages that they are not there."""
    from lightning_utilities.core import imports

    cache, asked = imports.RequirementCache, []
    available, check = imports.package_available, cache._check_available

    def check_others(requirement: imports.RequirementCache) -> None:
        if (requirement.requirement or "").startswith(names):
            if not hasattr(requirement, "available"):
                asked.append(requirement)
            requirement.available, requirement.message = False, ""
        else:
            check(requirement)

    imports.package_available = lambda name: name not in names and available(name)
    cache._check_available = check_others
    try:
        yield
    finally:
        imports.package_available, cache._check_available = available, check
        for requirement in asked:  # to be looked at anew by whoever asks next
            del requirement.available
        without = [a for a in asked if a.requirement != PICTURES]  # which each would import where it draws
        for name, module in list(sys.modules.items()):
            leaf = name.startswith("torchmetrics.") and not hasattr(module, "__path__")
            if (
                leaf
                and name != "torchmetrics.utilities.imports"
                and any(x is a for x in vars(module).values() for a in without)
            ):
                del sys.modules[name]
