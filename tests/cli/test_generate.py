from __future__ import annotations

import io
import os
import sys

import pytest
import torch
from transformers import AutoTokenizer

from lit_llm import generation
from lit_llm.checkpoints import save_model
from lit_llm.data.chat import CHAT_TEMPLATE, encode_conversation, prompt_ids, with_template
from lit_llm.data.tokenizer import byte_tokenizer
from lit_llm.models.llama import Llama
from tests.examples import bytes_with_bos
from tests.writing import REPOSITORY


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


def test_a_prompt_is_what_the_tokenizer_makes_of_it_where_it_puts_a_bos_first(lit_llm, tiny_llama, tmp_path):
    tokenizer = bytes_with_bos()
    network = tiny_llama(vocab_size=258)
    save_model(tmp_path / "model", network, tokenizer)
    said = lit_llm("generate", "--model", tmp_path / "model", "--prompt", "ab", "--temperature", "0").out
    ids = tokenizer("ab").input_ids
    [new] = generation.generate(network, [ids], 61, temperature=0.0, stop=tokenizer.eos_token_id)
    assert said == tokenizer.decode(ids[1:] + new) + "\n"


def test_several_prompts_are_continued_as_each_alone(lit_llm, model):
    words = ["generate", "--model", model, "--temperature", "0", "--max_new_tokens", "9"]
    alone = [lit_llm(*words, "--prompt", prompt).out for prompt in ("a", "longer 好")]
    together = lit_llm(*words, "--prompt", "a", "--prompt", "longer 好").out
    assert together == f"--- 1\n{alone[0]}--- 2\n{alone[1]}"


def test_streaming_writes_the_same_text(lit_llm, model):
    words = ["generate", "--model", model, "--prompt", "é", "--temperature", "0", "--max_new_tokens", "20"]
    assert lit_llm(*words, "--stream").out == lit_llm(*words).out


def test_a_character_that_is_never_finished_is_written_too(lit_llm, model, monkeypatch):
    tokens = byte_tokenizer().encode("b😀")[:-1]
    monkeypatch.setattr("lit_llm.generation.stream_tokens", lambda *options: ([token] for token in tokens))
    words = ["generate", "--model", model, "--prompt", "a"]
    assert lit_llm(*words, "--stream").out == lit_llm(*words).out == "ab\ufffd\n"


def piped(monkeypatch, text: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))


def test_a_text_that_is_piped_is_the_prompt_without_its_last_line_end(lit_llm, model, monkeypatch):
    words = ["generate", "--model", model, "--temperature", "0", "--max_new_tokens", "9"]
    expected = lit_llm(*words, "--prompt", "a\né\n").out
    piped(monkeypatch, "a\né\n\n".encode())
    assert lit_llm(*words).out == expected
    piped(monkeypatch, b"not read\n")
    assert lit_llm(*words, "--prompt", "a\né\n").out == expected


@pytest.mark.parametrize("more", [["--prompt", "a"], ["--chat"]])
def test_a_program_that_reads_its_input_line_by_line_can_generate_in_between(lit_llm, chatty, monkeypatch, more):
    piped(monkeypatch, b"one\ntwo\n")
    assert sys.stdin.readline() == "one\n"
    outcome = lit_llm("generate", "--model", chatty, "--max_new_tokens", "4", *more)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("words", [[], ["--chat"]])
def test_a_text_that_is_piped_and_not_utf_8_is_said_in_one_line(lit_llm, chatty, monkeypatch, words):
    piped(monkeypatch, b"x\xff\n")
    outcome = lit_llm("generate", "--model", chatty, "--max_new_tokens", "4", *words)
    assert outcome.err.splitlines()[-1].endswith("must be UTF-8 text, but is 'x\\udcff'")


def test_a_text_ends_before_a_stop_streamed_or_not(lit_llm, model):
    words = ["generate", "--model", model, "--temperature", "0", "--max_new_tokens", "20"]
    both = ["--prompt", "a", "--prompt", "b c"]
    whole = lit_llm(*words, "--prompt", "a").out
    stop = whole[5:7]
    cut = whole[: whole.index(stop, 1)] + "\n"
    for more in ([], ["--stream"]):
        assert lit_llm(*words, "--prompt", "a", "--stop", "not there", "--stop", stop, *more).out == cut
    assert f"--- 1\n{cut}--- 2\n" in lit_llm(*words, *both, "--stop", stop).out


