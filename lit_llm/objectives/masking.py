"""Which tokens are masked or removed: pure functions of the tokens and a seed."""

from __future__ import annotations

import json

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""The byte that each character of a byte-level token stands for."""


def chances(input_ids: Int[Tensor, "batch seq"], seed: tuple[int, ...], count: int) -> Float[Tensor, "count batch seq"]:
    """Random numbers in [0, 1) for each position, which depend only on the tokens of its row and a seed.

    A row gets the same numbers in any batch and on any device and process, equal rows get equal numbers, and a resumed
    run draws the same ones without any state in its checkpoint.

    Args:
        input_ids: Tokens.
        seed: Any whole numbers, such as a seed and the step.
        count: How many numbers to draw for each position.

    Source:
        Steele et al., 2014, "Fast Splittable Pseudorandom Number Generators" (SplitMix64's finaliser); counters instead
        of a state: Salmon et al., 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".

    Example:
        >>> ids = torch.tensor([[5, 6], [5, 6], [6, 5]])
        >>> one, other = chances(ids, (0, 1), 1)[0], chances(ids, (0, 2), 1)[0]
        >>> torch.equal(one[0], one[1]), torch.equal(one[0], one[2]), torch.equal(one, other)
        (True, False, False)
    """
    seq = input_ids.shape[1]
    places = torch.arange(seq, device=input_ids.device)
    rows = _mixed(input_ids * GOLDEN + _mixed(places + 1)).sum(dim=1)
    for number in seed:
        rows = _mixed(rows * GOLDEN + number)
    counters = torch.arange(count * seq, device=input_ids.device).view(count, 1, seq)
    return ((_mixed(rows[:, None] + counters * GOLDEN) >> 40) & (2**24 - 1)) * 2.0**-24


def _mixed(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Makes each bit depend on all bits, in 64-bit arithmetic."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * FIRST
    x = (x ^ ((x >> 27) & (2**37 - 1))) * SECOND
    return x ^ ((x >> 31) & (2**33 - 1))


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> Bool[Tensor, " vocab"]:
    """Which tokens are ordinary text, that is, not special ones."""
    marks = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ordinary = torch.ones(len(tokenizer), dtype=torch.bool)
    ordinary[sorted(marks | set(tokenizer.all_special_ids))] = False
    return ordinary


def word_edges(tokenizer: PreTrainedTokenizerBase) -> Bool[Tensor, "2 vocab"]:
    """For each token, whether it may continue a word, and whether a word may continue after it.

    A WordPiece that begins with `##` continues a word. So does a token without a leading space if the tokeniser puts a
    space before each word, as `bert-uncased-bpe-<size>` does. With other tokenisers a token continues a word if it
    begins with a letter, digit or underscore and the token before it ends with one; a word then consists of these and
    the space or sign at the beginning of its first token. A letter from U+2E80 on (Chinese, Japanese, Korean) is a word
    by itself, even if it consists of several tokens.

    Example:
        >>> from lit_llm.data.tokenizer import train_bert_bpe
        >>> tokenizer = train_bert_bpe([" ab"] * 9, 262)
        >>> ids = tokenizer.convert_tokens_to_ids(["[CLS]", "Ġ", "a", "Ġab"])
        >>> word_edges(tokenizer)[:, ids].int().tolist()
        [[0, 0, 1, 0], [0, 0, 1, 1]]
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    decoder = json.dumps(state["decoder"])
    ordinary, tokens = ordinary_tokens(tokenizer), tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if '"WordPiece"' in decoder:
        goes_on = torch.tensor([token.startswith("##") for token in tokens])
        return torch.stack([goes_on & ordinary, ordinary])
    in_bytes = '"ByteLevel"' in decoder
    pieces = [_bytes_of(token) if in_bytes else token.replace("▁", " ").encode() for token in tokens]
    steps = (state["pre_tokenizer"] or {}).get("pretokenizers", [])
    if steps and steps[-1].get("add_prefix_space") and not steps[-1].get("use_regex", True):
        goes_on = torch.tensor([not piece.startswith(b" ") for piece in pieces])
        return torch.stack([goes_on & ordinary, ordinary])
    edges = torch.tensor([(_is_inside(piece), _is_inside(piece, at_the_end=True)) for piece in pieces]).T
    return edges & ordinary


def _bytes_of(token: str) -> bytes:
    """The bytes that a token of a byte-level encoding stands for."""
    return bytes(BYTES.get(character, 0) for character in token)


def _is_inside(piece: bytes, at_the_end: bool = False) -> bool:
    """Whether the first (or last) character of a token may be inside a word."""
    for size in range(1, 5):
        try:
            character = (piece[-size:] if at_the_end else piece[:size]).decode()
        except UnicodeDecodeError:
            continue
        return character == "_" or (character.isalnum() and character < "\u2e80")
    return at_the_end or piece < b"\xe0"  # part of a character: its middle, or the start of one below U+0800


def word_starts(input_ids: Int[Tensor, "batch seq"], edges: Bool[Tensor, "2 vocab"]) -> Int[Tensor, "batch seq"]:
    """The position at which the word of each position begins.

    Args:
        input_ids: Tokens.
        edges: The result of `word_edges`.

    Example:
        >>> edges = torch.tensor([[0, 0, 1], [0, 1, 1]]).bool()  # special, first of a word, continuing
        >>> word_starts(torch.tensor([[0, 1, 2, 2, 1, 0, 2]]), edges).tolist()
        [[0, 1, 1, 1, 4, 5, 6]]
    """
    goes_on = edges[0][input_ids]
    goes_on[:, 1:] &= edges[1][input_ids[:, :-1]]
    goes_on[:, 0] = False
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return places.masked_fill(goes_on, 0).cummax(dim=1).values


def noise_spans(
    chance: Float[Tensor, "2 batch seq"], num_hidden: int, num_spans: int
) -> tuple[Bool[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Random spans to remove from each row, with the same numbers of removed tokens and of spans in all rows.

    A row begins with kept tokens and ends with a span, and spans do not touch. Kept and removed tokens are each cut
    into `num_spans` pieces, with all cuts equally likely.

    Args:
        chance: Two random numbers for each position.
        num_hidden: Number of removed tokens.
        num_spans: Number of spans.

    Returns:
        Which positions are removed, and which of these are the first of their span.

    Source:
        Raffel et al., 2020, arXiv:1910.10683, section 3.1.4; `random_spans_noise_mask` of their `preprocessors.py`.

    Example:
        >>> hidden, first = noise_spans(torch.rand(2, 3, 20), num_hidden=6, num_spans=2)
        >>> hidden.sum(dim=1).tolist(), first.sum(dim=1).tolist()
        ([6, 6, 6], [2, 2, 2])
    """
    seq = chance.shape[-1]
    kept, left_out = (
        _pieces(part[:, :size], num_spans) for part, size in zip(chance, (seq - num_hidden, num_hidden), strict=True)
    )
    ends = torch.stack([kept, left_out], dim=-1).flatten(1).cumsum(dim=1)
    places = torch.arange(seq, device=chance.device)
    piece = torch.searchsorted(ends, places.expand(len(ends), seq).contiguous(), right=True)
    hidden = piece % 2 == 1
    return hidden, hidden & ~hidden.roll(1, dims=1)


def _pieces(chance: Float[Tensor, "batch seq"], count: int) -> Int[Tensor, "batch count"]:
    """Random lengths, at least 1, of `count` pieces of each row."""
    size = chance.shape[1]
    cuts = chance[:, 1:].argsort(dim=1)[:, : count - 1].sort(dim=1).values + 1
    edges = torch.nn.functional.pad(torch.nn.functional.pad(cuts, (1, 0)), (0, 1), value=size)
    return edges.diff(dim=1)
