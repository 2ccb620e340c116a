"""Decoding with a cache: several prompts at once, greedy or sampled."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lit_llm.modes import evaluating
from lit_llm.ranges import require_at_least, require_range

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_HELD = 16
"""Number of held-back tokens at which they are output though incomplete; a character has at most four bytes."""


def sample(
    logits: Float[Tensor, "batch vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """Draws a token from each distribution.

    Args:
        logits: Unnormalised log-probabilities.
        temperature: Divides the logits; 0, or a value that rounds to 0 in fp32, takes the likeliest token.
        top_k: Keep only the likeliest tokens, this many.
        top_p: Keep only the likeliest tokens that together have this probability (Holtzman et al., 2019,
            arXiv:1904.09751); at least one stays.
        generator: Random number generator; `None` is torch's global one.

    Example:
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), temperature=0.0).tolist()
        [1]
    """
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1)
    logits = (logits.float() - logits.amax(dim=-1, keepdim=True)) / temperature  # finite for any temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        beyond = (before >= top_p) & (before > 0)  # `top_p` may round to 0 in fp32
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, beyond)
        logits = logits.masked_fill(dropped, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def generate(
    network: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | Collection[int] = (),
    device: torch.device | None = None,
) -> list[list[int]]:
    """Continues each prompt; arguments and errors are those of `stream_tokens`.

    Returns:
        The new tokens of each prompt.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    for new in stream_tokens(network, prompts, max_new_tokens, temperature, top_k, top_p, seed, stop, device):
        for text, token in zip(texts, new, strict=True):
            if token is not None:
                text.append(token)
    return texts


@torch.inference_mode()
def stream_tokens(
    network: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | Collection[int] = (),
    device: torch.device | None = None,
) -> Iterator[list[int | None]]:
    """Continues each prompt, a token at a time.

    Prompts of unequal length are padded on the left, and the padding is masked; only then is there a mask for the
    prompts, whose size is quadratic in the longest one. A network with a separate output layer (`hidden` and `lm_head`)
    computes logits of the last position only.

    Args:
        network: A causal language model with `new_cache`, that takes `positions`, `cache` and `mask` (`None`: causal).
        prompts: Token ids, at least one each.
        max_new_tokens: Most tokens added to each prompt.
        temperature: As in `sample`.
        top_k: As in `sample`.
        top_p: As in `sample`.
        seed: Seed of the sampling; the same seed gives the same text. `None` draws from torch's global generator.
        stop: Token, or any of several, that ends a text; it is not part of the result.
        device: Where the network computes; `None` is where its weights are.

    Yields:
        The new token of each prompt, `None` for those that have ended.

    Raises:
        ValueError: When a value is out of range, a prompt is empty, or prompt and new tokens exceed the network's
            maximum length.
    """
    require_possible(network, prompts, max_new_tokens, temperature, top_k, top_p, seed)
    longest = max(map(len, prompts))
    stops = {stop} if isinstance(stop, int) else set(stop)
    device = device or next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed) if seed is not None else None
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    padding = torch.tensor([longest - len(p) for p in prompts], device=device)[:, None]
    places = torch.arange(longest + max_new_tokens, device=device)
    written = (places >= padding)[:, None, None, :]  # batch 1 1 seq
    cache = network.new_cache(len(prompts), longest + max_new_tokens)

    with evaluating(network):
        positions = (places[:longest] - padding).clamp(min=0)
        mask = None
        if len(set(map(len, prompts))) > 1:
            causal = places[:longest] <= places[:longest, None]
            # A padding position attends to itself: a softmax over no positions is not a number.
            mask = (written[..., :longest] & causal) | torch.eye(longest, dtype=torch.bool, device=device)
        logits = _last(network, ids, positions=positions, mask=mask, cache=cache)
        ended = [False] * len(prompts)
        for step in range(max_new_tokens):
            chosen = sample(logits, temperature, top_k, top_p, generator)
            new: list[int | None] = []
            for index, token in enumerate(chosen.tolist()):
                ended[index] = ended[index] or token in stops
                new.append(None if ended[index] else token)
            yield new
            if all(ended) or step + 1 == max_new_tokens:
                break
            place = longest + step
            seen = written[..., : place + 1]
            logits = _last(network, chosen[:, None], positions=place - padding, mask=seen, cache=cache)


def _last(network: nn.Module, ids: Int[Tensor, "batch new"], **about: Any) -> Float[Tensor, "batch vocab"]:
    """Logits of the token after the last position."""
    if hasattr(network, "hidden"):
        return network.lm_head(network.hidden(ids, **about)[:, -1:])[:, -1]
    return network(ids, **about)[:, -1]


