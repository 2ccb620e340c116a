"""Which rows come when: orders and shards that are functions of seed, epoch and step."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

log = logging.getLogger(__name__)


def data_parallel_rank(trainer: Any) -> tuple[int, int]:
    """Which share of the rows this process reads, and of how many: those that share each product read the same."""
    if trainer is None:
        return 0, 1
    share = getattr(trainer, "distributed_sampler_kwargs", None)
    return (share["rank"], share["num_replicas"]) if share else (trainer.global_rank, trainer.world_size)


def resume_epoch(fit_loop: Any) -> None:
    """Has a run that goes on count the batches of its epoch as they are cut now, and begin at a whole step.

    Lightning counts on from those of before, and ends an epoch too soon, or late and without its validation, where the
    batch size, the rows or the number of ranks have changed. Of a step that was begun no checkpoint holds the gradient:
    its batches are read again. An epoch that is over stays so. One of a limited number of batches is Lightning's alone,
    and is as long as the others also where it comes to the end of the rows.

    Args:
        fit_loop: Lightning's, before it takes a batch, with what a checkpoint told it.
    """
    # Where epochs set the length, the schedule had the loaders made before there was a position to give them; after a
    # whole epoch Lightning gives them none.
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
    """Yields batches cut whole from data with random access, with a position that is a pair of numbers.

    The rows of batch `b` of epoch `e` depend on seed, `e`, `b` and rank alone: to go on after a checkpoint nothing is
    replayed, at step one hundred or one million. A collection of rows is cut at once, so there is nothing for worker
    processes to do.

    Args:
        cut: Makes the batch of the given row indices.
        num_rows: Rows there are.
        batch_size: Rows in a batch of one rank.
        shuffle_seed: Seed of the order, drawn anew each epoch; `None` keeps the rows in order, shares them out so
            that each is counted once whatever the number of ranks, and keeps the last, smaller batch. Several ranks
            have equally many batches, which differ by a row: those that share weights take each step together.
        rank: This process.
        world_size: All processes.
        lengths: Length of each row: batches are made of rows of about one length, or, where rows are not shuffled, the
            longest rows come first. An epoch that goes on with another batch size then goes on with other rows.
        classes: Class of each row, from 0: each comes equally often in an epoch, which is as long as without.
        weights: Weight of each class: each comes as often in an epoch as its weight is of their sum.

    Attributes:
        endless: Whether shuffled rows go on into the next epoch, for a loop that stops by itself.

    Raises:
        ValueError: When the seed is negative, or there are rows in order for some of the ranks alone.
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
        self.endless = False
        self._drawn: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Batches of one epoch, for this rank."""
        if self.shuffle_seed is not None:
            return self.num_rows // (self.batch_size * self.world_size)
        # As many on each rank, and none without a row.
        return min(-(-self.num_rows // (self.batch_size * self.world_size)), self.num_rows // self.world_size)

    def __iter__(self) -> Iterator[Any]:
        """Goes on from the current position to the end of its epoch; in order, always from the first row."""
        order = self._order(self.epoch)
        first = self.batch if self.shuffle_seed is not None else 0
        even = self.shuffle_seed is None and self.world_size > 1
        for batch in range(first, len(self)):
            start, end = (
                n * len(order) // len(self) if even else n * self.batch_size for n in (batch, batch + 1)
            )  # the last is cut short by what there is
            cut = self.cut(order[start:end])  # `epoch` is still its own
            # The position after this batch, also when the loop that reads us stops early.
            self.epoch, self.batch = (self.epoch, batch + 1) if batch + 1 < len(self) else (self.epoch + 1, 0)
            yield cut
        if self.endless and self.shuffle_seed is not None and len(self):
            yield from iter(self)

    def rows(self, number: int) -> np.ndarray:
        """The rows of a batch that is counted from the first epoch on; the position stays as it is."""
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
        """The position: the rows of its epoch that were read, by all ranks."""
        return {"epoch": self.epoch, "row": self.batch * self.batch_size * self.world_size, "num_rows": self.num_rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a position, also where the batch size or the number of ranks has changed since; other data begins.

        An epoch that was not over has a batch left, its last, of which some rows may be read again.
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
    """Rows of about one length into each batch, as many of them as there are whole batches.

    Of fifty batches at a time the rows are sorted by length; then the batches are shuffled, so that long and short ones
    come in any order, and a row has other company in each epoch. The Hugging Face Trainer's `group_by_length` does the
    same, but leaves the batches of a fifty in the order of their lengths.

    Args:
        order: Rows in random order, a multiple of `batch_size` of them.
        lengths: Length of each row.
        batch_size: Rows in a batch of all ranks.
        chance: What shuffles the batches.

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
    """As many rows as there are, in random order, of each class its share, to the row.

    Of a class with too many some are left out; those of a class with too few come again, but none for the third time
    before all have come twice, and so on. What the shares leave over when they are cut to whole rows goes to those that
    lost most by it, by chance to one of equals.

    Args:
        classes: Class of each row, from 0.
        chance: What draws.
        weights: Weight of each class, whose share is its part of their sum; `None` is equal shares.

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
    """Yields batches cut from a stream of token lists that is too long to keep, or has no end.

    The position is the number of documents read and the tokens left over from them. To go on after a checkpoint the
    documents before it are read and cleaned again, but not tokenised. A checkpoint holds the first rank's position
    alone, so where several share the documents out none can go on.

    Args:
        tokens: Starts the stream for this rank, passing over the given number of documents; yields each one's tokens.
        cut: Makes a batch out of a stream of tokens and the indices of its rows.
        seq_len: Tokens in a row.
        batch_size: Rows in a batch of one rank.
        world_size: All processes.
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
        self._start = 0  # what stands before it in the buffer has been used
        if world_size > 1:
            log.info(f"A run that streams its data in several processes, here {world_size}, cannot be resumed")

    def __len__(self) -> int:
        """No end: a length at all keeps Lightning from reading a batch ahead, so that the position is exact."""
        return sys.maxsize

    def __iter__(self) -> Iterator[Any]:
        """Goes on from the current position; begins anew when the stream ends."""
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
        """The position, and of how many ranks it is the first one's."""
        left_over = self._buffer[self._start :]
        return {"documents": self.documents, "left_over": left_over, "world_size": self.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position.

        Raises:
            ValueError: With several ranks, now or when it was written.
        """
        before = state.get("world_size", 1)
        if max(self.world_size, before) > 1:
            raise ValueError(
                f"data.streaming must be of one process, then and now, for a run to go on, but was of {before} and is "
                f"of {self.world_size}; take the checkpoint's weights for a new run, with --model.weights"
            )
        self.documents, self._buffer, self._start = state["documents"], list(state["left_over"]), 0
