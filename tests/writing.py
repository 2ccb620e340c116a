"""Texts for the tests' documents, and patterns for expected error messages."""

from __future__ import annotations

import random
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

ENGLISH = [
    "the",
    "sea",
    "keeps",
    "old",
    "letters",
    "under",
    "its",
    "green",
    "glass",
    "and",
    "reads",
    "them",
    "to",
    "the",
    "moon",
    "when",
    "no",
    "ship",
    "passes",
    "by",
]
CHINESE = "山高月小，水落石出。清风徐来，水波不兴。白露横江，水光接天。浩浩乎如冯虚御风，而不知其所止。"


def prose(number: int) -> str:
    """A short text, different for each number; every fourth one is Chinese."""
    draw = random.Random(number)
    if number % 4 == 0:
        return f"第{number}篇\n\n" + "".join(draw.choices(CHINESE, k=60)) + "\n"
    return f"Letter {number}\n\n" + " ".join(draw.choices(ENGLISH, k=40)) + ".\n"


def pairs(count: int) -> list[dict[str, str]]:
    """Distinct questions and answers, of 40 to 110 bytes with the template for tokenisers that have none."""
    draw = random.Random(0)
    lengths = [draw.randint(1, 12) for _ in range(count)]
    return [
        {"prompt": f"{n} {' '.join(draw.choices(ENGLISH, k=2))}?", "response": " ".join(draw.choices(ENGLISH, k=k))}
        for n, k in enumerate(lengths)
    ]


def exactly(message: str) -> str:
    """A pattern for `pytest.raises(match=…)` that the whole message must match."""
    return rf"\A{re.escape(message)}\Z"


def places(experiment: str, table: str) -> int:
    """Number of places for a table in the README of an experiment."""
    text = (REPOSITORY / "experiments" / experiment / "README.md").read_text(encoding="utf-8")
    starts, ends = text.count(f"<!-- {table} -->"), text.count(f"<!-- /{table} -->")
    assert starts == ends
    return starts
