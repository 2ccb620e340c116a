"""Imports torchmetrics, which Lightning needs, without the heavy packages that only some of its metrics need."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator

PICTURES = "matplotlib"
UNUSED = ("scipy", "transformers", PICTURES)
"""Needed only for audio, text metrics that run a network, and `plot`. Importing them takes a second or two and some
100 MB."""


def import_torchmetrics() -> None:
    """Imports torchmetrics as if the packages of `UNUSED` were not installed. Call it before Lightning is imported.

    The metrics that need them can still be imported from their own modules, such as `torchmetrics.text.bert`; `plot`
    of any metric imports matplotlib when it is called.
    """
    if "torchmetrics" in sys.modules:
        return
    with contextlib.suppress(ImportError, AttributeError):
        with _passing_over(UNUSED):
            import torchmetrics  # noqa: F401
        from torchmetrics.utilities import plot

        # The plotting functions call this check first: reloading the module then imports matplotlib into it.
        plot._error_on_missing_matplotlib = functools.partial(importlib.reload, plot)


@contextlib.contextmanager
def _passing_over(names: tuple[str, ...]) -> Iterator[None]:
    """Makes `lightning_utilities` report these packages as not installed."""
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
        for requirement in asked:  # drop the cached answer, so that the next use checks again
            del requirement.available
        # Modules imported without such a package are dropped, to be imported anew (`plot` handles matplotlib itself).
        without = [a for a in asked if a.requirement != PICTURES]
        for name, module in list(sys.modules.items()):
            leaf = name.startswith("torchmetrics.") and not hasattr(module, "__path__")
            if (
                leaf
                and name != "torchmetrics.utilities.imports"
                and any(x is a for x in vars(module).values() for a in without)
            ):
                del sys.modules[name]
