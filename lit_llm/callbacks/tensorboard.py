"""A TensorBoard logger that writes one event per report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary


class TensorBoard(TensorBoardLogger):
    """Lightning's `TensorBoardLogger`, except that the metrics of a step are one event, not one event each.

    Each event wakes a thread that computes a checksum in Python while holding the GIL: with seven events, a report
    delays the training loop more than twice as long.
    """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Adds metrics of a step: numbers or single-element tensors."""
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self.experiment._get_file_writer().add_summary(Summary(value=values), step)
