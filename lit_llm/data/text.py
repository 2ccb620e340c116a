"""Text for language models: any corpus, cleaned, split by document, tokenised once and cut into rows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lit_llm.batch import TokenBatch
from lit_llm.data.cleaning import Cleaning
from lit_llm.data.corpora import Document
from lit_llm.data.documents import Corpus, open_corpus
from lit_llm.data.packing import cut_rows, document_ids, label_documents, num_rows
from lit_llm.data.pretokenization import DocumentEncoder
from lit_llm.data.sampling import BatchLoader, StreamLoader, place
from lit_llm.data.token_cache import TokenSplit, cut_documents, split_documents
from lit_llm.data.token_data import TokenData
from lit_llm.data.tokenizer import boundary_id

STREAM_CHUNK = 64


class TextData(TokenData):
    """Rows of tokens from any text.

    Documents are cleaned, put into a split by a hash of their content (so that none is in two splits, and one stays
    where it is when the corpus grows), tokenised once into a cache that later runs map into memory, and laid end to
    end in rows of `seq_len` tokens. A split that the source itself has is used as it is. A single file is cut into
    documents of about 8,192 characters, so that there is something to split.

    Args:
        path: The name of an embedded corpus (`stdlib`, `stdlib-code`, `stdlib-prose`), a file or folder of `.txt`,
            `.md` or `.py`, a table (`.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv`), or a data set on the Hugging Face
            hub, by name or as a local folder.
        subset: Configuration of a hub data set.
        column: Where a table keeps its text.
        max_documents: Read only the first ones.
        streaming: Train on documents as they come, without tokenising (or downloading) all of them first. Validation,
            test and a tokeniser to be trained come from the first 10,000 documents.
        cleaning: Which cleaning steps are taken.
        validation_fraction: Part of the documents to validate on; 0 for none.
        test_fraction: Part of the documents to test on; 0 for none.
        split_by: `document` puts whole documents into splits. `position` cuts each one instead, a single file as one
            document: its first characters train, the next validate, the last test. So nanoGPT splits Shakespeare's
            text (`validation_fraction: 0.1`, `test_fraction: 0`): the last tenth of its characters validates.
        tokenizer: `bytes`; `characters`, `bpe-<size>`, for an encoder `bert-bpe-<size>` or for an encoder-decoder
            `t5-bpe-<size>`, from this corpus's training documents; a folder with a `tokenizer.json`; or a name on the
            hub.
        seq_len: Tokens in a row.
        batch_size: Rows in a batch of one device.
        mask_documents: Keep attention from crossing documents in a row.
        seed: Of the order in which rows are drawn.

    Raises:
        ValueError: When there is no text, not enough for one row or batch, or none to validate on.

    Example:
        >>> data = TextData(path="stdlib-prose", tokenizer="bytes", seq_len=8, batch_size=2)
        >>> data.prepare_data(); data.setup("fit")
        >>> next(iter(data.train_dataloader()))["input_ids"].shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        path: str = "stdlib",
        subset: str | None = None,
        column: str = "text",
        max_documents: int | None = None,
        streaming: bool = False,
        cleaning: Cleaning = Cleaning(),  # noqa: B008 (frozen)
        validation_fraction: float = 0.02,
        test_fraction: float = 0.02,
        split_by: Literal["document", "position"] = "document",
        tokenizer: str = "bpe-4096",
        seq_len: int = 256,
        batch_size: int = 16,
        mask_documents: bool = False,
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
        self.column, self.streaming, self.mask_documents = column, streaming, mask_documents
        self.split_by = split_by

    # How rows are made.

    def train_dataloader(self) -> BatchLoader | StreamLoader:
        """Rows in an order drawn anew each epoch, or as the stream brings them."""
        rank, world_size = place(self.trainer)
        if self.streaming:
            return StreamLoader(self._stream, self._batch, self.seq_len, self.batch_size, world_size)
        split = self._cache.split("train")
        rows = (len(split.tokens) - 1) // self.seq_len  # a row that is not full waits for more text
        return self._loader(split, rows, self.seed, rank, world_size)

    def split_rows(self, name: str) -> int:
        """Rows of a split, a last and partly filled one included."""
        return num_rows(len(self._cache.split(name).tokens), self.seq_len)

    def _evaluation_loader(self, name: str, with_documents: bool = False) -> BatchLoader | list[Any]:
        rows = self.split_rows(name)
        return self._loader(self._cache.split(name), rows, None, *place(self.trainer), with_documents) if rows else []

    def _loader(
        self, split: TokenSplit, rows: int, seed: int | None, rank: int, world_size: int, with_documents: bool = False
    ) -> BatchLoader:
        starts = np.array(split.documents["start"]) if with_documents else None

        def cut(rows: np.ndarray) -> TokenBatch:
            batch = self._batch(split.tokens, rows)
            if seed is None:
                places = split.bytes_before(rows * self.seq_len), split.bytes_before((rows + 1) * self.seq_len)
                batch["num_bytes"] = torch.from_numpy(places[1] - places[0]).float()
            if starts is not None:
                batch["documents"] = torch.from_numpy(label_documents(starts, rows, self.seq_len))
            return batch

        return BatchLoader(cut, rows, self.batch_size, seed, rank, world_size)

    def _batch(self, tokens: np.ndarray, rows: np.ndarray) -> TokenBatch:
        ids, labels = cut_rows(tokens, rows, self.seq_len)
        batch: TokenBatch = {"input_ids": ids, "labels": labels}
        if self.mask_documents:
            batch["document_ids"] = document_ids(ids, boundary_id(self.tokenizer))
        return batch

    def _stream(self, skip: int) -> Iterator[list[int]]:
        """Token lists of this rank's training documents, without the first `skip` of them."""
        rank, world_size = place(self.trainer)
        documents = self._split(self._corpus(), Counter())
        mine = itertools.islice(
            (document.text for document, _, split in documents if split == "train"), rank, None, world_size
        )
        mine = itertools.islice(mine, skip, None)
        boundary, encoder = boundary_id(self.tokenizer), DocumentEncoder(self.tokenizer)
        while chunk := list(itertools.islice(mine, STREAM_CHUNK)):
            for ids in encoder.encode_opened(chunk):
                yield [boundary, *ids.tolist()]

    # How the cache is made.

    def _corpus(self) -> Corpus:
        in_pieces = self.split_by == "document"
        corpus = open_corpus(self.path, self.subset, self.column, self.streaming, in_pieces)
        return corpus if self.max_documents is None else corpus.head(self.max_documents)

    def _corpus_to_tokenize(self) -> Corpus:
        return self._corpus().head(10_000) if self.streaming else self._corpus()

    def _split(self, corpus: Corpus, dropped: Counter[str]) -> Iterator[tuple[Document, int, str]]:
        split = split_documents if self.split_by == "document" else cut_documents
        return split(corpus, self.cleaning, self.validation_fraction, self.test_fraction, dropped)

    def _recipe(self, ready: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        # What was made before there was a choice keeps its name.
        return {} if self.split_by == "document" else {"split_by": self.split_by}

    def _check_train(self) -> None:
        tokens = len(self._cache.split("train").tokens)
        rows = (tokens - 1) // self.seq_len
        if rows < 1:
            raise ValueError(
                f"data.seq_len must leave at least one row to train on, but is {self.seq_len} where the training "
                f"split of {self.path} has {tokens:,} tokens; lower it or give more text"
            )
        if not self.streaming:
            self._check_batch(rows, "lower it or data.seq_len")


def read_texts(
    path: str, subset: str | None, column: str, max_documents: int | None, cleaning: Cleaning
) -> Iterator[str]:
    """The cleaned texts of any corpus that `TextData` reads, whole: what `lit-llm tokenizer` trains on."""
    corpus = open_corpus(path, subset, column)
    if max_documents is not None:
        corpus = corpus.head(max_documents)
    for document, _ in cleaning.documents(corpus.read(None), Counter()):
        yield document.text
