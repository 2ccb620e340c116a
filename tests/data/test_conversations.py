import json
from pathlib import Path
from typing import Any

import pytest

from lit_llm.data.conversations import Conversations, parsed
from lit_llm.data.documents import open_corpus
from tests.writing import exactly


def messages(*said: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def read(row: dict[str, Any], **options: Any) -> str:
    return Conversations(**options).text(row, 3, "chat.jsonl")


def test_a_pair_is_a_conversation_of_two_turns() -> None:
    pair, whole = read({"prompt": "é", "response": "b"}), read(messages(("user", "é"), ("assistant", "b")))
    assert pair == whole
    assert json.loads(pair) == messages(("user", "é"), ("assistant", "b"))["messages"]
    assert read({"q": "é", "a": "b", "id": 1}, prompt="q", response="a") == pair
    assert read({"messages": None, "prompt": "é", "response": "b"}) == pair  # a table with both kinds


def test_what_follows_the_last_answer_is_left_out_and_messages_are_cleaned() -> None:
    row = messages(("system", "s\x00"), ("user", "cafe\u0301\r\n"), ("assistant", "a"), ("user", "thanks"))
    assert json.loads(read(row)) == messages(("system", "s"), ("user", "café\n"), ("assistant", "a"))["messages"]


def test_calls_and_weights_may_be_empty_and_a_weight_of_one_is_the_same_as_none() -> None:
    row = messages(("user", "a"), ("assistant", "b"))
    more = {
        "messages": [
            message | {"tool_calls": [], "weight": weight} for message, weight in zip(row["messages"], (None, 1))
        ]
    }
    assert read(more) == read(row)


def test_calls_tools_and_what_they_return_are_kept_without_the_nulls_of_a_typed_table() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    said = [
        {"role": "user", "content": "1+2", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3\x00", "name": "add", "tool_call_id": None},
        {"role": "assistant", "content": "3", "tool_calls": None},
    ]
    kept = [
        {"role": "user", "content": "1+2"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call | {"function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "assistant", "content": "3"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "description": None}}]
    for given in (tools, json.dumps(tools)):
        found = parsed(read({"messages": said, "tools": given}))
        assert found == (kept, [{"type": "function", "function": {"name": "add"}}])
    for given in (None, [], "[]", "", "null"):
        assert parsed(read({"messages": said[:2], "tools": given})) == (kept[:2], None)
    assert parsed(read({"prompt": "a", "response": "b", "tools": "hammer, saw"}))[1] is None


UNANSWERED = "set data.unanswered to drop to leave such rows out"
BAD = [
    (
        messages(("user", "a")),
        f"messages must hold an assistant's turn, but those in {{place}} have none; {UNANSWERED}",
    ),
    ({"messages": []}, f"messages must hold an assistant's turn, but those in {{place}} have none; {UNANSWERED}"),
    (
        {"prompt": "a", "response": " \n"},
        f"an assistant's turn must say something, but is empty in {{place}}; {UNANSWERED}",
    ),
    (
        {"prompt": "a", "response": None},
        f"an assistant's turn must say something, but is empty in {{place}}; {UNANSWERED}",
    ),
    (
        messages(("user", "a"), ("assistant", None)),
        f"an assistant's turn must say something, but is empty in {{place}}; {UNANSWERED}",
    ),
    (
        messages(("user", "a"), ("assistant", ""), ("assistant", "b")),
        f"an assistant's turn must say something, but is empty in {{place}}; {UNANSWERED}",
    ),
    (messages((None, "a")), "role must be text, but is None in {place}"),
    (messages(("tool", {"a": 1})), "content must be text, but is dict for the tool in {place}"),
    (messages(("user", "a"), ("assistant", 3)), "content must be text, but is int for the assistant in {place}"),
    ({"messages": [{"role": "user"}]}, "content must be text, but is NoneType for the user in {place}"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
        f"messages must hold an assistant's turn of weight 1, but those in {{place}} have none; {UNANSWERED}",
    ),
    (
        {"messages": [{"role": "assistant", "content": "b", "weight": 0.5}]},
        "weight must be 0 or 1, but is 0.5 in {place}",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": "f(x)"}]},
        "tool_calls must be a list of objects, but are 'f(x)' in {place}",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]},
        "tool_calls must be the assistant's, but are those of the user in {place}",
    ),
    (
        messages(("user", "a"), ("assistant", "b")) | {"tools": "hammer, saw"},
        "tools must be a list of objects or its JSON, but are 'hammer, saw' in {place}",
    ),
    (
        messages(("user", "a"), ("assistant", "b")) | {"tools": ["f"]},
        "tools must be a list of objects or its JSON, but are ['f'] in {place}",
    ),
    ({"prompt": 3, "response": "b"}, "content must be text, but is int for the user in {place}"),
    ({"messages": "hi"}, "messages must be a list of role and content, but are 'hi' in {place}"),
    ({"messages": ["hi"]}, "messages must be a list of role and content, but are ['hi'] in {place}"),
    (
        {"instruction": "a", "output": "b"},
        "data.path must hold rows with messages, or with prompt and response, but {place} has the columns instruction, "
        "output; name yours with data.prompt and data.response",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_row_that_is_no_conversation_is_refused_in_one_line(row: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=exactly(message.format(place="row 3 of chat.jsonl"))):
        read(row)


def test_unanswered_rows_can_be_left_out_and_others_not() -> None:
    for row, message in BAD:
        if UNANSWERED in message:
            assert read(row, unanswered="drop") == ""
        else:
            with pytest.raises((ValueError, TypeError)):
                read(row, unanswered="drop")


def test_a_message_may_have_more_than_role_and_content_late_in_a_file(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 1_000_000}]
    rows = [{"messages": talk}] * 12 + [{"messages": [{**message, "name": "c"} for message in talk]}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = open_corpus(str(tmp_path / "x.jsonl"), column=Conversations()).read()
    assert [json.loads(document.text) == talk for document in documents] == [True] * 13
