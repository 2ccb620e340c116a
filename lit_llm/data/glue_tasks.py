"""The GLUE tasks: columns, classes, headline metric and submission file of each."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from lit_llm.data.docmatch import CLASS_NAMES
from lit_llm.data.tables import Columns


class Submission(NamedTuple):
    """Format in which gluebenchmark.com accepts the predictions of a test split.

    Attributes:
        file: Name of the file, tab-separated, with the columns `index` and `prediction`.
        labels: Whether a prediction is the index of a class, its name, or a value.
        limits: Minimum and maximum value; predictions are clipped to these.
    """

    file: str
    labels: Literal["index", "name", "value"]
    limits: tuple[float, float] = (-math.inf, math.inf)


class Task(NamedTuple):
    """A task, as known before its data is read.

    Attributes:
        columns: Columns of the texts and of the label.
        class_names: Names of the classes, in order; empty if labels are values.
        metric: Headline metric, computed on the validation split.
        submission: Format of a submission; `None` if there is no leaderboard.
        splits: Suffix of the names of its validation and test splits.
    """

    columns: Columns
    class_names: tuple[str, ...]
    metric: str
    submission: Submission | None
    splits: str = ""


def _task(
    texts: str, class_names: str, metric: str, file: str, labels: str = "index", splits: str = "", **limits: Any
) -> Task:
    text, _, pair = texts.partition(" ")
    names = tuple(class_names.split())
    return Task(
        Columns(text, pair or None, "label"), names, metric, Submission(f"{file}.tsv", labels, **limits), splits
    )


NLI = "entailment neutral contradiction"
TASKS = {
    "cola": _task("sentence", "unacceptable acceptable", "mcc", "CoLA"),
    "sst2": _task("sentence", "negative positive", "accuracy", "SST-2"),
    "mrpc": _task("sentence1 sentence2", "not_equivalent equivalent", "f1", "MRPC"),
    "stsb": _task("sentence1 sentence2", "", "pearson", "STS-B", "value", limits=(0.0, 5.0)),
    "qqp": _task("question1 question2", "not_duplicate duplicate", "f1", "QQP"),
    "mnli": _task("premise hypothesis", NLI, "accuracy", "MNLI-m", "name", "_matched"),
    "mnli_mismatched": _task("premise hypothesis", NLI, "accuracy", "MNLI-mm", "name", "_mismatched"),
    "qnli": _task("question sentence", "entailment not_entailment", "accuracy", "QNLI", "name"),
    "rte": _task("sentence1 sentence2", "entailment not_entailment", "accuracy", "RTE", "name"),
    "wnli": _task("sentence1 sentence2", "not_entailment entailment", "accuracy", "WNLI"),
}
"""Columns, classes and splits as in `nyu-mll/glue` on the hub; metrics and files as on gluebenchmark.com, and the first
metric where it averages two."""

DOCMATCH = Task(Columns("docstring", "body", "label"), CLASS_NAMES, "accuracy", None)
