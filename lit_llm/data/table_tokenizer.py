"""Tokenisers of tables: trained once on their texts and kept, and as text that a checkpoint can hold."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_llm.data.cache import cache_folder, cache_name
from lit_llm.data.cleaning import content_hash
from lit_llm.data.tokenizer import load_tokenizer, training_of
from lit_llm.files import replacing


def trained_tokenizer(spec: str, texts: list[str]) -> PreTrainedTokenizerBase:
    """The tokeniser that such a `bpe-<size>` is on these texts; kept in the cache folder."""
    folder = cache_folder() / "tokenizers" / cache_name(spec=spec, texts=content_hash("\0".join(texts)))
    if not (folder / "tokenizer.json").is_file():
        with replacing(folder) as new:
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


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The files of a tokeniser, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
