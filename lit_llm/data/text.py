"""Text for language models: any corpus, cleaned, split by document, tokenised once and cut into rows of tokens."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lit_llm.batch import TokenBatch
from lit_llm.data.cleaning import Cleaning
from lit_llm.data.corpora import Document
from lit_llm.data.documents import Corpus, mixture, open_corpus
from lit_llm.data.packing import cut_rows, document_ids, label_documents, num_rows
from lit_llm.data.pretokenization import DocumentEncoder
from lit_llm.data.sampling import BatchLoader, StreamLoader, data_parallel_rank
from lit_llm.data.token_cache import TokenSplit, cut_documents, split_documents
from lit_llm.data.token_data import TokenData
from lit_llm.data.tokenizer import boundary_id, opening_ids

STREAM_CHUNK = 64


class TextData(TokenData):
    """Rows of tokens from any text.

    Documents are cleaned, assigned to a split by a hash of their content (so that no text is in two splits, and a
    document keeps its split when the corpus grows), tokenised once into a cache that later runs memory-map, and
    concatenated into rows of `seq_len` tokens. Each document follows a boundary token and whatever the tokeniser itself
    puts before a text, such as Llama's BOS. Splits that the source has are used as they are, among them those of a
    folder in which each text is named after one (`train.txt` and `valid.txt`, or `train/…` and `valid/…`). A single
    file, and one named after a split, is cut into documents of about 8,192 characters; editing it may change all
    documents after the edit.

    In a mixture, each corpus has a share of the training rows that is its weight divided by the sum of the weights,
    whatever its size. An epoch is as long as without weights; if a source has too few rows for its share, they repeat,
    none for the third time before all have come twice. A row belongs to the source in which it starts. All sources are
    cleaned, deduplicated (the first source keeps a document that several have) and tokenised together. Validation and
    test read all rows of all sources.

    Args:
        path: The name of an embedded corpus (`stdlib`, `stdlib-code`, `stdlib-prose`), a file or folder of `.txt`,
            `.md` or `.py`, a table (`.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv`), or a data set on the Hugging Face
            hub, by name or as a local folder. A mapping from paths to weights above 0 mixes several, for example
            `{stdlib-code: 3, my_texts/: 1}`; the other arguments then apply to all of them.
        subset: Configuration of a hub data set.
        column: Column of a table that holds the text.
        max_documents: Read only this many documents (of each source of a mixture).
        streaming: Train on documents as they arrive, without tokenising (or downloading) all of them first. Validation,
            test and tokeniser training use the first 10,000 documents. Not available for mixtures. A streaming run has
            no end of an epoch, and cannot be resumed if it uses several processes.
        cleaning: Cleaning steps to apply.
        validation_fraction: Fraction of the documents to validate on; 0 for none.
        test_fraction: Fraction of the documents to test on; 0 for none.
        split_by: `document` assigns whole documents to splits. `position` splits each document instead (a single file
            is one document): its beginning is for training, the next part for validation, the end for testing, as
            nanoGPT splits Shakespeare (`validation_fraction: 0.1`, `test_fraction: 0`).
        tokenizer: `bytes`; `characters`, `bpe-<size>`, `bert-uncased-bpe-<size>` or `bert-bpe-<size>` (for encoders) or
            `t5-bpe-<size>` (for encoder-decoders), built from this corpus's training documents; a folder with a
            `tokenizer.json`; or a name on the hub.
        seq_len: Tokens per row.
        batch_size: Rows per batch and device.
        mask_documents: Prevent attention across documents in a row.
        seed: Seed of the order of rows.

    Raises:
        ValueError: When there is no text, not enough for one row (of each source) or one batch, or none to validate on;
            when a weight is not a finite number above 0, or a mixture is to be streamed.

    Example:
        >>> data = TextData(path="stdlib-prose", tokenizer="bytes", seq_len=8, batch_size=2)
        >>> data.prepare_data(); data.setup("fit")
        >>> next(iter(data.train_dataloader()))["input_ids"].shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        path: str | dict[str, Any] = "stdlib",
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
        self.weights = _weights(path) if isinstance(path, Mapping) else {}
        super().__init__(
            self.weights or path,
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
        if split_by == "document":
            self.more_to_validate_on = "raise it, set data.split_by to position"
        if self.weights and streaming:
            raise ValueError(
                "data.streaming must be false where data.path is a mixture, but is true; tokenise the sources first"
            )

    # Properties read by objectives and model directories.

    @property
    def sources(self) -> list[str]:
        """Names of a mixture's sources in metrics, in order; empty for a single corpus."""
        return [name.strip("/") for name in self.weights]

    @property
    def manifest(self) -> dict[str, Any]:
        """What the data is and how it was made, with a mixture's weights; available from `setup` on."""
        return super().manifest | ({"weights": self.weights} if self.weights else {})

    @property
    def _source(self) -> dict[str, Any]:
        return super()._source | {"column": self.column, "split_by": self.split_by, "streaming": self.streaming}

    @property
    def _contents(self) -> list[int] | None:
        return None if self.streaming else super()._contents

    # How rows are made.

    def train_dataloader(self) -> BatchLoader | StreamLoader:
        """Rows in a new random order each epoch, or in the order of the stream."""
        rank, world_size = data_parallel_rank(self.trainer)
        if self.streaming:
            return StreamLoader(self._stream, self._batch, self.seq_len, self.batch_size, world_size)
        split = self._cache.split("train")
        rows = (len(split.tokens) - 1) // self.seq_len  # without a partly filled last row
        return self._loader(split, rows, self.seed, rank, world_size)

    def row_sources(self, name: str, rows: int) -> np.ndarray | None:
        """Index of the source in which each row of a split starts; `None` for a single corpus."""
        if not self.weights:
            return None
        found = self.manifest["splits"][name].get("sources", {})
        starts = [about["start"] for about in found.values()]
        places = np.array([list(self.weights).index(source) for source in found], dtype=np.int64)
        return places[np.searchsorted(starts, np.arange(rows) * self.seq_len, side="right") - 1]

    def split_rows(self, name: str) -> int:
        """Number of rows of a split, including a partly filled last one."""
        return num_rows(len(self._cache.split(name).tokens), self.seq_len)

    def _evaluation_loader(self, name: str, with_documents: bool = False) -> BatchLoader | list[Any]:
        rows = self.split_rows(name)
        if not rows:
            return []
        return self._loader(self._cache.split(name), rows, None, *data_parallel_rank(self.trainer), with_documents)

    def _loader(
        self, split: TokenSplit, rows: int, seed: int | None, rank: int, world_size: int, with_documents: bool = False
    ) -> BatchLoader:
        starts = np.array(split.documents["start"]) if with_documents else None
        sources = self.row_sources(split.name, rows)

        def cut(rows: np.ndarray) -> TokenBatch:
            batch = self._batch(split.tokens, rows)
            if seed is None:
                places = split.bytes_before(rows * self.seq_len), split.bytes_before((rows + 1) * self.seq_len)
                batch["num_bytes"] = torch.from_numpy(places[1] - places[0]).float()
                if sources is not None:
                    batch["sources"] = torch.from_numpy(sources[rows])
            if starts is not None:
                batch["documents"] = torch.from_numpy(label_documents(starts, rows, self.seq_len))
            return batch

        weights = np.array(list(self.weights.values())) if self.weights else None
        return BatchLoader(cut, rows, self.batch_size, seed, rank, world_size, classes=sources, weights=weights)

    def _batch(self, tokens: np.ndarray, rows: np.ndarray) -> TokenBatch:
        ids, labels = cut_rows(tokens, rows, self.seq_len)
        batch: TokenBatch = {"input_ids": ids, "labels": labels}
        if self.mask_documents:
            batch["document_ids"] = document_ids(ids, boundary_id(self.tokenizer))
        return batch

    def _stream(self, skip: int) -> Iterator[list[int]]:
        """Yields the tokens of each of this rank's training documents after the first `skip`."""
        rank, world_size = data_parallel_rank(self.trainer)
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

        def opened(path: str) -> Corpus:
            return open_corpus(path, self.subset, self.column, self.streaming, in_pieces)

        corpus = mixture({path: opened(path) for path in self.weights}) if self.weights else opened(self.path)
        return corpus if self.max_documents is None else corpus.head(self.max_documents)

    def _corpus_to_tokenize(self) -> Corpus:
        return self._corpus().head(10_000) if self.streaming else self._corpus()

    def _split(self, corpus: Corpus, dropped: Counter[str]) -> Iterator[tuple[Document, int, str]]:
        split = split_documents if self.split_by == "document" else cut_documents
        return split(corpus, self.cleaning, self.validation_fraction, self.test_fraction, dropped)

    def _recipe(self, ready: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        # Only what differs from the defaults, so that caches made before these options keep their name.
        recipe = {} if self.split_by == "document" else {"split_by": self.split_by}
        by_bos = ready is not None and ready.cls_token_id is None and opening_ids(ready)
        return recipe | ({"opening": ready.bos_token} if by_bos else {})

    def _check_train(self) -> None:
        documents = {name: split["documents"] for name, split in self.manifest["splits"].items()}
        if not documents["train"]:
            remedy = "give more text" + ", or set data.split_by to position" * (self.split_by == "document")
            raise ValueError(
                f"data.path must leave a document to train on, but {self.corpus_name} has {documents['validation']} to "
                f"validate on, {documents['test']} to test on and none besides; {remedy}"
            )
        tokens = len(self._cache.split("train").tokens)
        rows = (tokens - 1) // self.seq_len
        if rows < 1:
            raise ValueError(
                f"data.seq_len must leave at least one row to train on, but is {self.seq_len} where the training "
                f"split of {self.corpus_name} has {tokens:,} tokens; lower it or give more text"
            )
        if self.weights:
            counts = np.bincount(self.row_sources("train", rows), minlength=len(self.weights))
            for source, count in zip(self.weights, counts, strict=True):
                if not count:
                    raise ValueError(
                        f"data.path must have a row of {self.seq_len} tokens to train on of each source, but {source} "
                        f"has none of its own; lower data.seq_len, or leave the source out"
                    )
        if not self.streaming:
            self._check_batch(rows, "lower it or data.seq_len")


def _weights(path: Mapping[Any, Any]) -> dict[str, float]:
    """The validated weights of a mixture; a folder's name may be a number."""
    if not path:
        raise ValueError("data.path must be a path, or a mapping of paths to weights, but is {}")
    for source, weight in path.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise ValueError(f"data.path must give each source a finite weight above 0, but {source} has {weight!r}")
    names = Counter(str(source).strip("/") for source in path)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"data.path must name each source once, but names {twice[0]} several times")
    return {str(source): float(weight) for source, weight in path.items()}


def read_texts(
    path: str, subset: str | None, column: str, max_documents: int | None, cleaning: Cleaning
) -> Iterator[str]:
    """The cleaned texts of all splits of any corpus that `TextData` reads: what `lit-llm tokenizer` trains on."""
    corpus = open_corpus(path, subset, column)
    if max_documents is not None:
        corpus = corpus.head(max_documents)
    for document, _ in cleaning.documents(corpus.read(None), Counter()):
        yield document.text
