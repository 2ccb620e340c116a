"""A task of pairs that every machine already has: does this docstring of Python's library describe this function?"""

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
    """The first paragraph of each function's docstring, and the body without it, its comments and its signature.

    So a function's name, which would often give the answer away, is seen only where it calls itself. Bodies of less
    than 20 characters, which say little, are left out.

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

    The other half are as hard as can be had without a model: each docstring once more, with the body of another
    function of its module. As each docstring and each body comes once with either label, neither says anything by
    itself. A body or, in one module, a docstring that came before is left out, so that no wrong pair is right. Whole
    modules go into splits, a tenth each to validate and to test on, by a hash of the path.
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
        # Who is taken for whom: the next of the module, in the order of a hash of the docstring.
        order = sorted(pairs, key=content_hash)
        split = split_of(content_hash(document.id), validation_fraction=0.1, test_fraction=0.1)
        for docstring, other in zip(order, [*order[1:], order[0]], strict=True):
            for source, label in ((docstring, 1), (other, 0)):
                row = {"docstring": docstring, "body": pairs[source], "label": label}
                yield {**row, "module": document.id, "split": split}


def open_docmatch() -> dict[str, Dataset]:
    """The splits of the task; made once for a Python and kept as a table in the cache folder."""
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
