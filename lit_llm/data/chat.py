"""Conversations rendered by a chat template and tokenised, with a mask of the tokens that are learnt."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lit_llm.data.conversations import ROLES, Message, is_learnt, parsed, spelt
from lit_llm.data.corpora import Document
from lit_llm.data.pretokenization import DocumentEncoder
from lit_llm.data.token_cache import Encoded
from lit_llm.data.tokenizer import require_utf_8
from lit_llm.wording import first_line

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

REFUSED = (TemplateError, ValueError, TypeError)
"""Errors of a template that refuses a conversation, or that has to do with values of other types than it expects."""

Tools = list[dict[str, Any]] | None

CONVERSATIONS_FORMAT = 6
"""Version of the encoding, raised whenever tokens, learnt tokens or byte counts change, so no older cache is used."""

BEFORE = "\ue000"
"""Character put before all pieces of a text but the first, for tokenisers that add a space to the beginning of a text.

The space is then added to this character, whose tokens are removed; no token joins it with the piece.
"""

CHAT_TEMPLATE = """\
{%- set boundary = eos_token or bos_token or sep_token -%}
{%- for message in messages -%}
    {%- if loop.first or loop.previtem['role'] != 'assistant' -%}{{ boundary }}{%- endif -%}
    {{- message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + boundary -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if not messages or messages[-1]['role'] != 'assistant' -%}{{ boundary }}{%- endif -%}
    {{- 'assistant\\n' -}}
{%- endif -%}"""
"""Chat template for tokenisers without their own: ChatML with the one special token that all of them have.

A turn is the boundary token, the role, a line feed and the content; the boundary that ends an assistant's turn also
opens the next turn. The vocabulary does not grow. Messages must not contain the boundary's text.
"""


def with_template(tokenizer: PreTrainedTokenizerBase, path: str | None = None) -> PreTrainedTokenizerBase:
    """The tokeniser with a chat template: that of the file if one is given, else its own, else `CHAT_TEMPLATE`.

    Raises:
        FileNotFoundError: When the file does not exist.
    """
    if path is not None:
        if not Path(path).expanduser().is_file():
            raise FileNotFoundError(f"data.chat_template must be a file, but is {path}, which does not exist")
        tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Tokens of the prompt, up to where the assistant's answer begins.

    Raises:
        ValueError: When the template refuses or ignores messages, or a message is not UTF-8 or contains the text of a
            special token, which could end its turn.
    """
    for message in messages:
        require_utf_8(message["content"])
    if token := _forged(messages, None, special_tokens(tokenizer).values()):
        raise ValueError(f"prompt must spell no special token, but holds {token}")
    name = "the conversation"
    _require_rendered(tokenizer, messages, None, name)
    text = _render(tokenizer, messages, None, name, add_generation_prompt=True)
    [(ids, _)] = _tokens(tokenizer, [text], [_starts(tokenizer, messages, None, text, name)])
    return ids


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an assistant's turn: those of the template, and the end-of-text token.

    Those of the template are the first special token after the content, and the last learnt token if it is special:
    they differ if the template also ends the conversation.
    """
    answer, special = "yes", special_tokens(tokenizer).keys()
    messages: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    text, spans, starts = _turns(tokenizer, messages, None, "the conversation")
    [(ids, offsets)] = _tokens(tokenizer, [text], [starts])
    learnt = _learnt(ids, offsets, text, spans, special_tokens(tokenizer))
    last = [token for token, is_learnt in zip(ids, learnt, strict=True) if is_learnt][-1:]
    _, is_there, rest = text.rpartition(answer)
    after = offsets[:, 0] >= len(text) - len(rest) * bool(is_there)
    first = [token for token, follows in zip(ids, after, strict=True) if follows and token in special][:1]
    return (set(last + first) & special) | ({tokenizer.eos_token_id} - {None})


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    name: str = "the conversation",
    tools: Tools = None,
) -> tuple[list[int], np.ndarray]:
    """Tokens of a conversation, and which of them are learnt.

    For each of the assistant's turns, the tokens begin with those of its prompt (`prompt_ids`), because no token spans
    the start of a turn. Otherwise they equal those of transformers' `apply_chat_template`, which may join white space
    at the beginning of a turn with the line feed before it. If a template does not render a prompt as the beginning of
    the whole conversation, the two may be joined here too.

    The content of all the assistant's turns is learnt, and the token that ends each. If the template marks this with
    `{% generation %}`, the marks are used; otherwise, a turn is what the rendering up to its end adds to the rendering
    of its prompt.

    Args:
        tokenizer: A tokeniser with a chat template.
        messages: The messages; an assistant's with a `weight` of 0 is not learnt.
        name: Name of the conversation in errors.
        tools: The tools that the assistant can call, for the template.

    Returns:
        The tokens, and for each whether it is learnt.

    Raises:
        ValueError: When the template refuses the messages; ignores roles, calls or tools; marks nothing, and renders
            the first messages differently from the beginning of the whole; or does not mark each turn once although
            some are not learnt.

    Example:
        >>> from lit_llm.data.tokenizer import byte_tokenizer
        >>> tokenizer = with_template(byte_tokenizer())
        >>> say = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
        >>> ids, learnt = encode_conversation(tokenizer, say)
        >>> tokenizer.decode(ids)
        '<|endoftext|>user\\n1+1<|endoftext|>assistant\\n2<|endoftext|>'
        >>> tokenizer.decode([token for token, is_learnt in zip(ids, learnt) if is_learnt])
        '2<|endoftext|>'
    """
    text, spans, starts = _turns(tokenizer, messages, tools, name)
    [(ids, offsets)] = _tokens(tokenizer, [text], [starts])
    return ids, _learnt(ids, offsets, text, spans, special_tokens(tokenizer))


def encode_conversations(
    encoder: DocumentEncoder, documents: list[Document], dropped: Counter[str]
) -> list[Encoded | None]:
    """Tokenises conversations given as JSON, for `build_cache`.

    A conversation is left out if a message contains the text of a special token, which would end or begin a turn.
    """
    tokenizer = encoder.tokenizer
    special = special_tokens(tokenizer)
    conversations = [parsed(document.text) for document in documents]
    left_out = [_forged(*conversation, special.values()) is not None for conversation in conversations]
    if any(left_out):
        dropped["special token in a message"] += sum(left_out)
    kept = [(document.id, *talk) for document, talk, no in zip(documents, conversations, left_out) if not no]
    turns = [_turns(tokenizer, messages, tools, name) for name, messages, tools in kept]
    tokens = _tokens(tokenizer, [text for text, _, _ in turns], [starts for _, _, starts in turns])
    encoded = []
    for (name, *_), (text, spans, _), (ids, offsets) in zip(kept, turns, tokens):
        learnt = _learnt(ids, offsets, text, spans, special)
        if not learnt.any():
            raise ValueError(f"data.chat_template must render what the assistant says, but nothing of it is in {name}")
        encoded.append(Encoded(ids, _said(text, spans, special), learnt))
    rest = iter(encoded)
    return [None if no else next(rest) for no in left_out]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], starts: list[list[int]]
) -> list[tuple[list[int], np.ndarray]]:
    """Tokens of rendered texts and their character offsets, made on all cores; no token spans one of the starts."""
    before = BEFORE if _adds_space(tokenizer) else ""
    special = tuple(special_tokens(tokenizer).values()) if before else ()  # after these, a token starts, with its space
    edges = [
        sorted({0, len(text), *(place for place in places if not text.endswith(special, 0, place))})
        for text, places in zip(texts, starts)
    ]
    pieces = [
        (before if start else "") + text[start:end]
        for text, places in zip(texts, edges)
        for start, end in itertools.pairwise(places)
    ]
    encoded = tokenizer(pieces, add_special_tokens=False, split_special_tokens=False).encodings if pieces else []
    encodings = iter(encoded)
    found = []
    for places in edges:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        begin: list[int] = []
        for start, encoding in zip(places[:-1], encodings):
            lying = encoding.offsets
            skipped = sum(end <= len(before) for _, end in lying) if before and start else 0
            ids += encoding.ids[skipped:]
            offsets += lying[skipped:]
            begin += [start - len(before) * (start > 0)] * (len(lying) - skipped)
        found.append((ids, np.array(offsets, dtype=np.int64).reshape(-1, 2) + np.array(begin, dtype=np.int64)[:, None]))
    return found


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokeniser adds a space to the beginning of every text, as many SentencePiece ones do."""
    normalizer, splitter = tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.pre_tokenizer
    text = normalizer.normalize_str("x") if normalizer else "x"
    return "".join(piece for piece, _ in splitter.pre_tokenize_str(text)) != "x" if splitter else text != "x"


def _learnt(
    ids: list[int], offsets: np.ndarray, text: str, spans: list[tuple[int, int]], special: dict[int, str]
) -> np.ndarray:
    """Which tokens lie in the spans of text, including the token that ends each turn."""
    starts, ends = offsets.T
    is_special = np.isin(ids, list(special))
    learnt = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        inside = np.flatnonzero((starts < end) & (ends > start))
        if not len(inside):
            continue
        last = inside[-1]
        while last + 1 < len(learnt) and ends[last + 1] <= end:  # trailing spaces, if offsets exclude spaces
            last += 1
        if is_special[inside].any():  # white space after the end token is the template's, not the assistant's
            closing = inside[is_special[inside]][-1]
            last = last if text[ends[closing] : end].strip() else closing
        elif last + 1 < len(learnt) and is_special[last + 1]:  # the template's mark excludes the end token
            last += 1
        learnt[inside[0] : last + 1] = True
    return learnt


def _said(text: str, spans: list[tuple[int, int]], special: dict[int, str]) -> int:
    """UTF-8 bytes of the learnt spans without special tokens: a template may render only part of the content."""
    tokens = "|".join(map(re.escape, special.values())) or "(?!)"
    turns = (re.sub(rf"({tokens})\s*\Z", "", text[start:end]) for start, end in spans)
    return sum(len(re.sub(tokens, "", turn).encode()) for turn in turns)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """All special tokens, by id."""
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added


def _forged(messages: list[Message], tools: Tools, special: Collection[str]) -> str | None:
    """A special token in a conversation's contents, calls, tools, names or roles; `None` if there is none."""
    others = [message for message in messages if message["role"] not in ROLES]
    names = [str(message[name]) for message in others for name in ("role", "name", "tool_call_id") if name in message]
    written = [*map(spelt, messages), *names, *([json.dumps(tools, ensure_ascii=False)] if tools else [])]
    return next((token for token in special if any(token in text for text in written)), None)


def _turns(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools, name: str
) -> tuple[str, list[tuple[int, int]], list[int]]:
    """The text of a conversation, the spans of it that are learnt, and the ends of the prompts for its turns."""
    _require_rendered(tokenizer, messages, tools, name)
    answers = [message for message in messages if message["role"] == "assistant"]
    template = tokenizer.get_chat_template(tools=tools)
    if GENERATION.search(template):
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
        except REFUSED as error:
            raise _refusal(name, error) from error
        spans = spans[0]
        if not all(map(is_learnt, answers)):
            if len(spans) != len(answers):
                raise ValueError(
                    "data.chat_template must mark each of the assistant's turns once with {% generation %} where a "
                    f"weight is 0, but marks {len(spans)} where {name} has {len(answers)}"
                )
            spans = [span for span, answer in zip(spans, answers, strict=True) if is_learnt(answer)]
        return texts[0], spans, _starts(tokenizer, messages, tools, texts[0], name)
    text, spans = _render(tokenizer, messages, tools, name), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _before(tokenizer, messages[: number + 1], tools, name)
            after = _render(tokenizer, messages[: number + 1], tools, name)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    "data.chat_template must mark with {% generation %} what the assistant says, or render the "
                    f"beginning of a conversation as it renders it in the whole, but does neither with {name}"
                )
            spans.append((len(before), len(after)))
    starts = [start for start, _ in spans]
    return text, [span for span, answer in zip(spans, answers, strict=True) if is_learnt(answer)], starts


