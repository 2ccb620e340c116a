import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lit_llm.batch import IGNORE_INDEX
from lit_llm.data.labels import LabelReader, is_hidden, labelled_splits, learn_labels, read_labels
from lit_llm.data.tables import Columns
from tests.writing import exactly

COLUMNS = Columns("text", None, "label")


def table(labels: list, features: Features | None = None) -> Dataset:
    return Dataset.from_dict({"text": [f"text {n}" for n in range(len(labels))], "label": labels}, features)


def read(labels: list, names: tuple[str, ...] = ()) -> tuple[list, list[str]]:
    reader = learn_labels(table(labels), "x", "label", names)
    return reader.read(labels, "train").tolist(), reader.class_names


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([5, 2, 5], ([1, 0, 1], ["2", "5"])),
        (["10", "9", "10"], ([1, 0, 1], ["9", "10"])),
        (["01", "1", "10"], ([0, 1, 2], ["01", "1", "10"])),
        (["b", "a", "c"], ([1, 0, 2], ["a", "b", "c"])),
        ([True, False], ([1, 0], ["False", "True"])),
        (["true", "false", "maybe"], ([2, 0, 1], ["false", "maybe", "true"])),
        ([0.5, 2.0], ([0.5, 2.0], [])),
        (["1", "2.5", "-1e1"], ([1.0, 2.5, -10.0], [])),
    ],
)
def test_labels_are_classes_in_order_or_values(labels, expected) -> None:
    assert read(labels) == expected


def test_classes_are_called_what_is_known_of_them() -> None:
    assert read([1, 0, 1], ("no", "yes")) == ([1, 0, 1], ["no", "yes"])
    assert read(["yes", "no", "yes"], ("no", "maybe", "yes")) == ([2, 0, 2], ["no", "maybe", "yes"])
    assert read(["b", "a"], ("no", "yes")) == ([1, 0], ["a", "b"])
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a"])})
    assert learn_labels(table([0, 1], features), "x", "label").class_names == ["z", "a"]


def test_whole_numbers_written_as_real_ones_are_classes_where_those_are_known() -> None:
    assert read([1.0, 0.0], ("no", "yes")) == ([1, 0], ["no", "yes"])
    assert read(["0.0", "1.0"], ("no", "yes")) == ([0, 1], ["no", "yes"])


def test_whole_numbers_are_values_where_values_are_asked_for_and_no_classes_are_known(caplog) -> None:
    for labels in ([1, 5, 3], ["1", "5", "3"], [1.0, 5.0, 3.0]):
        reader = learn_labels(table(labels), "x", "label", as_values=True)
        assert (reader.read(labels, "train").tolist(), reader.class_names) == ([1.0, 5.0, 3.0], [])
    assert not caplog.text
    assert learn_labels(table([0, 1]), "x", "label", ("no", "yes"), as_values=True).class_names == ["no", "yes"]
    assert learn_labels(table(["a", "b"]), "x", "label", as_values=True).class_names == ["a", "b"]


def test_spaces_around_labels_make_no_further_classes_and_are_said(caplog) -> None:
    caplog.set_level("INFO")
    labels = ["a", " a", "b ", "b"]
    assert read(labels) == ([0, 0, 1, 1], ["a", "b"])
    assert caplog.messages == ["Ignoring spaces around labels in 'label' of x: there are 2 different ones"]
    assert read([" 1", "2"]) == ([0, 1], ["1", "2"])


@pytest.mark.parametrize(("labels", "odd"), [([0, -1, 1], "-1"), (["0", "1", "2"], "2"), ([1.0, 0.5], "0.5")])
def test_a_number_beyond_the_known_classes_is_no_further_class(labels, odd) -> None:
    message = rf"\Adata.label must be a class from 0 to 1 \(no, yes\), but 'label' is {odd} in row \d of .+; leave such"
    with pytest.raises(ValueError, match=message):
        read(labels, ("no", "yes"))


