"""Pairs of a source and a target text: from any table, or functions and docstrings of Python's standard library."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from lit_llm.batch import IGNORE_INDEX, Seq2SeqBatch
from lit_llm.data.arguments import require_counts
from lit_llm.data.collation import Collation
from lit_llm.data.docmatch import open_docmatch
from lit_llm.data.sampling import BatchLoader, data_parallel_rank
from lit_llm.data.stratification import with_all_splits
from lit_llm.data.table_tokenizer import TableTokens
from lit_llm.data.tables import Columns, Split, check_texts, column_values, open_table

log = logging.getLogger(__name__)

NAME = "stdlib-docstrings"
PAIRS = (
    ("source", "target"),
    ("body", "docstring"),
    ("document", "summary"),
    ("article", "highlights"),
    ("input", "output"),
    ("prompt", "response"),
    ("question", "answer"),
)


@dataclass(frozen=True)
class PairColumns:
    """Which columns of a table hold an example.

    Attributes:
        source: Column of the text to read.
        target: Column of the text to write; `None` if it is only to be predicted.
    """

    source: str
    target: str | None


class Seq2SeqData(TableTokens):
    """Pairs of a source text to read and a target text to write.

    Texts are tokenised once. Each batch is padded to its own longest texts; examples of similar length are batched
    together, so that there is little padding.

    Args:
        path: `stdlib-docstrings` (some 7,000 function bodies of Python's standard library, each with the first
            paragraph of its docstring, split by module), a table (`.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`), a
            folder of tables called `train`, `validation` and `test`, a folder in the hub's layout, or a data set on the
            hub. A lone table is split by its column `split` if that names splits.
        subset: Configuration of a hub data set.
        source: Column of the text to read; like `target`, it is optional if the columns are called `source` and
            `target`, `document` and `summary`, `input` and `output`, `prompt` and `response` or similar, or as in the
            table that a checkpoint was trained on.
        target: Column of the text to write. A table to predict does not need it; a test split without it is only used
            for predictions.
        tokenizer: `t5-bpe-<size>`, trained on the training texts; a folder with a `tokenizer.json`; or a name on the
            hub. Default: the one next to the network's weights, or `t5-bpe-4096` for a network without weights.
        max_source_len: Maximum tokens of a text to read, including the end token; longer ones are truncated.
        max_target_len: The same for a text to write; generated text is compared with the whole target.
        batch_size: Examples per batch and device.
        validation_fraction: Fraction of the training split to validate on if the source has no validation split, chosen
            by a hash of the texts; pairs with the same source text stay together. 0 for none.
        test_fraction: The same for a test split; also applies if the source's own test split has no texts to write,
            which is then only used for predictions.
        length_grouping: Batch examples of similar length.
        seed: Seed of the order of examples.

    Raises:
        ValueError: When the columns are not found, a text is missing, there are too few examples, or the tokeniser does
            not put an end token after a text.

    Example:
        >>> from pathlib import Path
        >>> path = Path(__import__("tempfile").mkdtemp()) / "x.csv"
        >>> _ = path.write_text("source,target\\n" + "".join(f"eins {n},one {n}\\n" for n in range(40)))
        >>> data = Seq2SeqData(path=str(path), tokenizer="t5-bpe-360", batch_size=4)
        >>> data.prepare_data(); data.setup("fit")
        >>> sorted(next(iter(data.train_dataloader())))
        ['attention_mask', 'input_ids', 'labels', 'rows']
    """

    columns: PairColumns
    default_tokenizer = "t5-bpe-4096"

    def __init__(
        self,
        path: str = NAME,
        subset: str | None = None,
        source: str | None = None,
        target: str | None = None,
        tokenizer: str | None = None,
        max_source_len: int = 128,
        max_target_len: int = 48,
        batch_size: int = 32,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.0,
        length_grouping: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(path, subset, batch_size, validation_fraction, test_fraction, seed)
        require_counts(2, max_source_len=max_source_len, max_target_len=max_target_len)
        self.given = {"source": source, "target": target}
        self.tokenizer_spec, self.length_grouping = tokenizer, length_grouping
        self.max_source_len, self.max_target_len = max_source_len, max_target_len

    # Properties read by objectives, callbacks and model directories.

    @property
    def max_seq_len(self) -> int:
        """Maximum tokens of a text, whether source or target."""
        return max(self.max_source_len, self.max_target_len)

    @property
    def manifest(self) -> dict[str, Any]:
        """What the data is and how it was made."""
        return {
            "path": self.path,
            "subset": self.subset,
            "columns": asdict(self.columns),
            "tokenizer": self.tokenizer_spec,
            "max_source_len": self.max_source_len,
            "max_target_len": self.max_target_len,
            "splits": {name: {"examples": len(split)} for name, split in self.splits.items()},
        }

    def targets(self, split: str, rows: list[int]) -> list[str]:
        """The target texts of some examples, not truncated."""
        return self.splits[split].rows[rows][self.columns.target]

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Reads the table and trains the tokeniser; when predicting, this waits for the checkpoint."""
        if self._predicting:
            return
        if self.tokenizer("a").input_ids[-1] != self.tokenizer.eos_token_id or self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"data.tokenizer must end a text with its end token and have padding, but {self._decided_spec} does "
                f"not; t5-bpe-4096 does"
            )

    def test_dataloader(self) -> BatchLoader | list[Any]:
        """All examples of the test split, as in validation; none if it has no texts to write."""
        hidden = "test" in self.splits and not _has_texts(self.splits["test"].rows, self.columns.target)
        return [] if hidden else super().test_dataloader()

    # How examples are read.

    def _find_splits(self) -> dict[str, Split]:
        found = _docstrings() if self.path == NAME else open_table(self.path, self.subset)
        self.tables = found
        first = found["train"] if "train" in found else next(iter(found.values()))
        known = self._known_columns(first)
        given = {role: name or known.get(role) for role, name in self.given.items()}
        self.columns = _find_columns(first, self.path, **given, needs_target=not self._predicting)
        if whole := self._whole_to_predict(found, self.columns.target):
            self.columns = PairColumns(self.columns.source, None)  # an existing target is only shown
            check_texts(whole["test"].rows, asdict(self.columns), self.path, next(reversed(found)))
            return whole
        if alone := self._standing_alone(found):
            [(name, split)] = alone.items()
            check_texts(split.rows, asdict(self.columns), self.path, name)
            return alone
        if "train" not in found:
            raise ValueError(f"data.path must hold a training split, but {self.path} has only {', '.join(found)}")
        splits = {}
        for name, rows in found.items():
            hidden = name == "test" and not _has_texts(rows, self.columns.target)
            if hidden:
                log.info(f"The test split of {self.path} has no texts to write, so it can only be used for predictions")
            columns = PairColumns(self.columns.source, None) if hidden else self.columns
            check_texts(rows, asdict(columns), self.path, name)
            splits[name] = Split(rows, None if hidden else np.zeros(len(rows), np.int64))
        texts = Columns(self.columns.source, self.columns.target, None)
        return with_all_splits(splits, texts, self.validation_fraction, self.test_fraction)

    def _texts_to_learn_tokens_from(self) -> list[str]:
        columns = (self.columns.source, self.columns.target)
        return [text for name in columns for text in self.splits["train"].column(name)]

    # How batches are made.

    def _make_readable(self, split: Split) -> tuple[Collation, Collation | None]:
        source, target = self.columns.source, self.columns.target
        sources = self._collated(split.column(source), None, None, self.max_source_len)
        if not _has_texts(split.rows, target):
            return sources, None
        return sources, self._collated(split.column(target), None, None, self.max_target_len)

    def _loader(self, name: str, seed: int | None = None, share: bool = True) -> BatchLoader:
        sources, targets = self._read(name)

        def cut(rows: np.ndarray) -> Seq2SeqBatch:
            batch = sources.batch(rows)
            batch.pop("token_type_ids", None)
            if targets is None:
                return batch
            written = targets.batch(rows)
            labels = written["input_ids"].masked_fill(written["attention_mask"] == 0, IGNORE_INDEX)
            return {**batch, "labels": labels}

        lengths = sources.lengths + (0 if targets is None else targets.lengths)
        mine = data_parallel_rank(self.trainer) if share else (0, 1)
        return BatchLoader(cut, len(sources), self.batch_size, seed, *mine, lengths if self.length_grouping else None)


