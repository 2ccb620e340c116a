import itertools
import logging
import time
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lit_llm.data.sampling import BatchLoader, StreamLoader, balanced
from tests.writing import exactly

SIZES = st.tuples(st.integers(0, 40), st.integers(1, 6))  # rows, batch size


def loader(num_rows: int, batch_size: int, seed: int | None = 0, rank: int = 0, world_size: int = 1) -> BatchLoader:
    return BatchLoader(lambda rows: rows.tolist(), num_rows, batch_size, seed, rank, world_size)


def flat(batches: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def several_epochs(batches: BatchLoader, epochs: int) -> list[list[int]]:
    return [batch for _ in range(epochs) for batch in batches]


@given(SIZES)
def test_in_order_every_row_comes_once(size: tuple[int, int]) -> None:
    batches = list(loader(*size, seed=None))
    assert flat(batches) == list(range(size[0]))
    assert all(len(batch) == size[1] for batch in batches[:-1])


@given(SIZES, st.integers(0, 3))
def test_shuffled_no_row_comes_twice_in_an_epoch_and_only_the_rest_of_a_batch_is_left(size, seed) -> None:
    rows, batch_size = size
    batches = list(loader(rows, batch_size, seed))
    drawn = flat(batches)
    assert len(set(drawn)) == len(drawn) == rows // batch_size * batch_size
    assert set(drawn) <= set(range(rows))
    assert all(len(batch) == batch_size for batch in batches)


@given(SIZES, st.integers(1, 4), st.sampled_from([None, 0]))
def test_the_length_is_the_number_of_batches(size, world_size, seed) -> None:
    assume(size[0] >= world_size or seed == 0 or not size[0])
    for rank in range(world_size):
        batches = loader(*size, seed, rank, world_size)
        assert len(batches) == len(list(batches))


def test_epochs_differ_in_order_and_share_no_prefix() -> None:
    batches = loader(64, 4)
    first, second = list(batches), list(batches)
    assert sorted(flat(first)) == sorted(flat(second))
    assert first[0] != second[0]


def test_the_seed_alone_decides_the_order() -> None:
    assert several_epochs(loader(30, 4, seed=5), 3) == several_epochs(loader(30, 4, seed=5), 3)
    assert several_epochs(loader(30, 4, seed=5), 1) != several_epochs(loader(30, 4, seed=6), 1)


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 4))
def test_ranks_share_out_a_global_batch_that_does_not_depend_on_their_number(rows, batch_size, world_size) -> None:
    ranks = [list(loader(rows, batch_size, 3, rank, world_size)) for rank in range(world_size)]
    together = [sorted(flat(parts)) for parts in zip(*ranks, strict=True)]
    alone = [sorted(batch) for batch in loader(rows, batch_size * world_size, 3)]
    assert together == alone


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 4))
def test_ranks_share_out_evaluation_rows_without_overlap_or_loss(rows, batch_size, world_size) -> None:
    assume(rows == 0 or rows >= world_size)
    parts = [flat(loader(rows, batch_size, None, rank, world_size)) for rank in range(world_size)]
    assert sorted(flat(parts)) == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("rank", [0, 2])
