"""Base class of data modules over a token cache: properties, checks, and how the cache is found or built."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from lit_llm.data import changes
from lit_llm.data.arguments import require_counts, require_fractions
from lit_llm.data.cache import cache_folder, cache_name
from lit_llm.data.cleaning import CLEANING_FORMAT, Cleaning
from lit_llm.data.corpora import Document
from lit_llm.data.documents import Corpus, corpus_name
from lit_llm.data.sampling import BatchLoader, data_parallel_rank
from lit_llm.data.token_cache import (
    Encode,
    TokenCache,
    TokenSplit,
    build_cache,
    encode_texts,
    split_documents,
)
from lit_llm.data.tokenizer import fingerprint, load_tokenizer, tokenizer_files, training_of

log = logging.getLogger(__name__)


class TokenData(LightningDataModule, ABC):
    """Rows of tokens from documents that are cleaned, split by a hash of their content, and tokenised once.

    A subclass defines how the corpus is read, how its documents become tokens, and how tokens become rows. Subclasses
    document the arguments.
    """

    encode: Encode = staticmethod(encode_texts)
    wanted = "text"
    """What `path` must hold, for messages."""

    more_to_validate_on = "raise it"
    """What to do about an empty validation split, for messages."""

    doubt: str | None = None
    """Why documents that were trained on may be among the evaluated ones; `None` if there is no such doubt."""

    def __init__(
        self,
        path: str | dict[str, Any],
        subset: str | None,
        max_documents: int | None,
        cleaning: Cleaning,
        validation_fraction: float,
        test_fraction: float,
        tokenizer: str,
        seq_len: int,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        require_counts(seq_len=seq_len, batch_size=batch_size, max_documents=max_documents)
        require_fractions(validation_fraction, test_fraction)
        self.path, self.subset, self.max_documents = path, subset, max_documents
        self.corpus_name = corpus_name(path)
        self.cleaning = cleaning
        self.validation_fraction, self.test_fraction = validation_fraction, test_fraction
        self.tokenizer_spec = tokenizer
        self.seq_len, self.batch_size = seq_len, batch_size
        self.seed = seed
        self.cache: TokenCache | None = None
        self._separate: dict[str, bool] = {}  # whether the source itself has these splits

    # Properties read by objectives and model directories.

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokeniser; available from `setup` on."""
        return self._cache.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary; available from `setup` on."""
        return self._cache.manifest["vocab_size"]

    @property
    def manifest(self) -> dict[str, Any]:
        """What the data is and how it was made; available from `setup` on."""
        return self._cache.manifest

    @property
    def _cache(self) -> TokenCache:
        if self.cache is None:
            self.prepare_data()
            self.setup("fit")
        assert self.cache is not None
        return self.cache

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Builds the token cache if there is none yet."""
        self._open_cache()

    def setup(self, stage: str) -> None:
        """Memory-maps the cache and refuses data that is insufficient for `stage`."""
        if self.cache is None:
            self.cache = self._open_cache()
        if stage == "fit":
            self._check_train()
        if stage in ("fit", "validate") and self.validation_fraction > 0:
            self._check_validation()

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """All rows of the validation split, in order, each once whatever the number of processes."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> BatchLoader | list[Any]:
        """All rows of the test split, as in validation."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> BatchLoader | list[Any]:
        """The test split, or the validation split if there is none, with the document of each label."""
        return self._evaluation_loader(self.predict_split.name, with_documents=True)

    def state_dict(self) -> dict[str, Any]:
        """The tokeniser's files, so that a checkpoint alone can read and write text, and what it is trained on."""
        tokenizer = tokenizer_files(self._cache.folder / "tokenizer")
        documents = {"source": self._source, "contents": self._contents, "separate": self._separate}
        return {"tokenizer": tokenizer, "documents": documents}

    def require_unchanged(self, state_dict: dict[str, Any]) -> None:
        """Refuses to resume from a checkpoint if its documents have changed."""
        if change := self._change(state_dict):
            raise changes.refusal("documents", change)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint with another tokeniser; warns if it may have been trained on what is evaluated.

        Raises:
            ValueError: When the checkpoint's tokeniser is not this data's, or training would resume with documents that
                have changed.
        """
        stage = None if self.trainer is None else self.trainer.state.fn
        if stage == "fit":
            self.require_unchanged(state_dict)
        change = self._change(state_dict)
        if state_dict["tokenizer"]["tokenizer.json"] != self.state_dict()["tokenizer"]["tokenizer.json"]:
            raise ValueError(
                f"data.tokenizer must be the checkpoint's, but is {self.tokenizer_spec} of {self.corpus_name}, "
                f"which differs" + (f", as {change}" if change else "")
            )
        if change and stage is not None:
            split = {"validate": "validation", "test": "test"}.get(stage) or self.predict_split.name
            own = state_dict["documents"].get("separate", {})  # older checkpoints do not say
            if not (self._separate[split] and own.get(split)):
                self.doubt = changes.doubt("documents", split, change)
                log.warning(self.doubt)

    @property
    def _source(self) -> dict[str, Any]:
        """What determines the documents of the training split, besides the files at the path."""
        return {
            "path": self.path,
            "subset": self.subset,
            "max_documents": self.max_documents,
            "cleaning": asdict(self.cleaning),
            "validation_fraction": self.validation_fraction,
            "test_fraction": self.test_fraction,
        }

    @cached_property
    def _contents(self) -> list[int] | None:
        """Number of training documents and a hash of their contents; `None` if not all of them are known."""
        documents = np.ascontiguousarray(self._cache.split("train").documents["content"])
        return [len(documents), int.from_bytes(hashlib.blake2b(documents, digest_size=8).digest(), "big")]

    def _change(self, state_dict: dict[str, Any]) -> str | None:
        """How the documents or their splits have changed since the checkpoint; `None` if no change is known."""
        then = state_dict.get("documents")  # missing in older checkpoints
        if not then or _uncut(then["source"]) != _uncut(self._source):
            return None
        before = self._cut(then["source"], then.get("separate", self._separate))  # missing in older checkpoints
        if change := changes.recut(self.corpus_name, before, self._cut(self._source, self._separate)):
            return change
        if not (then["contents"] and self._contents):
            return None
        return changes.difference("train", self.corpus_name, "documents", then["contents"], self._contents)

    def _cut(self, source: dict[str, Any], separate: dict[str, bool]) -> dict[str, float]:
        """What part of the documents each split is, none where the corpus has it, and whether of each document."""
        way = " by position" * (source.get("split_by") == "position")
        parts = {name: source[f"{name}_fraction"] for name in ("validation", "test")}
        return {f"{name}{way}": 0.0 if separate[name] else part for name, part in parts.items()}

    # How rows are made.

    @property
    def predict_split(self) -> TokenSplit:
        """The split that `predict` reads."""
        return self._cache.split("test" if self.split_rows("test") else "validation")

    @property
    def predict_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the predicted text of each document of that split."""
        return self.predict_split.documents["num_bytes"]

    @abstractmethod
    def split_rows(self, name: str) -> int:
        """Number of rows of a split that are evaluated."""

    @abstractmethod
    def _evaluation_loader(self, name: str, with_documents: bool = False) -> BatchLoader | list[Any]: ...

    @abstractmethod
    def _check_train(self) -> None: ...

    def _check_batch(self, rows: int, remedy: str) -> None:
        devices = data_parallel_rank(self.trainer)[1]
        if rows < self.batch_size * devices:
            raise ValueError(
                f"data.batch_size must be at most the rows there are to train on, but is {self.batch_size} on "
                f"{devices} device{'s' * (devices > 1)} where the training split of {self.corpus_name} has {rows} rows "
                f"of {self.seq_len} tokens; {remedy}"
            )

    def _check_validation(self) -> None:
        if not self.split_rows("validation"):
            total = sum(split["documents"] for split in self.manifest["splits"].values())
            raise ValueError(
                f"data.validation_fraction must leave a document to validate on, but is {self.validation_fraction}, "
                f"which takes none of the {total} of {self.corpus_name}; {self.more_to_validate_on}, or set it to 0 to "
                f"go without"
            )

    # How the cache is made.

    @abstractmethod
    def _corpus(self) -> Corpus: ...

    def _corpus_to_tokenize(self) -> Corpus:
        return self._corpus()

    def _split(self, corpus: Corpus, dropped: Counter[str]) -> Iterator[tuple[Document, int, str]]:
        """One pass over the documents."""
        return split_documents(corpus, self.cleaning, self.validation_fraction, self.test_fraction, dropped)

    def _dress(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Adapts a tokeniser before it is used and saved."""
        return tokenizer

    def _texts_to_learn_tokens_from(self, documents: Iterable[str]) -> Iterable[str]:
        return documents

    def _recipe(self, ready: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        """Adds to what determines the cache; `ready` is the tokeniser if it needs no training, else `None`."""
        return {}

    def _open_cache(self) -> TokenCache:
        if self.tokenizer_spec is None:
            raise ValueError(
                "data.tokenizer must be given, but is None; to start from model.weights name their folder or run"
            )
        corpus = self._corpus_to_tokenize()
        self._separate = {"validation": corpus.has_validation, "test": corpus.has_test}
        train = training_of(self.tokenizer_spec)
        ready = None if train else self._dress(load_tokenizer(self.tokenizer_spec))
        description = {
            "corpus": corpus.name,
            "identity": corpus.identity,
            "cleaning": {"format": CLEANING_FORMAT, **asdict(self.cleaning)},
            "validation_fraction": self.validation_fraction,
            "test_fraction": self.test_fraction,
            "tokenizer": self.tokenizer_spec,
            **self._recipe(ready),
        }
        of_tokens = [fingerprint(ready), ready.special_tokens_map, ready.chat_template] if ready else None
        name = cache_name(**description, fingerprint=of_tokens)
        folder = cache_folder() / "tokens" / name
        if cache := TokenCache.open(folder):
            return cache

        def documents(dropped: Counter[str]) -> Iterator[tuple[Document, int, str]]:
            found = False
            for item in self._split(corpus, dropped):
                found = True
                yield item
            if not found:
                reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "no documents"
                raise ValueError(f"data.path must hold {self.wanted}, but {self.corpus_name} has none ({reasons})")

        return build_cache(
            folder,
            documents,
            lambda texts: ready or self._dress(train(self._texts_to_learn_tokens_from(texts))),
            description,
            log.info,
            self.encode,
        )


def _uncut(source: dict[str, Any]) -> dict[str, Any]:
    """A source without the options of its splits, with its path resolved, so that all spellings of a path are equal."""
    path = source["path"]
    rest = {name: value for name, value in source.items() if not name.endswith("_fraction") and name != "split_by"}
    return {**rest, "path": Path(path).expanduser().resolve() if isinstance(path, str) else path}