def require_possible(
    network: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> None:
    """Refuses arguments of `stream_tokens` that are impossible; the errors are those listed there."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, but is {temperature}")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits, but is {seed}")
    require_at_least(1, top_k=top_k)
    require_range("in (0, 1]", top_p=top_p)
    require_at_least(0, max_new_tokens=max_new_tokens)
    if not prompts or not all(prompts):
        raise ValueError("prompt must hold at least one token, but is empty")
    longest = max(map(len, prompts))
    limit = getattr(network, "max_seq_len", None)
    if limit and longest > (room := limit - min(max_new_tokens, 1)):
        raise ValueError(
            f"prompt must be at most {room} tokens, which the network's max_seq_len {limit} has room to go on from, "
            f"but is {longest}; shorten it"
        )
    if limit and longest + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens must be at most {limit - longest}, which is what the network's max_seq_len "
            f"{limit} leaves after a prompt of {longest} tokens, but is {max_new_tokens}"
        )
    largest, size = max(map(max, prompts)), getattr(network, "vocab_size", None)
    if size is not None and largest >= size:
        raise ValueError(f"tokenizer must be the network's, of {size} tokens, but makes token {largest}")


class IncrementalDetokenizer:
    """Decodes tokens one by one, and holds back the bytes of a character that is not complete yet.

    Only the last tokens are decoded again, so that the time is linear in the length of a text, not quadratic.
    (`tokenizers.decoders.DecodeStream` fails on invalid bytes from tokenisers with byte fallback.)

    Args:
        tokenizer: The tokeniser.
        tokens: Preceding tokens, whose text is not output.

    Attributes:
        tokens: All tokens so far.

    Example:
        >>> from lit_llm.data.tokenizer import byte_tokenizer
        >>> tokenizer = byte_tokenizer()
        >>> writing = IncrementalDetokenizer(tokenizer)
        >>> [writing.add(token) for token in tokenizer.encode("aé")]
        ['a', '', 'é']
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int] = ()) -> None:
        self.tokenizer, self.tokens = tokenizer, list(tokens)
        # Range of the tokens whose text was output last. They are decoded again, since decoders strip a leading space.
        self._start, self._end = 0, len(self.tokens)

    def add(self, token: int) -> str:
        """Adds a token, and returns the text that it completes, with what was held back before."""
        self.tokens.append(token)
        unfinished = self.tokenizer.decode(self.tokens[self._start :]).endswith("\ufffd")
        return "" if unfinished and len(self.tokens) - self._end < MAX_HELD else self.rest()

    def pieces(self, steps: Iterable[Sequence[int | None]]) -> Iterator[str]:
        """Yields what `add` returns for each token that `stream_tokens` yields for a single prompt, and the rest."""
        for [token] in steps:
            if token is not None:
                yield self.add(token)
        yield self.rest()

    def rest(self) -> str:
        """Returns what was held back, even if its last character is incomplete."""
        before, text = (self.tokenizer.decode(self.tokens[self._start : end]) for end in (self._end, None))
        self._start, self._end = self._end, len(self.tokens)
        return text[len(before) :]


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yields the pieces of a text up to the first occurrence of any stop word.

    What may be the beginning of a stop word is held back until that is decided.

    Raises:
        ValueError: When a stop word is empty.

    Example:
        >>> "".join(until(["one t", "w", "o three"], ["two", "three"]))
        'one '
    """
    if "" in stops:
        raise ValueError("stop must be a text, but is empty")
    held = ""
    for piece in pieces:
        held += piece
        places = [held.find(stop) for stop in stops if stop in held]
        if places:
            yield held[: min(places)]
            return
        begun = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        ready, held = held[: len(held) - begun], held[len(held) - begun :]
        if ready:
            yield ready
    if held:
        yield held


class Continuation(NamedTuple):
    """The continuation of a prompt: all new tokens, their text up to a stop word, and whether a stop word ended it."""

    tokens: list[int]
    text: str
    stopped: bool


def continuations(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    steps: Iterable[Sequence[int | None]],
    stops: Sequence[str] = (),
) -> list[Continuation]:
    """Takes new tokens until each continuation has ended or holds a stop word.

    Args:
        tokenizer: The tokeniser.
        prompts: Tokens whose text a continuation follows, without a special token that opens them.
        steps: The new token of each prompt, as `stream_tokens` yields them.
        stops: Stop words; as in `until`.

    Raises:
        ValueError: When a stop word is empty.
    """
    writings = [IncrementalDetokenizer(tokenizer, prompt) for prompt in prompts]  # keeps a leading space
    made: list[list[int]] = [[] for _ in prompts]
    ends, longest = [""] * len(prompts), max(map(len, stops), default=0)
    for new in steps:
        for index, token in enumerate(new):
            if token is not None and not any(stop in ends[index] for stop in stops):
                made[index].append(token)
                if stops:
                    ends[index] = ends[index][-longest:] + writings[index].add(token)
        if stops and all(any(stop in end for stop in stops) for end in ends):
            break
    found = []
    for prompt, tokens in zip(prompts, made, strict=True):
        before, text = tokenizer.batch_decode([prompt, prompt + tokens])
        whole = text[len(before) :]
        cut = "".join(until([whole], stops))
        found.append(Continuation(tokens, cut, cut != whole))
    return found