def test_fewer_evaluation_rows_than_ranks_are_refused_alike_by_all_ranks(rank: int) -> None:
    message = (
        "trainer.devices must leave each process a row to evaluate, but 3 processes would share 2; take fewer, or "
        "raise data.validation_fraction or data.test_fraction"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        loader(2, 4, None, rank, 3)
    assert len(loader(3, 4, None, rank, 3)) == 1
    assert len(loader(2, 4, 0, rank, 3)) == len(loader(0, 4, None, rank, 3)) == 0


@given(st.integers(4, 30), st.integers(1, 4), st.integers(0, 25))
@settings(deadline=None, max_examples=40)
def test_a_shuffled_loader_goes_on_from_any_batch_of_any_epoch(rows, batch_size, done) -> None:
    uninterrupted = several_epochs(loader(rows, batch_size), done + 7)[: done + 7]
    stopped, seen = loader(rows, batch_size), []
    for _ in range(done):  # each epoch has at least one batch
        seen += itertools.islice(stopped, done - len(seen))
    resumed = loader(rows, batch_size)
    resumed.load_state_dict(stopped.state_dict())
    assert seen + several_epochs(resumed, 8)[:7] == uninterrupted


def test_the_position_is_that_of_the_next_batch_when_the_loop_stops_early() -> None:
    batches = loader(12, 4)
    assert batches.state_dict() == {"epoch": 0, "row": 0, "num_rows": 12}
    running = iter(batches)
    states = []
    for _ in range(3):
        next(running)
        states.append(batches.state_dict())
    assert [(state["epoch"], state["row"]) for state in states] == [(0, 4), (0, 8), (1, 0)]


def test_a_changed_batch_size_goes_on_at_the_same_row_and_other_data_begins() -> None:
    position = {"epoch": 1, "row": 8, "num_rows": 40}
    for rows, size, wanted in ((40, 2, (1, 4)), (40, 8, (1, 1)), (40, 40, (1, 0)), (30, 4, (0, 0))):
        batches = loader(rows, size)
        batches.load_state_dict(position)
        assert (batches.epoch, batches.batch) == wanted
        assert list(batches)
    batches = loader(40, 30)
    batches.load_state_dict({"epoch": 1, "row": 36, "num_rows": 40})
    assert (batches.epoch, batches.batch) == (1, 0)


def test_in_order_a_loader_begins_with_the_first_row_each_time() -> None:
    batches = loader(10, 4, seed=None)
    next(iter(batches))
    assert list(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_going_to_a_late_position_replays_nothing() -> None:
    cut: list[int] = []
    batches = BatchLoader(lambda rows: cut.append(len(rows)), 1000, 2, shuffle_seed=0)
    batches.load_state_dict({"epoch": 10**9, "row": 998, "num_rows": 1000})
    started = time.perf_counter()
    assert len(list(batches)) == 1
    assert cut == [2]
    assert time.perf_counter() - started < 1
    assert batches.state_dict() == {"epoch": 10**9 + 1, "row": 0, "num_rows": 1000}


# Streams.

SEQ_LEN, BATCH_SIZE = 4, 2


def documents(count: int, length: int = 7) -> list[list[int]]:
    return [[100 * number + place for place in range(length + number % 3)] for number in range(count)]


def stream_loader(corpus: list[list[int]], rank: int = 0, world_size: int = 1) -> StreamLoader:
    def start(skip: int) -> Iterator[list[int]]:
        return itertools.islice(iter(corpus[rank::world_size]), skip, None)

    def cut(tokens: np.ndarray, rows: np.ndarray) -> list[list[int]]:
        return [tokens[row * SEQ_LEN : (row + 1) * SEQ_LEN + 1].tolist() for row in rows]

    return StreamLoader(start, cut, SEQ_LEN, BATCH_SIZE, world_size)


def first(batches: StreamLoader, count: int) -> list[list[list[int]]]:
    return list(itertools.islice(batches, count))


def predicted(batches: list[list[list[int]]]) -> list[int]:
    return [token for batch in batches for row in batch for token in row[1:]]


def test_a_stream_is_predicted_token_by_token_and_begins_anew_at_its_end() -> None:
    corpus = documents(5)
    endless = itertools.cycle(itertools.chain.from_iterable(corpus))
    batches = first(stream_loader(corpus), 20)
    assert predicted(batches) == list(itertools.islice(endless, 20 * SEQ_LEN * BATCH_SIZE + 1))[1:]


def test_each_row_of_a_stream_reads_what_the_row_before_predicted_last() -> None:
    rows = [row for batch in first(stream_loader(documents(9)), 10) for row in batch]
    assert all(len(row) == SEQ_LEN + 1 for row in rows)
    assert all(before[-1] == row[0] for before, row in itertools.pairwise(rows))


@given(st.integers(1, 7), st.integers(1, 30), st.integers(0, 25))
@settings(deadline=None)
def test_a_stream_goes_on_exactly_where_it_was(count: int, length: int, done: int) -> None:
    corpus = documents(count, length)
    uninterrupted = first(stream_loader(corpus), done + 9)
    stopped = stream_loader(corpus)
    seen = first(stopped, done)
    state = stopped.state_dict()
    resumed = stream_loader(corpus)
    resumed.load_state_dict(state)
    assert seen + first(resumed, 9) == uninterrupted


@pytest.mark.parametrize(("before", "now"), [(2, 2), (2, 1), (1, 2)])
def test_a_stream_that_several_ranks_read_does_not_go_on_from_the_place_of_one(before: int, now: int) -> None:
    stopped, resumed = (stream_loader(documents(9), world_size=size) for size in (before, now))
    first(stopped, 2)
    message = (
        f"data.streaming must be of one process, then and now, for a run to go on, but was of {before} and is of {now}; "
        f"take the checkpoint's weights for a new run, with --model.weights"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        resumed.load_state_dict(stopped.state_dict())


@pytest.mark.parametrize("world_size", [1, 2])
def test_that_a_stream_of_several_ranks_cannot_go_on_is_said_at_its_start(world_size: int, caplog) -> None:
    with caplog.at_level(logging.INFO):
        stream_loader(documents(9), world_size=world_size)
    said = "A run that streams its data in several processes, here 2, cannot be resumed"
    assert caplog.messages == [said] * (world_size > 1)


def test_a_stream_goes_on_from_a_place_that_does_not_say_of_how_many_ranks_it_is() -> None:
    stopped, resumed = stream_loader(documents(9)), stream_loader(documents(9))
    first(stopped, 2)
    resumed.load_state_dict({name: value for name, value in stopped.state_dict().items() if name != "world_size"})
    assert first(resumed, 3) == first(stopped, 3)


def test_the_position_of_a_stream_is_a_copy() -> None:
    batches = stream_loader(documents(5))
    running = iter(batches)
    next(running)
    state = batches.state_dict()
    kept = {**state, "left_over": list(state["left_over"])}
    next(running)
    assert state == kept
    assert batches.state_dict() != kept


def test_a_document_is_added_to_those_left_over_which_are_not_copied() -> None:
    left_over: list[list[int]] = []

    def noted(skip: int) -> Iterator[list[int]]:
        for number in itertools.count(skip):
            left_over.append(batches._buffer)
            yield [number]

    batches = StreamLoader(noted, lambda tokens, rows: tokens, seq_len=50, batch_size=2)
    first(batches, 3)
    assert len(left_over) > 300
    assert all(each is left_over[0] for each in left_over)


def test_ranks_of_a_stream_read_different_documents_and_together_all() -> None:
    corpus = documents(12)
    read = []
    for rank in range(3):
        mine = corpus[rank::3]
        enough = sum(map(len, mine)) // (SEQ_LEN * BATCH_SIZE)
        read.append({token // 100 for token in predicted(first(stream_loader(corpus, rank, 3), enough))})
    assert read[0] | read[1] | read[2] == set(range(12))
    assert sum(map(len, read)) == 12


def test_a_stream_without_documents_ends() -> None:
    assert first(stream_loader([]), 1) == []


@pytest.mark.parametrize("length", [1, 3])
def test_a_stream_shorter_than_a_batch_is_repeated_until_it_fills_one(length: int) -> None:
    batches = first(stream_loader([list(range(length))]), 2)
    assert predicted(batches) == [(1 + place) % length for place in range(16)]


# Lengths and classes.

LENGTHS = np.random.default_rng(0).integers(1, 60, 1000)


def test_grouped_by_length_little_is_padding_and_the_batches_come_in_any_order() -> None:
    batches = list(BatchLoader(lambda rows: LENGTHS[rows], 1000, 8, 0, lengths=LENGTHS))
    filled = sum(batch.sum() for batch in batches) / sum(8 * batch.max() for batch in batches)
    assert filled > 0.95
    means = np.array([batch.mean() for batch in batches[:50]])
    assert abs(np.corrcoef(means, np.arange(50))[0, 1]) < 0.4


@given(SIZES, st.integers(1, 3), st.booleans())
def test_grouped_by_length_the_rows_are_those_of_an_epoch_on_any_number_of_ranks(size, world_size, grouped) -> None:
    rows, batch_size = size

    def read(rank: int, world: int, batch: int) -> list[list[int]]:
        lengths = LENGTHS[:rows] if grouped else None
        return list(BatchLoader(lambda found: found.tolist(), rows, batch, 0, rank, world, lengths))

    together = [read(rank, world_size, batch_size) for rank in range(world_size)]
    drawn = flat(flat(together))
    assert len(set(drawn)) == len(drawn) == rows // (batch_size * world_size) * batch_size * world_size
    alone = read(0, 1, batch_size * world_size)
    assert [sorted(flat(parts)) for parts in zip(*together)] == [sorted(batch) for batch in alone]


def test_not_shuffled_the_longest_rows_come_first_and_each_once() -> None:
    ranks = [flat(BatchLoader(lambda rows: rows.tolist(), 101, 4, None, rank, 2, LENGTHS[:101])) for rank in range(2)]
    assert sorted(flat(ranks)) == list(range(101))
    assert all((np.diff(LENGTHS[rows]) <= 0).all() for rows in ranks)


def test_mixed_batches_are_the_same_in_another_order_which_is_always_the_same() -> None:
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        loader = BatchLoader(lambda rows: rows.tolist(), 101, 4, None, rank, world_size, LENGTHS[:101])
        in_order, loader.mixed = list(loader), True
        first, again = list(loader), list(loader)
        assert first == again != in_order
        assert sorted(first) == sorted(in_order)
        some = LENGTHS[flat(first[: len(first) // 2])]
        assert abs(some.mean() - LENGTHS[:101].mean()) < LENGTHS[:101].std() / 2


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 3))
def test_balanced_each_class_comes_equally_often_and_no_row_much_oftener_than_another(sizes, seed) -> None:
    classes = np.repeat(np.arange(len(sizes)), sizes)
    order = flat(BatchLoader(lambda rows: rows.tolist(), len(classes), 1, seed, classes=classes))
    counts = np.bincount(classes[order], minlength=len(sizes))
    assert len(order) == len(classes)
    assert counts.max() - counts.min() <= 1
    for kind in range(len(sizes)):
        times = np.bincount(order, minlength=len(classes))[classes == kind]
        assert times.max() - times.min() <= 1


def test_balanced_and_grouped_a_loader_goes_on_where_it_was() -> None:
    classes = np.repeat([0, 1], [90, 10])

    def make() -> BatchLoader:
        return BatchLoader(lambda rows: rows.tolist(), 100, 8, 0, lengths=LENGTHS[:100], classes=classes)

    whole, stopped, resumed = make(), make(), make()
    uninterrupted = several_epochs(whole, 3)
    list(itertools.islice(stopped, 5))
    resumed.load_state_dict(stopped.state_dict())
    assert several_epochs(resumed, 3)[: 36 - 5] == uninterrupted[5:]
    assert uninterrupted[:12] != uninterrupted[12:24]


# Weights.


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 3))
def test_each_class_has_its_share_to_the_row_and_no_row_comes_much_oftener_than_another_of_it(classes, seed) -> None:
    sizes, weights = (np.array(each) for each in zip(*classes))
    kinds = np.repeat(np.arange(len(sizes)), sizes)
    order = flat(BatchLoader(lambda rows: rows.tolist(), len(kinds), 1, seed, classes=kinds, weights=weights))
    assert len(order) == len(kinds)
    counts = np.bincount(kinds[order], minlength=len(sizes))
    assert (abs(counts - len(kinds) * weights / weights.sum()) < 1).all()
    for kind in range(len(sizes)):
        times = np.bincount(order, minlength=len(kinds))[kinds == kind]
        assert times.max() - times.min() <= 1


@pytest.mark.parametrize("sizes", [[1], [7, 3], [5, 5, 1], [2, 3, 4, 8]])
def test_equal_weights_are_none(sizes: list[int]) -> None:
    classes = np.repeat(np.arange(len(sizes)), sizes)
    for seed in range(20):
        orders = [
            balanced(classes, np.random.default_rng(seed), weights)
            for weights in (None, np.full(len(sizes), 0.1), np.full(len(sizes), 3))
        ]
        assert np.array_equal(orders[0], orders[1])
        assert np.array_equal(orders[0], orders[2])


def weighted(batch_size: int, rank: int = 0, world_size: int = 1) -> BatchLoader:
    classes, weights = np.repeat([0, 1, 2], [80, 15, 5]), np.array([1.0, 2.0, 1.0])
    return BatchLoader(
        lambda rows: rows.tolist(), 100, batch_size, 0, rank, world_size, classes=classes, weights=weights
    )


def test_what_an_epoch_leaves_out_is_drawn_anew_by_the_next() -> None:
    batches = weighted(10)
    first, second, *more = (sorted(row for row in flat(batches) if row < 80) for _ in range(20))
    assert len(first) == len(second) == 25
    assert first != second
    assert set(first).union(second, *more) == set(range(80))


@pytest.mark.parametrize("world_size", [2, 4])
def test_weighted_rows_make_the_same_global_batches_for_any_number_of_ranks(world_size: int) -> None:
    ranks = [several_epochs(weighted(8 // world_size, rank, world_size), 2) for rank in range(world_size)]
    assert [sorted(flat(parts)) for parts in zip(*ranks, strict=True)] == [
        sorted(batch) for batch in several_epochs(weighted(8), 2)
    ]


@pytest.mark.parametrize("done", [1, 11, 12, 17])
def test_weighted_rows_go_on_from_any_batch(done: int) -> None:
    uninterrupted = several_epochs(weighted(8), 3)
    stopped, resumed = weighted(8), weighted(8)
    seen = list(itertools.islice(stopped, done))
    seen += itertools.islice(stopped, done - len(seen))
    resumed.load_state_dict(stopped.state_dict())
    assert seen + several_epochs(resumed, 2)[: 24 - done] == uninterrupted[:24]


def test_while_a_batch_is_cut_the_epoch_is_its_own() -> None:
    batches = BatchLoader(lambda rows: batches.epoch, 6, 2, 0)
    assert several_epochs(batches, 3) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@given(rows=st.integers(4, 60), batch_size=st.integers(1, 5), world_size=st.integers(2, 4))
def test_ranks_that_share_weights_have_equally_many_batches_to_evaluate(rows, batch_size, world_size) -> None:
    parts = [list(loader(rows, batch_size, None, rank, world_size)) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert all(batch for part in parts for batch in part)
    assert max(len(batch) for part in parts for batch in part) <= batch_size + 1
