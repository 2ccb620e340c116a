"""Texts or pairs of texts as flat arrays of tokens, and batches of them, each padded to its longest example."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lit_llm.batch import ExampleBatch
from lit_llm.data.augmentation import TextAugmentation
from lit_llm.data.tokenizer import padding_id

log = logging.getLogger(__name__)

CHUNK = 8192


class Collation:
    """The examples of one split, tokenised.

    Args:
        texts: Text of each example, or the first of two.
        pairs: Second text of each example; `None` if there is only one.
        labels: Class index or value of each example; `None` if there are no labels.
        tokenizer: Any fast tokeniser; it adds its special tokens around and between texts. It keeps the truncation
            setting as state, so pass a copy if it is also used elsewhere.
        max_seq_len: Maximum tokens of an example, special tokens included; of two texts, the longer one is truncated.

    Attributes:
        starts: Where each example begins in the flat arrays, and where the last one ends.

    Example:
        >>> from lit_llm.data.tokenizer import byte_tokenizer
        >>> split = Collation(["ab", "c"], None, np.array([1, 0]), byte_tokenizer(), max_seq_len=8)
        >>> split.batch(np.array([1, 0]))["attention_mask"].tolist()
        [[1, 0], [1, 1]]
    """

    def __init__(
        self,
        texts: list[str],
        pairs: list[str] | None,
        labels: np.ndarray | None,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
    ) -> None:
        ids, types, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)], [0]
        with_types, num_cut = "token_type_ids" in tokenizer.model_input_names, 0
        for start in range(0, len(texts), CHUNK):
            encoded = tokenizer(
                texts[start : start + CHUNK],
                None if pairs is None else pairs[start : start + CHUNK],
                truncation=True,
                max_length=max_seq_len,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=with_types,
                split_special_tokens=True,  # in a text, a special token's spelling is plain text
            )
            lengths += map(len, encoded["input_ids"])
            num_cut += sum(len(each) == max_seq_len and bool(each.overflowing) for each in encoded.encodings)
            ids.append(np.fromiter(_flat(encoded["input_ids"]), np.int32))
            if with_types:
                types.append(np.fromiter(_flat(encoded["token_type_ids"]), np.uint8))
        if num_cut:
            log.info(f"Cut {num_cut:,} of {len(texts):,} examples ({num_cut / len(texts):.1%}) at {max_seq_len} tokens")
        self.padding = padding_id(tokenizer)
        self.padding_type = tokenizer.pad_token_type_id
        self.ids, self.starts = np.concatenate([*ids, np.array([self.padding], np.int32)]), np.cumsum(lengths)
        self.types = np.concatenate([*types, np.array([self.padding_type], np.uint8)]) if with_types else None
        self.labels = labels
        marks = [token for role, token in tokenizer.special_tokens_map.items() if role != "unk_token"]
        words = {tokenizer.unk_token}.difference(marks)  # it stands for a word, unless it has another role too
        kept = [token for token in tokenizer.all_special_tokens if token not in words]
        self.special_ids = np.array(tokenizer.convert_tokens_to_ids(kept))
        stand_ins = (tokenizer.mask_token_id, tokenizer.unk_token_id, self.padding)
        self.mask_token = next(token for token in stand_ins if token is not None)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self.starts)

    def batch(
        self, rows: np.ndarray, augmentation: TextAugmentation | None = None, chance: tuple[int, int] = (0, 0)
    ) -> ExampleBatch:
        """Makes a batch, padded to its longest example; an example without tokens becomes one padding token.

        Args:
            rows: Indices of the examples.
            augmentation: Augmentation of each example.
            chance: Seed and epoch, which together with the row determine the augmentation.
        """
        starts, lengths, ids, types = self.starts[rows], self.lengths[rows], self.ids, self.types
        if augmentation is not None:
            kept, changed = [], []
            for row, start, length in zip(rows.tolist(), starts.tolist(), lengths.tolist(), strict=True):
                own = ids[start : start + length]
                special, generator = np.isin(own, self.special_ids), np.random.default_rng((*chance, row))
                new, places = augmentation(own, special, self.mask_token, generator)
                changed.append(new)
                kept.append(start + places)
            lengths = np.array([len(new) for new in changed])
            starts = np.cumsum(lengths) - lengths
            ids = np.concatenate([*changed, [self.padding]])
            types = None if types is None else types[np.concatenate([*kept, [-1]])]
        places = np.arange(max(1, lengths.max()))
        inside = places < lengths[:, None]
        where = np.minimum(starts[:, None] + places, len(ids) - 1)
        batch: ExampleBatch = {
            "input_ids": torch.from_numpy(np.where(inside, ids[where], self.padding).astype(np.int64)),
            "attention_mask": torch.from_numpy((places < np.maximum(1, lengths)[:, None]).astype(np.int64)),
            "rows": torch.from_numpy(rows.astype(np.int64)),
        }
        if types is not None:
            padded = np.where(inside, types[where], self.padding_type)
            batch["token_type_ids"] = torch.from_numpy(padded.astype(np.int64))
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[rows])
        return batch


def _flat(lists: list[list[int]]) -> Iterator[int]:
    return (number for each in lists for number in each)
