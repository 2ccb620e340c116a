"""Text classification and regression: the GLUE tasks, the embedded one, and any table shaped like them."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from lit_llm.batch import ExampleBatch
from lit_llm.data.augmentation import TextAugmentation
from lit_llm.data.collation import Collation
from lit_llm.data.docmatch import NAME, open_docmatch
from lit_llm.data.glue_tasks import DOCMATCH, TASKS, Submission
from lit_llm.data.labels import LabelReader, few_of, is_hidden, labelled_splits, require_seen, some_of
from lit_llm.data.sampling import BatchLoader
from lit_llm.data.table_tokenizer import tokenizer_files, trained_tokenizer
from lit_llm.data.tables import Split, both, check_texts, choose_splits, column_values, find_columns, open_table
from lit_llm.data.tokenizer import load_tokenizer, training_of

log = logging.getLogger(__name__)


class GLUEData(LightningDataModule):
    """Examples of one or two texts with a label: a class, or a real number.

    Texts are tokenised once. A batch is cut at once and padded to its own longest example; examples of about one length
    come together, so that little is padding.

    Args:
        task: A GLUE task: `cola`, `sst2`, `mrpc`, `stsb`, `qqp`, `mnli`, `mnli_mismatched` (which validates on other
            genres), `qnli`, `rte` or `wnli`. `None` for any other table.
        path: `stdlib-docmatch` (the default without a task: does a docstring of Python's library describe a function?),
            a table (`.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`), a folder of tables called `train`, `validation` and
            `test`, a folder in the hub's layout, or a data set on the hub (with a task by default `nyu-mll/glue`).
        subset: Configuration of a hub data set; with a task its name.
        text: Column of the text, or of the first of two; may be left out where there is one obvious choice.
        text_pair: Column of the second text.
        label: Column of the label. Whole numbers and text are classes, real numbers are values.
        tokenizer: `bert-bpe-<size>`, trained on these training texts; a folder with a `tokenizer.json`; or a name on
            the hub. By default the one beside the network's weights, or for a network without, `bert-bpe-4096`.
        max_seq_len: Tokens after which an example is cut, special tokens included; of two texts the longer one is.
        batch_size: Examples in a batch of one device.
        validation_fraction: Part of the training split to validate on, where the source has no validation split: of
            each class the same, by a hash of the texts. 0 for none.
        test_fraction: The same for a test split.
        max_examples: Train on at most so many, drawn with the seed in the proportions of the classes.
        labels_per_class: Train on so many of each class as labelled, drawn with the seed; the others of the training
            split become unlabelled, as those of a split called `unlabelled` or `unsupervised` are.
        unlabelled_ratio: For semi-supervised training: so many unlabelled examples in a batch for each labelled one,
            as they are and augmented; labelled ones are then not augmented. An epoch is one pass over the unlabelled
            ones; labelled ones come again as often as is needed. 0 leaves the unlabelled ones out.
        balance_classes: Draw each class equally often.
        length_grouping: Put examples of about one length into a batch; not the few of `labels_per_class`, which would
            then always come in the same company.
        augmentation: Changes training examples, anew in each epoch.
        seed: Of the order in which examples are drawn, and of the augmentation.

    Raises:
        ValueError: When the table has no such columns, a label is missing or new, or there are too few examples.

    Example:
        >>> folder = Path(__import__("tempfile").mkdtemp())
        >>> _ = (folder / "x.csv").write_text("text,label\\n" + "good,yes\\nbad,no\\n" * 20)
        >>> data = GLUEData(path=str(folder / "x.csv"), tokenizer="bert-bpe-260", batch_size=4)
        >>> data.prepare_data(); data.setup("fit")
        >>> data.class_names, sorted(next(iter(data.train_dataloader())))
        (['no', 'yes'], ['attention_mask', 'input_ids', 'labels', 'rows', 'token_type_ids'])
    """

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
        super().__init__()
        if task is not None and task not in TASKS:
            raise ValueError(f"data.task must be one of {', '.join(TASKS)}, but is {task!r}")
        counts = {"max_seq_len": max_seq_len, "batch_size": batch_size, "max_examples": max_examples}
        counts["labels_per_class"] = labels_per_class
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, but is {value}")
        if unlabelled_ratio < 0:
            raise ValueError(f"data.unlabelled_ratio must be at least 0, but is {unlabelled_ratio}")
        if validation_fraction < 0 or test_fraction < 0 or validation_fraction + test_fraction >= 1:
            raise ValueError(
                f"data.validation_fraction and data.test_fraction must be at least 0 and leave something to train on, "
                f"but are {validation_fraction} and {test_fraction}"
            )
        self.path = path or ("nyu-mll/glue" if task else NAME)
        self.task = TASKS[task] if task else DOCMATCH if self.path == NAME else None
        # The two of MNLI are one data set on the hub.
        self.subset = subset or (task and task.removesuffix("_mismatched"))
        self.given = {"text": text, "text_pair": text_pair, "label": label}
        self.tokenizer_spec = tokenizer
        self.max_seq_len, self.batch_size = max_seq_len, batch_size
        self.validation_fraction, self.test_fraction = validation_fraction, test_fraction
        self.max_examples, self.balance_classes, self.length_grouping = max_examples, balance_classes, length_grouping
        self.labels_per_class, self.unlabelled_ratio = labels_per_class, unlabelled_ratio
        self.augmentation, self.seed = augmentation, seed
        self.reader: LabelReader | None = None
        self._collations: dict[str, Collation] = {}

    # Facts that objectives, callbacks and model directories ask for.

    @property
    def monitor(self) -> tuple[str, str] | None:
        """The task's headline metric and whether its `max` is best; `None` for a table without a task."""
        return self.task and (f"val/{self.task.metric}", "max")

    @property
    def submission(self) -> Submission | None:
        """What a GLUE task's board wants; `None` for other data."""
        return self.task and self.task.submission

    @property
    def class_names(self) -> list[str]:
        """What the classes are called, in their order; empty where labels are values. As all facts, from `setup` on."""
        return self.reader.class_names if self.reader else []

    @property
    def num_classes(self) -> int | None:
        """Number of classes; `None` where labels are values."""
        return len(self.class_names) or None

    @property
    def num_targets(self) -> int | None:
        """1 where labels are values; `None` where they are classes."""
        return None if self.reader is None or self.class_names else 1

    @property
    def class_counts(self) -> list[int]:
        """Labelled training examples of each class."""
        return np.bincount(self.splits["train"].labels, minlength=len(self.class_names)).tolist()

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.tokenizer)

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

    @property
    def predict_split(self) -> str:
        """The split that `predict` reads: the test split, or where there is none the validation split.

        All of a single table, or of one without labels, is a test split then.
        """
        return "test" if "test" in self.splits else "validation"

    def label_name(self, index: int) -> str:
        """What a class is called."""
        return self.class_names[index]

    def texts(self, split: str, rows: list[int]) -> list[dict[str, Any]]:
        """All columns of some examples, as the source has them."""
        return [self.splits[split].rows[row] for row in rows]

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Reads the table, and trains the tokeniser where it is to be trained."""
        if "train" in self.splits:
            self._require_marks()

    def setup(self, stage: str) -> None:
        """Refuses data that cannot do what `stage` needs.

        Raises:
            ValueError: When there is too little to train on, or nothing to validate or to test on.
        """
        if stage == "test" and not self._testable:
            raise ValueError(
                f"data.path must hold a test split with labels to test on, but {self.path} has none; raise "
                f"data.test_fraction where the checkpoint was trained, or predict"
            )
        if stage != "fit":
            return
        rows, devices = len(self.splits["train"]), self._place[1]
        if rows < self.batch_size * devices:
            raise ValueError(
                f"data.batch_size must be at most the examples there are to train on, but is {self.batch_size} on "
                f"{devices} devices where {self.path} has {rows}; lower it"
            )
        if self.unlabelled_ratio:
            unlabelled = len(self.splits["unlabelled"]) if "unlabelled" in self.splits else 0
            if unlabelled < self.unlabelled_ratio * self.batch_size * devices:
                raise ValueError(
                    f"data.unlabelled_ratio must leave a batch of data.batch_size within the unlabelled examples, but "
                    f"is {self.unlabelled_ratio} with batches of {self.batch_size} on {devices} devices where "
                    f"{self.path} has {unlabelled}; lower one, or set data.labels_per_class"
                )
        if self.balance_classes and not self.class_names:
            raise ValueError("data.balance_classes must be false where labels are real numbers, but is true")
        if self.validation_fraction and "validation" not in self.splits:
            raise ValueError(
                f"data.validation_fraction must leave an example to validate on, but is {self.validation_fraction}, "
                f"which takes none of the {rows} of {self.path}; raise it, or set it to 0 to go without"
            )

    def train_dataloader(self) -> BatchLoader:
        """Examples in an order drawn anew each epoch."""
        labelled = self._loader("train", self.seed)
        if not self.unlabelled_ratio:
            return labelled
        read, unlabelled = self._collation("train"), self._collation("unlabelled")

        def cut(rows: np.ndarray) -> ExampleBatch:
            batch = read.batch(labelled.rows(loader.epoch * len(loader) + loader.batch))
            batch["unlabelled"] = unlabelled.batch(rows)
            batch["unlabelled_strong"] = unlabelled.batch(rows, self.augmentation, (self.seed, loader.epoch))
            return batch

        size, lengths = self.batch_size * self.unlabelled_ratio, unlabelled.lengths if self.length_grouping else None
        loader = BatchLoader(cut, len(unlabelled), size, self.seed, *self._place, lengths)
        return loader

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """All examples of the validation split, the longest first, each once whatever the number of processes."""
        return self.ordered_dataloader("validation")

    def ordered_dataloader(self, split: str, share: bool = True) -> BatchLoader | list[Any]:
        """All examples of any split, the longest first and as they are; shared out among the processes, or not."""
        return self._loader(split, share=share) if split in self.splits else []

    def test_dataloader(self) -> BatchLoader | list[Any]:
        """All examples of the test split, as in validation; none where it has no labels."""
        return self.ordered_dataloader("test") if self._testable else []

    def predict_dataloader(self) -> BatchLoader | list[Any]:
        """All examples of the split to predict, with labels or without."""
        return self.ordered_dataloader(self.predict_split)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to read texts and to name classes on its own."""
        return {"tokenizer": self._tokenizer_files, "labels": [list(self.reader.values), list(self.class_names)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint whose tokens or classes mean something else; a table to predict as a whole takes both.

        Raises:
            ValueError: When the checkpoint's tokeniser or classes are not this data's.
        """
        values, names = state_dict["labels"]
        if "train" not in self.splits:
            with tempfile.TemporaryDirectory() as folder:
                for name, text in state_dict["tokenizer"].items():
                    (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
                self.tokenizer = load_tokenizer(folder)
            rows, column = self.splits["test"].rows, self.columns.label
            self.reader = LabelReader(self.path, column or "", tuple(values), names)
            if column is not None and not is_hidden(rows, column):
                self.splits["test"] = Split(rows, self.reader.read(column_values(rows, column), "test"))
        elif self.class_names != names:
            raise ValueError(
                f"data.label must have the checkpoint's classes, {', '.join(names) or 'none'}, but has "
                f"{', '.join(self.class_names) or 'none'} in {self.path}"
            )
        elif self._tokenizer_files["tokenizer.json"] != state_dict["tokenizer"]["tokenizer.json"]:
            raise ValueError(
                f"data.tokenizer must be the checkpoint's, but is {self._tokenizer_spec} of {self.path}, which differs"
            )

    # How examples are read.

    @cached_property
    def splits(self) -> dict[str, Split]:
        """The examples: `train`, `validation` and `test`, as far as there are such."""
        found = self._open()
        unlabelled = found.pop("unlabelled", None) if "train" in found else None
        if not found:
            raise ValueError(f"data.path must hold a split to read, but {self.path} has none")
        first = found["train"] if "train" in found else next(iter(found.values()))
        given = {
            role: name or getattr(self.task and self.task.columns, role, None) for role, name in self.given.items()
        }
        if self._predicting and given["label"] not in first.column_names:
            given["label"] = None
        self.columns = find_columns(first, self.path, **given)
        for name, rows in [*found.items(), *([("unlabelled", unlabelled)] if unlabelled is not None else [])]:
            check_texts(rows, self.columns.texts, self.path, name)
        if self._predicting and (len(found) == 1 or self.columns.label is None):
            rows = next(reversed(found.values()))
            log.info(f"Predicting all {len(rows):,} rows of {self.path}")
            return {"test": Split(rows, None)}  # what its labels mean, the checkpoint says
        names, fractions = self.task.class_names if self.task else (), (self.validation_fraction, self.test_fraction)
        splits, self.reader = labelled_splits(found, self.columns, self.path, names, *fractions)
        if self.max_examples is not None:
            splits["train"] = some_of(splits["train"], self.max_examples, self.seed)
            require_seen(splits, self.reader)
        if unlabelled is not None:
            splits["unlabelled"] = Split(unlabelled, None)
        if self.labels_per_class is not None:
            splits["train"], rest = few_of(splits["train"], self.labels_per_class, self.seed, self.path)
            splits["unlabelled"] = rest if unlabelled is None else both(rest, splits["unlabelled"])
        return splits

    def _open(self) -> dict[str, Dataset]:
        if self.path == NAME:
            return open_docmatch()
        return choose_splits(open_table(self.path, self.subset), self.path, self.task.splits if self.task else "")

    @property
    def _testable(self) -> bool:
        return "test" in self.splits and self.splits["test"].labels is not None

    @property
    def _predicting(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == "predict"

    # How texts become tokens.

    @property
    def _tokenizer_spec(self) -> str:
        network = getattr(self.trainer, "lightning_module", None)
        return self.tokenizer_spec or getattr(network, "tokenizer_path", None) or "bert-bpe-4096"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokeniser; of a table without labels that is predicted, the checkpoint's, once that is read."""
        spec = str(self._tokenizer_spec)
        if training_of(spec) is None:
            return load_tokenizer(spec)
        if "train" not in self.splits:
            raise AttributeError("tokenizer")  # so that who asks what data has finds none
        splits, columns = [self.splits["train"]], (self.columns.text, self.columns.text_pair)
        splits += [self.splits["unlabelled"]] if "unlabelled" in self.splits else []
        texts = [text for split in splits for name in columns if name for text in split.column(name)]
        return trained_tokenizer(spec, texts)

    @cached_property
    def _tokenizer_files(self) -> dict[str, str]:
        return tokenizer_files(self.tokenizer)

    def _require_marks(self) -> None:
        pair = self.columns.text_pair is not None
        marks = self.tokenizer.num_special_tokens_to_add(pair)
        if pair and not marks:
            raise ValueError(
                f"data.tokenizer must put a mark between two texts, but {self._tokenizer_spec} has none; "
                f"bert-bpe-4096 is one that does"
            )
        if self.max_seq_len <= marks + pair:
            raise ValueError(
                f"data.max_seq_len must leave room for text beside {marks} special tokens, but is {self.max_seq_len}"
            )

    # How batches are made.

    def _collation(self, name: str) -> Collation:
        if name not in self._collations:
            split, pair = self.splits[name], self.columns.text_pair
            texts, pairs = split.column(self.columns.text), split.column(pair) if pair else None
            self._collations[name] = Collation(texts, pairs, split.labels, self.tokenizer, self.max_seq_len)
        return self._collations[name]

    @property
    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, name: str, seed: int | None = None, share: bool = True) -> BatchLoader:
        collation = self._collation(name)
        augmentation = None if seed is None else self.augmentation

        def cut(rows: np.ndarray) -> ExampleBatch:
            return collation.batch(rows, augmentation, (self.seed, loader.epoch))

        few = name == "train" and self.labels_per_class is not None
        lengths = collation.lengths if self.length_grouping and not few else None
        classes = collation.labels if self.balance_classes and seed is not None else None
        place = self._place if share else (0, 1)
        loader = BatchLoader(cut, len(collation), self.batch_size, seed, *place, lengths, classes)
        return loader
