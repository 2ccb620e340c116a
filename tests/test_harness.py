"""The harness's scores of a network, compared with those of the network itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lm_eval")

from lit_llm.data.tokenizer import byte_tokenizer
from lit_llm.generation import generate
from lit_llm.harness import LiveModel
from lit_llm.models.llama import Llama
from tests.conftest import awake
from tests.examples import bytes_with_bos


def awake_network(vocab_size=257, **changes):
    return awake(Llama, vocab_size=vocab_size, **changes)


def nats(network, context, continuation):
    row = torch.tensor([[*context, *continuation]])
    said = network(row[:, :-1]).log_softmax(dim=-1)[0, len(context) - 1 :]
    return said.gather(1, row[0, len(context) :, None]).sum().item()


@torch.no_grad()
def test_it_holds_the_network_itself_and_batches_do_not_matter():
    network = awake_network()
    requests = [(("", ""), list(b"the c"), list(b"at")), (("", ""), list(b"x"), list(b" bird flies"))]
    single = LiveModel(network, byte_tokenizer(), 1)._loglikelihood_tokens(requests)
    both = LiveModel(network, byte_tokenizer(), 2)._loglikelihood_tokens(requests)
    wanted = [nats(network, bytes(context), bytes(target)) for _, context, target in requests]
    assert [value for value, _ in single] == pytest.approx(wanted, rel=1e-5)
    assert [value for value, _ in both] == pytest.approx(wanted, rel=1e-5)


def test_there_are_logits_of_what_is_asked_and_of_nothing_else():
    network, rows = awake_network(), []
    network.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[:-1].numel()))
    requests = [(("", ""), list(b"the c"), list(b"at")), (("", ""), list(b"x"), list(b" bird flies"))]
    LiveModel(network, byte_tokenizer(), 2)._loglikelihood_tokens(requests)
    assert sum(rows) == len(b"at") + len(b" bird flies")


@torch.no_grad()
def test_texts_begin_with_the_bos_that_the_tokenizer_puts_there():
    tokenizer = bytes_with_bos()
    network = awake_network(vocab_size=len(tokenizer))
    model = LiveModel(network, tokenizer)
    assert model.tok_encode("ab") == model.tok_encode("<s>ab") == tokenizer("ab").input_ids

    class Request:
        def __init__(self, *args):
            self.args = args

    context, whole = tokenizer("the cat").input_ids, tokenizer("the cat sat").input_ids
    [(pair, _), (start, _)] = model.loglikelihood([Request("the cat", " sat"), Request("", " sat")], disable_tqdm=True)
    assert pair == pytest.approx(nats(network, context, whole[len(context) :]), rel=1e-5)
    assert start == pytest.approx(nats(network, context[:1], whole[len(context) :]), rel=1e-5)
    [rolled] = model.loglikelihood_rolling([Request("the cat")])
    assert rolled == pytest.approx(nats(network, context[:1], context[1:]), rel=1e-5)
    [said] = model.generate_until([Request("the cat", {"max_gen_toks": 9})])
    [new] = generate(network, [context], 9, temperature=0.0, stop=tokenizer.eos_token_id)
    assert said == tokenizer.decode(new, skip_special_tokens=True)


def test_texts_are_written_together_as_they_are_alone_and_no_further_than_a_stop():
    network, steps = awake_network(), []
    network.embed_tokens.register_forward_hook(lambda *args: steps.append(1))

    class Request:
        def __init__(self, text, **options):
            self.args = (text, {"max_gen_toks": 24, **options})

    texts = ["the cat", "a", "one red bird that sat"]
    whole = LiveModel(network, byte_tokenizer(), 8).generate_until([Request(text) for text in texts])
    for text, said in zip(texts, whole, strict=True):
        ids = [byte_tokenizer().eos_token_id, *byte_tokenizer().encode(text, add_special_tokens=False)]
        [alone] = generate(network, [ids], 24, temperature=0.0, stop=byte_tokenizer().eos_token_id)
        assert said == byte_tokenizer().decode(alone, skip_special_tokens=True)
    assert len(set(whole)) > 1
    steps.clear()
    stops = [said[2] for said in whole]
    cut = LiveModel(network, byte_tokenizer(), 8).generate_until([Request(text, until=stops) for text in texts])
    assert len(steps) <= 9
    for said, part in zip(whole, cut, strict=True):
        assert part == min((said.split(stop)[0] for stop in stops), key=len)


@pytest.mark.parametrize(
    ("stop", "answer"), [("<|end|>", "4é2\n"), ("\n<|end|>", "4é2"), ("2", "4é"), ("no", "4é2\nyou")]
)
def test_an_answer_ends_before_a_stop_that_is_a_special_token_and_has_none_itself(monkeypatch, stop, answer):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mark|>", "<|end|>"]})
    mark, end = tokenizer.convert_tokens_to_ids(["<|mark|>", "<|end|>"])
    made = [mark, *tokenizer.encode("4é"), mark, *tokenizer.encode("2\n"), end, *tokenizer.encode("you")]
    monkeypatch.setattr("lit_llm.harness.stream_tokens", lambda *args, **more: ([token] for token in made))

    class Request:
        args = ("6*7=", {"until": [stop]})

    assert LiveModel(awake_network(), tokenizer).generate_until([Request]) == [answer]


@pytest.mark.parametrize(
    ("options", "longest", "drawn"),
    [
        ({"until": ["Question:"], "do_sample": False, "temperature": 0.0}, 256, (0.0, None, None)),
        ({"max_gen_toks": 9, "until": "\n"}, 9, (0.0, None, None)),
        ({"max_new_tokens": 300, "temperature": 0.7, "top_p": 0.9}, 300, (0.7, None, 0.9)),
        ({"max_tokens": 5, "do_sample": True, "top_k": 3}, 5, (1.0, 3, None)),
    ],
)
def test_a_tasks_options_mean_what_they_mean_to_the_harness(monkeypatch, options, longest, drawn):
    asked = []
    monkeypatch.setattr("lit_llm.harness.stream_tokens", lambda network, prompts, *how, **more: asked.append(how) or [])

    class Request:
        args = ("the cat", options)

    LiveModel(awake_network(max_seq_len=512), byte_tokenizer()).generate_until([Request])
    assert asked == [(longest, *drawn)]


def test_the_same_question_asked_again_is_answered_anew_where_answers_are_drawn():
    class Request:
        args = ("the cat", {"max_gen_toks": 12, "do_sample": True})

    texts = LiveModel(awake_network(), byte_tokenizer(), 1).generate_until([Request] * 4)
    assert len(set(texts)) == 4
    assert LiveModel(awake_network(), byte_tokenizer(), 1).generate_until([Request] * 4) == texts


@torch.no_grad()
def test_a_long_text_is_read_in_windows_each_token_once():
    network = awake_network()
    model = LiveModel(network, byte_tokenizer(), 4)
    text = "the cat sat on the mat and saw one red bird fly over. " * 3

    class Request:
        args = (text,)

    found = model.loglikelihood_rolling([Request])[0]
    ids = [model.eot_token_id, *model.tok_encode(text)]
    total = 0.0
    for first in range(0, len(ids) - 1, 64):
        row = torch.tensor([ids[first : first + 65]])
        if row.shape[1] == 65:
            said = network(row[:, :-1]).log_softmax(dim=-1)[0]
            total += said.gather(1, row[0, 1:, None]).sum().item()
    assert found < total  # the last window, padded with preceding tokens, adds to it
    assert found == pytest.approx(total * (len(ids) - 1) / (64 * ((len(ids) - 1) // 64)), rel=0.25)
