"""A tokenised corpus on disk: built once, memory-mapped afterwards, and visible only when complete."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_llm.data.cache import new_cache, read_manifest
from lit_llm.data.cleaning import Cleaning, content_hash, split_of
from lit_llm.data.corpora import Document
from lit_llm.data.documents import Corpus
from lit_llm.data.pretokenization import DocumentEncoder
from lit_llm.data.tokenizer import boundary_id, open_tokenizer

SPLITS = ("train", "validation", "test")
CHUNK_BYTES = 4 << 20
INDEX = np.dtype([("start", "<u8"), ("num_bytes", "<u8"), ("content", "<u8")])


class Encoded(NamedTuple):
    """A document as tokens.

    Attributes:
        ids: Its tokens, without the boundary.
        num_bytes: UTF-8 bytes of the text that is to be predicted.
        learnt: Whether each token is to be predicted; `None` if all are.
    """

    ids: list[int] | np.ndarray
    num_bytes: int
    learnt: np.ndarray | None = None


Encode = Callable[[DocumentEncoder, list[Document], Counter[str]], list[Encoded | None]]
"""Tokenises documents; gives `None` for one that is left out, and counts the reason."""


def encode_texts(encoder: DocumentEncoder, documents: list[Document], dropped: Counter[str]) -> list[Encoded | None]:
    """Tokenises plain texts, all of whose tokens are predicted, each after the tokens that open it (`opening_ids`)."""
    texts = [document.text for document in documents]
    sizes = (len(text.encode("utf-8", "surrogatepass")) for text in texts)
    return [Encoded(ids, size) for ids, size in zip(encoder.encode_opened(texts), sizes, strict=True)]


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one split and the positions of its documents.

    The stream is `boundary document₀ boundary document₁ … boundary`. A label belongs to the document whose token it
    is; the boundary after a document belongs to that document.

    Attributes:
        tokens: The stream, memory-mapped.
        documents: For each document the position of the boundary before it, the UTF-8 bytes of its text that is
            predicted (all of a plain text), and its content hash.
        folder: Folder of the cache.
        name: `train`, `validation` or `test`.
    """

    tokens: np.ndarray
    documents: np.ndarray
    folder: Path
    name: str

    @cached_property
    def ids(self) -> list[str]:
        """Where each document came from."""
        with (self.folder / f"{self.name}.ids").open(encoding="ascii") as file:
            return [json.loads(line) for line in file]

    @cached_property
    def learnt(self) -> np.ndarray:
        """Whether each token of the stream is to be predicted, memory-mapped; exists only if some are not."""
        return np.memmap(self.folder / f"{self.name}.learnt", dtype=bool, mode="r")

    @property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """For each document the position of its first token, and that of the boundary after its last."""
        starts, ends, _ = self._bounds
        return starts + 1, ends

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        starts = self.documents["start"].astype(np.int64)
        ends = np.append(starts[1:], len(self.tokens) - 1)
        return starts, ends, np.concatenate([[0], np.cumsum(self.documents["num_bytes"].astype(np.int64))])

    def bytes_before(self, places: np.ndarray) -> np.ndarray:
        """For each place, the bytes of text that the labels at positions `1 … place` of the stream stand for.

        A document's bytes are spread evenly over its labels, which needs nothing from the tokeniser and is exact for
        whole documents: the sum over a split is its size.
        """
        starts, ends, bytes_at_start = self._bounds
        if not len(starts):
            return np.zeros(len(places))
        places = np.minimum(places, len(self.tokens) - 1)
        d = np.maximum(np.searchsorted(starts, places, side="left") - 1, 0)
        part = (places - starts[d]) / np.maximum(ends[d] - starts[d], 1)
        return bytes_at_start[d] + part * self.documents["num_bytes"][d]


