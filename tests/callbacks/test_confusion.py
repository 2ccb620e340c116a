from __future__ import annotations

import csv
import functools
import warnings
from pathlib import Path

import matplotlib.image
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn import metrics

from lit_llm.callbacks import confusion
from lit_llm.callbacks.confusion import ConfusionMatrix, draw_confusion_matrix, of_classes
from lit_llm.callbacks.run_report import RunReport
from lit_llm.cli.quiet import quieten
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.objectives.classification import Classification
from lit_llm.objectives.regression import Regression
from tests.examples import BERT, Examples, Loaders, example, together
from tests.objectives.test_classification import trainer

NETWORK = functools.partial(PretrainedClassifier, config=BERT)


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[list[list[int]], list[str], str]]:
    """Records the arguments of `draw_confusion_matrix` instead of drawing."""
    found = []
    monkeypatch.setattr(
        confusion,
        "draw_confusion_matrix",
        lambda path, counts, names, title: found.append((counts.tolist(), names, title)),
    )
    return found


def test_every_example_of_a_split_is_counted_once(tmp_path: Path, drawn: list) -> None:
    made, data = Classification(NETWORK), Examples(3)
    run = trainer(tmp_path, max_steps=3, val_check_interval=1, callbacks=[ConfusionMatrix()])
    run.fit(made, datamodule=data)
    run.test(made, datamodule=data, verbose=False)
    run.validate(made, datamodule=data, verbose=False)
    assert [title for *_, title in drawn] == ["validation split, step 3", "test split", "validation split"]
    assert {tuple(names) for _, names, _ in drawn} == {("class 0", "class 1", "class 2")}
    for (counts, _, _), rows in zip(drawn, (range(100, 111), range(200, 207), range(100, 111)), strict=True):
        whole = together([example(row, 3) for row in rows])
        with torch.no_grad():
            predicted = made.eval().logits(whole).argmax(-1)
        assert counts == metrics.confusion_matrix(whole["labels"], predicted, labels=range(3)).tolist()


def test_of_a_fit_the_best_validation_is_drawn(tmp_path: Path, drawn: list) -> None:
    rate = functools.partial(torch.optim.SGD, lr=0.0)  # the weights do not change, so the first validation is best
    report = RunReport("val/accuracy", "max")
    report.on_fit_end = lambda *args: None
    made = Classification(NETWORK, rate)
    run = trainer(tmp_path, max_steps=3, val_check_interval=1, callbacks=[report, ConfusionMatrix()])
    run.fit(made, datamodule=Examples(3))
    assert [title for *_, title in drawn] == ["validation split, step 1"]


def test_classes_of_data_without_names_are_called_as_the_network_calls_them(tmp_path: Path, drawn: list) -> None:
    run = trainer(tmp_path, max_steps=3, callbacks=[ConfusionMatrix()])
    run.fit(Classification(NETWORK), datamodule=Loaders(3, True))
    assert [names for _, names, _ in drawn] == [["LABEL_0", "LABEL_1", "LABEL_2"]]


def test_values_have_no_confusion(tmp_path: Path, drawn: list) -> None:
    run = trainer(tmp_path, max_steps=1, callbacks=[ConfusionMatrix()])
    run.fit(Regression(NETWORK), datamodule=Examples(None))
    assert not drawn


def test_the_picture_is_shaded_by_shares_of_the_true_class(tmp_path: Path, monkeypatch) -> None:
    shades, written = [], []
    shown = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, x, **options: shades.append(x) or shown(self, x, **options))
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **options: written.append(text))
    draw_confusion_matrix(tmp_path / "x.png", torch.tensor([[3, 1], [0, 0]]), ["no", "yes"], "test split")
    assert shades[0].tolist() == [[0.75, 0.25], [0.0, 0.0]]
    assert written == ["3", "1", "0", "0"]
    assert matplotlib.image.imread(tmp_path / "x.png").ndim == 3


def test_many_classes_are_drawn_without_words(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Axes, "text", lambda *args, **options: pytest.fail("no room for counts"))
    draw_confusion_matrix(tmp_path / "x.png", torch.eye(100, dtype=torch.long), [""] * 100, "test split")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_of_each_class_there_is_what_scikit_learn_says(tmp_path: Path) -> None:
    truth, predicted = torch.randint(4, (60,)), torch.randint(3, (60,))
    counts = torch.from_numpy(metrics.confusion_matrix(truth, predicted, labels=range(5)))
    names = [*"abcd", "never"]
    ConfusionMatrix().show(tmp_path, None, counts, "test", "test split")
    with (tmp_path / "classes.csv").open(newline="") as file:
        assert [line["class"] for line in csv.DictReader(file)] == list("01234")
    scores = metrics.precision_recall_fscore_support(truth, predicted, labels=range(5), zero_division=0)
    precision, recall, f1, support = (score.tolist() for score in scores)
    wanted = [list(line) for line in zip(names, support, precision, recall, f1, strict=True)]
    for mine, its in zip(of_classes(counts, names), wanted, strict=True):
        assert mine[:2] == its[:2]
        assert mine[2:] == pytest.approx(its[2:], abs=1e-4)


@pytest.mark.parametrize("name", ["from $5 to $10", "$x_{$"])
def test_a_class_name_with_dollars_is_not_read_as_a_formula(tmp_path: Path, monkeypatch, name: str) -> None:
    labels, draw = [], Figure.savefig

    def savefig(figure: Figure, *args, **options) -> None:
        draw(figure, *args, **options)
        labels.extend((*figure.axes[0].get_xticklabels(), *figure.axes[0].get_yticklabels()))

    monkeypatch.setattr(Figure, "savefig", savefig)
    draw_confusion_matrix(tmp_path / "x.png", torch.eye(2, dtype=torch.long), [name, "other"], "validation split")
    assert [(label.get_text(), label.get_parse_math()) for label in labels] == 2 * [(name, False), ("other", False)]


def test_a_class_name_in_a_script_without_a_font_is_drawn_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quieten()
        draw_confusion_matrix(tmp_path / "x.png", torch.eye(2, dtype=torch.long), ["\U00012345", "b"], "test split")
    assert [str(warning.message) for warning in caught] == []
