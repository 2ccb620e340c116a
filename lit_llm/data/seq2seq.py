"""Pairs of texts, one to read and one to write: from any table, or docstrings of Python's own library."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from lit_llm.batch import IGNORE_INDEX, Seq2SeqBatch
from lit_llm.data.collation import Collation
from lit_llm.data.docmatch import open_docmatch
from lit_llm.data.labels import cut_splits
from lit_llm.data.sampling import BatchLoader, place
from lit_llm.data.table_tokenizer import tokenizer_beside, tokenizer_files, trained_tokenizer
from lit_llm.data.tables import Columns, Split, check_texts, choose_splits, open_table
from lit_llm.data.tokenizer import load_tokenizer, training_of

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


class Seq2SeqData(LightningDataModule):
    """Pairs of a source text to read and a target text to write.

    Texts are tokenised once. A batch is cut at once and padded to its own longest texts; examples of about one length
    come together, so that little is padding.

    Args:
        path: `stdlib-docstrings` (what does a function of Python's library do? Some 7,000 bodies and the first
            paragraph of their docstrings, split by module), a table (`.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`), a
            folder of tables called `train`, `validation` and `test`, a folder in the hub's layout, or a data set on the
            hub.
        subset: Configuration of a hub data set.
        source: Column of the text to read; like `target`, it is optional if the columns are called `source` and
            `target`, `document` and `summary`, `input` and `output`, `prompt` and `response` or similar.
        target: Column of the text to write.
        tokenizer: `t5-bpe-<size>`, trained on these training texts; a folder with a `tokenizer.json`; or a name on the
            hub. Default: the one next to the network's weights, or `t5-bpe-4096` for a network without weights.
        max_source_len: Maximum tokens of a text to read, including the end token; longer ones are truncated.
        max_target_len: The same for a text to write.
        batch_size: Examples per batch and device.
        validation_fraction: Fraction of the training split to validate on if the source has no validation split, by a
            hash of the texts; 0 for none.
        test_fraction: The same for a test split.
        length_grouping: Batch examples of similar length.
        seed: Seed of the order of examples.

    Raises:
        ValueError: When the table has no such columns, a text is missing, there are too few examples, or the tokeniser
            does not end a text.

    Example:
        >>> from pathlib import Path
        >>> path = Path(__import__("tempfile").mkdtemp()) / "x.csv"
        >>> _ = path.write_text("source,target\\n" + "".join(f"eins {n},one {n}\\n" for n in range(40)))
        >>> data = Seq2SeqData(path=str(path), tokenizer="t5-bpe-360", batch_size=4)
        >>> data.prepare_data(); data.setup("fit")
        >>> sorted(next(iter(data.train_dataloader())))
        ['attention_mask', 'input_ids', 'labels', 'rows']
    """

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
        super().__init__()
        counts = {"max_source_len": max_source_len, "max_target_len": max_target_len, "batch_size": batch_size}
        for name, value in counts.items():
            least = 1 if name == "batch_size" else 2
            if value < least:
                raise ValueError(f"data.{name} must be at least {least}, but is {value}")
        if validation_fraction < 0 or test_fraction < 0 or validation_fraction + test_fraction >= 1:
            raise ValueError(
                f"data.validation_fraction and data.test_fraction must be at least 0 and leave something to train on, "
                f"but are {validation_fraction} and {test_fraction}"
            )
        self.path, self.subset, self.given = path, subset, {"source": source, "target": target}
        self.tokenizer_spec = tokenizer
        self.max_source_len, self.max_target_len, self.batch_size = max_source_len, max_target_len, batch_size
        self.validation_fraction, self.test_fraction = validation_fraction, test_fraction
        self.length_grouping, self.seed = length_grouping, seed
        self._collations: dict[str, tuple[Collation, Collation]] = {}

    # Facts that objectives, callbacks and model directories ask for.

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.tokenizer)

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest text that may come."""
        return max(self.max_source_len, self.max_target_len)

    @property
    def manifest(self) -> dict[str, Any]:
        """What the data is and how it was made."""
        return {
            "path": self.path,
            "subset": self.subset,
            "columns": dict(zip(self.given, self.columns, strict=True)),
            "tokenizer": self.tokenizer_spec,
            "max_source_len": self.max_source_len,
            "max_target_len": self.max_target_len,
            "splits": {name: {"examples": len(split)} for name, split in self.splits.items()},
        }

    @property
    def predict_split(self) -> str:
        """The split that `predict` reads: the test split, or where there is none the validation split."""
        return next(name for name in ("test", "validation", "train") if name in self.splits)

    def texts(self, split: str, rows: list[int]) -> list[dict[str, Any]]:
        """All columns of some examples, as the source has them."""
        return [self.splits[split].rows[row] for row in rows]

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Reads the table, and trains the tokeniser where it is to be trained."""
        if self.tokenizer("a").input_ids[-1] != self.tokenizer.eos_token_id or self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"data.tokenizer must end a text with its end token and have padding, but {self._tokenizer_spec} does "
                f"not; t5-bpe-4096 does"
            )

    def setup(self, stage: str) -> None:
        """Refuses data that cannot do what `stage` needs.

        Raises:
            ValueError: When there is too little to train on, or nothing to validate on.
        """
        if stage != "fit":
            return
        rows, devices = len(self.splits["train"]), place(self.trainer)[1]
        if rows < self.batch_size * devices:
            raise ValueError(
                f"data.batch_size must be at most the examples there are to train on, but is {self.batch_size} on "
                f"{devices} device{'s' * (devices > 1)} where {self.path} has {rows}; lower it"
            )
        if self.validation_fraction and "validation" not in self.splits:
            raise ValueError(
                f"data.validation_fraction must leave an example to validate on, but is {self.validation_fraction}, "
                f"which takes none of the {rows} of {self.path}; raise it, or set it to 0 to go without"
            )

    def train_dataloader(self) -> BatchLoader:
        """Examples in an order drawn anew each epoch."""
        return self._loader("train", self.seed)

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """All examples of the validation split, the longest first, each once whatever the number of processes."""
        return self._loader("validation") if "validation" in self.splits else []

    def test_dataloader(self) -> BatchLoader | list[Any]:
        """All examples of the test split, as in validation."""
        return self._loader("test") if "test" in self.splits else []

    def predict_dataloader(self) -> BatchLoader:
        """All examples of the split to predict."""
        return self._loader(self.predict_split)

    def state_dict(self) -> dict[str, Any]:
        """The tokeniser's files, so that a checkpoint can read and write text on its own."""
        return {"tokenizer": tokenizer_files(self.tokenizer)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint whose tokens mean something else.

        Raises:
            ValueError: When the checkpoint's tokeniser is not this data's.
        """
        if state_dict["tokenizer"]["tokenizer.json"] != self.state_dict()["tokenizer"]["tokenizer.json"]:
            raise ValueError(
                f"data.tokenizer must be the checkpoint's, but is {self._tokenizer_spec} of {self.path}, which differs"
            )

    # How examples are read.

    @cached_property
    def splits(self) -> dict[str, Split]:
        """The examples: `train`, `validation` and `test`, as far as there are such."""
        found = _docstrings() if self.path == NAME else choose_splits(open_table(self.path, self.subset), self.path)
        if "train" not in found:
            raise ValueError(f"data.path must hold a training split, but {self.path} has only {', '.join(found)}")
        self.columns = _find_columns(found["train"], self.path, **self.given)
        for name, rows in found.items():
            check_texts(rows, dict(zip(self.given, self.columns, strict=True)), self.path, name)
        splits = {name: Split(rows, np.zeros(len(rows), np.int64)) for name, rows in found.items()}
        fractions = (
            0.0 if name in splits else fraction
            for name, fraction in (("validation", self.validation_fraction), ("test", self.test_fraction))
        )
        splits |= cut_splits(splits["train"], Columns(*self.columns, None), *fractions)
        return {name: splits[name] for name in ("train", "validation", "test") if name in splits}

    @property
    def _tokenizer_spec(self) -> str:
        network = getattr(self.trainer, "lightning_module", None)
        return str(self.tokenizer_spec or getattr(network, "tokenizer_path", None) or "t5-bpe-4096")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokeniser."""
        spec = self._tokenizer_spec
        if training_of(spec) is None:
            return load_tokenizer(spec) if self.tokenizer_spec else tokenizer_beside(spec, self.trainer)
        return trained_tokenizer(spec, [text for name in self._train_columns for text in name])

    @property
    def _train_columns(self) -> list[list[str]]:
        split = self.splits["train"]
        return [split.column(name) for name in self.columns]

    # How batches are made.

    def _loader(self, name: str, seed: int | None = None) -> BatchLoader:
        if name not in self._collations:
            limits, tokenizer = (self.max_source_len, self.max_target_len), copy.deepcopy(self.tokenizer)
            self._collations[name] = tuple(
                Collation(self.splits[name].column(column), None, None, tokenizer, limit)
                for column, limit in zip(self.columns, limits, strict=True)
            )
        sources, targets = self._collations[name]

        def cut(rows: np.ndarray) -> Seq2SeqBatch:
            batch, written = sources.batch(rows), targets.batch(rows)
            labels = written["input_ids"].masked_fill(written["attention_mask"] == 0, IGNORE_INDEX)
            batch.pop("token_type_ids", None)
            return {**batch, "labels": labels}

        lengths = sources.lengths + targets.lengths if self.length_grouping else None
        return BatchLoader(cut, len(sources), self.batch_size, seed, *place(self.trainer), lengths)


def _docstrings() -> dict[str, Dataset]:
    """The pairs of the embedded task that belong together."""
    return {
        name: rows.filter(lambda label: label == 1, input_columns="label") for name, rows in open_docmatch().items()
    }


def _find_columns(rows: Dataset, path: str, source: str | None, target: str | None) -> tuple[str, str]:
    """Where the texts are: as named, or where there is one obvious choice.

    Raises:
        ValueError: When a column is not there, or the choice is not obvious.
    """
    names = rows.column_names
    given = {"source": source, "target": target}
    for role, name in given.items():
        if name is not None and name not in names:
            raise ValueError(f"data.{role} must be one of {', '.join(names)} in {path}, but is {name!r}")
    for usual in PAIRS:
        pair = source or usual[0], target or usual[1]
        if set(pair) <= set(names) and pair[0] != pair[1]:
            return pair
    lacking = next((role for role, name in given.items() if name is None), "source")
    raise ValueError(f"data.{lacking} must be one of {', '.join(names)} in {path}, but is not given")
