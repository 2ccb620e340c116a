from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import Timer

from lit_llm.cli.trainer_options import require_end


class Clock(Timer):
    """A subclass made by a user."""


def of(*class_paths: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(class_path=path) for path in ("lit_llm.callbacks.samples.Samples", *class_paths)]


EVERY = {"val_check_interval": 250, "check_val_every_n_epoch": None}
STOPS = [f"{module}.EarlyStopping" for module in ("lightning.pytorch.callbacks", "lit_llm.callbacks.early_stopping")]


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"max_steps": 6}, True),
        ({"max_time": "00:00:01:00"}, True),
        ({"fast_dev_run": True}, True),
        ({"max_epochs": 2, "limit_train_batches": 3}, True),
        ({"limit_train_batches": 3}, False),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, False),
        ({"callbacks": of()}, False),
        ({"callbacks": of("lightning.pytorch.callbacks.Timer")}, True),
        ({"callbacks": of(f"{__name__}.Clock")}, True),
        *(({"callbacks": one}, ends) for one, ends in zip(of(f"{__name__}.Clock"), (False, True))),
        *(({"callbacks": of(stop)} | EVERY, True) for stop in STOPS),
        *(({"callbacks": of(stop), "limit_train_batches": 3}, True) for stop in STOPS),
        *(({"callbacks": of(stop)}, False) for stop in STOPS),  # a stream has no epochs to validate after
    ],
)
def test_a_stream_is_trained_on_where_something_ends_it(options: dict[str, Any], ends: bool) -> None:
    options = {"max_epochs": -1, "max_steps": -1} | options
    if ends:
        require_end(options)
    else:
        with pytest.raises(ValueError, match=r"^trainer\.max_steps must be given where data\.streaming is true"):
            require_end(options)
