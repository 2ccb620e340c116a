"""Order of rows: shuffling and sharding as pure functions of seed, epoch and step."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

log = logging.getLogger(__name__)


def data_parallel_rank(trainer: Any) -> tuple[int, int]:
    """Data-parallel rank of this process, and how many there are; tensor-parallel processes read the same rows."""
    if trainer is None:
        return 0, 1
    share = getattr(trainer, "distributed_sampler_kwargs", None)
    return (share["rank"], share["num_replicas"]) if share else (trainer.global_rank, trainer.world_size)


def resume_epoch(fit_loop: Any) -> None:
    """On resuming, recounts the batches of the epoch that are done, and starts at the beginning of an optimiser step.

    Lightning restores the old count, which is wrong if the batch size, the number of rows or the number of ranks has
    changed: the epoch would end too early, or too late and without its validation. A checkpoint does not hold the
    accumulated gradients of an unfinished step, so the batches of that step are read again. A finished epoch stays
    finished. If the number of batches per epoch is limited, Lightning's count is kept, and batches continue past the
    end of the rows so that all epochs have the same length.

    Args:
        fit_loop: Lightning's fit loop, restored from a checkpoint, before it takes a batch.
    """
    # If the run's length is given in epochs, the schedule has built the loaders before there was a position to restore;
    # after a whole epoch Lightning restores none.
    loader, progress = fit_loop._combined_loader.flattened[0], fit_loop.epoch_loop.batch_progress
    if fit_loop.restarting or progress.is_last_batch:
        fit_loop._combined_loader._load_state_dicts(fit_loop._combined_loader_states_to_load)
        fit_loop._combined_loader_states_to_load = []
    if not isinstance(loader, BatchLoader):
        return
    loader.endless = len(loader) != fit_loop.max_batches
    if not fit_loop.restarting or loader.endless:
        return
    begun = 0 if progress.is_last_batch else loader.batch % fit_loop.trainer.accumulate_grad_batches
    loader.batch -= begun
    moved = (len(loader) if progress.is_last_batch else loader.batch) - progress.current.ready
    for counts, change in ((progress.current, moved), (progress.total, -begun)):
        for name, count in vars(counts).items():
            setattr(counts, name, count + change)


class BatchLoader:
    """Yields whole batches from random-access data; the position is an epoch and a batch number.

    The rows of batch `b` of epoch `e` depend only on the seed, `e`, `b` and the rank, so resuming replays nothing, at
    step one hundred or one million. A batch is gathered in one call, so there is nothing for worker processes to do.

    Args:
        cut: Makes a batch from an array of row indices.
        num_rows: Number of rows.
        batch_size: Rows per batch and rank.
        shuffle_seed: Seed of the order, which is drawn anew each epoch. `None` keeps the rows in order, gives each to
            exactly one rank and keeps the last, smaller batch. Several ranks then have equally many batches, whose
            sizes differ by at most one row, because ranks that share weights must take each step together.
        rank: Data-parallel rank of this process.
        world_size: Number of data-parallel ranks.
        lengths: Length of each row: shuffled batches then hold rows of similar length, and unshuffled rows come longest
            first. An epoch that is resumed with another batch size continues with other rows.
        classes: Class of each row, from 0: classes are drawn equally often; the length of an epoch does not change.
        weights: Weight of each class: classes are drawn in proportion to their weights.

    Attributes:
        endless: Whether shuffled rows continue into the next epoch, for a loop that stops by itself.
        mixed: Whether batches of unshuffled rows come in a fixed random order, for a loop that reads only some of them.

    Raises:
        ValueError: When the seed is negative, or unshuffled rows are fewer than the ranks.
    """

    def __init__(
        self,
        cut: Callable[[np.ndarray], Any],
        num_rows: int,
        batch_size: int,
        shuffle_seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        lengths: np.ndarray | None = None,
        classes: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        if shuffle_seed is not None and shuffle_seed < 0:
            raise ValueError(f"data.seed must be at least 0, but is {shuffle_seed}")
        if shuffle_seed is None and 0 < num_rows < world_size:
            raise ValueError(
                f"trainer.devices must leave each process a row to evaluate, but {world_size} processes would share "
                f"{num_rows}; take fewer, or raise data.validation_fraction or data.test_fraction"
            )
        self.cut = cut
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.rank, self.world_size = rank, world_size
        self.lengths, self.classes, self.weights = lengths, classes, weights
        self.epoch = self.batch = 0
        self.endless = self.mixed = False
        self._drawn: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Batches of one epoch, for this rank."""
        if self.shuffle_seed is not None:
            return self.num_rows // (self.batch_size * self.world_size)
        # The same on each rank, and no batch without a row.
        return min(-(-self.num_rows // (self.batch_size * self.world_size)), self.num_rows // self.world_size)

    def __iter__(self) -> Iterator[Any]:
        """Continues from the current position to the end of its epoch; unshuffled rows always start at the first."""
        order = self._order(self.epoch)
        first = self.batch if self.shuffle_seed is not None else 0
        even = self.shuffle_seed is None and self.world_size > 1
        mixed = np.random.default_rng(0).permutation(len(self)).tolist() if self.mixed else range(len(self))
        for batch in range(first, len(self)):
            start, end = (
                n * len(order) // len(self) if even else n * self.batch_size for n in (mixed[batch], mixed[batch] + 1)
            )  # slicing shortens the last one
            cut = self.cut(order[start:end])  # before the position moves on, because `cut` may read it
            # Set before the batch is yielded, so that it is right even if the reading loop stops early.
            self.epoch, self.batch = (self.epoch, batch + 1) if batch + 1 < len(self) else (self.epoch + 1, 0)
            yield cut
        if self.endless and self.shuffle_seed is not None and len(self):
            yield from iter(self)

    def rows(self, number: int) -> np.ndarray:
        """The rows of a batch whose number counts from the start of the first epoch; does not move the position."""
        epoch, batch = divmod(number, len(self))
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._order(epoch)
        return self._drawn[1][batch * self.batch_size : (batch + 1) * self.batch_size]

    def _order(self, epoch: int) -> np.ndarray:
        if self.shuffle_seed is None:
            order = np.arange(self.num_rows) if self.lengths is None else np.argsort(-self.lengths, kind="stable")
            return order[self.rank :: self.world_size]
        chance = np.random.default_rng((self.shuffle_seed, epoch))
        if self.classes is None:
            order = chance.permutation(self.num_rows)
        else:
            order = balanced(self.classes, chance, self.weights)
        # Batch by batch, so that a global batch holds the same rows however many ranks share it.
        order = order[: len(self) * self.batch_size * self.world_size]
        if self.lengths is not None:
            order = grouped(order, self.lengths, self.batch_size * self.world_size, chance)
        return order.reshape(len(self), self.batch_size, self.world_size)[:, :, self.rank].ravel()

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch, and how many of its rows all ranks together have read."""
        return {"epoch": self.epoch, "row": self.batch * self.batch_size * self.world_size, "num_rows": self.num_rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores a position, also after a change of the batch size or the number of ranks.

        If the number of rows has changed, starts from the beginning. An unfinished epoch always has at least its last
        batch left, some rows of which may be read twice.
        """
        self.epoch, self.batch = state["epoch"], state["row"] // (self.batch_size * self.world_size)
        if state["num_rows"] != self.num_rows:
            log.info(
                f"The data are read from their beginning: they have {self.num_rows:,} rows now, and had "
                f"{state['num_rows']:,} when the checkpoint was written"
            )
            self.epoch = self.batch = 0
        self.batch = min(self.batch, max(len(self) - 1, 0))


def grouped(order: np.ndarray, lengths: np.ndarray, batch_size: int, chance: np.random.Generator) -> np.ndarray:
    """Reorders rows so that each batch holds rows of similar length.

    Rows are sorted by length within every fifty batches; then all batches are shuffled, so that long and short ones
    come in random order. Which rows share a batch differs from epoch to epoch. The Hugging Face Trainer's
    `group_by_length` does the same, but leaves the batches of each fifty sorted by length.

    Args:
        order: Rows in random order; their number is a multiple of `batch_size`.
        lengths: Length of each row.
        batch_size: Rows in a batch of all ranks together.
        chance: Random generator that shuffles the batches.

    Example:
        >>> lengths = np.array([9, 1, 8, 2, 1, 9])
        >>> order = grouped(np.arange(6), lengths, batch_size=2, chance=np.random.default_rng(0))
        >>> lengths[order].reshape(3, 2).tolist()
        [[9, 9], [1, 1], [2, 8]]
    """
    fifties = np.arange(len(order)) // (50 * batch_size)
    batches = order[np.lexsort((lengths[order], fifties))].reshape(-1, batch_size)
    return chance.permutation(batches).ravel()


def balanced(classes: np.ndarray, chance: np.random.Generator, weights: np.ndarray | None = None) -> np.ndarray:
    """Draws as many rows as there are, in random order, such that each class gets exactly its share.

    A class with too many rows loses some; rows of a class with too few repeat, none for the third time before all have
    come twice, and so on. Shares are rounded down to whole rows; the remaining rows go to the classes with the largest
    remainders, ties broken at random.

    Args:
        classes: Class of each row, from 0.
        chance: Random generator.
        weights: Weight of each class; its share is its weight divided by the sum. `None` gives equal shares.

    Example:
        >>> order = balanced(np.array([0, 0, 0, 0, 1, 1]), np.random.default_rng(0))
        >>> sorted(order[order > 3].tolist()), len(order)
        ([4, 4, 5], 6)
        >>> order = balanced(np.array([0, 0, 0, 0, 0, 1]), np.random.default_rng(0), weights=np.array([1, 2]))
        >>> int((order == 5).sum())
        4
    """
    kinds = chance.permutation(np.unique(classes))
    weights = np.ones(len(kinds)) if weights is None else weights[kinds]
    shares = len(classes) * weights / weights.sum()
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: len(classes) - counts.sum()]] += 1
    drawn = []
    for kind, wanted in zip(kinds, counts, strict=True):
        mine = np.flatnonzero(classes == kind)
        rounds = [chance.permutation(mine) for _ in range(-(-wanted // len(mine)))]
        drawn.append(np.concatenate([mine[:0], *rounds])[:wanted])
    return chance.permutation(np.concatenate(drawn))


class StreamLoader:
    """Yields batches cut from a stream of token lists that is too long to store, or endless.

    The position is the number of documents read and the tokens left over from them. Resuming reads and cleans the
    earlier documents again, but does not tokenise them. A checkpoint holds only the first rank's position, so a run
    with several ranks cannot be resumed.

    Args:
        tokens: Starts this rank's stream after skipping the given number of documents; yields the tokens of each.
        cut: Makes a batch from a stream of tokens and the indices of its rows.
        seq_len: Tokens per row.
        batch_size: Rows per batch and rank.
        world_size: Number of data-parallel ranks.
    """

    def __init__(
        self,
        tokens: Callable[[int], Iterator[list[int]]],
        cut: Callable[[np.ndarray, np.ndarray], Any],
        seq_len: int,
        batch_size: int,
        world_size: int = 1,
    ) -> None:
        self.tokens, self.cut = tokens, cut
        self.world_size = world_size
        self.seq_len, self.batch_size = seq_len, batch_size
        self.documents = 0
        self._buffer: list[int] = []
        self._start = 0  # everything before it in the buffer has been used
        if world_size > 1:
            log.info(f"A run that streams its data in several processes, here {world_size}, cannot be resumed")

    def __len__(self) -> int:
        """Practically infinite; because there is a length, Lightning prefetches no batch and the position is exact."""
        return sys.maxsize

    def __iter__(self) -> Iterator[Any]:
        """Continues from the current position; starts over when the stream ends."""
        wanted = self.batch_size * self.seq_len + 1
        while True:
            started = self.documents
            for ids in self.tokens(self.documents):
                self.documents += 1
                self._buffer += ids
                while len(self._buffer) - self._start >= wanted:
                    block = np.array(self._buffer[self._start : self._start + wanted])
                    self._start += wanted - 1
                    yield self.cut(block, np.arange(self.batch_size))
                del self._buffer[: self._start]
                self._start = 0
            if started == 0 == self.documents:
                return
            self.documents = 0

    def state_dict(self) -> dict[str, Any]:
        """The position of this rank (in a checkpoint, of the first) and the number of ranks."""
        left_over = self._buffer[self._start :]
        return {"documents": self.documents, "left_over": left_over, "world_size": self.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a position.

        Raises:
            ValueError: With several ranks, now or when the position was saved.
        """
        before = state.get("world_size", 1)
        if max(self.world_size, before) > 1:
            raise ValueError(
                f"data.streaming must be of one process, then and now, for a run to go on, but was of {before} and is "
                f"of {self.world_size}; take the checkpoint's weights for a new run, with --model.weights"
            )
        self.documents, self._buffer, self._start = state["documents"], list(state["left_over"]), 0
