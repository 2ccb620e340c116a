import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.batch import IGNORE_INDEX
from lit_llm.data.packing import cut_rows, document_ids, label_documents, num_rows

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