def test_whole_numbers_written_as_real_ones_are_values_with_a_warning_where_classes_are_unknown(caplog) -> None:
    assert read([1.0, 0.5]) == ([1.0, 0.5], [])
    assert not caplog.text
    assert read([1.0, 0.0]) == ([1.0, 0.0], [])
    assert "write them as whole numbers (1, not 1.0) to use them as classes" in caplog.text


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (
            ["1", "x"],
            TypeError,
            "data.label must be of one type, but is text ('x' in row 1) and a number ('1' in row 0) in the training split of x",
        ),
        (
            [1, 1],
            ValueError,
            "data.label must tell two classes or more apart, but is 1 in all 2 rows of the training split of x",
        ),
        ([], ValueError, "data.path must hold rows to train on, but x has none"),
        (
            ["a", None],
            ValueError,
            "data.label must be there in every row, but is not in row 1 of the training split of x; leave such rows out, "
            "or set data.unlabelled_ratio, for semi-supervised training",
        ),
        (
            [1.0, float("nan")],
            ValueError,
            "data.label must be there in every row, but is not in row 1 of the training split of x; leave such rows out, "
            "or set data.unlabelled_ratio, for semi-supervised training",
        ),
        ([[1], [2]], TypeError, "data.label must hold a number or text, but holds list in the training split of x"),
    ],
)
def test_labels_that_are_none_are_said_in_one_line(labels, kind, message) -> None:
    with pytest.raises(kind, match=exactly(message)):
        learn_labels(table(labels), "x", "label")


@pytest.mark.parametrize("train", [["true", "false"], ["True", "False"], ["TRUE", "FALSE"], [True, False], [1, 0]])
@pytest.mark.parametrize("other", [["true", "false"], ["True", "False"], ["TRUE", "FALSE"], [True, False]])
def test_truth_values_are_the_same_classes_however_a_table_writes_them(train, other) -> None:
    reader = learn_labels(table(train), "x", "label")
    assert reader.read(other, "test").tolist() == [1, 0]


def named(labels: list, names: list[str]) -> Dataset:
    return table(labels, Features({"text": Value("string"), "label": ClassLabel(names=names)}))


@pytest.mark.parametrize(
    ("train", "other", "expected"),
    [
        (named([0, 1], ["pos", "neg"]), table(["neg", "pos", "neg"]), [1, 0, 1]),
        (table(["pos", "neg"]), named([0, 1, 0], ["pos", "neg"]), [1, 0, 1]),
        (named([0, 1], ["pos", "neg"]), named([0, 2, 1], ["neg", "mixed", "pos"]), [1, 0, IGNORE_INDEX]),
        (named([0, 1], ["pos", "neg"]), named([0, 1, 0], ["POSITIVE", "NEGATIVE"]), [0, 1, 0]),
        (table([2, 5]), named([1, 0, 1], ["2", "5"]), [1, 0, 1]),
        (table([True, False]), named([1, 0, 1], ["True", "False"]), [0, 1, 0]),
    ],
)
def test_labels_to_predict_are_the_classes_of_the_same_names(train, other, expected) -> None:
    assert read_labels(other, learn_labels(train, "x", "label"), "test").tolist() == expected


@pytest.mark.parametrize(
    ("train", "other", "message"),
    [
        (
            ["a", "b"],
            ["a", "c"],
            "data.label must be one of 'a', 'b' as in training, but 'label' is 'c' in row 1 of the validation split of x",
        ),
        (
            [0.5, 1.5],
            [0.5, "c"],
            "data.label must be of one type, but is text ('c' in row 1) and a number (0.5 in row 0) in the validation split of x",
        ),
        (
            [0, 1],
            [1, "x", True],
            "data.label must be of one type, but is true or false (True in row 2) and text ('x' in row 1) and a number (1 in row 0) in the validation split of x",
        ),
        (
            [0.5, 1.5],
            ["c"],
            "data.label must be a number as in training, but 'label' is 'c' in row 0 of the validation split of x",
        ),
    ],
)
def test_a_label_that_training_has_not_seen_is_refused(train, other, message) -> None:
    reader = learn_labels(table(train), "x", "label")
    with pytest.raises((ValueError, TypeError), match=exactly(message)):
        reader.read(other, "validation")


