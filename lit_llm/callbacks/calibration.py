"""Batches on which a callback looks at what flows through the network."""

from __future__ import annotations

from itertools import islice
from typing import Any

from lightning.pytorch import Trainer


def calibration_batches(trainer: Trainer, num_batches: int) -> list[Any]:
    """The first batches of the first epoch, on the device, whatever the step: a resumed run sees the same.

    They come from a loader of their own, so that the run's keeps its place.

    Raises:
        ValueError: When the data gives none.
    """
    loader = trainer.datamodule.train_dataloader()
    batches = [trainer.strategy.batch_to_device(batch) for batch in islice(iter(loader), num_batches)]
    if not batches:
        raise ValueError(f"num_batches must be at least 1 and the data must give one, but is {num_batches}")
    return batches
