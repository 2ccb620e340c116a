"""Classification that says the same whatever dropout leaves out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lit_llm.objectives.classification import Classification
from lit_llm.objectives.exact_steps import Loss

log = logging.getLogger(__name__)


class RDrop(Classification):
    """Reads each batch twice, with other units dropped, and adds how far apart the two answers are.

    For few examples and a network with dropout; where it has none, a line says so. A step takes twice as long.

    Args:
        args: As in `Classification`.
        alpha: Factor on the divergence, at least 0.
        kwargs: As in `Classification`.

    Raises:
        ValueError: When `alpha` is negative.

    Source:
        Wu et al., 2021, "R-Drop", arXiv:2106.14448, eq. 1 to 4. Its cross-entropy is the sum of both passes, here their
        mean, as in its code: `alpha` is half of the equation's.

    Example:
        >>> import torch
        >>> model = RDrop(torch.nn.Identity, alpha=2.0)
        >>> model.divergence(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
        tensor([0.1155])
    """

    def __init__(self, *args: Any, alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not alpha >= 0:
            raise ValueError(f"model.alpha must be at least 0, but is {alpha}")
        self.save_arguments()
        self.alpha = alpha
        self._begins = True

    def loss(self, batch: Mapping[str, Tensor]) -> Loss:
        """The mean cross-entropy of two passes and `alpha` times their divergence, summed over the examples."""
        if not self.training:
            return super().loss(batch)
        first, second = self.logits(batch), self.logits(batch)
        if self._begins:
            self._begins = False
            if first.equal(second):
                name = type(self.network).__name__
                log.warning(f"{name} has no dropout: RDrop reads each batch twice, and both answers are the same")
        (one, targets), (other, _) = (self.cross_entropy(logits, batch["labels"]) for logits in (first, second))
        return (one + other) / 2 + self.alpha * targets * self.divergence(first, second).mean(), targets

    @staticmethod
    def divergence(
        first: Float[Tensor, "batch classes"], second: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, " batch"]:
        """The mean of both Kullback-Leibler divergences of two answers to each example, in nats.

        Args:
            first: Logits of one.
            second: Logits of the other.
        """
        p, q = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
        return ((p.exp() - q.exp()) * (p - q)).sum(dim=-1) / 2
