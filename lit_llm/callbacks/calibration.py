"""Calibration batches for callbacks that need activations of the network."""

from __future__ import annotations

from itertools import islice
from typing import Any

from lightning.pytorch import Trainer


def calibration_batches(trainer: Trainer, num_batches: int) -> list[Any]:
    """The first batches of the first epoch, on the device, whatever the step, so that a resumed run sees the same.

    They are in the run's precision, as those that it trains on. They come from a separate loader, so that the run's own
    loader keeps its position.

    Raises:
        ValueError: When there are none.
    """
    loader = trainer.datamodule.train_dataloader()
    precision, strategy = trainer.precision_plugin, trainer.strategy
    batches = [strategy.batch_to_device(precision.convert_input(batch)) for batch in islice(iter(loader), num_batches)]
    if not batches:
        raise ValueError(f"num_batches must be at least 1 and the data must give one, but is {num_batches}")
    return batches
