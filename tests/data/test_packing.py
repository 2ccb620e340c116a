import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_llm.batch import IGNORE_INDEX
from lit_llm.data.packing import cut_rows, document_ids, label_documents, lay_rows, num_rows, pack
from tests.writing import exactly

BOUNDARY = 0
STREAMS = st.lists(st.integers(0, 9), min_size=2, max_size=60)
SEQ_LENS = st.integers(1, 20)
DOCUMENTS = st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=8)


def cut_all(stream: list[int], seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    return cut_rows(np.array(stream, dtype=np.uint16), np.arange(num_rows(len(stream), seq_len)), seq_len)


def laid_end_to_end(documents: list[list[int]]) -> tuple[list[int], np.ndarray]:
    stream, starts = [], []
    for document in documents:
        starts.append(len(stream))
        stream += [BOUNDARY, *document]
    return [*stream, BOUNDARY], np.array(starts)


@given(STREAMS, SEQ_LENS)
def test_every_token_but_the_first_is_predicted_exactly_once(stream: list[int], seq_len: int) -> None:
    _, labels = cut_all(stream, seq_len)
    assert labels[labels != IGNORE_INDEX].tolist() == stream[1:]


@given(STREAMS, SEQ_LENS)
def test_rows_are_slices_of_the_stream(stream: list[int], seq_len: int) -> None:
    ids, labels = cut_all(stream, seq_len)
    for row in range(len(ids)):
        start = row * seq_len
        read = stream[start : start + seq_len]
        predicted = stream[start + 1 : start + seq_len + 1]
        assert ids[row].tolist()[: len(read)] == read
        assert labels[row].tolist() == predicted + [IGNORE_INDEX] * (seq_len - len(predicted))


@given(STREAMS, SEQ_LENS, st.data())
def test_rows_come_as_asked_for(stream: list[int], seq_len: int, data: st.DataObject) -> None:
    ids, labels = cut_all(stream, seq_len)
    rows = np.array(data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1)))
    some_ids, some_labels = cut_rows(np.array(stream, dtype=np.uint32), rows, seq_len)
    assert torch.equal(some_ids, ids[rows])
    assert torch.equal(some_labels, labels[rows])


def test_a_stream_without_anything_to_predict_has_no_row() -> None:
    assert [num_rows(tokens, 4) for tokens in (0, 1, 2, 5, 6)] == [0, 0, 1, 1, 2]


def test_rows_do_not_share_memory_with_the_stream() -> None:
    stream = np.arange(9, dtype=np.uint16)
    ids, labels = cut_rows(stream, np.array([0, 1]), 4)
    ids.zero_()
    assert stream.tolist() == list(range(9))
    assert labels.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


@given(DOCUMENTS, SEQ_LENS)
def test_document_ids_count_the_boundaries_passed(documents: list[list[int]], seq_len: int) -> None:
    ids, _ = cut_all(laid_end_to_end(documents)[0], seq_len)
    for row, found in zip(ids.tolist(), document_ids(ids, BOUNDARY).tolist()):
        assert found == [row[: place + 1].count(BOUNDARY) for place in range(len(row))]


@given(DOCUMENTS, SEQ_LENS)
def test_each_label_belongs_to_the_document_that_it_is_part_of(documents: list[list[int]], seq_len: int) -> None:
    stream, starts = laid_end_to_end(documents)
    owners = [number for number, document in enumerate(documents) for _ in [*document, "end"]]
    rows = np.arange(num_rows(len(stream), seq_len))
    _, labels = cut_all(stream, seq_len)
    found = torch.from_numpy(label_documents(starts, rows, seq_len))
    assert found[labels != IGNORE_INDEX].tolist() == owners


def held(lengths: list[int], capacity: int) -> list[list[int]]:
    order, edges = pack(np.array(lengths, dtype=np.int64), capacity)
    assert edges[0] == 0
    assert edges[-1] == len(order)
    return [order[a:b].tolist() for a, b in itertools.pairwise(edges)]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_every_example_is_packed_once_and_fits(lengths: list[int], capacity: int) -> None:
    rows = held(lengths, capacity)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[example] for example in row) <= capacity for row in rows)


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """Fewest rows over all orders, by dynamic programming over sets with (rows, tokens in the last row)."""
    best = {0: (1, 0)}
    for chosen in range(1, 1 << len(lengths)):
        options = []
        for example, length in enumerate(lengths):
            if chosen >> example & 1:
                rows, used = best[chosen ^ 1 << example]
                options.append((rows, used + length) if used + length <= capacity else (rows + 1, length))
        best[chosen] = min(options)
    return best[len(best) - 1][0]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(20, 30))
def test_packing_keeps_to_the_bound_of_its_algorithm(lengths: list[int], capacity: int) -> None:
    assert len(held(lengths, capacity)) <= 11 / 9 * fewest_rows(lengths, capacity) + 6 / 9


def test_rows_are_nearly_full_where_examples_are_short() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 3000)
    rows = held(lengths.tolist(), 256)
    assert lengths.sum() / (256 * len(rows)) > 0.995


def test_the_best_fit_is_taken() -> None:
    # In order of size: 6, 5, 4 (joins the 6), 3 (joins the 5); the 2 fits only next to 5 and 3.
    assert [sorted(row) for row in held([6, 5, 4, 3, 2], 10)] == [[0, 2], [1, 3, 4]]
    assert [sorted(row) for row in held([7, 6, 3, 4], 10)] == [[0, 2], [1, 3]]


def test_nothing_packs_into_no_rows() -> None:
    assert held([], 5) == []


@pytest.mark.parametrize("length", [0, 11])
def test_what_does_not_fit_is_refused(length: int) -> None:
    low, high = min(length, 3), max(length, 3)
    message = f"lengths must be from 1 to the row's 10, but are from {low} to {high}"
    with pytest.raises(ValueError, match=exactly(message)):
        pack(np.array([3, length]), 10)


EXAMPLES = st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.integers(0, 255)), max_size=5)


@given(EXAMPLES, st.integers(0, 5))
def test_laid_examples_are_documents_that_keep_their_labels_to_themselves(examples, spare: int) -> None:
    row = [
        (np.array(ids, dtype=np.uint16), np.array([bits >> k & 1 for k in range(len(ids))])) for ids, bits in examples
    ]
    seq_len = sum(len(ids) - 1 for ids, _ in row) + spare
    batch = lay_rows([row], seq_len, padding=0)
    assert all(value.shape == (1, seq_len) and value.dtype == torch.long for value in batch.values())
    ids, labels, documents, positions = (batch[k][0] for k in ("input_ids", "labels", "document_ids", "positions"))
    for number, (tokens, learnt) in enumerate(row):
        here = documents == number
        assert ids[here].tolist() == tokens[:-1].tolist()
        assert labels[here].tolist() == [t if m else IGNORE_INDEX for t, m in zip(tokens[1:].tolist(), learnt[1:])]
        assert positions[here].tolist() == list(range(len(tokens) - 1))
    rest = documents == len(row)
    assert rest.sum() == spare
    assert (labels[rest] == IGNORE_INDEX).all()
    assert positions[rest].tolist() == list(range(spare))
