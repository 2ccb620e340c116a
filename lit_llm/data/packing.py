"""Packs documents into rows of one length, and finds the document that a position belongs to. Pure functions."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lit_llm.batch import IGNORE_INDEX


def num_rows(num_tokens: int, seq_len: int) -> int:
    """Number of rows that predict every token of a stream but the first once; the last may be partly filled."""
    return -(-max(0, num_tokens - 1) // seq_len)


def cut_rows(
    tokens: np.ndarray, rows: np.ndarray, seq_len: int
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Cuts rows out of a stream of tokens in one gather, without a copy of the stream.

    Row `r` reads tokens `r * seq_len` to `(r + 1) * seq_len - 1`, and predicts the token after each.

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
    """Index of each position's document within its row, from 0; a boundary token opens the next document.

    Example:
        >>> document_ids(torch.tensor([[5, 0, 7, 7, 0]]), boundary=0).tolist()
        [[0, 1, 1, 1, 2]]
    """
    return (input_ids == boundary).cumsum(dim=1)


def label_documents(starts: np.ndarray, rows: np.ndarray, seq_len: int) -> Int[np.ndarray, "batch seq"]:
    """Index of the document that each label of the rows belongs to.

    The labels of a document are its own tokens and the boundary that ends it. The stream is
    `boundary doc₀ boundary doc₁ …`, so `starts[d]`, the position of the boundary before document `d`, is exclusive.

    Example:
        >>> label_documents(np.array([0, 3]), np.array([0]), seq_len=5).tolist()  # b x x b y b
        [[0, 0, 0, 1, 1]]
    """
    places = rows[:, None] * seq_len + np.arange(1, seq_len + 1)
    return np.searchsorted(starts, places, side="left") - 1


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs whole examples into few rows by best-fit decreasing.

    Longest first, each example goes into the row with the least room that still fits it, so the order of the examples
    does not change the number of rows. That is at most 11/9 of the minimum (plus one); with short examples among long
    ones, rows are nearly full.

    Args:
        lengths: Length of each example, from 1 to `capacity`.
        capacity: Length of a row.

    Returns:
        The examples ordered by row, and the edges of the rows: row `r` holds `order[edges[r] : edges[r + 1]]`.

    Raises:
        ValueError: When an example is empty or does not fit.

    Source:
        Johnson, 1974, "Fast Algorithms for Bin Packing"; for language models Ding et al., 2024, arXiv:2404.10830.

    Example:
        >>> order, edges = pack(np.array([3, 5, 2, 4]), capacity=7)
        >>> [sorted(row.tolist()) for row in np.split(order, edges[1:-1])]
        [[1, 2], [0, 3]]
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"lengths must be from 1 to the row's {capacity}, but are from {lengths.min()} to {lengths.max()}"
        )
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit `n` is set if a row has room for exactly `n` more tokens
    for example in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[example])
        fitting = rooms >> length << length
        room = (fitting & -fitting).bit_length() - 1 if fitting else capacity
        if fitting:
            row = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
            rows[row].append(example)
        else:
            row = len(rows)
            rows.append([example])
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    edges = np.cumsum([0, *map(len, rows)])
    return np.array([example for row in rows for example in row], dtype=np.int64), edges


def lay_rows(rows: list[list[tuple[np.ndarray, np.ndarray]]], seq_len: int, padding: int) -> dict[str, Tensor]:
    """Lays the examples of each row side by side, each as a document of its own.

    An example of `n` tokens takes `n - 1` positions: its last token is only a label, and no label is a token of another
    example. The rest of a row is one more document, without labels.

    Args:
        rows: The examples of each row: their tokens, and whether each token is to be predicted.
        seq_len: Length of a row.
        padding: Token that fills the rest of a row.

    Returns:
        `input_ids`, `labels`, `document_ids` and `positions` of shape `batch seq`, as in `lit_llm.batch`.

    Example:
        >>> batch = lay_rows([[(np.array([5, 6, 7]), np.array([0, 0, 1])), (np.array([8, 9]), np.array([0, 1]))]], 4, 0)
        >>> for name, value in batch.items(): print(name, value.tolist())
        input_ids [[5, 6, 8, 0]]
        labels [[-100, 7, 9, -100]]
        document_ids [[0, 0, 1, 2]]
        positions [[0, 1, 0, 0]]
    """
    shape = (len(rows), seq_len)
    ids, labels = np.full(shape, padding, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
    documents, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for r, examples in enumerate(rows):
        start = 0
        for number, (tokens, learnt) in enumerate(examples):
            end = start + len(tokens) - 1
            ids[r, start:end] = tokens[:-1]
            labels[r, start:end] = np.where(learnt[1:], tokens[1:].astype(np.int64), IGNORE_INDEX)
            documents[r, start:end] = number
            positions[r, start:end] = np.arange(end - start)
            start = end
        documents[r, start:] = len(examples)
        positions[r, start:] = np.arange(seq_len - start)
    batch = {"input_ids": ids, "labels": labels, "document_ids": documents, "positions": positions}
    return {name: torch.from_numpy(value) for name, value in batch.items()}
