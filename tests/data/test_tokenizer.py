import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, BertTokenizer

from lit_llm.data.tokenizer import (
    BOUNDARY,
    UNKNOWN,
    boundary_id,
    byte_tokenizer,
    character_tokenizer,
    encode_documents,
    fingerprint,
    first_id,
    load_tokenizer,
    opening_ids,
    tokenizer_files,
    train_bert_bpe,
    train_bert_uncased_bpe,
    train_bpe,
    train_t5_bpe,
    training_of,
    write_tokenizer_files,
)
from tests.examples import bytes_with_bos
from tests.writing import exactly, prose

TEXTS = [prose(number) for number in range(60)]
BYTES = byte_tokenizer()
TRAINED = train_bpe(TEXTS, 400)
CHARACTERS = character_tokenizer(TEXTS)
BERT = train_bert_bpe(TEXTS, 400)
UNCASED = train_bert_uncased_bpe(TEXTS, 400)
ANY_TEXT = st.text(st.characters(codec="utf-8"))


@given(ANY_TEXT)
@settings(deadline=None)
def test_a_byte_tokenizer_has_one_token_a_byte_and_loses_nothing(text: str) -> None:
    [ids] = encode_documents(BYTES, [text])
    assert len(ids) == len(text.encode())
    assert BYTES.decode(ids) == text


@given(ANY_TEXT)
@settings(deadline=None)
def test_a_trained_tokenizer_loses_nothing_even_of_what_it_never_saw(text: str) -> None:
    [ids] = encode_documents(TRAINED, [text])
    assert TRAINED.decode(ids) == text


def test_bytes_and_boundary_are_all_the_tokens_of_the_byte_tokenizer() -> None:
    assert len(BYTES) == 257
    assert len({i for [i] in encode_documents(BYTES, [chr(n) for n in range(128)])}) == 128


def test_a_character_tokenizer_has_one_token_for_each_character_there_is_boundary_and_unknown_aside() -> None:
    characters = sorted(set("".join(TEXTS)))
    assert len(CHARACTERS) == 2 + len(characters)
    ids = encode_documents(CHARACTERS, TEXTS)
    assert ids == [[2 + characters.index(character) for character in text] for text in TEXTS]
    assert [CHARACTERS.decode(document) for document in ids] == TEXTS


@given(st.text(st.sampled_from("sea 山\n!é\u0301\U0001f600<unk>|")))
@settings(deadline=None)
def test_a_character_that_was_not_seen_is_one_unknown_token(text: str) -> None:
    [ids] = encode_documents(CHARACTERS, [text])
    seen = set("".join(TEXTS))
    assert [index == CHARACTERS.unk_token_id for index in ids] == [character not in seen for character in text]
    assert CHARACTERS.decode(ids) == "".join(c if c in seen else UNKNOWN for c in text)


def test_training_shortens_the_text_it_was_trained_on() -> None:
    encoded = encode_documents(TRAINED, TEXTS)
    assert sum(map(len, encoded)) < 0.5 * sum(len(text.encode()) for text in TEXTS)
    assert len(TRAINED) == 400


@pytest.mark.parametrize("vocab_size", [257, 300])
def test_the_vocabulary_has_the_size_asked_for(vocab_size: int) -> None:
    assert len(train_bpe(TEXTS, vocab_size)) == vocab_size


def test_a_small_corpus_yields_fewer_tokens_than_asked_for() -> None:
    assert 257 < len(train_bpe(["ab ab ab"], 10_000)) < 270


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert fingerprint(train_bpe(TEXTS, 300)) == fingerprint(train_bpe(iter(TEXTS), 300))


def test_no_token_holds_more_than_two_digits_or_the_end_of_one_word_and_another() -> None:
    numbers = train_bpe(["2024 2024 2024 the sea the sea the sea"] * 50, 400)
    tokens = [numbers.decode([index]) for index in range(len(numbers))]
    assert "20" in tokens
    assert " sea" in tokens
    assert not any(token.isdigit() and len(token) > 2 for token in tokens)
    assert not any("e s" in token for token in tokens)


@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED], ids=["bytes", "trained"])
def test_a_boundary_spelt_in_a_text_is_text(tokenizer) -> None:
    text = f"a{BOUNDARY}b"
    [ids] = encode_documents(tokenizer, [text])
    assert boundary_id(tokenizer) not in ids
    assert tokenizer.decode(ids) == text


def test_encoding_documents_leaves_the_tokenizer_as_it_was() -> None:
    before = TRAINED.encode(f"a{BOUNDARY}b")
    encode_documents(TRAINED, [BOUNDARY])
    assert TRAINED.encode(f"a{BOUNDARY}b") == before
    assert boundary_id(TRAINED) in before


def test_documents_are_encoded_whole_without_any_token_added() -> None:
    text = "letter " * 5000
    [ids, empty] = encode_documents(TRAINED, [text, ""])
    assert TRAINED.decode(ids) == text
    assert empty == []


