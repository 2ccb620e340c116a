"""The harness's scores are the network's own, on a task that is a file here."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from lit_llm.checkpoints import load_model, save_model
from lit_llm.cli.evaluate import adapted
from lit_llm.data.tokenizer import byte_tokenizer
from lit_llm.generation import generate
from tests.conftest import awake
from tests.examples import bytes_with_bos

lm_eval = pytest.importorskip("lm_eval")

ROWS = [("the cat", [" sat", " flew"], 0), ("a bird", [" swims", " flies"], 1), ("one red", [" mat", " of"], 0)]


@pytest.fixture
def model(tmp_path, tiny_llama):
    save_model(tmp_path / "model", tiny_llama(vocab_size=257), byte_tokenizer())
    return tmp_path / "model"


@pytest.fixture
def task(tmp_path):
    rows = [{"text": text, "choices": choices, "label": label} for text, choices, label in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "task.yaml"


def nats(network, context, continuation):
    row = torch.tensor([[*context, *continuation]])
    said = network(row[:, :-1]).log_softmax(dim=-1)[0, len(context) - 1 :]
    return said.gather(1, row[0, len(context) :, None]).sum().item()


def ids(text):
    return byte_tokenizer().encode(text, add_special_tokens=False)


@torch.no_grad()
def test_a_local_task_is_scored_by_the_networks_own_probabilities(lit_llm, model, task, tmp_path):
    outcome = lit_llm("evaluate", "--model", model, "--tasks", task, "--json", tmp_path / "new/scores.json")
    assert outcome.code == 0, outcome.err
    network, _ = load_model(model)
    right = sum(
        max(range(2), key=lambda n: nats(network, ids(text), ids(choices[n]))) == label for text, choices, label in ROWS
    )
    scores = json.loads((tmp_path / "new/scores.json").read_text())
    assert scores["tiny_choice"]["acc,none"] == pytest.approx(right / 3)
    assert "tiny_choice" in outcome.out


def test_a_tasks_file_may_include_another_and_name_functions_beside_it(lit_llm, model, task, tmp_path):
    (tmp_path / "beside.py").write_text("def text(row):\n    return row['text'].upper()\n")
    (tmp_path / "mine.yaml").write_text("include: task.yaml\ntask: mine\ndoc_to_text: !function beside.text\n")
    outcome = lit_llm("evaluate", "--model", model, "--tasks", tmp_path / "mine.yaml", "--limit", 2)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("mine ")
    (tmp_path / "mine.yaml").write_text("doc_to_text: !function beside.nothing\n")
    outcome = lit_llm("evaluate", "--model", model, "--tasks", tmp_path / "mine.yaml")
    assert f"--tasks must be YAML files of lm-eval, but {tmp_path / 'mine.yaml'} is none: " in outcome.last_line


@torch.no_grad()
def test_the_adapter_holds_the_network_itself_and_batches_do_not_matter():
    network = awake_network()
    requests = [(("", ""), list(b"the c"), list(b"at")), (("", ""), list(b"x"), list(b" bird flies"))]
    single = adapted(network, byte_tokenizer(), 1)._loglikelihood_tokens(requests)
    both = adapted(network, byte_tokenizer(), 2)._loglikelihood_tokens(requests)
    wanted = [nats(network, bytes(context), bytes(target)) for _, context, target in requests]
    assert [value for value, _ in single] == pytest.approx(wanted, rel=1e-5)
    assert [value for value, _ in both] == pytest.approx(wanted, rel=1e-5)


def test_there_are_logits_of_what_is_asked_and_of_nothing_else():
    network, rows = awake_network(), []
    network.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[:-1].numel()))
    requests = [(("", ""), list(b"the c"), list(b"at")), (("", ""), list(b"x"), list(b" bird flies"))]
    adapted(network, byte_tokenizer(), 2)._loglikelihood_tokens(requests)
    assert sum(rows) == len(b"at") + len(b" bird flies")


@torch.no_grad()
def test_texts_begin_with_the_bos_that_the_tokenizer_puts_there():
    tokenizer = bytes_with_bos()
    network = awake_network(vocab_size=len(tokenizer))
    model = adapted(network, tokenizer)
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
    whole = adapted(network, byte_tokenizer(), 8).generate_until([Request(text) for text in texts])
    for text, said in zip(texts, whole, strict=True):
        ids = [byte_tokenizer().eos_token_id, *byte_tokenizer().encode(text, add_special_tokens=False)]
        [alone] = generate(network, [ids], 24, temperature=0.0, stop=byte_tokenizer().eos_token_id)
        assert said == byte_tokenizer().decode(alone, skip_special_tokens=True)
    assert len(set(whole)) > 1
    steps.clear()
    stops = [said[2] for said in whole]
    cut = adapted(network, byte_tokenizer(), 8).generate_until([Request(text, until=stops) for text in texts])
    assert len(steps) <= 9
    for said, part in zip(whole, cut, strict=True):
        assert part == min((said.split(stop)[0] for stop in stops), key=len)


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
    monkeypatch.setattr("lit_llm.generation.steps", lambda network, prompts, *how, **more: asked.append(how) or [])

    class Request:
        args = ("the cat", options)

    adapted(awake_network(max_seq_len=512), byte_tokenizer()).generate_until([Request])
    assert asked == [(longest, *drawn)]


def test_the_same_question_asked_again_is_answered_anew_where_answers_are_drawn():
    class Request:
        args = ("the cat", {"max_gen_toks": 12, "do_sample": True})

    texts = adapted(awake_network(), byte_tokenizer(), 1).generate_until([Request] * 4)
    assert len(set(texts)) == 4
    assert adapted(awake_network(), byte_tokenizer(), 1).generate_until([Request] * 4) == texts


@torch.no_grad()
def test_a_long_text_is_read_in_windows_each_token_once():
    network = awake_network()
    model = adapted(network, byte_tokenizer(), 4)
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
    assert found < total  # the last window, filled up with what came before, adds to it
    assert found == pytest.approx(total * (len(ids) - 1) / (64 * ((len(ids) - 1) // 64)), rel=0.25)


def awake_network(vocab_size=257, **changes):
    from lit_llm.models.llama import Llama

    return awake(Llama, vocab_size=vocab_size, **changes)


@pytest.mark.parametrize(
    ("tasks", "line"),
    [
        ("nothing.yaml", "--tasks must be names or files, but nothing.yaml does not exist"),
        ("no_such_task", "--tasks must be tasks of lm-eval or YAML files, but no_such_task is neither"),
        (["{task}", "--limit", "0"], "--limit must be at least 1, but is 0"),
        (["{task}", "--device", "foo"], "--device must be one that torch finds here, but is foo"),
        (["{task}", "--json", "{task}/x.json"], "--json must be a file in a folder that can be written to, but is"),
    ],
)
def test_what_is_not_there_is_one_line(lit_llm, model, task, tasks, line):
    words = [word.format(task=task) for word in ([tasks] if isinstance(tasks, str) else tasks)]
    outcome = lit_llm("evaluate", "--model", model, "--tasks", *words)
    assert outcome.code == 2
    assert line in outcome.last_line
