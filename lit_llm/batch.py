"""The contract between data and objectives: names, shapes and meanings of the fields of a batch.

A batch is a plain dict, which every strategy, device transfer and collate function supports.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NotRequired, TypedDict

from jaxtyping import Float, Int
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not to be predicted: the default `ignore_index` of torch's cross-entropy."""


def say_nothing(labels: Iterable[Any]) -> bool:
    """Whether every label is a placeholder: -1 (a number or text) or null; the text `None` counts as a label."""
    return set(labels) <= {-1, "-1", "-1.0", None}


class TokenBatch(TypedDict):
    """Rows of tokens for a language model.

    Attributes:
        input_ids: Tokens that the network reads.
        labels: Token to predict at each position, *already shifted* (position `t` of a causal model holds token
            `t + 1`), or `IGNORE_INDEX`.
        document_ids: Index, within the row, of the document that each position belongs to, from 0; present if attention
            must not cross documents.
        positions: Index of each token within its document, from 0; if absent, positions count within the row.
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
    """Texts or pairs of texts, each with one label, for classification and regression.

    All fields except those in `NOT_READ` are passed to the network by name.

    Attributes:
        input_ids: Tokens of a text, or of two texts with special tokens between them; padded on the right.
        attention_mask: 1 on tokens, 0 on padding.
        token_type_ids: 0 on the first text, 1 on the second; present if the tokeniser returns them.
        labels: Index of the class, or the value; absent if the split has no labels.
        rows: Index of each example in its split; if absent, `predict` numbers the examples and no mistakes are listed.
        unlabelled: In semi-supervised training, a batch of other examples, unaugmented or weakly augmented. Their
            labels, if known, serve statistics only and are never trained on.
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
    """Images, each with one label, for image classification.

    Attributes:
        pixel_values: Intensities, normalised by the mean and standard deviation of each channel.
        labels: Index of the class or, for mixed images (in training only), the probability of each class; absent if the
            split has no labels.
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
    """Pairs of a source text and a target text, for encoder–decoder networks.

    Attributes:
        input_ids: Tokens of the source text; padded on the right.
        attention_mask: 1 on tokens, 0 on padding.
        labels: Tokens of the target text, including the end token, then `IGNORE_INDEX`. They are not shifted: the
            network shifts them itself to make the decoder's input. Absent if the targets are only to be predicted.
        rows: Index of each example in its split.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    labels: NotRequired[Int[Tensor, "batch new"]]
    rows: Int[Tensor, " batch"]


NOT_READ = frozenset({"labels", "rows", "sources", "num_bytes", "documents", "unlabelled", "unlabelled_strong"})


def inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The fields that the network is called with: all except those in `NOT_READ`."""
    return {name: value for name, value in batch.items() if name not in NOT_READ}


def keep_unread(precision: Any) -> None:
    """Makes a Lightning precision plugin keep the type of `NOT_READ` fields when it casts batches to 16 bits.

    Otherwise bfloat16 would round a label of 1906 to 1904, and the byte counts of texts likewise.
    """
    precision.convert_input = functools.partial(_converted, precision)


def _converted(precision: Any, batch: Any) -> Any:
    converted = type(precision).convert_input(precision, batch)
    if not isinstance(batch, Mapping):
        return converted
    return converted | {name: x for name, x in batch.items() if name in NOT_READ and isinstance(x, Tensor)}


def count_items(batch: Any) -> int:
    """The number of tokens of a batch of text, padding included, otherwise of rows; unlabelled examples count too.

    Example:
        >>> import torch
        >>> count_items({"input_ids": torch.zeros(2, 8), "unlabelled": {"input_ids": torch.zeros(3, 8)}})
        40
    """
    if isinstance(batch, dict):
        further = sum(count_items(part) for part in batch.values() if isinstance(part, dict))
        return further + (batch["input_ids"].numel() if "input_ids" in batch else len(next(iter(batch.values()))))
    return batch.numel() if isinstance(batch, Tensor) else len(batch[0])
