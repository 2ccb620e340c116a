"""Accuracy on the embedded pair task of what knows no language: the larger class, and logistic regressions on words.

    python experiments/docmatch/baselines.py

Prints the table of README.md. Words are the runs of letters in a name, so that `readLine` and `read_line` are two.
"""

import re

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from lit_llm.data.docmatch import open_docmatch

WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
STRENGTHS = (0.01, 0.03, 0.1, 0.3)


def words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)}


def fitted(train: csr_matrix, rest: dict[str, csr_matrix], labels: dict[str, np.ndarray]) -> tuple[float, float]:
    """Accuracy in validation and test, of the penalty that is best in validation."""
    models = [LogisticRegression(C=strength, max_iter=2000).fit(train, labels["train"]) for strength in STRENGTHS]
    best = max(models, key=lambda model: model.score(rest["validation"], labels["validation"]))
    return tuple(best.score(rest[name], labels[name]) for name in ("validation", "test"))


splits = open_docmatch()
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
found = {
    "majority class": tuple(float((labels[name] == larger).mean()) for name in ("validation", "test")),
    "bag of words of both": fitted(words_of_both["train"], words_of_both, labels),
    "share of the docstring's words that the body has": fitted(share["train"], share, labels),
    "bag of words of both, and of those in common": fitted(with_common["train"], with_common, labels),
}
print("| | validation accuracy | test accuracy |\n| --- | ---: | ---: |")
for name, (validation, test) in found.items():
    print(f"| {name} | {validation:.3f} | {test:.3f} |")
print("\n" + ", ".join(f"{name} {len(rows):,}" for name, rows in splits.items()) + " pairs")
