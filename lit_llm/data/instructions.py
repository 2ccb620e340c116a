"""Instruction tuning: conversations of which the assistant's part is learnt."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lit_llm.batch import TokenBatch
from lit_llm.data.chat import CONVERSATIONS_FORMAT, encode_conversations, with_template
from lit_llm.data.cleaning import Cleaning
from lit_llm.data.conversations import Conversations, parsed, spelt
from lit_llm.data.corpora import Document
from lit_llm.data.documents import Corpus, open_corpus
from lit_llm.data.packing import lay_rows, pack
from lit_llm.data.sampling import BatchLoader, data_parallel_rank
from lit_llm.data.token_cache import SPLITS, TokenSplit, split_documents
from lit_llm.data.token_data import TokenData
from lit_llm.data.tokenizer import byte_tokenizer, padding_id

log = logging.getLogger(__name__)


class InstructionData(TokenData):
    """Rows of tokens from conversations, with labels on what the assistant says and on the token that ends its turn.

    A row of the table holds a prompt and a response, or a list of messages. Conversations are rendered by a chat
    template, which is saved with the tokeniser, so `lit-llm generate --chat` and transformers' `apply_chat_template`
    render them identically. They are divided into splits like the documents of `TextData`, and are tokenised once.

    Args:
        path: `stdlib-instructions`; a table (`.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv`) or a folder of them; or a
            data set on the Hugging Face hub, by name or as a local folder.
        subset: Configuration of a hub data set.
        prompt: Column of the user's message.
        response: Column of the assistant's answer.
        messages: Column of whole conversations: lists of `{"role": system, user or assistant, "content": text}`; an
            assistant's message with `"weight": 0` is read but not learnt. Other roles, such as `tool`, the assistant's
            `tool_calls` and the column `tools` go to the chat template, which has to render them.
        unanswered: Whether a row without an assistant's turn, or with an empty one, is an error or dropped.
        max_documents: Read only this many rows.
        cleaning: Cleaning steps to apply to each message.
        validation_fraction: Fraction of the conversations to validate on; 0 for none.
        test_fraction: Fraction of the conversations to test on; 0 for none.
        tokenizer: `bytes`; `bpe-<size>`, trained on the training conversations; a folder with a `tokenizer.json`,
            such as that of the model to start from; or a name on the hub.
        chat_template: File with a Jinja template in the format of transformers. Default: that of the tokeniser, or
            `lit_llm.data.chat.CHAT_TEMPLATE` if it has none.
        seq_len: Tokens per row.
        batch_size: Rows per batch and device.
        packed: Fill rows with as many whole conversations as fit, each a separate document with positions from 0;
            otherwise one conversation per row, padded to the longest of its batch. The losses are the same.
        overlong: What to do with a conversation that is longer than a row: drop it, cut it at the row's end (or drop it
            if nothing to learn is left), or refuse the data.
        seed: Seed of the order of rows.

    Raises:
        ValueError: When a row is no conversation, or there are too few rows for a batch or for validation.

    Example:
        >>> data = InstructionData(tokenizer="bytes", max_documents=50, validation_fraction=0.2, batch_size=2)
        >>> data.prepare_data(); data.setup("fit")
        >>> sorted(next(iter(data.train_dataloader())))
        ['document_ids', 'input_ids', 'labels', 'positions']
    """

    encode = staticmethod(encode_conversations)
    wanted = "conversations"

    def __init__(
        self,
        path: str = "stdlib-instructions",
        subset: str | None = None,
        prompt: str = "prompt",
        response: str = "response",
        messages: str = "messages",
        unanswered: Literal["refuse", "drop"] = "refuse",
        max_documents: int | None = None,
        cleaning: Cleaning = Cleaning(),  # noqa: B008 (frozen)
        validation_fraction: float = 0.02,
        test_fraction: float = 0.02,
        tokenizer: str = "bpe-4096",
        chat_template: str | None = None,
        seq_len: int = 256,
        batch_size: int = 16,
        packed: bool = True,
        overlong: Literal["drop", "cut", "refuse"] = "drop",
        seed: int = 0,
    ) -> None:
        super().__init__(
            path,
            subset,
            max_documents,
            cleaning,
            validation_fraction,
            test_fraction,
            tokenizer,
            seq_len,
            batch_size,
            seed,
        )
        self.rows = Conversations(prompt, response, messages, unanswered, cleaning)
        self.chat_template = chat_template
        self.packed, self.overlong = packed, overlong
        self._examples: dict[str, Examples] = {}

    # Facts that objectives and model directories ask for.

    @property
    def manifest(self) -> dict[str, Any]:
        """What the data is, how it was made, and how many conversations were too long; available from `setup` on."""
        found = {name: self.examples(name).overlong for name in SPLITS}
        return {**super().manifest, "overlong": {"seq_len": self.seq_len, "rule": self.overlong, **found}}

    @property
    def predict_bytes(self) -> np.ndarray:
        """Learnt bytes of each conversation of `predict_split`, as laid into rows: of a cut answer, its share."""
        found, examples = np.zeros(len(self.predict_split.documents)), self.examples(self.predict_split.name)
        found[examples.documents] = examples.num_bytes
        return found

    def train_dataloader(self) -> BatchLoader:
        """Rows in an order that is reshuffled each epoch."""
        return self._loader("train", self.seed)

    @property
    def _source(self) -> dict[str, Any]:
        return super()._source | {name: value for name, value in asdict(self.rows).items() if name != "cleaning"}

    # How rows are made.

    def examples(self, name: str) -> Examples:
        """The conversations of a split that fit into rows, and their layout."""
        if name not in self._examples:
            found = Examples(self._cache.split(name), self.seq_len, self.packed, self.overlong)
            self._examples[name] = found
            if found.overlong:
                counts = ", ".join(f"{count:,} {what}" for what, count in found.overlong.items())
                log.info(f"More than {self.seq_len} tokens in the {name} split of {self.path}: {counts}")
        return self._examples[name]

    def split_rows(self, name: str) -> int:
        """Number of rows of a split."""
        return self.examples(name).num_rows

    def _evaluation_loader(self, name: str, with_documents: bool = False) -> BatchLoader | list[Any]:
        return self._loader(name, None, with_documents) if self.split_rows(name) else []

    def _loader(self, name: str, seed: int | None, with_documents: bool = False) -> BatchLoader:
        examples, padding = self.examples(name), padding_id(self.tokenizer)

        def cut(rows: np.ndarray) -> TokenBatch:
            return examples.batch(rows, padding, with_bytes=seed is None, with_documents=with_documents)

        return BatchLoader(cut, examples.num_rows, self.batch_size, seed, *data_parallel_rank(self.trainer))

    def _check_train(self) -> None:
        self._check_batch(
            self.split_rows("train"), "lower it, give more conversations, or raise data.seq_len where they are too long"
        )

    # How the cache is made.

    def _corpus(self) -> Corpus:
        corpus = open_corpus(self.path, self.subset, self.rows)
        return corpus if self.max_documents is None else corpus.head(self.max_documents)

    def _split(self, corpus: Corpus, dropped: Counter[str]) -> Iterator[tuple[Document, int, str]]:
        # The messages are cleaned already; an empty text is a row without an answer.
        cleaning = replace(self.cleaning, strip_control=False, unicode_nfc=False, drop_empty=True)
        return split_documents(corpus, cleaning, self.validation_fraction, self.test_fraction, dropped)

    def _dress(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        return with_template(tokenizer, self.chat_template)

    def _texts_to_learn_tokens_from(self, documents: Iterable[str]) -> Iterable[str]:
        for messages, tools in map(parsed, documents):
            yield from [json.dumps(tools, ensure_ascii=False)] if tools else []
            yield from (f"{message['role']}\n{spelt(message)}" for message in messages)

    def _recipe(self, ready: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        return {
            "chat_template": (ready or self._dress(byte_tokenizer())).chat_template,
            "conversations": CONVERSATIONS_FORMAT,
        }


class Examples:
    """The conversations of one split and the rows that they are laid into.

    Args:
        split: Tokens of the conversations.
        seq_len: Maximum tokens that a row reads.
        packed: Whether a row may hold several conversations.
        overlong: What to do with conversations that are longer than a row: `drop`, `cut` or `refuse`.

    Attributes:
        overlong: Number of overlong conversations by what was done with them, `cut` or `dropped`.
        documents: Index in the split of each conversation that is kept.
        lengths: Positions that each kept conversation takes in a row.
        num_rows: Number of rows.

    Raises:
        ValueError: When a conversation is too long and `overlong` is `refuse`.
    """

    def __init__(self, split: TokenSplit, seq_len: int, packed: bool, overlong: str) -> None:
        self.split, self.seq_len, self.packed = split, seq_len, packed
        starts, ends = split.edges
        places = ends - starts - 1  # the last token is only ever a label
        too_long = places > seq_len
        if overlong == "refuse" and too_long.any():
            longest = int(places.argmax())
            raise ValueError(
                f"data.seq_len must hold every conversation, but is {seq_len} where {split.ids[longest]} needs "
                f"{places[longest]:,}; raise it, or set data.overlong to drop or cut"
            )
        in_all = self._labels(starts, ends)
        if overlong == "cut":
            ends = np.minimum(ends, starts + seq_len + 1)
        labels = self._labels(starts, ends)
        kept = (labels > 0) & (ends - starts - 1 <= seq_len)
        counts = {"cut": int((too_long & kept).sum()), "dropped": int((too_long & ~kept).sum())}
        self.overlong = {what: count for what, count in counts.items() if count}
        self.documents = np.flatnonzero(kept)
        self.starts, self.ends = starts[kept], ends[kept]
        self.lengths = self.ends - self.starts - 1
        self.num_bytes = split.documents["num_bytes"][kept] * labels[kept] / np.maximum(in_all[kept], 1)
        alone = np.arange(len(self.documents)), np.arange(len(self.documents) + 1)
        self._order, self._edges = pack(self.lengths, seq_len) if packed else alone
        self.num_rows = len(self._edges) - 1

    def _labels(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Number of labels of each conversation between these edges; its first token is never a label."""
        if not len(starts):
            return np.zeros(0, dtype=np.int64)
        sums = np.add.reduceat(self.split.learnt, np.stack([starts + 1, ends], axis=1).ravel(), dtype=np.int64)[::2]
        return np.where(ends - starts > 1, sums, 0)

    def held(self, row: int) -> np.ndarray:
        """Indices, among the kept conversations, of those that a row holds."""
        return self._order[self._edges[row] : self._edges[row + 1]]

    def batch(self, rows: np.ndarray, padding: int, with_bytes: bool, with_documents: bool) -> TokenBatch:
        """Makes a batch of rows.

        Args:
            rows: Indices of the rows.
            padding: Token that fills up a row.
            with_bytes: Add `num_bytes`, the bytes of the answers.
            with_documents: Add `documents`, the index in the split of each label's conversation.
        """
        held = [self.held(row) for row in rows.tolist()]
        width = self.seq_len if self.packed else max(int(self.lengths[x].sum()) for x in held)
        tokens, learnt = self.split.tokens, self.split.learnt
        laid = lay_rows(
            [[(tokens[a:b], learnt[a:b]) for a, b in zip(self.starts[x], self.ends[x], strict=True)] for x in held],
            width,
            padding,
        )
        batch: TokenBatch = {"input_ids": laid["input_ids"], "labels": laid["labels"]}
        if self.packed:
            batch["document_ids"], batch["positions"] = laid["document_ids"], laid["positions"]
        if with_bytes:
            batch["num_bytes"] = torch.tensor([self.num_bytes[x].sum() for x in held], dtype=torch.float32)
        if with_documents:
            owners = [np.append(self.documents[x], -1)[ids] for x, ids in zip(held, laid["document_ids"], strict=True)]
            batch["documents"] = torch.from_numpy(np.stack(owners))
        return batch
