"""`lit-llm generate`: continue prompts with a trained language model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lit_llm.cli.parser import OneLineArguments


def run(words: list[str]) -> None:
    """Runs the command; `words` begins with its name."""
    options = vars(_parser().parse_args(words[1:]))
    from lit_llm.cli.allocator import keep_freed_memory

    keep_freed_memory()
    generate(**options)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineArguments(
        prog="lit-llm generate",
        description="Continue prompts with a trained language model. Several prompts are continued together.",
        epilog='example: lit-llm generate --model runs/llama_stdlib/<time>/model --prompt "def main(" --seed 1',
    )
    parser.add_argument("--model", required=True, help="a model directory, a run folder or a checkpoint file")
    parser.add_argument("--prompt", required=True, action="append", help="text to continue; may be given many times")
    parser.add_argument(
        "--max_new_tokens", type=int, help="most tokens added to each (default 128, or what the model has room for)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token each time (default 0.8)"
    )
    parser.add_argument("--top_k", type=int, help="draw only from this many of the likeliest tokens")
    parser.add_argument(
        "--top_p", type=float, default=0.95, help="draw only from the likeliest that share this probability (0.95)"
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="write tokens as they come (default: with one prompt on a terminal)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, …; by default the accelerator, if there is one")
    return parser


def generate(
    model: str,
    prompt: list[str],
    max_new_tokens: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stream: bool | None,
    device: str,
) -> None:
    """Prints each prompt with its continuation; arguments as in `lit-llm generate --help`.

    Raises:
        ValueError: When the model has no tokeniser, or one that is not its own, or an option is out of range.
    """
    import torch

    from lit_llm.checkpoints import load_model
    from lit_llm.data.tokenizer import boundary_id
    from lit_llm.generation import generate as continue_prompts

    network, tokenizer = load_model(model)
    if tokenizer is None:
        raise ValueError(f"model must come with a tokeniser to read prompts, but {model} has none")
    if device == "auto":
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        network.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be one that torch finds here, but is {device}: {error}") from error
    boundary = boundary_id(tokenizer)
    prompts = [[boundary, *tokenizer.encode(text, add_special_tokens=False)] for text in prompt]
    largest, size = max(map(max, prompts)), getattr(network, "vocab_size", sys.maxsize)
    if largest >= size:
        raise ValueError(f"tokenizer must be the network's, of {size} tokens, but in {model} it makes token {largest}")
    if max_new_tokens is None:
        room = getattr(network, "max_seq_len", sys.maxsize) - max(map(len, prompts))
        max_new_tokens = max(1, min(128, room))
    if stream is None:
        stream = len(prompt) == 1 and sys.stdout.isatty()
    if stream and len(prompt) > 1:
        raise ValueError(f"--stream must be given with one prompt, but there are {len(prompt)}")
    writer = _Writer(tokenizer, prompts[0][1:]) if stream else None
    texts = continue_prompts(
        network, prompts, max_new_tokens, temperature, top_k, top_p, seed, boundary, writer and writer.write
    )
    if writer:
        print()
        return
    for number, (ids, new) in enumerate(zip(prompts, texts, strict=True)):
        if len(prompt) > 1:
            print(f"--- {number + 1}")
        print(tokenizer.decode(ids[1:] + new))


class _Writer:
    """Prints a text as its tokens come, holding back bytes that are not yet a whole character."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.tokens = list(prompt)
        self.written = 0
        self._print()

    def write(self, new: list[int | None]) -> None:
        if new[0] is not None:
            self.tokens.append(new[0])
            self._print()

    def _print(self) -> None:
        text = self.tokenizer.decode(self.tokens)
        if not text.endswith("\ufffd"):
            print(text[self.written :], end="", flush=True)
            self.written = len(text)
