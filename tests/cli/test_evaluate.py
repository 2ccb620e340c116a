"""The harness's scores equal those computed from the network, on a task that is a local file."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

from lit_llm.checkpoints import load_model, save_model
from lit_llm.data.tokenizer import byte_tokenizer
from lit_llm.harness import LiveModel
from tests.test_harness import nats

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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("foo: 1", "ValueError: Unknown config shape: keys=['foo']"),
        ("include: task.yaml\ndoc_to_text: '{{{{nope}}}}'", "UndefinedError: 'nope' is undefined"),
        (
            "include: task.yaml\ndataset_kwargs: {{data_files: {{test: {folder}/none.jsonl}}}}",
            "FileNotFoundError: Unable to find '{folder}/none.jsonl'",
        ),
        ("include: task.yaml\ntest_split: dev", "KeyError: 'dev'"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_one_line(lit_llm, model, task, tmp_path, content, reason):
    (tmp_path / "mine.yaml").write_text(content.format(folder=tmp_path))
    outcome = lit_llm("evaluate", "--model", model, "--tasks", task, tmp_path / "mine.yaml")
    assert outcome.code == 2
    line = f"--tasks must be tasks that lm-eval can read, but {tmp_path}/mine.yaml is none: "
    assert outcome.last_line == f"lit-llm: error: {line}{reason.format(folder=tmp_path)}"


def test_what_the_network_raises_is_not_put_down_to_the_task(lit_llm, model, task, monkeypatch):
    monkeypatch.setattr(LiveModel, "_loglikelihood_tokens", lambda *args, **options: {}["defect"])
    with pytest.raises(KeyError, match="defect"):
        lit_llm("evaluate", "--model", model, "--tasks", task)


@pytest.mark.parametrize(
    ("tasks", "line"),
    [
        ("nothing.yaml", "--tasks must be names or files, but nothing.yaml does not exist"),
        ("no_such_task", "--tasks must be tasks of lm-eval or YAML files, but no_such_task is neither"),
        (["{task}", "--limit", "0"], "--limit must be at least 1, but is 0"),
        (["{task}", "--num_fewshot", "-1"], "--num_fewshot must be at least 0, but is -1"),
        (["{task}", "--device", "foo"], "--device must be one that torch finds here, but is foo"),
        (["{task}", "--json", "{task}/x.json"], "--json must be a file in a folder that can be written to, but is"),
    ],
)
def test_what_is_not_there_is_one_line(lit_llm, model, task, tasks, line):
    words = [word.format(task=task) for word in ([tasks] if isinstance(tasks, str) else tasks)]
    outcome = lit_llm("evaluate", "--model", model, "--tasks", *words)
    assert outcome.code == 2
    assert line in outcome.last_line
