"""What Lightning does at each step, left out where it does nothing."""

from __future__ import annotations

import contextlib
from typing import Any

from lightning.pytorch.profilers import PassThroughProfiler

HOOKS_OF_A_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class NoProfiler(PassThroughProfiler):
    """Lightning's profiler of nothing, without the generator that it makes some seventy times a step."""

    _nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> contextlib.AbstractContextManager[Any]:
        """A context that does nothing."""
        return self._nothing


def skip_empty_hooks(owner: Any, base: type) -> None:
    """Has Lightning pass over the hooks of a step that `owner` leaves as they are: it calls all but `None`."""
    for name in HOOKS_OF_A_STEP:
        if name not in vars(owner) and getattr(type(owner), name) is getattr(base, name):
            setattr(owner, name, None)
