from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lit_llm.batch import IGNORE_INDEX
from lit_llm.callbacks.predictions import DocumentScores, ExamplePredictions
from lit_llm.data.instructions import InstructionData
from lit_llm.models.cnn import CNN
from lit_llm.models.llama import Llama
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.objectives.causal_lm import CausalLM
from lit_llm.objectives.classification import Classification
from lit_llm.objectives.objective import Objective
from lit_llm.objectives.regression import Regression
from tests.examples import BERT, Examples, Loaders, Submission, example, together
from tests.image_batches import Images
from tests.objectives.test_classification import trainer
from tests.writing import pairs

NETWORK = functools.partial(PretrainedClassifier, config=BERT)


def predicted(tmp_path: Path, made: Objective, data: LightningDataModule) -> list[dict[str, str]]:
    trainer(tmp_path, callbacks=[DocumentScores(), ExamplePredictions()]).predict(made, datamodule=data)
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seq_len", [40, 128])
def test_the_scores_of_conversations_add_up_to_the_splits_also_where_they_are_cut(tmp_path, packed, seq_len) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in pairs(60))
    (tmp_path / "x.jsonl").write_text(rows)
    fractions = {"validation_fraction": 0.0, "test_fraction": 0.3}
    cut = {"seq_len": seq_len, "batch_size": 2, "packed": packed, "overlong": "cut"}
    data = InstructionData(path=str(tmp_path / "x.jsonl"), tokenizer="bytes", **fractions, **cut)
    made = CausalLM(functools.partial(Llama, d_model=16, num_layers=1, num_heads=2, max_seq_len=128))
    table = predicted(tmp_path, made, data)
    (tester := trainer(tmp_path)).test(made, datamodule=data, verbose=False)
    assert data.examples("test").overlong.keys() == ({"cut"} if seq_len == 40 else set())
    sizes = [float(line["bytes"]) for line in table]
    bits = sum(size * float(line["bits_per_byte"]) for size, line in zip(sizes, table, strict=True))
    assert bits / sum(sizes) == pytest.approx(tester.callback_metrics["test/bits_per_byte"].item(), rel=1e-4)
    assert all("." not in line["bytes"] for line in table) == (seq_len == 128)
    found = [float(line["bits_per_byte"]) for line in table]
    assert found == sorted(found, reverse=True)
    for line, size in zip(table, sizes, strict=True):  # each byte of an answer is a token, as is the turn's end
        said = len(pairs(60)[int(line["document"].split("/")[-1])]["response"].encode())
        assert size == pytest.approx(int(line["tokens"]) * said / (said + 1), abs=0.005)


@pytest.mark.parametrize("labelled", [True, False])
@torch.no_grad()
def test_classes_with_their_probabilities_stand_beside_the_input(tmp_path: Path, labelled: bool) -> None:
    made = Classification(NETWORK)
    table = predicted(tmp_path, made, Examples(3, test_labels=labelled))
    probabilities = made.eval().logits(together([example(row, 3) for row in range(7)])).softmax(-1)
    assert [line["sentence"] for line in table] == [f"test {row}, said twice" for row in range(7)]
    names = ["class 0", "class 1", "class 2"]
    assert list(table[0]) == ["sentence", *["label"] * labelled, "predicted", *(f"p({name})" for name in names)]
    assert [line["predicted"] for line in table] == [names[p.argmax()] for p in probabilities]
    assert [line.get("label") for line in table] == [names[row % 3] if labelled else None for row in range(7)]
    found = [[float(line[f"p({name})"]) for name in names] for line in table]
    torch.testing.assert_close(torch.tensor(found), probabilities, atol=1e-6, rtol=0)


@torch.no_grad()
def test_values_stand_beside_the_input(tmp_path: Path) -> None:
    made = Regression(NETWORK)
    table = predicted(tmp_path, made, Examples(None))
    values = made.eval().values(together([example(row, None) for row in range(7)]))
    assert list(table[0]) == ["sentence", "label", "predicted"]
    torch.testing.assert_close(torch.tensor([float(line["predicted"]) for line in table]), values, atol=1e-6, rtol=0)
    assert [float(line["label"]) for line in table] == [row % 5 / 2 for row in range(7)]


def test_values_are_written_with_all_digits_that_tell_them_apart_and_no_others(tmp_path: Path) -> None:
    made, data, values = Regression(NETWORK), Examples(None), [12345681.0, 0.1, 1906.0, 2.5, 0.123456789, -3.0, 1e-9]
    for batch in (batches := list(data.predict_dataloader())):
        batch["labels"] = torch.tensor(values)[batch["rows"]]
    data.predict_dataloader = lambda: DataLoader(batches, batch_size=None)
    table = predicted(tmp_path, made, data)
    assert [line["label"] for line in table] == ["12345681.0", "0.1", "1906.0", "2.5", "0.12345679", "-3.0", "1e-09"]


@pytest.mark.parametrize("num_classes", [3, None])
def test_where_a_label_is_not_known_none_is_written(tmp_path: Path, num_classes: int | None) -> None:
    made, data = Regression(NETWORK) if num_classes is None else Classification(NETWORK), Examples(num_classes)
    for batch in (batches := list(data.predict_dataloader())):
        batch["labels"][batch["rows"] % 2 == 0] = float("nan") if num_classes is None else IGNORE_INDEX
    data.predict_dataloader = lambda: DataLoader(batches, batch_size=None)
    table = predicted(tmp_path, made, data)
    said = [f"class {row % 3}" if num_classes else str(row % 5 / 2) for row in range(7)]
    assert [line["label"] for line in table] == [said[row] if row % 2 else "" for row in range(7)]