def _require_rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools, name: str) -> None:
    """Refuses a conversation of which the template ignores what not all templates know: other roles, calls, tools.

    Raises:
        ValueError: When it does, or `CHAT_TEMPLATE` would render other roles or calls.
    """
    others = sorted({message["role"] for message in messages} - set(ROLES))
    if others and tokenizer.chat_template == CHAT_TEMPLATE:
        raise ValueError(
            f"role must be one of {', '.join(ROLES)} in the default chat template, but is {others[0]!r} in {name}; one "
            f"that renders it can be given by data.chat_template"
        )
    without: dict[str, tuple[list[Message], Tools]] = {
        f"messages of the role {role}": (
            [{**m, "content": f"{m['content']}x"} if m["role"] == role else m for m in messages],
            tools,
        )
        for role in others
    }
    if any("tool_calls" in message for message in messages):
        silent = [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
        without["tool_calls"] = (silent, tools)
    if tools:
        without["tools"] = (messages, None)
    text = _render(tokenizer, messages, tools, name) if without else ""
    for what, changed in without.items():
        try:
            ignored = _render(tokenizer, *changed, name) == text
        except ValueError:  # a template that refuses the change has read it
            continue
        if ignored:
            raise ValueError(f"data.chat_template must render {what}, but ignores those of {name}; name one that does")


def _starts(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools, text: str, name: str
) -> list[int]:
    """Where the prompts for the assistant's turns end in the text, of those prompts that the text begins with."""
    starts = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                before = _before(tokenizer, messages[: number + 1], tools, name)
            except ValueError:  # the template refuses these messages, so there is no such prompt
                continue
            if text.startswith(before):
                starts.append(len(before))
    return starts


def _before(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools, name: str) -> str:
    """The rendering up to the content of the last message, which is the assistant's."""
    *told, said = messages
    if told:
        return _render(tokenizer, told, tools, name, add_generation_prompt=True)
    # There is no prompt without messages: take the common beginning of the renderings of two answers.
    other = {"role": said["role"], "content": "b" if said["content"].lstrip().startswith("a") else "a"}
    both = zip(*(_render(tokenizer, [message], tools, name) for message in (said, other)))
    return "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: Tools,
    name: str,
    add_generation_prompt: bool = False,
) -> str:
    options = {"tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except REFUSED as error:
        raise _refusal(name, error) from error


def _refusal(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} must be such as the chat template renders, but it refuses: {first_line(error)}")
