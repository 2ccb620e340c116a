"""Text classification and regression: the GLUE tasks, the embedded one, and any table shaped like them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from datasets import Dataset

from lit_llm.data.augmentation import TextAugmentation
from lit_llm.data.collation import Collation
from lit_llm.data.docmatch import NAME, open_docmatch
from lit_llm.data.examples import ExampleData
from lit_llm.data.glue_tasks import DOCMATCH, TASKS, Submission
from lit_llm.data.table_tokenizer import TableTokens
from lit_llm.data.tables import LABELS, PAIRS, Split, check_texts, find_columns, open_table


class GLUEData(TableTokens, ExampleData):
    """Examples of one or two texts with a label: a class, or a real number.

    Texts are tokenised once. Each batch is padded to its longest example only; by default, examples of similar length
    are batched together, so there is little padding.

    Args:
        task: A GLUE task: `cola`, `sst2`, `mrpc`, `stsb`, `qqp`, `mnli`, `mnli_mismatched` (validated on genres that
            are not trained on), `qnli`, `rte` or `wnli`; its tables have the columns of the hub's `nyu-mll/glue`.
            `None` for any other table.
        path: `stdlib-docmatch` (the default without a task: does a docstring of Python's library describe a function?),
            a table (`.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`), split by its column `split` if that names splits, a
            folder of tables called `train`, `validation` and `test`, a folder in the hub's layout, or a data set on the
            hub (default for a task: `nyu-mll/glue`).
        subset: Configuration of a hub data set; with a task, its name by default.
        text: Column of the text, or of the first of two; optional if there is one obvious choice.
        text_pair: Column of the second text.
        label: Column of the label. Whole numbers and text are classes, real numbers are values; for an objective that
            needs values, such as `Regression`, whole numbers are values too.
        tokenizer: `bert-uncased-bpe-<size>` or `bert-bpe-<size>`, trained on the training texts; a folder with a
            `tokenizer.json`; or a name on the hub. Default: the one next to the network's weights, or
            `bert-uncased-bpe-8192` for a network without weights.
        max_seq_len: Maximum tokens of an example, including special tokens; of two texts, the longer one is truncated.
        batch_size: Examples per batch and device.
        validation_fraction: Fraction of the training split to validate on if the source has no validation split: the
            same fraction of each class, chosen by a hash of the texts; pairs with the same first text stay together. 0
            for none.
        test_fraction: The same for a test split; also used if the source's own has no labels and can only be predicted.
        max_examples: Train on at most this many examples, drawn with the seed in proportion to the classes.
        labels_per_class: Keep the labels of only this many training examples per class, drawn with the seed; the rest
            become unlabelled, like those of a split called `unlabelled` or `unsupervised`.
        unlabelled_ratio: For semi-supervised training: number of unlabelled examples per labelled one in a batch, each
            both plain and augmented; labelled ones are then not augmented. Training rows whose label is missing are
            unlabelled. An epoch is one pass over the unlabelled ones; labelled ones are repeated as needed. 0 ignores
            the unlabelled ones, and refuses a table with missing labels.
        balance_classes: Draw each class equally often; use either this or an objective's `class_weights`, not both.
        length_grouping: Batch examples of similar length together, except the few labelled ones of semi-supervised
            training, of which the same would always share a batch, and those of an objective with `class_weights`: a
            rare class of a length of its own would fill batches by itself, where its weight changes nothing.
        augmentation: Augmentation of training examples, different in each epoch.
        seed: Seed of the order of examples and of the augmentation.

    Raises:
        ValueError: When a column is missing, a label is missing or unknown, or there are too few examples.

    Example:
        >>> from pathlib import Path
        >>> folder = Path(__import__("tempfile").mkdtemp())
        >>> rows = "".join(f"good {n},yes\\nbad {n},no\\n" for n in range(20))
        >>> _ = (folder / "x.csv").write_text("text,label\\n" + rows)
        >>> data = GLUEData(path=str(folder / "x.csv"), tokenizer="bert-bpe-260", batch_size=4)
        >>> data.prepare_data(); data.setup("fit")
        >>> data.class_names, sorted(next(iter(data.train_dataloader())))
        (['no', 'yes'], ['attention_mask', 'input_ids', 'labels', 'rows', 'token_type_ids'])
    """

    default_tokenizer = "bert-uncased-bpe-8192"

    def __init__(
        self,
        task: str | None = None,
        path: str | None = None,
        subset: str | None = None,
        text: str | None = None,
        text_pair: str | None = None,
        label: str | None = None,
        tokenizer: str | None = None,
        max_seq_len: int = 128,
        batch_size: int = 32,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.0,
        max_examples: int | None = None,
        labels_per_class: int | None = None,
        unlabelled_ratio: int = 0,
        balance_classes: bool = False,
        length_grouping: bool = True,
        augmentation: TextAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        if task is not None and task not in TASKS:
            raise ValueError(f"data.task must be one of {', '.join(TASKS)}, but is {task!r}")
        if max_seq_len < 1:
            raise ValueError(f"data.max_seq_len must be at least 1, but is {max_seq_len}")
        super().__init__(
            path=path or ("nyu-mll/glue" if task else NAME),
            # Both MNLI tasks are one configuration on the hub.
            subset=subset or (task and task.removesuffix("_mismatched")),
            batch_size=batch_size,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            max_examples=max_examples,
            labels_per_class=labels_per_class,
            unlabelled_ratio=unlabelled_ratio,
            balance_classes=balance_classes,
            augmentation=augmentation,
            seed=seed,
        )
        self.task = TASKS[task] if task else DOCMATCH if self.path == NAME else None
        self.given = {"text": text, "text_pair": text_pair, "label": label}
        self.tokenizer_spec, self.max_seq_len, self.length_grouping = tokenizer, max_seq_len, length_grouping

    # Facts that objectives, callbacks and model directories ask for.

    @property
    def monitor(self) -> tuple[str, str] | None:
        """The task's headline metric and whether its `max` is best; `None` for a table without a task."""
        return self.task and (f"val/{self.task.metric}", "max")

    @property
    def submission(self) -> Submission | None:
        """Format of a GLUE task's submission; `None` without one, or if another table is predicted as a whole."""
        return self.task.submission if self.task and "train" in self.splits else None

    @property
    def manifest(self) -> dict[str, Any]:
        """What the data is and how it was made."""
        return {
            "path": self.path,
            "subset": self.subset,
            "columns": asdict(self.columns),
            "class_names": self.class_names,
            "tokenizer": self.tokenizer_spec,
            "max_seq_len": self.max_seq_len,
            "splits": {name: {"examples": len(split)} for name, split in self.splits.items()},
        }

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Reads the table and trains the tokeniser; for `predict`, later, once the checkpoint's data is known."""
        if not self._predicting and "train" in self.splits:
            self._require_marks()

    # How examples are read.

    def _find_splits(self) -> dict[str, Split]:
        self.tables = self._open()
        found = dict(self.tables)
        unlabelled = found.pop("unlabelled", None) if "train" in found else None
        if not found:
            raise ValueError(f"data.path must hold a split to read, but {self.path} has none")
        first = found["train"] if "train" in found else next(iter(found.values()))
        known, usual, pairs = self._known_columns(first), LABELS, PAIRS
        given = {
            role: name or getattr(self.task and self.task.columns, role, None) or known.get(role)
            for role, name in self.given.items()
        }
        if self._predicting and (given["label"] or self._trained_on):  # the label column is not guessed
            given["label"], usual = given["label"] if given["label"] in first.column_names else None, ()
        alone = self._standing_alone(found)
        if (self._predicting or alone) and self._trained_on:
            pairs = PAIRS if self._trained_on_pairs(given["text_pair"], first) else ()
        self.columns = find_columns(first, self.path, **given, usual=usual, usual_pairs=pairs)
        for name, rows in [*found.items(), *([("unlabelled", unlabelled)] if unlabelled is not None else [])]:
            check_texts(rows, self.columns.texts, self.path, name)
        if whole := alone or self._whole_to_predict(found, self.columns.label):
            return whole
        return self._labelled(found, unlabelled, self.task.class_names if self.task else ())

    def _trained_on_pairs(self, text_pair: str | None, rows: Dataset) -> bool:
        """Whether the checkpoint was trained on two texts; refuses a table whose number of texts differs.

        Args:
            text_pair: Column of the table's second text; `None` if it has none.
            rows: The table.

        Raises:
            ValueError: When only the checkpoint or only the table has a second text.
        """
        trained_on = self._trained_on["columns"]["text_pair"]
        if trained_on is not None and text_pair is None:
            raise ValueError(
                f"data.path must hold a second text, as the checkpoint was trained on {trained_on!r}, but {self.path} "
                f"has {', '.join(rows.column_names)}; name another column by data.text_pair"
            )
        if trained_on is None and text_pair is not None:
            raise ValueError(
                f"data.text_pair must be None for a checkpoint that was trained on one text, but is {text_pair!r}"
            )
        return trained_on is not None

    def _open(self) -> dict[str, Dataset]:
        if self.path == NAME:
            return open_docmatch()
        return open_table(self.path, self.subset, self.task.splits if self.task else "")

    # How texts become tokens.

    def _texts_to_learn_tokens_from(self) -> list[str]:
        splits, columns = [self.splits["train"]], (self.columns.text, self.columns.text_pair)
        splits += [self.splits["unlabelled"]] if "unlabelled" in self.splits else []
        return [text for split in splits for name in columns if name for text in split.column(name)]

    def _require_marks(self) -> None:
        pair = self.columns.text_pair is not None
        marks = self.tokenizer.num_special_tokens_to_add(pair)
        if pair and not marks:
            raise ValueError(
                f"data.tokenizer must put a mark between two texts, but {self._decided_spec} has none; "
                f"bert-uncased-bpe-8192 is one that does"
            )
        if self.max_seq_len <= marks + pair:
            raise ValueError(
                f"data.max_seq_len must leave room for text beside {marks} special tokens, but is {self.max_seq_len}"
            )

    # How batches are made.

    def _make_readable(self, split: Split) -> Collation:
        texts, pair = split.column(self.columns.text), self.columns.text_pair
        return self._collated(texts, split.column(pair) if pair else None, split.labels, self.max_seq_len)

    def _lengths(self, readable: Collation) -> np.ndarray | None:
        return readable.lengths if self.length_grouping else None
