from __future__ import annotations

from transformers import AutoTokenizer


def test_a_trained_tokeniser_opens_in_transformers_and_holds_any_text(lit_llm, texts, tmp_path):
    outcome = lit_llm("tokenizer", "--path", texts, "--vocab_size", "300", "--out", tmp_path / "made")
    assert outcome.code == 0, outcome.err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer.encode("the cat, 猫 坐 🐈")) == "the cat, 猫 坐 🐈"
    assert "300 tokens from 80 documents" in outcome.out


def test_a_kind_for_an_encoder_has_its_marks(lit_llm, texts, tmp_path):
    words = ["--kind", "bert-uncased-bpe", "--vocab_size", "300", "--out", tmp_path / "made"]
    outcome = lit_llm("tokenizer", "--path", texts, *words)
    assert outcome.code == 0, outcome.err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert (len(tokenizer), tokenizer.mask_token) == (300, "[MASK]")
    assert tokenizer.tokenize("THE") == tokenizer.tokenize("the")


def test_a_folder_that_exists_is_not_overwritten(lit_llm, texts, tmp_path):
    outcome = lit_llm("tokenizer", "--path", texts, "--out", tmp_path)
    assert outcome.code == 2
    assert outcome.last_line == f"lit-llm: error: --out must be a new folder, but {tmp_path} exists"


def test_no_room_for_the_bytes_is_said(lit_llm, texts, tmp_path):
    outcome = lit_llm("tokenizer", "--path", texts, "--vocab_size", "100", "--out", tmp_path / "made")
    assert outcome.last_line == (
        "lit-llm: error: vocab_size must be at least 257 (the bytes and <|endoftext|>), but is 100"
    )
    assert not (tmp_path / "made").exists()


def test_a_folder_may_be_below_the_home_folder(lit_llm, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    outcome = lit_llm("tokenizer", "--path", texts, "--vocab_size", "300", "--out=~/made")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "made" / "tokenizer.json").is_file()