@dataclass(frozen=True)
class TokenCache:
    """A tokenised corpus.

    Attributes:
        folder: Its folder.
        manifest: Corpus, cleaning, tokeniser, documents, bytes and tokens of each split, and what was dropped and why;
            for a mixture also the start and size of each source in each split.
    """

    folder: Path
    manifest: dict[str, Any]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokeniser that it was made with."""
        return open_tokenizer(self.folder / "tokenizer")

    def split(self, name: str) -> TokenSplit:
        """Memory-maps one split."""
        path = self.folder / f"{name}.tokens"
        tokens = np.memmap(path, dtype=self.manifest["dtype"], mode="r")
        return TokenSplit(tokens, np.load(self.folder / f"{name}.documents.npy", mmap_mode="r"), self.folder, name)

    @classmethod
    def open(cls, folder: Path) -> TokenCache | None:
        """The cache in a folder; `None` if it is missing or incomplete."""
        manifest = read_manifest(folder)
        return None if manifest is None else cls(folder, manifest)


def split_documents(
    corpus: Corpus, cleaning: Cleaning, validation_fraction: float, test_fraction: float, dropped: Counter[str]
) -> Iterator[tuple[Document, int, str]]:
    """Cleaned documents with their content hash and split.

    A split that the source has is kept; one that it lacks is cut from the rest by content hash.
    """
    for document, content in cleaning.documents(corpus.read(None), dropped):
        split = document.split
        if split is None or split == "train":
            source = corpus.source_of(document)
            split = split_of(
                content,
                0.0 if source.has_validation else validation_fraction,
                0.0 if source.has_test else test_fraction,
            )
        yield document, content, split


def cut_documents(
    corpus: Corpus, cleaning: Cleaning, validation_fraction: float, test_fraction: float, dropped: Counter[str]
) -> Iterator[tuple[Document, int, str]]:
    """Cuts each cleaned document into training, validation and test parts, with their content hash and split.

    Of `n` characters, the first `int(n * (1 - validation_fraction - test_fraction))` are for training, and those from
    `int(n * (1 - test_fraction))` on for testing; empty parts are left out. A part is named after its document and its
    range of characters, as in `book.txt[900:1000]`. A document that the source has in another split than training stays
    whole, and nothing is cut for a split that the source has.
    """
    for document, content, _ in split_documents(corpus, cleaning, 0.0, 0.0, dropped):
        if document.split in ("validation", "test"):
            yield document, content, document.split
            continue
        source = corpus.source_of(document)
        test = 0.0 if source.has_test else test_fraction
        held_out = test + (0.0 if source.has_validation else validation_fraction)
        n = len(document.text)
        edges = [0, int(n * (1 - held_out)), int(n * (1 - test)), n]
        for split, (start, end) in zip(SPLITS, itertools.pairwise(edges)):
            if start < end:
                part = document._replace(id=f"{document.id}[{start}:{end}]", text=document.text[start:end])
                yield part, content_hash(part.text), split


def build_cache(
    folder: Path,
    documents: Callable[[Counter[str]], Iterator[tuple[Document, int, str]]],
    make_tokenizer: Callable[[Iterator[str]], PreTrainedTokenizerBase],
    description: dict[str, Any],
    report: Callable[[str], None],
    encode: Encode = encode_texts,
) -> TokenCache:
    """Tokenises a corpus into `folder`, which appears only when it is complete.

    Args:
        folder: Folder of the cache; another process may build the same cache at the same time.
        documents: Starts a pass over the documents; takes a counter of dropped documents by reason.
        make_tokenizer: Makes the tokeniser from the texts of the training split.
        description: Added to the manifest.
        report: Called with a summary of one line.
        encode: Tokenises documents.
    """
    started = time.perf_counter()
    with new_cache(folder) as (new, manifest):
        tokenizer = make_tokenizer(d.text for d, _, split in documents(Counter()) if split == "train")
        tokenizer.save_pretrained(new / "tokenizer")
        dropped: Counter[str] = Counter()
        encoder = DocumentEncoder(tokenizer)
        writers = {name: _SplitWriter(new, name, encoder.dtype, boundary_id(tokenizer)) for name in SPLITS}
        chunk: list[tuple[Document, int, str]] = []
        size = 0
        for item in documents(dropped):
            chunk.append(item)
            size += len(item[0].text)
            if size >= CHUNK_BYTES:
                _write(chunk, encode(encoder, [document for document, _, _ in chunk], dropped), writers)
                chunk, size = [], 0
        _write(chunk, encode(encoder, [document for document, _, _ in chunk], dropped), writers)
        counts = {name: writer.finish() for name, writer in writers.items()}
        manifest |= description | {
            "vocab_size": len(tokenizer),
            "dtype": str(encoder.dtype),
            "splits": counts,
            "dropped": dict(dropped),
        }
    tokens, size = (sum(c[key] for c in counts.values()) for key in ("tokens", "bytes"))
    report(
        f"Tokenised {sum(c['documents'] for c in counts.values()):,} documents, {size / 1e6:.1f} MB, into "
        f"{tokens / 1e6:.2f} M tokens (vocabulary {manifest['vocab_size']:,}) in "
        f"{time.perf_counter() - started:.0f} s; "
        f"cached in {folder}" + "".join(f"; dropped, {why}: {count:,}" for why, count in dropped.items())
    )
    return TokenCache(folder, manifest)


def _write(
    chunk: list[tuple[Document, int, str]], encoded: list[Encoded | None], writers: dict[str, _SplitWriter]
) -> None:
    for (document, content, split), tokens in zip(chunk, encoded, strict=True):
        if tokens is not None:
            writers[split].add(document, content, tokens)


class _SplitWriter:
    def __init__(self, folder: Path, name: str, dtype: np.dtype, boundary: int) -> None:
        self.dtype = dtype
        self.boundary = np.array([boundary], dtype=dtype).tobytes()
        self.folder, self.name = folder, name
        self.tokens = (folder / f"{name}.tokens").open("wb")
        self.ids = (folder / f"{name}.ids").open("w", encoding="ascii")
        self.learnt: BinaryIO | None = None
        self.index: list[tuple[int, int, int]] = []
        self.sources: dict[str, int] = {}
        self.written = 0

    def add(self, document: Document, content: int, encoded: Encoded) -> None:
        if document.source is not None:
            self.sources.setdefault(document.source, len(self.index))
        self.index.append((self.written, encoded.num_bytes, content))
        self.tokens.write(self.boundary + np.asarray(encoded.ids, dtype=self.dtype).tobytes())
        self.ids.write(json.dumps(document.id) + "\n")
        self.written += 1 + len(encoded.ids)
        if encoded.learnt is not None:
            self.learnt = self.learnt or (self.folder / f"{self.name}.learnt").open("wb")
            self.learnt.write(np.concatenate([[False], encoded.learnt]).tobytes())

    def finish(self) -> dict[str, Any]:
        self.tokens.write(self.boundary)
        self.tokens.close()
        self.ids.close()
        if self.learnt is not None:
            self.learnt.write(bytes(1))
            self.learnt.close()
        index = np.array(self.index, dtype=INDEX)
        np.save(self.folder / f"{self.name}.documents.npy", index)
        size = int(index["num_bytes"].sum())
        counts = {"documents": len(index), "bytes": size, "tokens": self.written}
        return counts | ({"sources": self._sources(index)} if self.sources else {})

    def _sources(self, index: np.ndarray) -> dict[str, dict[str, int]]:
        """Start and size of each source; the documents of a source are contiguous."""
        edges = [*self.sources.values(), len(index)]
        places = [*index["start"].tolist(), self.written]
        return {
            name: {
                "start": places[first],
                "documents": end - first,
                "bytes": int(index["num_bytes"][first:end].sum()),
                "tokens": places[end] - places[first],
            }
            for name, (first, end) in zip(self.sources, itertools.pairwise(edges), strict=True)
        }
