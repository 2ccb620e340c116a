"""Tokenises documents exactly like the tokeniser but several times as fast: each pre-token is encoded only once."""

from __future__ import annotations

import functools
import json
import os
import re
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from lit_llm.data.tokenizer import encode_documents, opening_ids

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Pattern by which `ByteLevel` splits text if `use_regex` is set."""

SYNTAX = re.compile(
    r"(?P<category>\\p\{[A-Z][a-z]?\}|\\s)|(?P<negated>\\S)|(?P<open>\[\^?)|(?P<close>\])"
    r"|\\[rnt]|[A-Za-z0-9' ]|\(\?[:!]|[)|]|(?:[?*+]|\{\d+(?:,\d*)?\})(?![?+])"
)
"""The pattern syntax that means the same to the tokenisers' regex engine and to Python's."""

BEYOND = re.compile("[\U00010000-\U0001efff\U00020000-\U0010ffff]")
"""Characters that the translated patterns do not cover: from U+10000 on, except the emoji's U+1F000 to U+1FFFF."""

MOST_PIECES = 1 << 19
"""Maximum number of pieces in a table, about 100 MB."""

FEW_CORES = 4
"""Maximum number of cores with which the table is used: on one core it is about four times as fast as the tokeniser,
which however uses all cores."""


class DocumentEncoder:
    """Token ids of whole documents, exactly those of `encode_documents`.

    A byte-pair encoding works on pre-tokens, the pieces into which its pattern splits a text; the tokens of a piece do
    not depend on the text around it. So Python's `re` splits texts with the tokeniser's own pattern, and each piece is
    looked up in a table that the tokeniser itself fills. The characters of a category such as `\\p{L}` come from the
    tokeniser's engine, whose version of Unicode may differ from Python's. `encode_documents` is used instead for other
    tokenisers (with a normaliser, added tokens that are found in text, or other pattern syntax), for texts with rare
    characters (`BEYOND`), and on more than `FEW_CORES` cores.

    Args:
        tokenizer: Any fast tokeniser.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self.split = _splitter(state) if (os.cpu_count() or 1) <= FEW_CORES else None
        self.table = _PieceTable(state, self.dtype) if self.split else None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, without added tokens; text that spells a special token is encoded as text."""
        found = [self._look_up(text) for text in texts]
        rest = [text for text, ids in zip(texts, found) if ids is None]
        encoded = iter(encode_documents(self.tokenizer, rest) if rest else [])
        return [np.array(next(encoded), dtype=self.dtype) if ids is None else ids for ids in found]

    def encode_opened(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, after the tokens that open a document (`opening_ids`)."""
        opening = np.array(opening_ids(self.tokenizer), dtype=self.dtype)
        return [np.concatenate([opening, ids]) if len(opening) else ids for ids in self.encode(texts)]

    def _look_up(self, text: str) -> np.ndarray | None:
        if self.split is None or not (text.isascii() or BEYOND.search(text) is None):
            return None
        pieces = self.split(text)
        if "".join(pieces) != text:  # the pattern does not cover the whole text
            return None
        return np.frombuffer(b"".join(map(self.table.__getitem__, pieces)), dtype=self.dtype)


class _PieceTable(dict[str, bytes]):
    """Ids of pieces as bytes, from the tokeniser without its pattern; keeps the first half a million pieces."""

    def __init__(self, state: dict[str, Any], dtype: np.dtype) -> None:
        super().__init__()
        steps = state["pre_tokenizer"]
        last = steps["pretokenizers"][-1] if steps and steps["type"] == "Sequence" else steps
        alone = last and last | {"use_regex": False}
        self.tokenizer = Tokenizer.from_str(
            json.dumps(state | {"pre_tokenizer": alone, "truncation": None, "padding": None})
        )
        self.tokenizer.encode_special_tokens = True
        self.dtype = dtype

    def __missing__(self, piece: str) -> bytes:
        ids = np.array(self.tokenizer.encode(piece, add_special_tokens=False).ids, dtype=self.dtype).tobytes()
        if len(self) < MOST_PIECES:
            self[piece] = ids
        return ids


def _splitter(state: dict[str, Any]) -> Any:
    """A function that splits a text into the pieces of a byte-pair encoding; `None` if that cannot be reproduced."""
    model, steps = state["model"], state["pre_tokenizer"]
    if model["type"] != "BPE" or model["dropout"] or state["normalizer"]:
        return None
    if not all(token["special"] for token in state["added_tokens"]):
        return None
    match steps:
        case None | {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            affixes = model["continuing_subword_prefix"] or model["end_of_word_suffix"] or model["fuse_unk"]
            return None if model["merges"] or affixes else list  # nothing is merged: each character on its own
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            pattern = GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            pass
        case _:
            return None
    translated = _translated(pattern)
    return translated and translated.findall


def _translated(pattern: str) -> re.Pattern[str] | None:
    """A tokeniser's pattern for Python's `re`; `None` if it uses syntax beyond `SYNTAX`, or matches empty text."""
    parts, place, inside = [], 0, False
    while place < len(pattern):
        match = SYNTAX.match(pattern, place)
        if match is None or (match["negated"] and inside) or (match["open"] and inside):
            return None
        inside = bool(match["open"]) or (inside and not match["close"])
        if match["category"]:
            parts.append(_characters(match[0]) if inside else f"[{_characters(match[0])}]")
        else:
            parts.append(f"[^{_characters(match[0].lower())}]" if match["negated"] else match[0])
        place = match.end()
    translated = re.compile("".join(parts))
    return None if translated.match("") else translated


@functools.cache
def _characters(category: str) -> str:
    """The character ranges of a category, as written in brackets, according to the tokenisers' engine."""
    known = (*range(0xD800), *range(0xE000, 0x10000), *range(0x1F000, 0x20000))
    runs = pre_tokenizers.Split(Regex(category + "+"), "removed", invert=True)
    found = runs.pre_tokenize_str("".join(map(chr, known)))
    return "".join(f"{re.escape(run[0])}-{re.escape(run[-1])}" for run, _ in found)
