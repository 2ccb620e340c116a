"""Fine-tuning methods are measured with equal budgets and compared."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from experiments import trainings
from experiments.finetuning_ways import run as finetuning
from lit_llm.checkpoints import save_model
from lit_llm.data.table_tokenizer import trained_tokenizer
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from tests.examples import BERT
from tests.writing import ENGLISH, places


@pytest.mark.slow
def test_ways_are_measured_by_the_command_line_and_only_once(lit_llm, reviews, tmp_path, monkeypatch):
    commands = []

    def inside(words, log, options):
        commands.append(words)
        outcome = lit_llm(*words)
        assert outcome.code == 0, outcome.err

    monkeypatch.setattr(trainings, "lit_llm", inside)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- finetuning_ways --><!-- /finetuning_ways -->")
    tokenizer = trained_tokenizer("bert-bpe-280", [" ".join(ENGLISH)] * 9)
    save_model(tmp_path / "start", PretrainedClassifier(2, config=BERT | {"vocab_size": 280}), tokenizer)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "start")) <= 280
    words = ["--model", str(tmp_path / "start"), "--data", str(reviews), "--sizes", "16,all", "--seeds", "0"]
    words += ["--examples_seen", "32", "--work", str(tmp_path / "work"), "--readme", str(readme)]
    words += ["--trainer.precision=32-true", "--data.max_seq_len=64"]
    finetuning.main(words)
    assert len(commands) == 2 * len(finetuning.WAYS)
    assert all("--trainer.precision=32-true" in command for command in commands)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.read_text().splitlines() if "|" in line]
    assert rows[0] == ["way", "learning rate", "trainable parameters"] + [
        f"{name}, {size}" for name in ("val/accuracy", "s") for size in (16, "all")
    ]
    assert [row[0] for row in rows[2:]] == list(finetuning.WAYS)
    full, head, gradual, decay, lora, dora = (int(row[2].replace(",", "")) for row in rows[2:])
    assert full == gradual == decay > dora > lora > head > 0
    assert all(0 <= float(score) <= 1 for row in rows[2:] for score in row[3:5])
    found = trainings.Measurements(tmp_path / "work/measurements.jsonl", {}).found
    assert {one["steps"] for one in found if one["size"] == 16} == {2}  # two passes of one batch
    assert len({one["steps"] for one in found if one["size"] is None}) == 1
    assert (tmp_path / "finetuning_ways.png").stat().st_size > 5000
    assert not list((tmp_path / "work").rglob("*.safetensors"))
    before = readme.read_text()
    finetuning.main(words)
    assert len(commands) == 2 * len(finetuning.WAYS)
    assert readme.read_text() == before


def test_a_table_of_ways_has_what_each_scores_and_costs(tmp_path):
    options, more = finetuning.parsed(["--model", "m", "--sizes", "100,1000,all", "--trainer.max_epochs", "3"])
    assert more == ["--trainer.max_epochs", "3"]
    assert [finetuning.epochs(size, options) for size in (100, 1000, 5000, None)] == [20, 2, 1, 1]
    one = {"metric": "val/accuracy", "parameters": 1234, "seconds": 10.0}
    found = [one | {"way": "LoRA", "size": 100, "seed": seed, "score": 0.6 + 0.1 * seed} for seed in (0, 1)]
    found += [one | {"way": "full", "size": None, "seed": 0, "score": 0.9, "seconds": 100.0}]
    lines = finetuning.table(found, options)
    assert lines[0].startswith("Passes: 20 over 100, 2 over 1,000, 1 over all examples, in batches of 16. Seeds 0, 1;")
    assert "| LoRA | 0.001 | 1,234 | 0.650 ± 0.071 |  |  | 10 ± 0 |  |  |" in lines
    assert "| full | 0.0001 | 1,234 |  |  | 0.900 |  |  | 100 |" in lines
    assert "| DoRA | 0.001 |  |  |  |  |  |  |  |" in lines
    finetuning.draw(tmp_path / "ways.png", found, options)
    assert (tmp_path / "ways.png").stat().st_size > 5000
    assert places("finetuning_ways", "finetuning_ways") == 1
