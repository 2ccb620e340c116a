"""The contract between data and objectives: field names, shapes and what they mean.

A batch is a plain dict, so that every strategy, device transfer and collate function of the field already knows it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NotRequired, TypedDict

from jaxtyping import Float, Int
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that is not to be predicted; torch's own default for cross-entropy."""


def say_nothing(labels: Iterable[Any]) -> bool:
    """Whether all labels are -1, as a number or in text, or nothing; the text `None` is a label."""
    return set(labels) <= {-1, "-1", "-1.0", None}


class TokenBatch(TypedDict):
    """Rows of tokens for a language model.

    Attributes:
        input_ids: What the network reads.
        labels: For each position the token it must predict, *already shifted* (position `t` of a causal model holds
            token `t + 1`), or `IGNORE_INDEX`.
        document_ids: Which document of its row a position belongs to, counted from 0; present when attention must not
            cross documents.
        positions: Index of each token in its own document, from 0; where absent, in its row.
        num_bytes: UTF-8 bytes of text that each row's labels stand for: the denominator of bits per byte.
        documents: Index, within the split, of the document that each label belongs to; present when predicting.
        sources: Index of the source that each row of a mixture starts in; present when evaluating.
    """

    input_ids: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    document_ids: NotRequired[Int[Tensor, "batch seq"]]
    positions: NotRequired[Int[Tensor, "batch seq"]]
    num_bytes: NotRequired[Float[Tensor, " batch"]]
    documents: NotRequired[Int[Tensor, "batch seq"]]
    sources: NotRequired[Int[Tensor, " batch"]]


class ExampleBatch(TypedDict):
    """Examples, each with one label: what a classifier or a regression reads.

    All fields but `labels`, `rows` and the two of unlabelled examples are what the network is called with, by name.

    Attributes:
        input_ids: Tokens of a text, or of two with the tokeniser's marks between them; padded on the right.
        attention_mask: 1 on tokens, 0 on padding.
        token_type_ids: 0 on the first text, 1 on the second; where the tokeniser makes them.
        labels: Index of the class, or the value; absent where the split has none.
        rows: Index of each example in its split; without, `predict` counts them, and no mistakes are listed.
        unlabelled: In semi-supervised training a batch of other examples, as they are or hardly changed. Their labels
            are there where they are known: to be counted, never to be learnt from.
        unlabelled_strong: The same examples in the same order, strongly augmented.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    token_type_ids: NotRequired[Int[Tensor, "batch seq"]]
    labels: NotRequired[Int[Tensor, " batch"] | Float[Tensor, " batch"]]
    rows: NotRequired[Int[Tensor, " batch"]]
    unlabelled: NotRequired[ExampleBatch]
    unlabelled_strong: NotRequired[ExampleBatch]


class ImageBatch(TypedDict):
    """Images, each with one label: what a classifier of images reads.

    Attributes:
        pixel_values: Intensities, normalised by mean and standard deviation of each channel.
        labels: Index of the class, or of mixed images (in training alone) the probability of each class; absent where
            the split has none.
        rows: As in `ExampleBatch`.
        unlabelled: As in `ExampleBatch`.
        unlabelled_strong: As in `ExampleBatch`.
    """

    pixel_values: Float[Tensor, "batch channels height width"]
    labels: NotRequired[Int[Tensor, " batch"] | Float[Tensor, "batch classes"]]
    rows: NotRequired[Int[Tensor, " batch"]]
    unlabelled: NotRequired[ImageBatch]
    unlabelled_strong: NotRequired[ImageBatch]


class Seq2SeqBatch(TypedDict):
    """Examples, each a text to read and one to write.

    Attributes:
        input_ids: Tokens of the text to read; padded on the right.
        attention_mask: 1 on tokens, 0 on padding.
        labels: Tokens of the text to write, the end token included, and `IGNORE_INDEX` after it. They are not shifted:
            a network reads those before a token to tell it. There are none where it is only to be predicted.
        rows: Index of each example in its split.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    labels: NotRequired[Int[Tensor, "batch new"]]
    rows: Int[Tensor, " batch"]


NOT_READ = frozenset({"labels", "rows", "sources", "num_bytes", "documents", "unlabelled", "unlabelled_strong"})


def inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the network is called with: all but labels, rows and unlabelled examples."""
    return {name: value for name, value in batch.items() if name not in NOT_READ}


def keep_unread(precision: Any) -> None:
    """Has a precision of Lightning's leave what no network reads, when it brings batches into the network's 16 bits.

    (It would make 1904 of a label of 1906, and round how many bytes texts have.)
    """
    precision.convert_input = functools.partial(_converted, precision)


def _converted(precision: Any, batch: Any) -> Any:
    converted = type(precision).convert_input(precision, batch)
    if not isinstance(batch, Mapping):
        return converted
    return converted | {name: x for name, x in batch.items() if name in NOT_READ and isinstance(x, Tensor)}


def count_items(batch: Any) -> int:
    """Tokens of a batch of text, or else its rows; unlabelled examples count too.

    Example:
        >>> import torch
        >>> count_items({"input_ids": torch.zeros(2, 8), "unlabelled": {"input_ids": torch.zeros(3, 8)}})
        40
    """
    if isinstance(batch, dict):
        further = sum(count_items(part) for part in batch.values() if isinstance(part, dict))
        return further + (batch["input_ids"].numel() if "input_ids" in batch else len(next(iter(batch.values()))))
    return batch.numel() if isinstance(batch, Tensor) else len(batch[0])
