from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.axes import Axes

import lit_llm
from lit_llm import files
from lit_llm.callbacks.metrics_csv import MetricsCSV
from lit_llm.callbacks.run_report import RunReport, command, commit, draw_learning_curve, model_card
from lit_llm.files import replacing
from lit_llm.models.pretrained_classifier import PretrainedClassifier
from lit_llm.models.pretrained_pooling import MeanClassifier, PairClassifier
from tests.examples import BERT


def test_a_mode_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"^checkpoint.mode must be min or max, but is 'least'$"):
        RunReport(mode="least")


def test_the_commit_is_that_of_the_package(tmp_path, monkeypatch):
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(lit_llm, "__file__", str(package / "__init__.py"))
    assert commit() is None

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *words], cwd=package.parent, check=True, capture_output=True).stdout

    git("init")
    git("commit", "--allow-empty", "-m", "somebody else's repository")
    assert commit() is None
    git("add", ".")
    git("commit", "-m", "the package's own")
    assert git("rev-parse", "HEAD").decode().startswith(commit())
    (package / "__init__.py").write_text("changed")
    assert commit().endswith("-dirty")


def test_the_command_of_a_notebook_is_the_one_that_a_shell_repeats(monkeypatch):
    for name, expected in {"x/ipykernel_launcher.py": "lit-llm fit --a 1", "x/mine.py": "x/mine.py fit --a 1"}.items():
        monkeypatch.setattr(sys, "argv", [name, "fit", "--a", "1"])
        assert command() == expected


@pytest.mark.parametrize(
    ("kind", "known"), [(PretrainedClassifier, True), (MeanClassifier, False), (PairClassifier, False)]
)
def test_a_card_says_whether_transformers_opens_the_model(kind, known):
    card = model_card("x", kind(3, config=BERT), None, {"step": 1})
    assert ("library_name: transformers" in card) == known
    assert ("Transformers has no such network; lit-llm reads it." in card) != known


def test_pictures_leave_a_notebooks_way_to_show_its_own_alone(tmp_path):
    before = matplotlib.get_backend()
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"val/loss": 1.0}, 1)
    logger.save()
    try:
        matplotlib.use("svg")
        draw_learning_curve(tmp_path)
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before)
    assert (tmp_path / "learning_curve.png").is_file()


def test_the_learning_curve_is_a_picture_of_what_was_logged(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(files, "replacing", lambda path: drawn.append(path) or replacing(path))
    logger = MetricsCSV(tmp_path)
    for step in range(1, 9):
        logger.log_metrics({"train/loss": 1 / step} | ({"val/loss": 2 / step} if step % 4 == 0 else {}), step)
    logger.save()
    draw_learning_curve(tmp_path)
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == [tmp_path / "learning_curve.png"]


def test_nothing_logged_is_no_picture(tmp_path: Path):
    draw_learning_curve(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("mode", "title"), [("max", "val/f1: 0.9000 at step 2"), ("min", "val/f1: 0.5000 at step 3")])
def test_the_learning_curve_says_where_the_monitored_metric_was_best(tmp_path, monkeypatch, mode, title):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text: titles.append(text))
    logger = MetricsCSV(tmp_path)
    for step, (f1, loss) in enumerate([(0.9, 2.0), (0.9, 1.0), (0.5, 2.0), (0.5, 3.0)], 1):
        logger.log_metrics({"val/f1": f1, "val/loss": loss}, step)
    logger.save()
    draw_learning_curve(tmp_path, "val/f1", mode)
    assert titles == [title]
