"""`lit-llm generate`: continues prompts with a trained language model, or chats with one."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
from collections.abc import Callable
from typing import Any

from lit_llm.cli.parser import OneLineArguments, moved

log = logging.getLogger(__name__)


def run(words: list[str]) -> None:
    """Runs the command; `words` begins with its name."""
    parser = _parser()
    options = vars(parser.parse_args(words[1:]))
    if hasattr(sys.stdin, "reconfigure") and not options["prompt"]:
        with contextlib.suppress(io.UnsupportedOperation):  # a program that calls this has read some of it
            sys.stdin.reconfigure(errors="surrogateescape")  # as on the command line: text that is not UTF-8 is refused
    if not options["prompt"] and not options["chat"]:
        piped = sys.stdin.read().removesuffix("\n") if sys.stdin and not sys.stdin.isatty() else ""
        if not piped:
            parser.error("--prompt, --chat or a text on the standard input must be given, but none is")
        options["prompt"] = [piped]
    from lit_llm.cli.allocator import keep_freed_memory

    keep_freed_memory()
    generate(**options)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineArguments(
        prog="lit-llm generate",
        description="Continue prompts with a trained language model. Several prompts are batched. With --chat, a "
        "prompt is a user's message and only the reply is printed; --chat without a prompt reads lines from the "
        "standard input as one conversation. Without --chat, a text that is piped to the command is the prompt, except "
        "for its last line end.",
        epilog='examples: lit-llm generate --model runs/llama_stdlib/<time>/model --prompt "def main(" --seed 1; '
        "lit-llm generate --model runs/llama_instructions/<time> --chat",
    )
    parser.add_argument("--model", required=True, help="a model directory, a run folder or a checkpoint file")
    parser.add_argument("--prompt", action="append", help="text to continue; can be given several times")
    parser.add_argument("--chat", action="store_true", help="chat, using the chat template of the model's tokeniser")
    parser.add_argument("--system", help="system prompt of --chat")
    parser.add_argument(
        "--max_new_tokens", type=int, help="maximum number of new tokens (default 128, or what the context allows)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="sampling temperature; 0 is greedy (default 0.8)"
    )
    parser.add_argument("--top_k", type=int, help="sample from only this many of the most likely tokens")
    parser.add_argument(
        "--top_p",
        type=float,
        default=0.95,
        help="sample from the smallest set of tokens with this total probability (default 0.95)",
    )
    parser.add_argument("--stop", action="append", help="text before which to stop; can be given several times")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print tokens as they are generated (default: for a single prompt on a terminal)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, …; default: the accelerator if there is one")
    return parser


def generate(
    model: str,
    prompt: list[str] | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop: list[str] | None,
    seed: int | None,
    stream: bool | None,
    device: str,
) -> None:
    """Prints each prompt with its continuation, or the replies; arguments as in `lit-llm generate --help`.

    Raises:
        ValueError: When the model is not a causal language model, has no tokeniser, another model's tokeniser or, for
            `--chat`, no chat template, when a prompt or a stop word is not UTF-8, or an option is out of range.
    """
    from lit_llm import generation
    from lit_llm.checkpoints import load_language_model
    from lit_llm.data.chat import prompt_ids, turn_ends
    from lit_llm.data.tokenizer import boundary_id, first_id, require_utf_8

    if system is not None and not chat:
        raise ValueError("--system must be given with --chat, but is given without")
    stops = stop or []
    for word in stops:
        require_utf_8(word, "--stop")
        if not word:
            raise ValueError("--stop must be a text, but is empty")
    network, tokenizer = load_language_model(model)
    if chat and not tokenizer.chat_template:
        raise ValueError(
            f"model must have a chat template for --chat, but {model} has none; tune it on conversations, as "
            f"configs/finetuning/llama_instructions.yaml does, or leave --chat out"
        )
    moved(network, device)
    limit = getattr(network, "max_seq_len", None) or sys.maxsize
    ends = turn_ends(tokenizer) if chat else {boundary_id(tokenizer)}

    def how(prompts: list[list[int]]) -> tuple[Any, ...]:
        new = max(1, min(128, limit - max(map(len, prompts)))) if max_new_tokens is None else max_new_tokens
        return network, prompts, new, temperature, top_k, top_p, seed

    def write(ids: list[int], shown: list[int]) -> list[int]:
        """Prints the text of `shown`, then of each new token after the prompt `ids`; returns the new tokens."""
        writing = generation.IncrementalDetokenizer(tokenizer, shown)
        print(tokenizer.decode(shown), end="", flush=True)
        for piece in generation.until(writing.pieces(generation.stream_tokens(*how([ids]), ends)), stops):
            print(piece, end="", flush=True)
        print(flush=True)
        return writing.tokens[len(shown) :]

    def reply(ids: list[int]) -> str:
        """Prints the reply to a prompt, and returns it without special tokens."""
        return "".join(generation.until([tokenizer.decode(write(ids, []), skip_special_tokens=True)], stops))

    told = [{"role": "system", "content": system}] if system is not None else []
    if not prompt:
        wanted = min(128, limit // 4) if max_new_tokens is None else max_new_tokens
        shortest = prompt_ids(tokenizer, [*told, {"role": "user", "content": "x"}])
        generation.require_possible(*how([shortest]))  # fail on invalid options before a message is read
        _converse(tokenizer, told, limit - wanted, reply)
        return
    if chat:
        prompts = [prompt_ids(tokenizer, [*told, {"role": "user", "content": text}]) for text in prompt]
        shown: list[list[int]] = [[] for _ in prompt]
    else:
        for text in prompt:
            require_utf_8(text)
        shown = [tokenizer.encode(text, add_special_tokens=False) for text in prompt]
        first = first_id(tokenizer)
        prompts = [[first, *ids] for ids in shown]
    if stream is None:
        stream = len(prompt) == 1 and sys.stdout.isatty()
    if stream and len(prompt) > 1:
        raise ValueError(f"--stream must be given with one prompt, but there are {len(prompt)}")
    if stream:
        write(prompts[0], shown[0])
        return
    steps = generation.stream_tokens(*how(prompts), ends)
    for number, (ids, new) in enumerate(zip(shown, generation.continuations(tokenizer, shown, steps, stops))):
        if len(prompt) > 1:
            print(f"--- {number + 1}")
        print(tokenizer.decode(ids) + new.text)


def _converse(
    tokenizer: Any, messages: list[dict[str, str]], max_prompt: int, reply: Callable[[list[int]], str]
) -> None:
    """Answers each line of the standard input, given as much of the conversation as fits into the context.

    The oldest question and answer are dropped when the prompt exceeds `max_prompt` tokens. A line that cannot be
    answered is reported and left out of the conversation, which continues.
    """
    from lit_llm.cli.errors import one_line
    from lit_llm.data.chat import prompt_ids

    first = len(messages)
    cue = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            said = input(cue)
        except EOFError:
            return
        if not said.strip():
            continue
        heard, forgotten = [*messages, {"role": "user", "content": said}], 0
        try:
            ids = prompt_ids(tokenizer, heard)
            while len(ids) > max_prompt and len(heard) > first + 1:
                del heard[first : first + 2]
                ids, forgotten = prompt_ids(tokenizer, heard), forgotten + 1
            said = reply(ids)
        except ValueError as error:
            if (line := one_line(error)) is None:
                raise
            log.warning(line)
            continue
        for _ in range(forgotten):
            log.info("(The oldest question and answer are forgotten: the context is full.)")
        messages = [*heard, {"role": "assistant", "content": said}]
