import unicodedata
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lit_llm.data.cleaning import Cleaning, content_hash, split_of
from lit_llm.data.corpora import Document

NOTHING = Cleaning(unicode_nfc=False, strip_control=False, drop_empty=False, drop_duplicates=False)
ANY_TEXT = st.text(st.characters(codec="utf-8"))
BROKEN_TEXT = st.text(st.sampled_from("e\u0301\x00\r\n\t é가ᄀ\u1161"))


def clean(cleaning: Cleaning, *texts: str) -> tuple[list[str], dict[str, int]]:
    dropped: Counter[str] = Counter()
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    return [document.text for document, _ in cleaning.documents(documents, dropped)], dict(dropped)


@given(ANY_TEXT)
def test_no_step_taken_changes_nothing(text: str) -> None:
    assert NOTHING.text(text) == text


@given(ANY_TEXT | BROKEN_TEXT)
@example("e\x00\u0301")  # a control character between a letter and its accent
def test_cleaned_text_is_composed_and_free_of_control_characters(text: str) -> None:
    cleaned = Cleaning().text(text)
    assert unicodedata.is_normalized("NFC", cleaned)
    assert {c for c in cleaned if unicodedata.category(c) == "Cc"} <= {"\t", "\n"}


@given(ANY_TEXT | BROKEN_TEXT)
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once = Cleaning().text(text)
    assert Cleaning().text(once) == once


@given(ANY_TEXT)
def test_stripping_leaves_every_other_character_in_its_place(text: str) -> None:
    cleaned = Cleaning(unicode_nfc=False).text(text)
    ends = text.replace("\r\n", "\n").replace("\r", "\n")
    kept = "".join(c for c in ends if c in "\t\n" or unicodedata.category(c) != "Cc")
    assert cleaned.replace("\n", "") == kept.replace("\n", "")
    assert cleaned.split() == "".join(c for c in ends if c.isspace() or unicodedata.category(c) != "Cc").split()


@pytest.mark.parametrize("separator", ["\f", "\v", "\x1c", "\x85", "\0\f\0\v"])
def test_a_form_feed_separates_words_and_leaves_no_trace_beside_white_space(separator: str) -> None:
    assert Cleaning().text(f"one{separator}two") == "one\ntwo"
    assert Cleaning().text(f"one.\n{separator}\nclass Two") == "one.\n\nclass Two"
    assert Cleaning().text(f"{separator}one {separator}two{separator}") == "one two"


@pytest.mark.parametrize(
    ("cleaning", "expected"),
    [
        (Cleaning(), "é\tb\nc\nd"),
        (Cleaning(unicode_nfc=False), "e\u0301\tb\nc\nd"),
        (Cleaning(strip_control=False), "é\tb\r\nc\x00\rd"),
    ],
)
def test_each_step_can_be_left_out(cleaning: Cleaning, expected: str) -> None:
    assert cleaning.text("e\u0301\tb\r\nc\x00\rd") == expected


def test_empty_documents_are_dropped_and_counted() -> None:
    assert clean(Cleaning(), "a", "", " \n\t", "\x00", "b") == (["a", "b"], {"empty": 3})


def test_repeated_documents_are_dropped_and_counted_and_the_first_stays() -> None:
    documents = [Document("first", "cafe\u0301"), Document("second", "café\x07"), Document("third", "cafe")]
    dropped: Counter[str] = Counter()
    kept = [document.id for document, _ in Cleaning().documents(documents, dropped)]
    assert kept == ["first", "third"]
    assert dropped == {"duplicate": 1}


def test_documents_that_are_not_to_be_dropped_stay() -> None:
    assert clean(NOTHING, "a", "", "a") == (["a", "", "a"], {})


def test_a_documents_source_and_split_survive_cleaning() -> None:
    cleaned, content = next(Cleaning().documents([Document("here", "a\r\n", "test")], Counter()))
    assert cleaned == Document("here", "a\n", "test")
    assert content == content_hash("a\n")


@given(ANY_TEXT, ANY_TEXT)
def test_content_hash_tells_texts_apart(one: str, other: str) -> None:
    assert (content_hash(one) == content_hash(other)) == (one == other)
    assert 0 <= content_hash(one) < 2**64


def test_content_hash_takes_text_that_is_not_unicode() -> None:
    assert content_hash("\ud800") != content_hash("\ud801")


@given(st.integers(0, 2**64 - 1), st.floats(0, 0.5), st.floats(0, 0.5, exclude_max=True))
@example(2**64 - 1, 0.5, 0.499)
def test_raising_a_fraction_never_moves_a_document_back_to_training(content: int, low: float, more: float) -> None:
    smaller = split_of(content, validation_fraction=low, test_fraction=0.0)
    larger = split_of(content, validation_fraction=low + more, test_fraction=0.0)
    assert (smaller, larger) in {("train", "train"), ("train", "validation"), ("validation", "validation")}


def test_splits_have_the_fractions_asked_for() -> None:
    counts = Counter(split_of(content_hash(str(n)), 0.2, 0.1) for n in range(5000))
    assert counts["validation"] / 5000 == pytest.approx(0.2, abs=0.02)
    assert counts["test"] / 5000 == pytest.approx(0.1, abs=0.02)


def test_no_fraction_is_all_training() -> None:
    assert {split_of(content, 0.0, 0.0) for content in (0, 1, 2**63, 2**64 - 1)} == {"train"}
