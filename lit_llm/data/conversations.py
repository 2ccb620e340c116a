"""Conversations read from the rows of a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lit_llm.data.cleaning import Cleaning
from lit_llm.data.corpora import INSTRUCTIONS, Document
from lit_llm.data.documents import Rows

Message = dict[str, Any]
ROLES = ("system", "user", "assistant")
"""Roles that all chat templates are taken to know; whether one knows another, such as `tool`, is tried out."""


@dataclass(frozen=True)
class Conversations(Rows):
    """Rows that hold a prompt and a response, or a list of messages; a document's text is what `parsed` reads.

    Attributes:
        prompt: Column of the user's message.
        response: Column of the assistant's answer.
        messages: Column of whole conversations: lists of `{"role": …, "content": …}`, with `tool_calls` where the
            assistant calls tools; an assistant's message with `"weight": 0` is not learnt. The tools themselves are in
            the column `tools` beside it, as a list or its JSON. Null entries of calls and tools are left out, because a
            table with a type for each column holds them for every entry that another row has.
        unanswered: Whether a row without an assistant's turn, or with an empty one, is an error or dropped.
        cleaning: Cleaning steps to apply to each message.
    """

    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    unanswered: Literal["refuse", "drop"] = "refuse"
    cleaning: Cleaning = field(default_factory=Cleaning)

    embedded: ClassVar[dict[str, Callable[[], Iterator[Document]]]] = INSTRUCTIONS
    text_files: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Prompt and response: CSV and TSV files hold no lists of messages."""
        return self.prompt, self.response

    def text(self, row: dict[str, Any], number: int, path: str) -> str:
        """The messages and tools as JSON, up to the last message that is learnt; empty for a row that is dropped.

        Raises:
            ValueError: When the columns are missing, a role is no text, another than the assistant calls tools, a
                weight is other than 0 and 1, or an answer is missing.
            TypeError: When messages, tools or calls are no list of objects, or a content is no text.
        """
        place = f"row {number} of {path}"
        messages = self._messages(row, place)
        kind = "an assistant's turn" + " of weight 1" * any("weight" in message for message in messages)
        while messages and not is_learnt(messages[-1]):
            messages.pop()
        answers = [message for message in messages if is_learnt(message)]
        if answers and all(answer.get("tool_calls") or answer["content"].strip() for answer in answers):
            tools = self._tools(row, place) if row.get(self.messages) else []
            return json.dumps({"messages": messages, "tools": tools} if tools else messages, ensure_ascii=False)
        if self.unanswered == "drop":
            return ""
        remedy = "set data.unanswered to drop to leave such rows out"
        if not answers:
            raise ValueError(f"messages must hold {kind}, but those in {place} have none; {remedy}")
        raise ValueError(f"an assistant's turn must say something, but is empty in {place}; {remedy}")

    def _messages(self, row: dict[str, Any], place: str) -> list[Message]:
        if row.get(self.messages) is not None:
            said = row[self.messages]
            if not _are_objects(said):
                raise TypeError(f"messages must be a list of role and content, but are {said!r:.60} in {place}")
        elif {self.prompt, self.response} <= row.keys():
            said = [
                {"role": "user", "content": row[self.prompt]},
                {"role": "assistant", "content": row[self.response] or ""},
            ]
        else:
            raise ValueError(
                f"data.path must hold rows with {self.messages}, or with {self.prompt} and {self.response}, but "
                f"{place} has the columns {', '.join(row)}; name yours with data.prompt and data.response"
            )
        for message in said:
            role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
            if not isinstance(role, str):
                raise ValueError(f"role must be text, but is {role!r:.60} in {place}")
            if not isinstance(content, str) and (content is not None or role != "assistant"):
                raise TypeError(f"content must be text, but is {type(content).__name__} for the {role} in {place}")
            if calls and not _are_objects(calls):
                raise TypeError(f"tool_calls must be a list of objects, but are {calls!r:.60} in {place}")
            if calls and role != "assistant":
                raise ValueError(f"tool_calls must be the assistant's, but are those of the {role} in {place}")
            if message.get("weight") not in (None, 0, 1):
                raise ValueError(f"weight must be 0 or 1, but is {message['weight']!r:.60} in {place}")
        return [self._message(message) for message in said]

    def _message(self, message: Message) -> Message:
        role, calls = message["role"], message.get("tool_calls")
        found: Message = {"role": role, "content": self.cleaning.text(message.get("content") or "")}
        if calls:
            found["tool_calls"] = _without_nulls(calls)
        if role == "assistant" and message.get("weight") == 0:
            found["weight"] = 0
        if role not in ROLES:
            found |= {name: message[name] for name in ("name", "tool_call_id") if message.get(name) is not None}
        return found

    def _tools(self, row: dict[str, Any], place: str) -> list[dict[str, Any]]:
        tools = row.get("tools") or []
        try:
            given = json.loads(tools) if isinstance(tools, str) else tools
        except json.JSONDecodeError:
            given = tools
        if given and _are_objects(given):
            return _without_nulls(given)
        if given is None or given == []:
            return []
        raise TypeError(f"tools must be a list of objects or its JSON, but are {tools!r:.60} in {place}")


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def parsed(text: str) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The messages and the tools of a document; a document without tools is the list of messages alone.

    Example:
        >>> parsed('[{"role": "user", "content": "a"}]')
        ([{'role': 'user', 'content': 'a'}], None)
    """
    said = json.loads(text)
    return (said, None) if isinstance(said, list) else (said["messages"], said["tools"])


def spelt(message: Message) -> str:
    """All that is written in a message: its content, and its calls as JSON."""
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else "")


def is_learnt(message: Message) -> bool:
    """Whether a message is the assistant's and its weight is not 0."""
    return message["role"] == "assistant" and message.get("weight") != 0
