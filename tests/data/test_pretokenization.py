import itertools
import json
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_llm.data import pretokenization
from lit_llm.data.corpora import stdlib_code, stdlib_prose
from lit_llm.data.pretokenization import DocumentEncoder
from lit_llm.data.tokenizer import BOUNDARY, WORDS, byte_tokenizer, character_tokenizer, encode_documents, train_bpe
from tests.writing import prose

TEXTS = [prose(number) for number in range(40)] + [d.text for d in itertools.islice(stdlib_prose(), 8)]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split_by(pattern: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), BYTE_LEVEL])


def bpe(pre_tokenizer, normalizer=None, added=(), **model) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[BOUNDARY], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=BOUNDARY)


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN = {
    "bpe": train_bpe(TEXTS, 500),
    "gpt2": bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes": byte_tokenizer(),
    "characters": character_tokenizer(TEXTS[:20]),
    "llama 3 but for its contractions": bpe(split_by(LLAMA3[LLAMA3.index("|[") + 1 :])),
    "a pattern with holes": bpe(split_by(r"\p{Lu}+|\p{N}")),
}
OTHER = {
    "prefix space": bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "normaliser": bpe(BYTE_LEVEL, normalizers.NFKC()),
    "added token": bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), added=["the"]),
    "llama 3": bpe(split_by(LLAMA3)),
    "merges across words": bpe(BYTE_LEVEL),
    "other behaviour": bpe(split_by(r"\s+", "merged_with_next")),
    "inverted": bpe(split_by(r"\p{L}+", invert=True)),
    "possessive": bpe(split_by(r"\p{L}++|[^\p{L}]+")),
    "category in brackets negated": bpe(split_by(r"[\S]+|\s+")),
    "pattern that matches nothing": bpe(split_by(r"\p{L}*")),
    "metaspace": bpe(pre_tokenizers.Metaspace()),
}
ODD = [
    *("'s", "'LL", "'", "’s", "don't", BOUNDARY, "<unk>", "<0>", "the", "_", "12", "2024", "٣", "²", "½", "Ⅷ", "ﬁ"),
    *(
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\n\n  ",
        "\x0b",
        "\x1c",
        "\x1f",
        "\x85",
        "\xa0",
        "\u2003",
        "\u2028",
        "\u3000",
        "\ufeff",
    ),
    *(
        "é",
        "e\u0301",
        "\u0301",
        "ß",
        "İ",
        "ſ",
        "K",
        "山",
        "ก็",
        "นี้",
        "हिन्दी",
        "😀",
        "👩‍👩‍👧",
        "🇩🇪",
        "🄀",
        "🯰",
        "\u200d",
        "\ufe0f",
    ),
    *("𝒳", "𠀀", "𐍈", "\ue000", "\uffff", "\U0010ffff", "\u0378", "Ა", "ⱟ", "\x00", "[", "]", "\\", "-", "^"),
]
ANY_TEXT = st.lists(st.sampled_from(ODD) | st.text(st.characters(codec="utf-8"), max_size=6), max_size=25).map("".join)


@pytest.fixture(autouse=True, scope="module")
def _few_cores() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 2)
        yield


ENCODERS: dict[str, DocumentEncoder] = {}


def encoded(name: str, texts: list[str]) -> list[list[int]]:
    encoder = ENCODERS.setdefault(name, DocumentEncoder((KNOWN | OTHER)[name]))
    return [ids.tolist() for ids in encoder.encode(texts)]


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN | OTHER)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_the_ids_of_any_text_are_the_tokenizers_own(name: str, texts: list[str]) -> None:
    assert encoded(name, texts) == encode_documents((KNOWN | OTHER)[name], texts)


@pytest.mark.parametrize("name", KNOWN)
def test_the_ids_of_code_and_prose_are_the_tokenizers_own(name: str) -> None:
    code = [d.text for d in itertools.islice(stdlib_code(), 0, None, 60)]
    texts = code + [d.text for d in itertools.islice(stdlib_prose(), 0, None, 8)]
    assert encoded(name, texts) == encode_documents(KNOWN[name], texts)
    assert sum(map(len, texts)) > 300_000


