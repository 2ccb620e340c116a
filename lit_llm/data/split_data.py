"""Base class of data modules with examples in splits: checks, the choice of what is predicted, and resuming."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from lightning.pytorch import LightningDataModule

from lit_llm.data import changes
from lit_llm.data.arguments import require_counts, require_fractions
from lit_llm.data.sampling import BatchLoader, data_parallel_rank
from lit_llm.data.table_files import UNLABELLED_TEST, split_kind
from lit_llm.data.tables import Split

log = logging.getLogger(__name__)


class SplitData(LightningDataModule, ABC):
    """Examples of a source that has splits or is cut into them; a source other than the run's own is predicted whole.

    If an evaluation is given another source than the run's own, without a table to train on, its table is validated or
    tested on by itself, with the checkpoint's classes. The run's own source must therefore be known before any table is
    opened: the command line calls `expect`.

    A subclass defines what a source's splits are, and how a split's rows become batches. Subclasses document the
    arguments.

    Raises:
        ValueError: When a value is out of range.
    """

    doubt: str | None = None
    """Why rows that were trained on may be among the evaluated ones; `None` if there is no such doubt."""

    columns: Any
    """Which columns of the source hold an example, as a dataclass; available once `splits` has been read."""

    def __init__(
        self,
        path: str,
        subset: str | None,
        batch_size: int,
        validation_fraction: float,
        test_fraction: float,
        seed: int,
    ) -> None:
        super().__init__()
        require_counts(batch_size=batch_size)
        require_fractions(validation_fraction, test_fraction)
        self.path, self.subset, self.batch_size, self.seed = path, subset, batch_size, seed
        self.validation_fraction, self.test_fraction = validation_fraction, test_fraction
        self._readable: dict[str, Any] = {}
        self._trained_on: dict[str, Any] | None = None
        # The source's own tables, before anything is cut out of `train`.
        self.tables: dict[str, Dataset] = {}
        self._contents: tuple[Any, ...] = (None, None, {})

    # What a subclass defines.

    @abstractmethod
    def _find_splits(self) -> dict[str, Split]:
        """The splits by name."""

    @abstractmethod
    def _make_readable(self, split: Split) -> Any:
        """The examples of a split, ready to be cut into batches."""

    @abstractmethod
    def _loader(self, name: str, seed: int | None = None, share: bool = True) -> BatchLoader:
        """Batches of a split, shuffled by a seed or the longest first; divided among the processes if `share`."""

    # Properties read by callbacks.

    @property
    def predict_split(self) -> str:
        """The split that `predict` reads: the unlabelled test split, else the test split, else the validation split.

        A source other than the run's own is one test split; the run's own source falls back on `train`.
        """
        return next(name for name in (UNLABELLED_TEST, "test", "validation", "train") if name in self.splits)

    def texts(self, split: str, rows: list[int]) -> list[dict[str, Any]]:
        """All columns of some examples, as the source has them."""
        return [self.splits[split].rows[row] for row in rows]

    # Splits.

    @cached_property
    def splits(self) -> dict[str, Split]:
        """The examples: `train`, `validation`, `test`, `unlabelled test` and `unlabelled`, as far as they exist."""
        return self._find_splits()

    @property
    def _is_own(self) -> bool | None:
        """Whether the source is the one that the checkpoint was trained on; `None` if that is unknown."""
        if not self._trained_on:
            return None
        here, there = (Path(path).expanduser().resolve() for path in (self.path, self._trained_on["path"]))
        return (here, self.subset) == (there, self._trained_on["subset"])

    def _contents_of(self, columns: dict[str, str | None]) -> dict[str, list[int]]:
        """Number of rows of each table that is trained on, and a hash of the given columns; computed once."""
        _ = self.splits
        if self._contents[0] is not self.tables or self._contents[1] != columns:
            found = {}
            for name in [name for name in ("train", "unlabelled") if name in self.tables]:
                rows = self.tables[name]
                digest = hashlib.blake2b(digest_size=8)
                for column in filter(rows.column_names.__contains__, columns.values()):
                    for some in rows.select_columns([column]).iter(10_000):
                        digest.update("\0".join(map(str, some[column])).encode("utf-8", "surrogatepass") + b"\0")
                found[name] = [len(rows), int.from_bytes(digest.digest(), "big")]
            self._contents = self.tables, columns, found
        return self._contents[2]

    def _change(self) -> str | None:
        """How the tables have changed since the checkpoint was trained; `None` if no change is known."""
        then = (self._trained_on or {}).get("contents")  # missing in older checkpoints
        if not then or not self._is_own:
            return None
        now = self._contents_of(self._trained_on["columns"])
        for name in sorted(then.keys() | now.keys()):
            before, after = (of.get(name, [0, 0]) for of in (then, now))
            if found := changes.difference(name, self.path, "rows", list(before), list(after)):
                return found
        cut = self._cut
        return changes.recut(self.path, self._trained_on.get("cut") or cut, cut)

    @property
    def _cut(self) -> dict[str, float]:
        """Fraction of the training table that is cut out for each split; 0 if the source has that split."""
        own = self.tables.keys() - ({"test"} if UNLABELLED_TEST in self.splits else set())
        fractions = {"validation": self.validation_fraction, "test": self.test_fraction}
        return {name: 0.0 if name in own else fraction for name, fraction in fractions.items()}

    def require_unchanged(self, state_dict: dict[str, Any]) -> None:
        """Refuses to resume from a checkpoint if its tables have changed, because the splits would be cut differently.

        Raises:
            ValueError: When they have changed.
        """
        self._trained_on = state_dict.get("trained_on", {})
        if change := self._change():
            raise changes.refusal("rows", change)

    def _known_columns(self, rows: Dataset) -> dict[str, str]:
        """Columns by role that the checkpoint was trained on and a table to evaluate has too; none when fitting."""
        known = (self._trained_on or {}).get("columns", {}) if self._stage != "fit" else {}
        return {role: name for role, name in known.items() if name in rows.column_names}

    def _whole_to_predict(self, found: dict[str, Dataset], wanted: str | None) -> dict[str, Split] | None:
        """A table to predict as a whole; `None` if the tables are the run's own, or nothing is predicted.

        Args:
            found: The tables.
            wanted: Their column of labels or target texts. If it is unknown whether the tables are the run's own,
                several tables with such a column are taken for its own.
        """
        own = (len(found) > 1 and wanted is not None) if self._is_own is None else self._is_own
        if not self._predicting or own:
            return None
        return {"test": Split(next(reversed(found.values())), None)}

    def _standing_alone(self, found: dict[str, Dataset]) -> dict[str, Split] | None:
        """A table, not the run's own, to validate or test on without a training table beside it; `None` otherwise."""
        file, kinds = Path(self.path).expanduser(), found
        if file.is_file() and len(found) == 1:
            kinds = {split_kind(file.stem): rows for rows in found.values()}
        if self._stage not in ("validate", "test") or self._is_own is not False or {"train", None} & kinds.keys():
            return None
        wanted = "validation" if self._stage == "validate" else "test"
        return {wanted: Split(kinds.get(wanted, next(reversed(kinds.values()))), None)}

    @property
    def _stage(self) -> str | None:
        """What the trainer does: `fit`, `validate`, `test` or `predict`."""
        return None if self.trainer is None else self.trainer.state.fn

    @property
    def _predicting(self) -> bool:
        return self._stage == "predict"

    @property
    def _awaits_checkpoint(self) -> bool:
        """Whether a checkpoint has yet to say what it was trained on, which decides what is predicted."""
        return self._predicting and self._trained_on is None

    # Lightning's hooks.

    def setup(self, stage: str) -> None:
        """Refuses data that is insufficient for `stage`.

        Raises:
            ValueError: When there is too little to train on, or nothing to validate on.
        """
        if stage != "fit":
            return
        rows, devices = len(self.splits["train"]), data_parallel_rank(self.trainer)[1]
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
        """Examples in a new random order each epoch."""
        return self._loader("train", self.seed)

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """All examples of the validation split, the longest first, each once whatever the number of processes.

        Where the trainer is to take but some of the batches, they come in another order, that those are like all.
        """
        return self._evaluated("validation", "limit_val_batches")

    def ordered_dataloader(self, split: str, share: bool = True) -> BatchLoader | list[Any]:
        """All examples of any split, the longest first and unaugmented; divided among the processes if `share`."""
        return self._loader(split, share=share) if split in self.splits else []

    def test_dataloader(self) -> BatchLoader | list[Any]:
        """All examples of the test split, as in validation."""
        return self._evaluated("test", "limit_test_batches")

    def _evaluated(self, split: str, limit: str) -> BatchLoader | list[Any]:
        other = self._is_own is False and self._stage != "fit"
        if other and {"train", split} <= self.splits.keys() and self._cut[split]:
            some, whole = len(self.splits[split]), len(self.tables["train"])
            log.warning(
                f"Evaluating {some:,} of the {whole:,} rows of {self.path}, the part that training on it would leave "
                f"for {split}; a table called {split} is evaluated whole"
            )
        loader, taken = self.ordered_dataloader(split), getattr(self.trainer, limit, 1.0)
        if isinstance(loader, BatchLoader):
            loader.mixed = isinstance(taken, int) or taken < 1.0  # a whole number counts batches
        return loader

    def predict_dataloader(self) -> BatchLoader | list[Any]:
        """All examples of the split to predict, labelled or not."""
        self._trained_on = self._trained_on or {}  # no checkpoint is loaded after this
        split = self.predict_split
        count = len(self.splits[split])
        if "train" not in self.splits:
            of = f"the {next(reversed(self.tables))} split of {self.path}" if len(self.tables) > 1 else self.path
            log.info(f"Predicting all {count:,} rows of {of}")
        else:
            alone = ", on which it was trained, as there is no other split" if split == "train" else ""
            log.info(f"Predicting the {count:,} rows of the {split} split of {self.path}{alone}")
        return self.ordered_dataloader(split)

    def state_dict(self) -> dict[str, Any]:
        """What identifies the training data: its source, columns, contents and the fractions that are cut out."""
        columns = asdict(self.columns)
        rows = {"columns": columns, "contents": self._contents_of(columns), "cut": self._cut}
        return {"trained_on": {"path": self.path, "subset": self.subset, **rows}}

    def expect(self, state_dict: dict[str, Any]) -> None:
        """Records, before any table is opened, what a checkpoint that is about to be loaded was trained on."""
        self._trained_on = state_dict.get("trained_on", {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Records what a checkpoint was trained on; warns if that may be among what is evaluated.

        Raises:
            ValueError: When training would resume with a source that has changed.
        """
        if self._stage == "fit":
            self.require_unchanged(state_dict)
        self._trained_on = state_dict.get("trained_on", {})  # missing in older checkpoints
        if self._predicting and "train" not in self.__dict__.get("splits", ["train"]):  # read before that was known
            self.__dict__.pop("splits")
            self._readable = {}
        if self._stage in ("validate", "test", "predict") and (change := self._change()):
            split = {"validate": "validation", "test": "test"}.get(self._stage) or self.predict_split
            source = "test" if split == UNLABELLED_TEST else split
            if source not in self.tables or (split == "test" and UNLABELLED_TEST in self.splits):
                self.doubt = changes.doubt("rows", split, change)
                log.warning(self.doubt)

    def _read(self, name: str) -> Any:
        if name not in self._readable:
            self._readable[name] = self._make_readable(self.splits[name])
        return self._readable[name]
