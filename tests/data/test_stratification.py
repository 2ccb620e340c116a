import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.data.stratification import cut_splits, some_of, with_all_splits
from lit_llm.data.tables import Columns, Split

COLUMNS = Columns("text", None, "label")


def split(labels: list, texts: list[str] | None = None) -> Split:
    texts = texts or [f"text {n}" for n in range(len(labels))]
    kind = np.float32 if isinstance(labels[0], float) else np.int64
    return Split(Dataset.from_dict({"text": texts, "label": labels}), np.array(labels, dtype=kind))


@given(st.lists(st.integers(20, 60), min_size=2, max_size=4))
def test_each_split_has_the_classes_in_the_same_proportions(sizes) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    parts = cut_splits(split(labels.tolist()), COLUMNS, validation_fraction=0.2, test_fraction=0.1)
    for name, fraction in {"train": 0.7, "validation": 0.2, "test": 0.1}.items():
        counts = np.bincount(parts[name].labels, minlength=len(sizes))
        assert all(abs(count - fraction * size) <= 1 for count, size in zip(counts, sizes))
    rows = [text for part in parts.values() for text in part.column("text")]
    assert len(rows) == len(set(rows)) == sum(sizes)


def test_values_are_cut_in_their_proportions_too() -> None:
    parts = cut_splits(split([n / 7 for n in range(200)]), COLUMNS, 0.2, 0.0)
    assert set(parts) == {"train", "validation"}
    assert abs(parts["validation"].labels.mean() - parts["train"].labels.mean()) < 2


def test_rows_carry_their_labels_and_the_order_of_the_table_does_not_matter() -> None:
    labels = [n % 2 for n in range(100)]
    one = cut_splits(split(labels), COLUMNS, 0.2, 0.1)
    texts = [f"text {n}" for n in range(100)]
    other = cut_splits(split(labels[::-1], texts[::-1]), COLUMNS, 0.2, 0.1)
    for name in one:
        assert set(one[name].column("text")) == set(other[name].column("text"))
        assert [int(text.split()[1]) % 2 for text in one[name].column("text")] == one[name].labels.tolist()
    assert one["train"].column("text") != [text for text in texts if text in one["train"].column("text")][::-1]


def test_equal_examples_are_in_one_split() -> None:
    texts = [f"text {n % 10}" for n in range(200)]
    parts = cut_splits(split([n % 2 for n in range(200)], texts), COLUMNS, 0.3, 0.2)
    found = [set(part.column("text")) for part in parts.values()]
    assert len(found) == 3
    assert sum(map(len, found)) == len(set.union(*found))


def pairs(first: list[str]) -> tuple[Split, Columns]:
    labels, second = [n % 3 for n in range(len(first))], [f"second {n}" for n in range(len(first))]
    rows = Dataset.from_dict({"text": first, "text_pair": second, "label": labels})
    return Split(rows, np.array(labels)), Columns("text", "text_pair", "label")


def test_pairs_with_one_first_text_are_in_one_split() -> None:
    parts = cut_splits(*pairs([f"first {n // 3}" for n in range(300)]), 0.2, 0.1)
    assert {name: len(part) for name, part in parts.items()} == {"test": 30, "validation": 60, "train": 210}
    found = [set(part.column("text")) for part in parts.values()]
    assert sum(map(len, found)) == len(set.union(*found))
    assert all(np.bincount(part.labels).tolist() == [len(part) // 3] * 3 for part in parts.values())


@pytest.mark.parametrize("others", [0, 3, 40])
def test_pairs_of_which_most_have_one_first_text_are_cut_by_the_second_too(others: int) -> None:
    parts = cut_splits(*pairs(["a question"] * (300 - others) + [f"first {n}" for n in range(others)]), 0.2, 0.1)
    assert {name: len(part) for name, part in parts.items()} == {"test": 30, "validation": 60, "train": 210}


@pytest.mark.parametrize("labels", [[0, 1, 2], [0.0, 0.5, 1.0]])
def test_equal_examples_are_in_one_split_though_their_labels_differ(labels) -> None:
    labels, texts = labels * 100, [f"text {n % 80}" for n in range(300)]
    parts = cut_splits(split(labels, texts), COLUMNS, 0.2, 0.1)
    found = {name: set(part.column("text")) for name, part in parts.items()}
    assert set(found) == {"train", "validation", "test"}
    assert sum(map(len, found.values())) == 80
    other = cut_splits(split(labels[::-1], texts[::-1]), COLUMNS, 0.2, 0.1)
    assert found == {name: set(part.column("text")) for name, part in other.items()}


def test_a_class_whose_only_example_is_of_another_class_too_is_trained_on() -> None:
    for number in range(20):
        texts = [f"text {n}" for n in range(100)] + [f"text {number}"]
        parts = cut_splits(split([0] * 100 + [1], texts), COLUMNS, 0.2, 0.2)
        assert 1 in parts["train"].labels


def test_a_class_of_equal_examples_is_trained_on() -> None:
    texts = [f"text {n}" for n in range(100)] + ["n/a"] * 30
    parts = cut_splits(split([0] * 100 + [1] * 30, texts), COLUMNS, 0.1, 0.1)
    assert {name: int(part.labels.sum()) for name, part in parts.items()} == {"train": 30, "validation": 0, "test": 0}


@pytest.mark.parametrize("frequent", [f"text {n}" for n in (0, 1, 2, 3)])
@pytest.mark.parametrize(("times", "cut"), [(31, 30), (60, 30), (150, 30), (285, 4), (300, 0)])
def test_a_frequent_text_is_trained_on_and_takes_no_place_from_the_others_of_its_class(frequent, times, cut) -> None:
    labels = [0] * 300 + [1] * 300
    texts = [f"other {n}" for n in range(600 - times)] + [frequent] * times
    parts = cut_splits(split(labels, texts), COLUMNS, 0.1, 0.1)
    found = {name: np.bincount(part.labels, minlength=2).tolist() for name, part in parts.items()}
    assert found["test"][0] == found["validation"][0] == 30
    assert abs(found["test"][1] - cut) <= 1 >= abs(found["validation"][1] - cut)
    assert parts["train"].column("text").count(frequent) == times
    other = cut_splits(split(labels[::-1], texts[::-1]), COLUMNS, 0.1, 0.1)
    assert {name: sorted(part.column("text")) for name, part in parts.items()} == {
        name: sorted(part.column("text")) for name, part in other.items()
    }


def test_a_text_that_a_small_class_has_twice_does_not_take_its_validation_from_it() -> None:
    for n in range(40):
        labels, texts = [0] * 100 + [1] * 11, [f"text {n} {k}" for k in range(110)] + [f"text {n} 109"]
        assert np.bincount(cut_splits(split(labels, texts), COLUMNS, 0.1, 0.0)["validation"].labels).tolist() == [10, 1]


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.0), (0.1, 0.1), (0.05, 0.05), (0.2, 0.1), (0.1, 0.3)])
def test_single_texts_are_cut_by_rounded_shares_however_few_there_are(validation, test) -> None:
    for size in range(1, 60):
        parts = cut_splits(split([0] * size), COLUMNS, validation, test)
        middles = (np.arange(size) + 0.5) / size
        ends = [int((middles < part).sum()) for part in (test, validation + test)]
        wanted = {"test": ends[0], "validation": ends[1] - ends[0], "train": size - ends[1]}
        assert {name: len(part) for name, part in parts.items()} == {n: rows for n, rows in wanted.items() if rows}


