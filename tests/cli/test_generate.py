from __future__ import annotations

import pytest

from lit_llm.checkpoints import save_model
from lit_llm.data.tokenizer import byte_tokenizer


@pytest.fixture
def model(tiny_llama, tmp_path):
    save_model(tmp_path / "model", tiny_llama(vocab_size=257), byte_tokenizer())
    return tmp_path / "model"


def test_the_same_seed_gives_the_same_text(lit_llm, model):
    first, again, other = (
        lit_llm("generate", "--model", model, "--prompt", "ab", "--seed", seed).out for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.startswith("ab")


def test_several_prompts_are_continued_as_each_alone(lit_llm, model):
    words = ["generate", "--model", model, "--temperature", "0", "--max_new_tokens", "9"]
    alone = [lit_llm(*words, "--prompt", prompt).out for prompt in ("a", "longer 好")]
    together = lit_llm(*words, "--prompt", "a", "--prompt", "longer 好").out
    assert together == f"--- 1\n{alone[0]}--- 2\n{alone[1]}"


def test_streaming_writes_the_same_text(lit_llm, model):
    words = ["generate", "--model", model, "--prompt", "é", "--temperature", "0", "--max_new_tokens", "20"]
    whole, streamed = lit_llm(*words).out, lit_llm(*words, "--stream").out
    assert streamed.rstrip("\n") == whole.rstrip("\n").rstrip("\ufffd") or streamed == whole


def test_by_default_it_writes_what_the_model_has_room_for(lit_llm, model):
    outcome = lit_llm("generate", "--model", model, "--prompt", "x" * 60)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature must be at least 0, but is -1.0"),
        (["--top_p", "0"], "top_p must be in (0, 1], but is 0.0"),
        (["--top_k", "0"], "top_k must be at least 1, but is 0"),
        (
            ["--max_new_tokens", "100"],
            "max_new_tokens must be at most 62, which is what the network's max_seq_len 64 leaves after a prompt of 2 "
            "tokens, but is 100",
        ),
        (["--stream", "--prompt", "y"], "--stream must be given with one prompt, but there are 2"),
    ],
)
def test_a_wrong_option_is_said_in_one_line(lit_llm, model, flags, message):
    outcome = lit_llm("generate", "--model", model, "--prompt", "x", *flags)
    assert outcome.code == 2
    assert outcome.last_line == f"lit-llm: error: {message}"
