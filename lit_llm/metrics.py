"""Metrics over whole data sets, as streaming sums."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from lit_llm.batch import IGNORE_INDEX


class LanguageModeling(Metric):
    """How well a language model predicts text.

    `compute` gives `loss` (nats per token, at least 0; `log(vocab)` knows nothing), `perplexity` (its exponential) and,
    where the data says how many bytes its labels stand for, `bits_per_byte` (the same nats per byte of text, in bits:
    comparable between tokenisers; 8 knows nothing). Sums are kept in double precision where the device has it, and over
    all processes.

    Example:
        >>> metric = LanguageModeling()
        >>> metric.update(torch.full((1, 4), math.log(2)), torch.zeros(1, 4, dtype=torch.long), torch.tensor([8.0]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'loss': 0.693, 'perplexity': 2.0, 'bits_per_byte': 0.5}
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64  # MPS has no doubles
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def update(
        self,
        nats: Float[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"],
        num_bytes: Float[Tensor, " batch"] | None = None,
    ) -> None:
        """Adds a batch: the cross-entropy of each label, the labels, and the bytes that each row stands for."""
        self.nats += nats.sum(dtype=self.nats.dtype)
        self.tokens += (labels != IGNORE_INDEX).sum()
        if num_bytes is not None:
            self.bytes += num_bytes.sum(dtype=self.bytes.dtype)

    def compute(self) -> dict[str, Tensor]:
        """The metrics so far."""
        loss = self.nats / self.tokens
        metrics = {"loss": loss, "perplexity": loss.exp()}
        if self.bytes > 0:
            metrics["bits_per_byte"] = self.nats / self.bytes / math.log(2)
        return {name: value.float() for name, value in metrics.items()}
