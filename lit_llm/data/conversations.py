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


@dataclass(frozen=True)
class Conversations(Rows):
    """Rows that hold a prompt and a response, or a list of messages; a document's text is its messages as JSON.

    Attributes:
        prompt: Column of the user's message.
        response: Column of the assistant's answer.
        messages: Column of whole conversations: lists of `{"role": …, "content": …}`; an assistant's message with
            `"weight": 0` is not learnt.
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
        """The messages as JSON, up to the last one that is learnt; empty for a row that is dropped.

        Raises:
            ValueError: When the columns are missing, a role is unknown, a message calls tools or has a weight other
                than 0 and 1, or an answer is missing.
            TypeError: When `messages` is no list of objects, or a content is no text.
        """
        place = f"row {number} of {path}"
        messages = self._messages(row, place)
        kind = "an assistant's turn" + " of weight 1" * any("weight" in message for message in messages)
        while messages and not is_learnt(messages[-1]):
            messages.pop()
        answers = [message["content"] for message in messages if is_learnt(message)]
        if answers and all(answer.strip() for answer in answers):
            return json.dumps(messages, ensure_ascii=False)
        if self.unanswered == "drop":
            return ""
        remedy = "set data.unanswered to drop to leave such rows out"
        if not answers:
            raise ValueError(f"messages must hold {kind}, but those in {place} have none; {remedy}")
        raise ValueError(f"an assistant's turn must say something, but is empty in {place}; {remedy}")

    def _messages(self, row: dict[str, Any], place: str) -> list[Message]:
        if row.get(self.messages) is not None:
            said = row[self.messages]
            if not isinstance(said, list) or not all(isinstance(message, dict) for message in said):
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
            require_known_role(message.get("role"), f" in {place}")
            content = message.get("content")
            if not isinstance(content, str) and (content is not None or message["role"] != "assistant"):
                kind = type(content).__name__
                raise TypeError(f"content must be text, but is {kind} for the {message['role']} in {place}")
            if calls := message.get("tool_calls"):
                raise ValueError(
                    f"tool_calls must be left out, as calls are not learnt, but are {calls!r:.60} in {place}; leave "
                    f"such rows out"
                )
            if message.get("weight") not in (None, 0, 1):
                raise ValueError(f"weight must be 0 or 1, but is {message['weight']!r:.60} in {place}")
        return [
            {"role": m["role"], "content": self.cleaning.text(m.get("content") or "")}
            | ({"weight": 0} if m["role"] == "assistant" and m.get("weight") == 0 else {})
            for m in said
        ]


def is_learnt(message: Message) -> bool:
    """Whether a message is the assistant's and its weight is not 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def require_known_role(role: Any, place: str = "") -> None:
    """Refuses a role that is not one of `ROLES`; `place` says in the error where it was found.

    Raises:
        ValueError: When the role is unknown.
    """
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, but is {role!r}{place}")