def _has_texts(rows: Dataset, column: str | None) -> bool:
    """Whether a table has the column, and a value in it."""
    return column in rows.column_names and any(text is not None for text in column_values(rows, column))


def _docstrings() -> dict[str, Dataset]:
    """The matching pairs of the embedded task."""
    return {
        name: rows.filter(lambda label: label == 1, input_columns="label") for name, rows in open_docmatch().items()
    }


def _find_columns(rows: Dataset, path: str, source: str | None, target: str | None, needs_target: bool) -> PairColumns:
    """Finds the columns of the texts: as given, or the one obvious choice.

    Args:
        rows: The table.
        path: Where it is from, for messages.
        source: The given source column, if any.
        target: The given target column, if any.
        needs_target: Whether there must be a target; otherwise it may be missing even if given.

    Raises:
        ValueError: When a column does not exist, or the choice is not obvious.
    """
    names = rows.column_names
    if not needs_target and target not in names:
        target = None
    given = {"source": source, "target": target}
    for role, name in given.items():
        if name is not None and name not in names:
            raise ValueError(f"data.{role} must be one of {', '.join(names)} in {path}, but is {name!r}")
    usual = [(source or first, target or second) for first, second in PAIRS]
    for pair in usual:
        if set(pair) <= set(names) and pair[0] != pair[1]:
            return PairColumns(*pair)
    alone = next((first for first, _ in usual if first in names), None)
    if alone and not needs_target:
        return PairColumns(alone, None)
    lacking = next((role for role, name in given.items() if name is None), "source")
    raise ValueError(f"data.{lacking} must be one of {', '.join(names)} in {path}, but is not given")
