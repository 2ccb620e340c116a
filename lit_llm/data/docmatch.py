"""A text-pair task that needs no download: does a docstring of Python's library describe a function?"""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value, disable_progress_bars, load_dataset

from lit_llm.data.cache import cache_folder, cache_name, stamps
from lit_llm.data.cleaning import content_hash, split_of
from lit_llm.data.corpora import Document, stdlib_code, stdlib_files
from lit_llm.files import replacing

NAME = "stdlib-docmatch"
CLASS_NAMES = ("other", "described")
SHORTEST = 20
FEATURES = Features(
    {
        "docstring": Value("string"),
        "body": Value("string"),
        "label": ClassLabel(names=list(CLASS_NAMES)),
        "module": Value("string"),
        "split": Value("string"),
    }
)


def documented_functions(document: Document) -> list[tuple[str, str]]:
    """Pairs of the first paragraph of a function's docstring and its body, without docstring, comments and signature.

    The function's name, which would often give the answer away, is thus seen only if it calls itself. Bodies of fewer
    than 20 characters are left out, because they say too little.

    Example:
        >>> source = 'def f(a):\\n  "Add.\\\\n\\\\nMore."\\n  return a + 10_000_000_000  # up'
        >>> documented_functions(Document("m.py", source))
        [('Add.', 'return a + 10000000000')]
        >>> documented_functions(Document("m.py", source.replace("10_000_000_000", "1")))
        []
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return []
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = (ast.get_docstring(node) or "").partition("\n\n")[0].strip()
        body = ast.unparse(ast.Module(node.body[1:], [])) if docstring else ""
        if len(body) >= SHORTEST:
            found.append((docstring, body))
    return found


def docmatch_rows() -> Iterator[dict[str, Any]]:
    """About 14,000 pairs of a docstring and a body, half of which belong together.

    The other half pairs each docstring with the body of another function of its module, which makes the negatives as
    hard as is possible without a model. Each docstring and each body occurs once with either label, so neither alone
    predicts the label. Repeated bodies, and docstrings repeated within a module, are left out, so that no negative pair
    is correct. Whole modules are assigned to splits by a hash of the path: a tenth each to validate and to test on.
    """
    seen: set[str] = set()
    for document in stdlib_code():
        pairs: dict[str, str] = {}
        for docstring, body in documented_functions(document):
            if body not in seen:
                seen.add(body)
                pairs.setdefault(docstring, body)
        if len(pairs) < 2:
            continue
        # The negative is the body of the next function of the module, in the order of a hash of the docstring.
        order = sorted(pairs, key=content_hash)
        split = split_of(content_hash(document.id), validation_fraction=0.1, test_fraction=0.1)
        for docstring, other in zip(order, [*order[1:], order[0]], strict=True):
            for source, label in ((docstring, 1), (other, 0)):
                row = {"docstring": docstring, "body": pairs[source], "label": label}
                yield {**row, "module": document.id, "split": split}


def open_docmatch() -> dict[str, Dataset]:
    """The splits of the task, made once per Python installation and kept as a table in the cache folder."""
    disable_progress_bars()
    name = cache_name(table=NAME, version=1, python=sys.version, files=stamps(stdlib_files()))
    path = cache_folder() / "tables" / f"{name}.parquet"
    if not path.is_file():
        columns: dict[str, list[Any]] = {column: [] for column in FEATURES}
        for row in docmatch_rows():
            for column, value in row.items():
                columns[column].append(value)
        with replacing(path) as new:
            Dataset.from_dict(columns, features=FEATURES).to_parquet(new)
    rows = load_dataset("parquet", data_files=[str(path)], split="train")
    splits = rows["split"][:]
    return {
        kind: rows.select([number for number, split in enumerate(splits) if split == kind])
        for kind in ("train", "validation", "test")
    }
