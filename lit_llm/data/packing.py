"""Documents to rows of one length, and back to which document a position belongs to. Pure functions."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lit_llm.batch import IGNORE_INDEX


def num_rows(num_tokens: int, seq_len: int) -> int:
    """Rows in which each token of a stream but the first is predicted once; the last row may be partly filled."""
    return -(-max(0, num_tokens - 1) // seq_len)


def cut_rows(
    tokens: np.ndarray, rows: np.ndarray, seq_len: int
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Cuts rows out of a stream of tokens in one gather, without a copy of the stream.

    Row `r` reads tokens `r * seq_len` to `(r + 1) * seq_len` and predicts those one further.

    Args:
        tokens: The stream, of any unsigned type; may be a memory map.
        rows: Indices of the rows wanted.
        seq_len: Length of a row.

    Returns:
        `input_ids` and `labels`; beyond the stream's end the labels are `IGNORE_INDEX`.

    Example:
        >>> ids, labels = cut_rows(np.arange(6, dtype=np.uint16), np.array([0, 1]), seq_len=3)
        >>> ids.tolist(), labels.tolist()
        ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, -100]])
    """
    wanted = rows[:, None] * seq_len + np.arange(seq_len + 1)
    beyond = wanted >= len(tokens)
    window = torch.from_numpy(tokens[np.minimum(wanted, len(tokens) - 1)].astype(np.int64))
    ids, labels = window[:, :-1], window[:, 1:]
    if beyond.any():
        labels = labels.masked_fill(torch.from_numpy(beyond[:, 1:]), IGNORE_INDEX)
    return ids.contiguous(), labels.contiguous()


def document_ids(input_ids: Int[Tensor, "batch seq"], boundary: int) -> Int[Tensor, "batch seq"]:
    """Which document of its row a position reads from, counted from 0; the boundary token opens a document.

    Example:
        >>> document_ids(torch.tensor([[5, 0, 7, 7, 0]]), boundary=0).tolist()
        [[0, 1, 1, 1, 2]]
    """
    return (input_ids == boundary).cumsum(dim=1)


def label_documents(starts: np.ndarray, rows: np.ndarray, seq_len: int) -> Int[np.ndarray, "batch seq"]:
    """Index of the document that each label of the rows belongs to.

    A document owns the labels that are its own tokens and the boundary that ends it; the stream is
    `boundary doc₀ boundary doc₁ …`, so `starts[d]` (the place of the boundary before document `d`) is exclusive.

    Example:
        >>> label_documents(np.array([0, 3]), np.array([0]), seq_len=5).tolist()  # b x x b y b
        [[0, 0, 0, 1, 1]]
    """
    places = rows[:, None] * seq_len + np.arange(1, seq_len + 1)
    return np.searchsorted(starts, places, side="left") - 1