def test_labels_of_which_none_is_known_stay_as_the_source_has_them(tmp_path: Path) -> None:
    data = Examples(3, test_labels=False)
    data.texts = lambda split, rows: [{"sentence": f"{row}", "label": f"unheard {row}"} for row in rows]
    table = predicted(tmp_path, Classification(NETWORK), data)
    assert list(table[0])[:3] == ["sentence", "label", "predicted"]
    assert [line["label"] for line in table] == [f"unheard {row}" for row in range(7)]


@pytest.mark.parametrize("split", ["test", "unlabelled test"])
@pytest.mark.parametrize("labels", ["index", "name", "value"])
def test_the_board_gets_its_file(tmp_path: Path, labels: str, split: str) -> None:
    data = Examples(None if labels == "value" else 3, test_labels=False)
    data.submission, data.predict_split = Submission("X-Y.tsv", labels), split
    made = Regression(NETWORK) if labels == "value" else Classification(NETWORK)
    table = predicted(tmp_path, made, data)
    lines = (tmp_path / "X-Y.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    said = [line.split("\t") for line in lines[1:]]
    assert [int(index) for index, _ in said] == list(range(7))
    for (_, prediction), line in zip(said, table, strict=True):
        if labels == "value":
            assert float(prediction) == pytest.approx(float(line["predicted"]), abs=5e-4)
        else:
            assert prediction == line["predicted"].removeprefix("class " if labels == "index" else "")


def test_the_board_gets_no_value_beyond_those_there_are(tmp_path: Path) -> None:
    data = Examples(None, test_labels=False)
    data.submission = Submission("STS-B.tsv", "value", (7.0, 8.0))
    predicted(tmp_path, Regression(NETWORK), data)
    assert {line.split("\t")[1] for line in (tmp_path / "STS-B.tsv").read_text().splitlines()[1:]} == {"7.000"}


def test_a_column_of_the_source_that_is_called_as_a_prediction_is_kept_by_another_name(tmp_path, caplog) -> None:
    data = Examples(3)
    caplog.set_level("INFO")
    data.texts = lambda split, rows: [{"predicted": f"mine {row}", "p(class 1)": row, "label": -1} for row in rows]
    table = predicted(tmp_path, Classification(NETWORK), data)
    kept = ["predicted (source)", "p(class 1) (source)"]
    assert list(table[0]) == [*kept, "label", "predicted", "p(class 0)", "p(class 1)", "p(class 2)"]
    assert [line["predicted (source)"] for line in table] == [f"mine {row}" for row in range(7)]
    said = f"Renamed columns of the source that clash with predictions: {', '.join(kept)}"
    assert said in caplog.messages


def test_a_column_called_label_that_is_none_is_kept(tmp_path: Path) -> None:
    data = Examples(3)
    data.columns = SimpleNamespace(label="truth")
    table = predicted(tmp_path, Classification(NETWORK), data)
    assert [line["label (source)"] for line in table] == ["-1"] * 7
    assert [line["label"] for line in table] == [f"class {row % 3}" for row in range(7)]


def test_a_validation_split_is_nothing_for_the_board(tmp_path: Path) -> None:
    data = Examples(3)
    data.submission, data.predict_split = Submission("X.tsv", "index"), "validation"
    predicted(tmp_path, Classification(NETWORK), data)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_several_processes_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ValueError, match=r"^trainer\.devices must be 1 to predict, but there are 2 processes$"):
        ExamplePredictions().on_predict_start(trainer(tmp_path), Classification(NETWORK))


class Nameless(nn.Module):
    """A network without class names."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.table = nn.Embedding(20, num_classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids).mean(dim=1)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("network", [NETWORK, Nameless])
@torch.no_grad()
def test_examples_of_data_without_texts_are_told_by_their_rows_and_classes_as_the_network_calls_them(
    tmp_path: Path, network, rows: bool
) -> None:
    made = Classification(network)
    table = predicted(tmp_path, made, Loaders(3, rows))
    probabilities = made.eval().logits(together([example(row, 3) for row in range(7)])).softmax(-1)
    names = ["0", "1", "2"] if network is Nameless else ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert list(table[0]) == ["row", "label", "predicted", *(f"p({name})" for name in names)]
    assert [line["row"] for line in table] == [str(row) for row in range(7)]
    assert [line["label"] for line in table] == [names[row % 3] for row in range(7)]
    assert [line["predicted"] for line in table] == [names[p.argmax()] for p in probabilities]


class Bare(Classification):
    """Returns only what is required for a batch."""

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        return {"probabilities": super().predict_step(batch, batch_idx)["probabilities"]}


def test_predictions_that_do_not_say_their_rows_are_numbered_as_they_come(tmp_path: Path) -> None:
    assert [line["row"] for line in predicted(tmp_path, Bare(NETWORK), Loaders(3, True))] == [str(n) for n in range(7)]


@pytest.mark.parametrize("rows", [True, False])
def test_values_of_data_without_texts_are_told_by_their_rows(tmp_path: Path, rows: bool) -> None:
    table = predicted(tmp_path, Regression(NETWORK), Loaders(None, rows))
    assert list(table[0]) == ["row", "label", "predicted"]
    assert [(line["row"], line["label"]) for line in table] == [(str(row), str(row % 5 / 2)) for row in range(7)]


def test_images_are_told_by_their_names(tmp_path: Path) -> None:
    table = predicted(tmp_path, Classification(CNN), Images())
    assert [line["image"] for line in table] == [f"test/{row}.png" for row in range(11)]
    assert list(table[0]) == ["image", "label", "predicted", *(f"p(digit {index})" for index in range(3))]