def test_a_class_that_only_another_split_has_is_refused() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    found = {"train": table([0, 1], features), "validation": table([0, 2], features)}
    message = "data.label must be seen in training before it is in the validation split of x, but 'c' is not"
    with pytest.raises(ValueError, match=exactly(message)):
        labelled_splits(found, COLUMNS, "x", (), 0.0, 0.0)


@pytest.mark.parametrize("labels", [[-1, -1], [-1.0, -1.0], ["-1", "-1"], [None, None]])
def test_a_test_split_with_hidden_labels_has_none(labels) -> None:
    found = {"train": table([-1, 1, 0]), "test": table(labels)}
    splits, reader = labelled_splits(found, COLUMNS, "x", (), 0.0, 0.0)
    assert splits["test"].labels is None
    assert reader.class_names == ["-1", "0", "1"]
    assert not is_hidden(table([-1, 1]), "label")
    assert is_hidden(Dataset.from_dict({"text": ["a"]}), "label")


def test_minus_one_beside_indices_is_a_class_with_a_warning(caplog) -> None:
    assert read([0, 1, -1, 2, -1])[1] == ["-1", "0", "1", "2"]
    assert caplog.messages == [
        "'label' of x is -1 in 2 of 5 training rows, which is a class like the others; leave such rows out if they "
        "have no label"
    ]
    caplog.clear()
    assert read([-1, 1])[1] == ["-1", "1"]
    assert not caplog.text


def test_a_minus_beside_names_is_a_class_with_a_warning_but_not_beside_a_plus(caplog) -> None:
    assert read(["neutral", "-", "entailment", "neutral"]) == ([2, 0, 1, 2], ["-", "entailment", "neutral"])
    assert caplog.messages == [
        "'label' of x is '-' in 1 of 4 training rows, which is a class like the others; leave such rows out if they "
        "have no label"
    ]
    caplog.clear()
    read(["-", "+", "="])
    read(["-", "yes"])
    assert not caplog.messages


def test_a_class_that_is_called_none_is_a_label() -> None:
    found = {"train": table(["None", "Some", "Some"]), "test": table(["None", "None"])}
    splits, _ = labelled_splits(found, COLUMNS, "x", (), 0.0, 0.0)
    assert splits["test"].labels.tolist() == [0, 0]


@pytest.mark.parametrize("hidden", [table([-1, -1]), Dataset.from_dict({"text": ["a"]})])
def test_only_a_test_split_may_be_without_labels_and_that_is_said(hidden, caplog) -> None:
    message = r"\Adata.label must be in the validation split of x, but 'label' is missing or empty there; leave"
    with pytest.raises(ValueError, match=message):
        labelled_splits({"train": table([1, 0]), "validation": hidden}, COLUMNS, "x", (), 0.0, 0.0)
    with caplog.at_level("INFO", logger="lit_llm"):
        labelled_splits({"train": table([1, 0]), "test": hidden}, COLUMNS, "x", (), 0.0, 0.0)
    assert "The test split of x has no labels" in caplog.text


