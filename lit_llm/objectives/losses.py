"""Losses that two or more objectives use: pure functions, summed rather than averaged."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lit_llm.batch import IGNORE_INDEX


def token_nats(
    logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Cross-entropy of each label in nats, 0 where it is `IGNORE_INDEX`; in fp32 whatever the logits' type."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return flat.view_as(labels)


def cross_entropy_sum(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int[Tensor, "batch seq"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """Cross-entropy in nats, summed over the labels that are not `IGNORE_INDEX`.

    Args:
        logits: Unnormalised log-probabilities, of any floating type; computed with in fp32.
        labels: The tokens to predict.
        label_smoothing: Probability that the target gives to all tokens alike (Szegedy et al., 2015,
            arXiv:1512.00567, section 7).
        z_loss: Weight of the squared log of the softmax's denominator, which keeps logits from drifting (Chowdhery et
            al., 2022, arXiv:2204.02311, section 5, with 1e-4).

    Example:
        >>> logits, labels = torch.zeros(1, 2, 4), torch.tensor([[1, IGNORE_INDEX]])
        >>> round(cross_entropy_sum(logits, labels).item(), 4)  # log 4
        1.3863
    """
    logits, labels = logits.flatten(0, 1).float(), labels.flatten()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        log_z = torch.logsumexp(logits, dim=-1)
        total = total + z_loss * (log_z.square() * (labels != IGNORE_INDEX)).sum()
    return total
