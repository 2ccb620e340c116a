from __future__ import annotations

import csv
import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch

from lit_llm.callbacks import mistakes
from lit_llm.callbacks.mistakes import WorstMistakes, draw_images
from lit_llm.models.cnn import CNN
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.objectives.classification import Classification
from tests.examples import BERT, Examples, Loaders
from tests.image_batches import Images
from tests.objectives.test_classification import trainer

STILL = functools.partial(torch.optim.SGD, lr=0.0)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@torch.no_grad()
def expected(made: Classification, data: Images, split: str, count: int) -> list[tuple[str, str, str, float]]:
    batch = data.batch(split, list(range(11)))
    probabilities = made.eval().logits(batch).softmax(-1)
    found = []
    for row, (p, label) in enumerate(zip(probabilities, batch["labels"].tolist(), strict=True)):
        if p.argmax() != label:
            name = data.texts(split, [row])[0]["image"]
            found.append((name, data.label_name(label), data.label_name(int(p.argmax())), p[label].item()))
    return sorted(found, key=lambda line: line[-1])[:count]


@pytest.mark.parametrize("count", [3, 24])
def test_the_worst_of_a_split_are_told_and_shown_whatever_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    drawn: list[tuple[torch.Tensor, list[str], str]] = []
    monkeypatch.setattr(mistakes, "draw_images", lambda path, *what: drawn.append(what))
    data, made = Images(), Classification(functools.partial(CNN, dropout=0.0), STILL)
    run = trainer(tmp_path, max_steps=3, callbacks=[WorstMistakes(count)])
    run.fit(made, datamodule=data)
    for split in ("validation", "test"):
        if split == "test":
            run.test(made, datamodule=data, verbose=False)
        table, wanted = read(tmp_path / "mistakes.csv"), expected(made, data, split, count)
        assert len(table) == min(count, len(wanted)) > 0
        for line, (name, label, predicted, probability) in zip(table, wanted, strict=True):
            assert (line["image"], line["label"], line["predicted"]) == (name, label, predicted)
            assert float(line["p(label)"]) == pytest.approx(probability, abs=1e-5)
        images, says, title = drawn.pop(0)
        rows = [int(name.rpartition("/")[2][:-4]) for name, *_ in wanted]
        assert torch.equal(images, data.images(split, rows))
        assert says[0] == f"{wanted[0][1]} taken for\n{wanted[0][2]}, p {wanted[0][3]:.3f}"
        assert title == f"worst mistakes, {'test split' if split == 'test' else 'validation split, step 3'}"
    assert not drawn


def test_texts_have_a_table_and_no_picture(tmp_path: Path) -> None:
    made = Classification(functools.partial(PretrainedClassifier, config=BERT), STILL)
    trainer(tmp_path, max_steps=3, callbacks=[WorstMistakes(2)]).fit(made, datamodule=Examples(3))
    table = read(tmp_path / "mistakes.csv")
    assert list(table[0]) == ["sentence", "label", "predicted", "p(label)"]
    assert table[0]["sentence"].startswith("validation 1")
    assert not (tmp_path / "mistakes.png").exists()


@pytest.mark.parametrize("rows", [True, False])
def test_a_run_of_data_without_texts_comes_to_its_end_and_tells_mistakes_by_their_rows(tmp_path: Path, rows) -> None:
    made = Classification(functools.partial(PretrainedClassifier, config=BERT), STILL)
    trainer(tmp_path, max_steps=3, callbacks=[WorstMistakes(2)]).fit(made, datamodule=Loaders(3, rows))
    assert (tmp_path / "mistakes.csv").exists() == rows
    if rows:
        table = read(tmp_path / "mistakes.csv")
        assert list(table[0]) == ["row", "label", "predicted", "p(label)"]
        for line in table:
            assert 100 <= int(line["row"]) < 111
            assert line["label"] == f"LABEL_{int(line['row']) % 3}" != line["predicted"]


def test_where_nothing_is_mistaken_an_older_picture_goes(tmp_path: Path) -> None:
    callback, module = WorstMistakes(), Gathering(CNN)
    (tmp_path / "mistakes.png").touch()
    callback.add(module, said([0, 1], [0, 1], [0.1, 0.2]), {"rows": torch.arange(2)})
    found = callback.collect(module)
    assert found == []
    callback.show(tmp_path, Images(), found, "test", "test split")
    assert not (tmp_path / "mistakes.png").exists()
    assert read(tmp_path / "mistakes.csv") == []


def said(labels: list[int], predicted: list[int], nats: list[float]) -> dict[str, torch.Tensor]:
    return {"labels": torch.tensor(labels), "predicted": torch.tensor(predicted), "nats": torch.tensor(nats)}


class Gathering(Classification):
    """Simulates a run of one process, or of two if `others` has the tensor that the second one gathers."""

    others: torch.Tensor | None = None

    @property
    def trainer(self) -> Any:
        return SimpleNamespace(global_rank=0, world_size=1 if self.others is None else 2)

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        return torch.stack([mine, self.others.to(mine)])


def test_no_more_are_kept_than_are_shown_and_those_of_all_processes_are_compared() -> None:
    callback, module = WorstMistakes(2), Gathering(CNN)
    for row in range(5):
        callback.add(module, said([0], [row % 2], [float(row)]), {"rows": torch.tensor([row])})
        assert len(callback._nats) <= 2
    module.others = torch.tensor([[2.0, 7, 1, 0], [-math.inf] * 4])
    found = callback.collect(module)
    assert [row for row, *_ in found] == [3, 7]
    assert [p for *_, p in found] == pytest.approx([math.exp(-3), math.exp(-2)])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 11])
def test_images_are_drawn_side_by_side(tmp_path: Path, channels: int, count: int) -> None:
    images = torch.randint(255, (count, channels, 8, 8), dtype=torch.uint8)
    draw_images(tmp_path / "x.png", images, ["a taken for\nb"] * count, "worst mistakes")
    height, width, _ = matplotlib.image.imread(tmp_path / "x.png").shape
    assert (height, width) > (100, 300) if count == 1 else height > 300


def test_dollars_in_the_caption_of_an_image_are_not_read_as_a_formula(tmp_path: Path) -> None:
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    draw_images(tmp_path / "x.png", images, ["$x_{$ taken for\nb"], "worst mistakes")
    assert (tmp_path / "x.png").exists()
