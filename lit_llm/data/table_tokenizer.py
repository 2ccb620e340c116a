"""Tokenisers of tables: trained once on a table's texts and cached, and stored as text in checkpoints."""

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
    """Texts of a table as tokens; the tokeniser is given, lies beside the network's weights, or is trained here."""

    default_tokenizer: ClassVar[str]
    """The tokeniser to train if none is given and the network starts without weights."""

    tokenizer_spec: str | None
    """The given tokeniser."""

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
        """The tokeniser; for a table without a training split, the checkpoint's, once that is loaded."""
        spec = self._decided_spec
        if training_of(spec) is None:
            return load_tokenizer(spec) if self.tokenizer_spec else tokenizer_beside(spec, self.trainer)
        if self._awaits_checkpoint or "train" not in self.splits:
            raise AttributeError("tokenizer")  # so that `hasattr` and `getattr` find none
        return trained_tokenizer(spec, self._texts_to_learn_tokens_from())

    @cached_property
    def _tokenizer_files(self) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            return tokenizer_files(Path(folder))

    def state_dict(self) -> dict[str, Any]:
        """The tokeniser's files, so that a checkpoint alone can read and write texts, and what it was trained on."""
        return {"tokenizer": self._tokenizer_files, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint with another tokeniser; without a training split, uses the checkpoint's tokeniser.

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
        """Tokenised texts, truncated by a copy of the tokeniser because truncation changes its state.

        Raises:
            ValueError: When a text has no token, because a batch of such rows would be empty.
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
    """The tokeniser that `spec`, for example `bpe-<size>`, gives on these texts; kept in the cache folder."""
    folder = cache_folder() / "tokenizers" / cache_name(spec=spec, texts=content_hash("\0".join(texts)))
    if read_manifest(folder) is None:
        with new_cache(folder) as (new, _):
            training_of(spec)(texts).save_pretrained(new)
    return load_tokenizer(folder)


def tokenizer_beside(place: str, trainer: Any) -> PreTrainedTokenizerBase:
    """The tokeniser beside the weights that a network starts from.

    Args:
        place: Where the weights are.
        trainer: Knows the network's objective, whose options say which argument to name in messages.

    Raises:
        FileNotFoundError: When nothing is there, or no tokeniser.
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
