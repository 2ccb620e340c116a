"""Accuracy of baselines without a language model on the embedded pair task: majority class, logistic regressions.

    python -m experiments.docmatch.baselines

Writes the first table of README.md. Identifiers are split: `readLine` and `read_line` are both two words.
"""

from __future__ import annotations

import argparse
import platform
import re
from pathlib import Path

import numpy as np
from datasets import Dataset
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from experiments.throughput.report import write_table
from lit_llm.data.docmatch import open_docmatch

HERE = Path(__file__).parent
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
STRENGTHS = (0.01, 0.03, 0.1, 0.3)


def main(given: list[str] | None = None) -> None:
    """Fits the baselines and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="what the table is written into")
    options = parser.parse_args(given)
    splits = open_docmatch()
    lines = ["| | validation accuracy | test accuracy |", "| --- | ---: | ---: |"]
    for name, (validation, test) in accuracies(splits).items():
        lines.append(f"| {name} | {validation:.3f} | {test:.3f} |")
    train, validation, test = (f"{len(splits[name]):,}" for name in ("train", "validation", "test"))
    counted = f"{train} pairs to train on, {validation} to validate on, {test} to test on"
    lines += ["", f"{counted}, of Python {platform.python_version()}'s library."]
    write_table("words", lines, options.readme)


def words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)}


def fitted(train: csr_matrix, rest: dict[str, csr_matrix], labels: dict[str, np.ndarray]) -> tuple[float, float]:
    """Validation and test accuracy of a logistic regression, with the penalty that is best in validation."""
    models = [LogisticRegression(C=strength, max_iter=2000).fit(train, labels["train"]) for strength in STRENGTHS]
    best = max(models, key=lambda model: model.score(rest["validation"], labels["validation"]))
    return tuple(best.score(rest[name], labels[name]) for name in ("validation", "test"))


def accuracies(splits: dict[str, Dataset]) -> dict[str, tuple[float, float]]:
    """Validation and test accuracy of each baseline."""
    labels = {name: np.array(rows["label"][:]) for name, rows in splits.items()}
    sets = {name: [(words(row["docstring"]), words(row["body"])) for row in rows] for name, rows in splits.items()}
    kinds = {
        "docstring": lambda docstring, body: docstring,
        "body": lambda docstring, body: body,
        "common": lambda docstring, body: docstring & body,
    }
    counts: dict[str, dict[str, csr_matrix]] = {}
    for kind, of in kinds.items():
        vectorizer = CountVectorizer(analyzer=list, binary=True, min_df=2)
        vectorizer.fit(sorted(of(*pair)) for pair in sets["train"])
        counts[kind] = {name: vectorizer.transform(sorted(of(*pair)) for pair in pairs) for name, pairs in sets.items()}
    share = {
        name: csr_matrix([[len(a & b) / max(1, len(a)), len(a & b)] for a, b in pairs]) for name, pairs in sets.items()
    }
    words_of_both = {name: hstack([counts["docstring"][name], counts["body"][name]]) for name in splits}
    with_common = {name: hstack([words_of_both[name], counts["common"][name], share[name]]) for name in splits}
    larger = np.bincount(labels["train"]).argmax()
    return {
        "majority class": tuple(float((labels[name] == larger).mean()) for name in ("validation", "test")),
        "bag of words of both": fitted(words_of_both["train"], words_of_both, labels),
        "share of the docstring's words that the body has": fitted(share["train"], share, labels),
        "bag of words of both, and of those in common": fitted(with_common["train"], with_common, labels),
    }


if __name__ == "__main__":
    main()