def test_how_little_is_tested_on_does_not_decide_how_much_is_validated_on() -> None:
    texts = [f"once {n}" for n in range(200)] + [f"twice {n % 200}" for n in range(400)]
    for test_fraction, tested in ((0.0, 0), (0.001, 1)):
        parts = cut_splits(split([0] * 600, texts), COLUMNS, 0.2, test_fraction)
        assert len(parts["validation"]) == 120
        assert sum(name == "test" for name in parts) == tested


def test_only_splits_that_are_missing_are_cut() -> None:
    train, test = split([n % 2 for n in range(100)]), split([0, 1])
    assert with_all_splits({"test": test, "train": train}, COLUMNS, 0.0, 0.5) == {"train": train, "test": test}
    found = with_all_splits({"test": test, "train": train}, COLUMNS, 0.2, 0.5)
    assert {name: len(part) for name, part in found.items()} == {"train": 80, "validation": 20, "test": 2}
    assert list(found) == ["train", "validation", "test"]
    hidden = Split(test.rows, None)
    assert with_all_splits({"train": train, "test": hidden}, COLUMNS, 0.0, 0.0) == {"train": train, "test": hidden}
    found = with_all_splits({"train": train, "test": hidden}, COLUMNS, 0.2, 0.1)
    assert {name: len(part) for name, part in found.items()} == {
        "train": 70,
        "validation": 20,
        "test": 10,
        "unlabelled test": 2,
    }


def test_some_examples_are_drawn_in_proportion_nested_and_by_the_seed() -> None:
    whole = split([0] * 150 + [1] * 50 + [2])
    forty, ten = some_of(whole, 40, 0), some_of(whole, 10, 0)
    assert np.bincount(forty.labels).tolist() == [29, 10, 1]
    assert set(ten.column("text")) < set(forty.column("text"))
    assert set(ten.labels.tolist()) == {0, 1, 2}
    assert set(some_of(whole, 10, 1).column("text")) != set(ten.column("text"))
    assert len(some_of(whole, 1000, 0)) == 201


@pytest.mark.parametrize("hidden", [False, True])
def test_rows_of_a_labelled_split_that_are_trained_on_too_are_warned_of(caplog, hidden) -> None:
    given = {name: split([0, 1, 1], texts) for name, texts in {"train": list("abc"), "test": list("bcd")}.items()}
    if hidden:
        given["test"] = Split(given["test"].rows, None)
    found = with_all_splits(given, COLUMNS, 0.0, 0.0)
    assert [len(each) for each in found.values()] == [3, 3]
    warned = [
        "2 of the 3 rows of the test split are in the training split too, which makes its metrics too good; leave them "
        "out of one of the two"
    ]
    assert caplog.messages == ([] if hidden else warned)


def test_pairs_that_share_one_text_with_training_are_not_warned_of(caplog) -> None:
    columns = Columns("text", "pair", "label")
    rows = {name: Dataset.from_dict({"text": ["a"], "pair": [name], "label": [0]}) for name in ("train", "test")}
    with_all_splits({name: Split(each, np.zeros(1, np.int64)) for name, each in rows.items()}, columns, 0.0, 0.0)
    assert not caplog.messages