@pytest.mark.parametrize("made", [TRAINED, CHARACTERS], ids=["trained", "characters"])
def test_a_saved_tokenizer_is_loaded_as_it_was(tmp_path: Path, made) -> None:
    made.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert fingerprint(loaded) == fingerprint(made)
    assert encode_documents(loaded, TEXTS) == encode_documents(made, TEXTS)
    assert loaded.decode(made.encode(TEXTS[4])) == TEXTS[4]
    assert (boundary_id(loaded), loaded.unk_token_id) == (boundary_id(made), made.unk_token_id)


def test_a_tokenizers_folder_may_be_a_runs_and_begin_with_the_home(tmp_path: Path, monkeypatch) -> None:
    TRAINED.save_pretrained(tmp_path / "run/model")
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (tmp_path / "run", "~/run", "~/run/model"):
        assert fingerprint(load_tokenizer(place)) == fingerprint(TRAINED)


@given(ANY_TEXT)
@settings(deadline=None)
def test_an_encoders_tokenizer_loses_nothing_either(text: str) -> None:
    [ids] = encode_documents(BERT, [text])
    assert BERT.decode(ids) == text


def test_an_encoders_tokenizer_marks_one_text_and_two_as_bert_does(tmp_path: Path) -> None:
    BERT.save_pretrained(tmp_path)
    for tokenizer in (BERT, load_tokenizer(tmp_path)):
        a, b = encode_documents(tokenizer, ["the sea", "old letters"])
        start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
        assert tokenizer("the sea").input_ids == [start, *a, end]
        both = tokenizer("the sea", "old letters")
        assert both.input_ids == [start, *a, end, *b, end]
        assert both.token_type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert [tokenizer.pad_token_id, start, end, tokenizer.mask_token_id] == [0, 1, 2, 3]
        assert tokenizer.pad(tokenizer(["a", "a a a"])).attention_mask[0][-1] == 0


@given(ANY_TEXT)
@settings(deadline=None)
def test_an_uncased_tokenizer_reads_the_words_that_berts_does_and_loses_none(text: str) -> None:
    berts = BertTokenizer(vocab={mark: number for number, mark in enumerate(("[PAD]", "[CLS]", "[SEP]", "[UNK]"))})
    backend = berts.backend_tokenizer
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]
    [ids] = encode_documents(UNCASED, [text])
    assert UNCASED.decode(ids) == "".join(f" {word}" for word in words)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_an_uncased_tokenizer_beside_an_encoder_is_the_same_to_transformers(tmp_path: Path, kind: str) -> None:
    UNCASED.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == fingerprint(UNCASED)


def test_a_word_is_the_same_tokens_wherever_it_stands() -> None:
    alone, name, head = encode_documents(UNCASED, ["sea", "a_sea", "(Séa"])
    assert name[-len(alone) :] == head[-len(alone) :] == alone
    assert fingerprint(train_bert_uncased_bpe(TEXTS, 400)) == fingerprint(UNCASED)


def test_an_encoders_documents_open_with_cls_and_end_with_sep() -> None:
    assert (opening_ids(BERT), boundary_id(BERT)) == ([BERT.cls_token_id], BERT.sep_token_id)
    assert opening_ids(TRAINED) == opening_ids(BYTES) == []


def test_a_bos_that_the_tokenizer_puts_before_texts_opens_documents_and_what_is_continued(tmp_path: Path) -> None:
    bytes_with_bos().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("a").input_ids[:1] == opening_ids(tokenizer) == [first_id(tokenizer)] == [tokenizer.bos_token_id]
    assert boundary_id(tokenizer) == tokenizer.eos_token_id != tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = None  # it has a BOS but does not add it
    assert (opening_ids(tokenizer), first_id(tokenizer)) == ([], boundary_id(tokenizer))
    assert [first_id(other) for other in (BYTES, TRAINED)] == [boundary_id(BYTES), boundary_id(TRAINED)]
    assert first_id(BERT) == BERT.cls_token_id


@pytest.mark.parametrize("legacy", [True, False])
def test_a_llamas_tokenizer_reads_after_special_tokens_as_it_did_however_often_it_is_saved(tmp_path, legacy) -> None:
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "▁a"])}
    model = models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    (tmp_path / "0").mkdir()
    Tokenizer(model).save(str(tmp_path / "0/tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": legacy}
    (tmp_path / "0/tokenizer_config.json").write_text(json.dumps(config))
    original = AutoTokenizer.from_pretrained(tmp_path / "0")
    assert original.tokenize("a</s>a")[-1] == ("▁a" if legacy else "a")
    for times in range(3):
        tokenizer = load_tokenizer(tmp_path / str(times))
        assert fingerprint(tokenizer) == fingerprint(original)
        tokenizer.save_pretrained(tmp_path / str(times + 1))
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path / "3")) == fingerprint(original)