def test_a_table_without_labels_or_without_training_rows_is_said() -> None:
    with pytest.raises(ValueError, match=exactly("data.path must hold a training split, but x has only test")):
        labelled_splits({"test": table([1])}, COLUMNS, "x", (), 0.0, 0.0)
    message = (
        "data.label must be given where no column is called label, labels, target, class, category, score, but is not; "
        "x has label"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        labelled_splits({"train": table([1])}, Columns("text", None, None), "x", (), 0.0, 0.0)
    message = (
        "data.path must hold a column of labels beside the text, but x has only 'text;label'; cells must be apart by "
        "commas in a .csv file, by tabs in a .tsv file"
    )
    rows = Dataset.from_dict({"text;label": ["a;1"]})
    with pytest.raises(ValueError, match=exactly(message)):
        labelled_splits({"train": rows}, Columns("text;label", None, None), "x", (), 0.0, 0.0)


def test_codes_of_another_split_are_the_same_classes_where_none_there_has_a_zero_in_front() -> None:
    reader = learn_labels(table(["01", "10", "12"]), "x", "label")
    assert reader.read(["12", "10"], "test").tolist() == [2, 1]
    assert reader.read([10, 12], "test").tolist() == [1, 2]
    with pytest.raises(
        ValueError, match=r"^data.label must be one of '01', '10', '12' as in training, but 'label' is 1 "
    ):
        reader.read(["1", "10"], "test")


@pytest.mark.parametrize("train", [["05", "10", "15"], ["5", "10", "2.5"]])
def test_a_zero_in_front_is_no_part_of_a_value(train) -> None:
    reader = learn_labels(table(train), "x", "label", as_values=True)
    assert reader.read(train, "train").tolist() == [float(text) for text in train]
    assert reader.read(["05", "10"], "test").tolist() == [5, 10]


@pytest.mark.parametrize(
    ("labels", "odd"), [([0.5, float("-inf"), float("inf")], "-inf"), (["1", "1e999"], "inf"), ([0.5, 1e39], "1e+39")]
)
def test_a_value_that_is_infinite_or_would_be_in_32_bits_is_refused_and_to_predict_is_not_known(labels, odd) -> None:
    reader = learn_labels(table([0.5, 2.5]), "x", "label")
    message = (
        f"data.label must be finite in 32 bits, but 'label' is {odd} in row 1 of the train split of x; leave such rows "
        f"out"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        labelled_splits({"train": table(labels)}, COLUMNS, "x", (), 0.0, 0.0)
    assert np.isnan(read_labels(table(labels), reader, "test")[1])


def test_labels_of_a_split_are_all_values_or_all_names_of_classes():
    stars = LabelReader("table", "label", (0, 1, 2), ["1", "2", "3"])
    assert stars.read(["1", "2", "3"], "test").tolist() == [0, 1, 2]
    assert stars.read([2, 0], "test").tolist() == [2, 0]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["1", "2", "4"], [0, 1, 3]),
        ([4.0, 1.0], [3, 0]),
        ([0, 4], [0, 4]),  # no class has the value 0
        ([0, 1, 5], [IGNORE_INDEX, 0, 4]),
        ([4, 5, None], [3, 4, IGNORE_INDEX]),
    ],
)
def test_numbers_of_a_table_of_ones_own_are_names_of_classes_before_they_are_indices(labels, expected) -> None:
    trained = named([0, 1, 2, 3, 4], ["1", "2", "3", "4", "5"])
    splits, reader = labelled_splits({"train": trained, "test": trained}, COLUMNS, "x", (), 0.0, 0.0)
    assert splits["train"].labels.tolist() == splits["test"].labels.tolist() == [0, 1, 2, 3, 4]
    assert read_labels(table(labels), reader, "test").tolist() == expected
    assert read_labels(named([1, 3], ["1", "2", "3", "4"]), reader, "test").tolist() == [1, 3]


def test_real_numbers_are_found_in_names_as_they_are_written_there() -> None:
    reader = learn_labels(named([0, 1], ["1.0", "1.5"]), "x", "label")
    assert read_labels(table([1.0, 1.5]), reader, "test").tolist() == [0, 1]


def test_truth_values_are_names_of_classes_before_they_are_indices() -> None:
    reader = learn_labels(named([0, 1], ["True", "False"]), "x", "label")
    assert read_labels(table(["true", "false"]), reader, "test").tolist() == [0, 1]
