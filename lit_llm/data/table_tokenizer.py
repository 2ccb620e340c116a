"""Tokenisers of tables: trained once on their texts and kept, and as text that a checkpoint can hold."""

from __future__ import annotations

import copy
import tempfile
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_llm.data.cache import cache_folder, cache_name, new_cache, read_manifest
from lit_llm.data.cleaning import content_hash
from lit_llm.data.collation import Collation
from lit_llm.data.split_data import SplitData
from lit_llm.data.tokenizer import load_tokenizer, tokenizer_files, training_of, write_tokenizer_files


class TableTokens(SplitData):
    """Texts of a table as tokens, of a tokeniser that is named, lies beside the network's weights or is learnt here."""

    default_tokenizer: ClassVar[str]
    """What is learnt where none is named and the network starts from nothing."""

    tokenizer_spec: str | None
    """What is named."""

    @abstractmethod
    def _texts_to_learn_tokens_from(self) -> list[str]:
        """All texts of the training split."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.tokenizer)

    @property
    def _decided_spec(self) -> str:
        network = getattr(self.trainer, "lightning_module", None)
        return str(self.tokenizer_spec or getattr(network, "tokenizer_path", None) or self.default_tokenizer)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokeniser; of a table that is predicted as a whole, the checkpoint's, once that is read."""
        spec = self._decided_spec
        if training_of(spec) is None:
            return load_tokenizer(spec) if self.tokenizer_spec else tokenizer_beside(spec, self.trainer)
        if self._awaits_checkpoint or "train" not in self.splits:
            raise AttributeError("tokenizer")  # so that who asks what data has finds none
        return trained_tokenizer(spec, self._texts_to_learn_tokens_from())

    @cached_property
    def _tokenizer_files(self) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            return tokenizer_files(Path(folder))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to read and write texts on its own, and what it was trained on."""
        return {"tokenizer": self._tokenizer_files, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint whose tokens mean something else; a table to predict as a whole takes its tokeniser.

        Raises:
            ValueError: When the checkpoint's tokeniser is not this data's.
        """
        super().load_state_dict(state_dict)
        if "train" not in self.splits:
            with tempfile.TemporaryDirectory() as folder:
                write_tokenizer_files(state_dict["tokenizer"], Path(folder))
                self.tokenizer = load_tokenizer(folder)
        elif self._tokenizer_files["tokenizer.json"] != state_dict["tokenizer"]["tokenizer.json"]:
            raise ValueError(
                f"data.tokenizer must be the checkpoint's, but is {self._decided_spec} of {self.path}, which differs"
            )

    def _collated(self, texts: list[str], pairs: list[str] | None, labels: Any, max_seq_len: int) -> Collation:
        """Texts as tokens, cut by a copy of the tokeniser.

        Raises:
            ValueError: When one has no token: of rows without any there is no batch.
        """
        read = Collation(texts, pairs, labels, copy.deepcopy(self.tokenizer), max_seq_len)
        if len(empty := np.flatnonzero(read.lengths == 0)):
            raise ValueError(
                f"data.path must hold texts of a token or more, but {self.path} has {len(empty):,} of {len(read):,} "
                f"without, the first of them {texts[empty[0]]!r} in row {empty[0]} of a split; leave such rows out, or "
                f"name a data.tokenizer that marks the end of a text"
            )
        return read


def trained_tokenizer(spec: str, texts: list[str]) -> PreTrainedTokenizerBase:
    """The tokeniser that such a `bpe-<size>` is on these texts; kept in the cache folder."""
    folder = cache_folder() / "tokenizers" / cache_name(spec=spec, texts=content_hash("\0".join(texts)))
    if read_manifest(folder) is None:
        with new_cache(folder) as (new, _):
            training_of(spec)(texts).save_pretrained(new)
    return load_tokenizer(folder)


def tokenizer_beside(place: str, trainer: Any) -> PreTrainedTokenizerBase:
    """The tokeniser of what a network starts from.

    Args:
        place: Where that is.
        trainer: Knows the network's objective, which says it.

    Raises:
        FileNotFoundError: When there is nothing, or no tokeniser.
    """
    try:
        return load_tokenizer(place)
    except FileNotFoundError as error:
        options = getattr(trainer.lightning_module, "hparams", {})
        name = "model.weights" if options.get("weights") == place else "model.network.path"
        if Path(place).expanduser().exists():
            raise FileNotFoundError(
                f"data.tokenizer must be given where {name} has none, but is not, and {place} has none"
            ) from error
        raise FileNotFoundError(
            f"{name} must be a model directory, a run folder or a name on the hub, but is {place}, of which there is "
            f"nothing here or there"
        ) from error