def test_the_fingerprint_tells_tokenizers_apart() -> None:
    assert len({fingerprint(t) for t in (BYTES, TRAINED, train_bpe(TEXTS, 401))}) == 3
    assert fingerprint(load_tokenizer("bytes")) == fingerprint(BYTES)


def test_a_name_says_what_to_train_and_how_large() -> None:
    assert len(training_of("bpe-300")(TEXTS)) == len(training_of("bert-bpe-300")(TEXTS)) == 300
    assert training_of("bert-bpe-300")(TEXTS).mask_token == "[MASK]"
    assert training_of("bert-uncased-bpe-300")(TEXTS).tokenize("A") == ["Ġ", "a"]
    assert fingerprint(training_of("characters")(TEXTS)) == fingerprint(CHARACTERS)


@pytest.mark.parametrize("spec", ["bytes", "bpe-", "bpe-12x", "my/bpe-12", "my/characters"])
def test_any_other_name_is_of_a_tokenizer_that_is_ready(spec: str) -> None:
    assert training_of(spec) is None


def test_the_boundary_is_the_first_there_is_of_eos_bos_and_sep() -> None:
    tokenizer = byte_tokenizer()
    names = ("eos_token", "bos_token", "sep_token")
    for number, name in enumerate(names):
        setattr(tokenizer, name, f"<{number}>")
    tokenizer.add_tokens(["<0>", "<1>", "<2>"], special_tokens=True)
    for number, name in enumerate(names):
        assert boundary_id(tokenizer) == tokenizer.convert_tokens_to_ids(f"<{number}>")
        setattr(tokenizer, name, None)


def test_a_tokenizer_without_a_boundary_is_refused(tmp_path: Path) -> None:
    bare = byte_tokenizer()
    bare.eos_token = bare.bos_token = bare.pad_token = None
    bare.save_pretrained(tmp_path)
    message = "tokenizer must have an eos, bos or sep token to put between documents, but has none"
    for refuse in (lambda: boundary_id(bare), lambda: load_tokenizer(tmp_path)):
        with pytest.raises(ValueError, match=exactly(message)):
            refuse()


def test_an_encoder_decoders_tokenizer_ends_each_text_and_has_sentinels(tmp_path: Path) -> None:
    training_of("t5-bpe-400")(TEXTS).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 400
    ids = tokenizer("sea 水").input_ids
    assert ids[-1] == tokenizer.eos_token_id == boundary_id(tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "sea 水"
    assert tokenizer("a", "b").input_ids == tokenizer("a").input_ids + tokenizer("b").input_ids
    assert tokenizer.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(100)]) == list(range(2, 102))
    assert encode_documents(tokenizer, ["<extra_id_3></s>"])[0][0] > 101
    assert opening_ids(tokenizer) == []


def test_too_small_a_vocabulary_is_refused() -> None:
    message = "vocab_size must be at least 257 (the bytes and <|endoftext|>), but is 256"
    with pytest.raises(ValueError, match=exactly(message)):
        train_bpe(TEXTS, 256)
    message = "vocab_size must be at least 358 (the bytes and <pad>, </s>, <extra_id_0>, <extra_id_1> …), but is 300"
    with pytest.raises(ValueError, match=exactly(message)):
        train_t5_bpe(["a"], 300)
    message = "vocab_size must be at least 260 (the bytes and [PAD], [CLS], [SEP], [MASK]), but is 259"
    with pytest.raises(ValueError, match=exactly(message)):
        train_bert_bpe(TEXTS, 259)


@pytest.mark.parametrize("spec", ["nobody/nothing-of-the-kind", "bpe-many", "{empty}"])
def test_a_tokenizer_that_is_not_there_is_said_in_one_line(tmp_path: Path, spec: str) -> None:
    spec = spec.replace("{empty}", str(tmp_path))
    start = (
        f"tokenizer must be `bytes`, `characters`, `bpe-<size>`, `bert-bpe-<size>`, `bert-uncased-bpe-<size>`, "
        f"`t5-bpe-<size>`, a folder made by `lit-llm tokenizer` or a name on the hub, but is {spec!r}: "
    )
    with pytest.raises(FileNotFoundError) as caught:
        load_tokenizer(spec)
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"added_tokens": []}', '{"added_tokens": [], "model": {}}'])
def test_a_file_that_is_no_tokenizer_is_said_in_one_line(tmp_path: Path, content: str) -> None:
    BYTES.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(FileNotFoundError, match=r"\Atokenizer must be [^\n]+, but is [^\n]+\Z"):
        load_tokenizer(tmp_path)


def test_the_files_of_a_tokenizer_are_written_into_its_folder_whatever_their_names_say(tmp_path: Path) -> None:
    names = {"a.json": "1", "templates/b.jinja": "2", "../c.json": "3", "/d/e.json": "4"}
    write_tokenizer_files(names, tmp_path / "here")
    found = {"a.json": "1", "templates/b.jinja": "2", "c.json": "3", "d/e.json": "4"}
    assert tokenizer_files(tmp_path / "here") == found
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