@pytest.mark.parametrize(("stop", "rule"), [("", "a text, but is empty"), ("\udcff", r"UTF-8 text, but is '\udcff'")])
def test_a_stop_that_no_text_holds_is_refused(lit_llm, model, stop, rule):
    outcome = lit_llm("generate", "--model", model, "--prompt", "x", "--stop", stop)
    assert outcome.last_line == f"lit-llm: error: --stop must be {rule}"


def test_by_default_it_writes_what_the_model_has_room_for(lit_llm, model):
    outcome = lit_llm("generate", "--model", model, "--prompt", "x" * 60)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature must be finite and at least 0, but is -1.0"),
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


def test_a_prompt_that_is_not_utf_8_is_said_in_one_line(lit_llm, model):
    prompt = os.fsdecode(b"x\xff")  # as the command line passes it on
    for words in (["--prompt", "y", "--prompt", prompt], ["--prompt", prompt, "--stream"]):
        outcome = lit_llm("generate", "--model", model, *words)
        assert outcome.code == 2
        assert outcome.err == "lit-llm: error: prompt must be UTF-8 text, but is 'x\\udcff'\n"


# Chat.

WORDS = ["--temperature", "0", "--max_new_tokens", "12"]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model that has memorised four conversations."""
    torch.manual_seed(0)
    tokenizer = with_template(byte_tokenizer())
    network = Llama(vocab_size=257, d_model=32, num_layers=2, num_heads=4, d_ff=48, max_seq_len=128)
    talks = [question("1", "one"), question("2", "two"), [*question("1", "one"), *question("2", "two")]]
    talks.append([{"role": "system", "content": "x"}, *question("1", "uno")])
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(150):
        losses = []
        for talk in talks:
            ids, learnt = encode_conversation(tokenizer, talk)
            ids, learnt = torch.tensor(ids), torch.from_numpy(learnt)
            logits = network(ids[None, :-1])[0]
            losses.append(torch.nn.functional.cross_entropy(logits[learnt[1:]], ids[1:][learnt[1:]]))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            break
    folder = tmp_path_factory.mktemp("chatty") / "model"
    save_model(folder, network, tokenizer)
    return folder


def question(said: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]


def test_chat_prints_the_reply_alone_and_ends_with_the_turn(lit_llm, chatty):
    words = ["generate", "--model", chatty, "--chat", *WORDS]
    assert lit_llm(*words, "--prompt", "1").out == "one\n"
    assert lit_llm(*words, "--prompt", "1", "--stream").out == "one\n"
    assert lit_llm(*words, "--prompt", "1", "--prompt", "2").out == "--- 1\none\n--- 2\ntwo\n"
    assert lit_llm(*words, "--prompt", "1", "--system", "x").out == "uno\n"


def test_without_a_prompt_lines_are_answered_until_the_input_ends(lit_llm, chatty, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n\n2\n"))
    heard = []
    monkeypatch.setattr("lit_llm.data.chat.prompt_ids", lambda t, m: heard.append(list(m)) or prompt_ids(t, m))
    outcome = lit_llm("generate", "--model", chatty, "--chat", *WORDS)
    assert outcome.code == 0, outcome.err
    assert outcome.out == "one\ntwo\n"
    assert heard[1:] == [question("1", "")[:1], [*question("1", "one"), *question("2", "")[:1]]]


def test_a_reply_ends_before_a_stop_and_is_remembered_so(lit_llm, chatty, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n2\n"))
    heard = []
    monkeypatch.setattr("lit_llm.data.chat.prompt_ids", lambda t, m: heard.append(list(m)) or prompt_ids(t, m))
    outcome = lit_llm("generate", "--model", chatty, "--chat", *WORDS, "--stop", "e")
    assert outcome.out.startswith("on\n")
    assert heard[2][:2] == question("1", "on")


def test_a_conversation_that_outgrows_the_model_forgets_its_beginning(lit_llm, chatty, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n2\n" * 8))
    outcome = lit_llm("generate", "--model", chatty, "--chat", "--system", "x", *WORDS)
    assert outcome.code == 0, outcome.err
    assert len(outcome.out.splitlines()) == 16
    assert outcome.err.count("forgotten") > 8


@pytest.mark.parametrize(
    ("refused", "line"),
    [
        ("1" * 200, "prompt must be at most 127 tokens, which the network's max_seq_len"),
        ("1" * 100, "max_new_tokens must be at most 11, which is what the network's max_seq_len"),
        ("<|endoftext|>", "prompt must spell no special token, but holds <|endoftext|>"),
    ],
)
def test_a_message_that_cannot_be_answered_is_refused_and_the_conversation_goes_on(
    lit_llm, chatty, monkeypatch, refused, line
):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"1\n{refused}\n2\n"))
    heard = []
    monkeypatch.setattr("lit_llm.data.chat.prompt_ids", lambda t, m: heard.append(list(m)) or prompt_ids(t, m))
    outcome = lit_llm("generate", "--model", chatty, "--chat", *WORDS)
    assert outcome.code == 0, outcome.err
    assert outcome.out == "one\ntwo\n"
    assert heard[-1] == [*question("1", "one"), *question("2", "")[:1]]
    assert outcome.err.startswith(line)
    assert "forgotten" not in outcome.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature must be finite and at least 0, but is -1.0"),
        (["--max_new_tokens", "128"], "max_new_tokens must be at most 110, which is"),
        (["--system", "<|endoftext|>"], "prompt must spell no special token, but holds <|endoftext|>"),
    ],
)
def test_what_no_message_could_be_answered_with_is_refused_before_any_is_read(
    lit_llm, chatty, monkeypatch, flags, message
):
    monkeypatch.setattr("builtins.input", lambda *cue: pytest.fail("asked for a message"))
    outcome = lit_llm("generate", "--model", chatty, "--chat", *flags)
    assert outcome.code == 2
    assert outcome.err.startswith(f"lit-llm: error: {message}")


def test_a_run_folder_and_a_checkpoint_can_be_talked_to(lit_llm, chats, tmp_path):
    small = ["--model.weights", "null", "--model.network", REPOSITORY / "configs/models/llama_3m.yaml"]
    small += ["--model.network.d_model", "16", "--model.network.num_layers", "1", "--model.network.num_heads", "2"]
    small += ["--data.path", chats, "--data.tokenizer", "bytes", "--data.batch_size", "4", "--trainer.max_steps", "2"]
    config = REPOSITORY / "configs/finetuning/llama_instructions.yaml"
    assert lit_llm("fit", "--config", config, *small, "--run_dir", tmp_path / "run").code == 0
    outs = [
        lit_llm("generate", "--model", tmp_path / "run" / part, "--chat", "--prompt", "hi", "--seed", "1")
        for part in ("", "model", "checkpoints/best.ckpt")
    ]
    assert outs[0].code == 0, outs[0].err
    assert outs[0].out == outs[1].out == outs[2].out
    assert AutoTokenizer.from_pretrained(tmp_path / "run/model").chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--chat", "--prompt", "x"],
            "model must have a chat template for --chat, but {model} has none; tune it on conversations, as "
            "configs/finetuning/llama_instructions.yaml does, or leave --chat out",
        ),
        (["--prompt", "x", "--system", "y"], "--system must be given with --chat, but is given without"),
        (
            [],
            "--prompt, --chat or a text on the standard input must be given, but none is; see lit-llm generate --help",
        ),
    ],
)
def test_what_is_missing_to_chat_is_said_in_one_line(lit_llm, model, monkeypatch, words, message):
    piped(monkeypatch, b"")
    outcome = lit_llm("generate", "--model", model, *words)
    assert outcome.code == 2
    assert outcome.err.strip() == f"lit-llm: error: {message.format(model=model)}"
