"""TensorBoard's log of a run, written as one event a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary


class TensorBoard(TensorBoardLogger):
    """Lightning's, but a step's metrics are one event of several values, not an event each.

    Each event wakes a thread that computes its checksum in Python and holds the interpreter meanwhile: with seven of
    them a report takes more than twice the time from the training loop.
    """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Adds metrics of a step: numbers, or tensors of one."""
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self.experiment._get_file_writer().add_summary(Summary(value=values), step)