PATTERNS = {"words": WORDS, "gpt2": pretokenization.GPT2, "llama 3": LLAMA3[LLAMA3.index("|[") + 1 :]}


def pieces(pattern: str, text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)]


@pytest.mark.parametrize("name", PATTERNS)
@given(text=ANY_TEXT)
@settings(deadline=None, max_examples=300)
def test_any_text_is_split_as_the_tokenizers_engine_splits_it(name: str, text: str) -> None:
    if pretokenization.BEYOND.search(text) is None:
        assert pretokenization._translated(PATTERNS[name]).findall(text) == pieces(PATTERNS[name], text)


def test_every_character_is_in_the_category_that_the_tokenizers_engine_puts_it_in() -> None:
    characters = [chr(c) for c in (*range(0xD800), *range(0xE000, 0x10000), *range(0x1F000, 0x20000))]
    text = "".join(f"a{c} {c}1" for c in characters)
    assert pretokenization._translated(WORDS).findall(text) == pieces(WORDS, text)


@pytest.mark.parametrize("name", sorted(KNOWN.keys() - {"a pattern with holes"}))
def test_a_known_tokenizer_is_asked_for_each_piece_only_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretokenization, "encode_documents", None)
    encoder = DocumentEncoder(KNOWN[name])
    first = encoder.encode(TEXTS)
    encoder.table.tokenizer = None
    assert all(map(np.array_equal, first, encoder.encode(TEXTS)))


@pytest.mark.parametrize("name", OTHER)
def test_a_tokenizer_that_is_not_known_goes_its_own_way(name: str) -> None:
    assert DocumentEncoder(OTHER[name]).split is None


def test_a_text_of_rare_characters_goes_its_own_way_and_its_neighbours_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def remember(tokenizer, texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return encode_documents(tokenizer, texts)

    monkeypatch.setattr(pretokenization, "encode_documents", remember)
    texts = ["plain", "𐍈 gothic", "emoji 😀", "𠀀"]
    assert [i.tolist() for i in DocumentEncoder(KNOWN["bpe"]).encode(texts)] == encode_documents(KNOWN["bpe"], texts)
    assert seen == [texts[1], texts[3]]


def test_the_table_stops_growing_and_the_ids_stay_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretokenization, "MOST_PIECES", 5)
    encoder = DocumentEncoder(KNOWN["bpe"])
    assert [ids.tolist() for ids in encoder.encode(TEXTS)] == encode_documents(KNOWN["bpe"], TEXTS)
    assert len(encoder.table) == 5


def test_merges_left_to_chance_are_left_to_the_tokenizer() -> None:
    tokenizer = train_bpe(TEXTS, 300)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert pretokenization._splitter(state) is not None
    state["model"]["dropout"] = 0.1
    assert pretokenization._splitter(state) is None


def test_many_cores_are_left_to_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert DocumentEncoder(KNOWN["bpe"]).split is None


def test_the_type_has_room_for_the_vocabulary() -> None:
    wide = train_bpe(TEXTS, 300)
    wide.add_tokens([f"<{n}>" for n in range(2**16)], special_tokens=True)
    encoder = DocumentEncoder(wide)
    assert encoder.split is not None
    assert (encoder.dtype, DocumentEncoder(KNOWN["bpe"]).dtype) == (np.uint32, np.uint16)
    texts = [*TEXTS, f"a{BOUNDARY}<65000>"]
    assert [ids.tolist() for ids in encoder.encode(texts)] == encode_documents(wide, texts)


def test_a_text_without_characters_has_no_ids() -> None:
    assert [ids.tolist() for ids in DocumentEncoder(KNOWN["bpe"]).encode(["", "a", ""])][::2] == [[], []]
    assert DocumentEncoder(KNOWN["bpe"]).encode([]) == []
