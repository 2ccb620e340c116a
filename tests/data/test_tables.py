import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from lit_llm.data.table_files import choose_splits
from lit_llm.data.tables import Columns, check_texts, column_values, find_columns, open_table
from tests.writing import exactly

ROWS = [{"text": 'a "quoted", tab\tand\nline', "label": "1"}, {"text": "NA", "label": "007"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    table = Dataset.from_list(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_a_file_of_any_kind_is_read_word_for_word(tmp_path, suffix) -> None:
    [rows] = open_table(str(write(tmp_path / f"x{suffix}", ROWS))).values()
    assert list(rows) == ROWS


def test_dates_in_json_lines_are_text(tmp_path) -> None:
    dates = ["2024-01-01", "2024-01-02T10:00:00Z"]
    rows = open_table(str(write(tmp_path / "x.jsonl", [{"text": date, "label": date[:10]} for date in dates])))["train"]
    assert list(rows) == [{"text": date, "label": date[:10]} for date in dates]
    check_texts(rows, {"text": "text"}, "x", "train")


@pytest.mark.parametrize("indent", [None, 1])
def test_dates_in_an_array_of_json_are_text(tmp_path, indent) -> None:
    rows = [{"text": f"2024-01-{n:02}T10:00:00", "label": f"2024-01-{n:02}"} for n in range(1, 9)]
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=indent))
    assert list(open_table(str(tmp_path / "x.json"))["train"]) == rows


def test_what_a_column_of_json_lines_holds_is_seen_in_all_of_its_rows(tmp_path) -> None:
    rows = [{}, {"text": "b"}] + [{"text": "ab" * 500, "label": n % 5, "more": n} for n in range(11_000)]
    rows += [{"text": "a", "label": 0.5, "more": "b"}, {"text": "a", "label": 1, "late": {"c": None}}]
    found = open_table(str(write(tmp_path / "x.jsonl", rows)))["train"]
    assert column_values(found, "label") == [row.get("label") for row in rows]
    assert found[-2:]["more"] == ["b", None]
    assert found[-1]["late"] == {"c": None}


def test_a_line_of_json_that_is_no_row_is_named(tmp_path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n["b"]\n')
    reason = 'a line must be a row, but line 2 of x.jsonl is ["b"]'
    message = f"data.path must be a table that can be read, but {tmp_path}/x.jsonl is not: {reason}"
    with pytest.raises(ValueError, match=exactly(message)):
        open_table(str(tmp_path / "x.jsonl"))


def test_a_csv_file_with_a_nameless_index_is_read_and_its_text_found(tmp_path) -> None:
    Dataset.from_list(ROWS).to_csv(tmp_path / "x.csv", index=True)
    rows = open_table(str(tmp_path / "x.csv"))["train"]
    assert rows.column_names == ["Unnamed: 0", "text", "label"]
    assert rows["text"][:] == [row["text"] for row in ROWS]
    rows = rows.rename_column("text", "review")
    assert find_columns(rows, "x.csv", None, None, None) == Columns("review", None, "label")


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_csv_file_that_was_written_several_times_with_its_index_is_read_and_its_text_found(tmp_path, times) -> None:
    frame = pd.DataFrame(ROWS).rename(columns={"text": "review"})
    for _ in range(times):
        frame.to_csv(tmp_path / "x.csv")
        frame = pd.read_csv(tmp_path / "x.csv", dtype=str, keep_default_na=False)
    rows = open_table(str(tmp_path / "x.csv"))["train"]
    assert rows.to_list() == frame.to_dict("records")
    assert find_columns(rows, "x.csv", None, None, None) == Columns("review", None, "label")


@pytest.mark.parametrize("header", [",Unnamed: 0.2,Unnamed: 0,text", "Unnamed: 1,,text,", ",,Unnamed: 1,Unnamed: 0"])
def test_columns_without_a_name_are_called_as_pandas_calls_them(tmp_path, header) -> None:
    (tmp_path / "x.csv").write_text(header + "\na,b,c,d\n")
    rows = open_table(str(tmp_path / "x.csv"))["train"]
    assert rows.to_list() == pd.read_csv(tmp_path / "x.csv").to_dict("records")


def test_quotes_that_enclose_no_cell_of_a_tsv_file_are_text_and_merge_no_rows(tmp_path) -> None:
    cells = ['"Open', 'He said "no".', 'never" closed', '"all" and "more"', '"whole"']
    (tmp_path / "x.tsv").write_text("text\tlabel\n" + "".join(f"{cell}\t{n}\n" for n, cell in enumerate(cells)))
    rows = open_table(str(tmp_path / "x.tsv"))["train"]
    assert rows["text"][:] == cells
    assert rows["label"][:] == list("01234")


def test_a_folder_has_the_splits_that_its_files_are_called_after_also_of_different_columns(tmp_path) -> None:
    write(tmp_path / "train-00000-of-00002.csv", ROWS)
    write(tmp_path / "train-00001-of-00002.csv", ROWS)
    write(tmp_path / "dev.tsv", ROWS[:1])
    write(tmp_path / "test.jsonl", [{"text": "unlabelled"}])
    splits = open_table(str(tmp_path))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 4, "validation": 1, "test": 1}


@pytest.mark.parametrize("name", ["x.csv", "folder/x.parquet"])
def test_a_lone_table_is_split_by_its_column_split(tmp_path, caplog, name) -> None:
    caplog.set_level("INFO", "lit_llm")
    values = ["dev", "train", "unlabelled", "Train", "test", "train"]
    path = write(tmp_path / name, [{"text": str(n), "split": value} for n, value in enumerate(values)])
    path = path if name == "x.csv" else path.parent
    found = {kind: rows["text"][:] for kind, rows in open_table(str(path)).items()}
    assert found == {"train": ["1", "5"], "validation": ["0"], "test": ["4"], "unlabelled": ["2"]}
    assert caplog.messages == [
        f"Splitting {path} by its column 'split': 'dev', 'train', 'unlabelled', 'Train', 'test'",
        f"Reading unlabelled, train, dev, test of {path}; ignoring Train",
    ]


@pytest.mark.parametrize(
    ("values", "odd"),
    [
        (["train", "dev", "7"], "'7'"),
        (["train", "dev", None], "None"),
        (["cup", "latest", "a"], ""),
        (["train"] * 3, ""),
    ],
)
def test_a_column_split_in_which_a_value_names_no_split_splits_nothing(tmp_path, caplog, values, odd) -> None:
    path = write(tmp_path / "x.csv", [{"text": "a", "split": value} for value in values])
    assert [(kind, len(rows)) for kind, rows in open_table(str(path)).items()] == [("train", 3)]
    message = f"The column 'split' of {path} does not split it, since {odd} in it names no split"
    assert caplog.messages == [message] * bool(odd)


def test_beside_other_tables_a_column_split_decides_nothing(tmp_path) -> None:
    write(tmp_path / "train.csv", [{"text": "a", "split": value} for value in ("train", "test")])
    write(tmp_path / "dev.csv", [{"text": "a", "split": "train"}])
    assert {kind: len(rows) for kind, rows in open_table(str(tmp_path)).items()} == {"train": 2, "validation": 1}


def test_shards_whose_names_the_hub_gave_hashes_are_one_split(tmp_path) -> None:
    for number, code in enumerate(("6f1d9a0c3be2d7a1", "a09b74b3ef9c3b56", "0123456789012345")):
        write(tmp_path / f"train-{number:05}-of-00003-{code}.parquet", [{"text": f"{number}", "label": "a"}])
    write(tmp_path / "test-00000-of-00001-55aa9a0c3be2d7ff.parquet", ROWS)
    splits = open_table(str(tmp_path))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 3, "test": 2}


@pytest.mark.parametrize(
    "name", ["train_{}.parquet", "train-{}.jsonl", "train.{}.csv", "data_train000{}.tsv", "Train_202{}-01.csv"]
)
def test_files_of_a_split_that_differ_in_a_number_alone_are_all_read(tmp_path, name) -> None:
    for number in range(3):
        write(tmp_path / name.format(number), [{"text": f"{number}", "label": "a"}])
    write(tmp_path / "test.csv", ROWS)
    splits = open_table(str(tmp_path))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 3, "test": 2}
    assert splits["train"]["text"][:] == ["0", "1", "2"]


def test_files_of_a_split_in_several_formats_are_refused_by_their_names(tmp_path) -> None:
    for name in ("test.csv", "train_0.csv", "train_1.tsv"):
        write(tmp_path / name, ROWS)
    message = (
        f"data.path must hold each split in one format, but {tmp_path} has train_0.csv and train_1.tsv; convert one of "
        f"them"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        open_table(str(tmp_path))


def test_files_without_labels_that_differ_in_a_number_alone_are_all_read(tmp_path) -> None:
    for name in ("train.csv", "unlabelled_0.csv", "unlabelled_1.csv"):
        write(tmp_path / name, ROWS)
    splits = open_table(str(tmp_path))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2, "unlabelled": 4}


def test_tables_whose_numbers_are_no_parts_of_a_split_stay_apart(tmp_path, caplog) -> None:
    names = ["a1", "a2", "train", "train (1)", "train_v1", "train_v2"]
    for name in names:
        write(tmp_path / f"{name}.csv", ROWS)
    assert len(open_table(str(tmp_path))["train"]) == len(ROWS)
    said = caplog.messages[0].removeprefix("Reading ").replace(f" of {tmp_path}; ignoring ", ", ")
    assert sorted(said.split(", ")) == names


def test_a_file_that_is_left_out_may_be_of_any_kind(tmp_path) -> None:
    for name in ("train.csv", "test.csv"):
        write(tmp_path / name, ROWS)
    (tmp_path / "tokens.json").write_text('{\n "a": [1,\n 2]\n}')
    (tmp_path / "notes.csv").write_text("a;b\n1,2,3,4\n")
    assert {name: len(rows) for name, rows in open_table(str(tmp_path)).items()} == {"train": 2, "test": 2}


@pytest.mark.parametrize(("left", "level"), [("train_b", "WARNING"), ("sample", "INFO"), ("test_b", "INFO")])
def test_a_second_table_to_train_on_is_left_out_with_a_warning(caplog, left, level) -> None:
    caplog.set_level("INFO")
    choose_splits(dict.fromkeys(["test_a", "train_a", left], Dataset.from_dict({})), "x")
    said = f"Reading train_a, test_a of x; ignoring {left}"
    assert [(record.levelname, record.message) for record in caplog.records] == [(level, said)]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('text\tlabel\n"so it goes\t1\nhe said "\t0\n', ['"so it goes', 'he said "']),  # as wide without quoting
        ('text\tlabel\n"so it goes\t1\nb\t0\t"\n', None),  # neither way fits
        ('text\tlabel\n"one\n\ntwo"\t1\nb\t0\n', ["one\n\ntwo", "b"]),
        ('text\n"one\ntwo"\nb\n', ["one\ntwo", "b"]),
    ],
)
def test_quotes_lines_apart_enclose_a_tsv_cell_only_where_rows_need_it(tmp_path, content, texts) -> None:
    (tmp_path / "x.tsv").write_text(content)
    if texts is None:
        with pytest.raises(ValueError, match=r"Expected 2 fields in line 3, saw 3"):
            open_table(str(tmp_path / "x.tsv"))
    else:
        assert open_table(str(tmp_path / "x.tsv"))["train"]["text"][:] == texts


@pytest.mark.parametrize("with_card", [True, False])
def test_a_folder_in_the_hubs_layout_has_its_subsets(tmp_path, with_card) -> None:
    for task, text in (("one", "a"), ("two", "b")):
        write(tmp_path / task / "train-00000-of-00001.parquet", [{"text": text, "label": 0}])
    if with_card:
        configs = [
            {"config_name": task, "data_files": [{"split": "train", "path": f"{task}/train-*"}]}
            for task in ("one", "two")
        ]
        (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert list(open_table(str(tmp_path), "two")["train"]) == [{"text": "b", "label": 0}]


def test_a_readme_without_splits_changes_nothing(tmp_path) -> None:
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "test.jsonl", [{"text": "unlabelled"}])
    (tmp_path / "README.md").write_text("# My tables\n")
    assert {name: len(rows) for name, rows in open_table(str(tmp_path)).items()} == {"test": 1, "train": 2}


def test_a_card_without_splits_leaves_them_to_the_names_beneath_it(tmp_path) -> None:
    write(tmp_path / "data" / "train-00000-of-00001.parquet", ROWS)
    (tmp_path / "README.md").write_text("# Theirs\n")
    assert list(open_table(str(tmp_path))["train"]) == ROWS


CARD = """---
dataset_info:
  features:
  - {name: text, dtype: string}
  - name: label
    dtype: {class_label: {names: {"0": pos, "1": neg}}}
---
"""


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("subset", [None, "ours"])
def test_classes_are_called_what_a_card_without_splits_calls_them(tmp_path, suffix, subset) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    write(tmp_path / (subset or "") / f"train{suffix}", rows)
    write(tmp_path / (subset or "") / f"unlabelled{suffix}", [{"text": "c", "label": -1}])
    (tmp_path / "README.md").write_text(CARD)
    found = open_table(str(tmp_path), subset)
    assert found["train"].features["label"].names == ["pos", "neg"]
    assert {name: list(rows["label"]) for name, rows in found.items()} == {"train": [1, 0], "unlabelled": [-1]}


@pytest.mark.parametrize("labels", [[1, 2], ["maybe", "pos"], [0.5, 1.0]])
def test_what_a_card_does_not_say_of_a_column_is_read_as_it_is(tmp_path, labels) -> None:
    write(tmp_path / "train.jsonl", [{"text": "a", "label": label} for label in labels])
    (tmp_path / "README.md").write_text(CARD)
    assert list(open_table(str(tmp_path))["train"]["label"]) == labels


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (["0", "1", "2"], ["2", "1"], ([0, 1, 2], [2, 1])),
        (["1", "2", "3"], ["2", "-1"], ([0, 1, 2], [1, -1])),
        (["1", "2"], ["0", " 1"], ([1, 2], [0, 1])),  # the type is inferred from all splits
        (["1", "2", "0"], ["-1", "-1"], ([1, 2, 0], [-1, -1])),
        (["0", "1", "3"], ["1", "2"], (["0", "1", "3"], ["1", "2"])),
    ],
)
def test_digits_in_text_are_all_names_of_classes_or_all_their_numbers(tmp_path, suffix, train, test, expected) -> None:
    for name, labels in (("train", train), ("test", test)):
        write(tmp_path / f"{name}{suffix}", [{"text": "a", "label": label} for label in labels])
    (tmp_path / "README.md").write_text(CARD.replace('"0": pos, "1": neg', '"0": "1", "1": "2", "2": "3"'))
    found = open_table(str(tmp_path))
    assert (list(found["train"]["label"]), list(found["test"]["label"])) == expected


@pytest.mark.parametrize("card", ["README.md", None])
def test_what_older_data_sets_say_in_json_is_no_table(tmp_path, card) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": ["a"], "label": [1]}, features).to_parquet(
        tmp_path / "data" / "train-00000-of-00001.parquet"
    )
    (tmp_path / "dataset_infos.json").write_text('{"default": {"description": "Theirs"}}')
    if card:
        (tmp_path / card).write_text("---\nlanguage: en\n---\n")
    assert open_table(str(tmp_path))["train"].features["label"].names == ["no", "yes"]


def test_a_config_beside_a_table_is_none(tmp_path) -> None:
    write(tmp_path / "mine.csv", ROWS)
    (tmp_path / "config.json").write_text('{\n "a": 1\n}')
    assert [len(rows) for rows in open_table(str(tmp_path)).values()] == [2]


def test_a_folder_in_the_hubs_layout_may_be_beneath_the_home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "mine" / "a.parquet", ROWS)
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": "a.parquet"}]}]
    (tmp_path / "mine" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert list(open_table("~/mine")["train"]) == ROWS


def test_a_changed_file_is_read_anew(tmp_path) -> None:
    path = write(tmp_path / "x.csv", ROWS)
    open_table(str(path))
    write(path, ROWS[:1])
    assert len(open_table(str(path))["train"]) == 1


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_a_file_that_is_changed_at_the_time_it_had_before_is_read_anew(tmp_path, suffix) -> None:
    path = write(tmp_path / f"x{suffix}", ROWS)
    before = path.stat()
    open_table(str(path))
    write(path, ROWS[:1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert list(open_table(str(path))["train"]) == ROWS[:1]


def test_of_several_splits_of_a_kind_the_one_asked_for_is_chosen() -> None:
    names = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    found = DatasetDict({name: Dataset.from_dict({"name": [name]}) for name in names})
    for suffix in ("_matched", "_mismatched"):
        chosen = choose_splits(found, "x", suffix)
        assert {kind: rows[0]["name"] for kind, rows in chosen.items()} == {
            "train": "train",
            "validation": f"validation{suffix}",
            "test": f"test{suffix}",
        }


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        ("Test Train Valid", {"train": "Train", "validation": "Valid", "test": "Test"}),
        ("sst2_test sst2_train", {"train": "sst2_train", "test": "sst2_test"}),
        ("diagnostic sample_submission train", {"train": "train"}),
        ("latest", {"train": "latest"}),
        ("test", {"test": "test"}),
    ],
)
def test_the_split_is_the_word_in_the_name_wherever_it_stands(names, kinds) -> None:
    found = {name: Dataset.from_dict({"name": [name]}) for name in names.split()}
    assert {kind: rows[0]["name"] for kind, rows in choose_splits(found, "x").items()} == kinds


def test_names_that_do_not_say_which_table_trains_are_refused() -> None:
    found = {name: Dataset.from_dict({"name": [name]}) for name in ("a", "test")}
    message = "data.path must say in a name which table is train, but x has a, test"
    with pytest.raises(ValueError, match=exactly(message)):
        choose_splits(found, "x")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["text", "label"], Columns("text", None, "label")),
        (["idx", "review", "target"], Columns("review", None, "target")),
        (["sentence1", "sentence2", "labels"], Columns("sentence1", "sentence2", "labels")),
        (["question", "sentence", "label"], Columns("question", "sentence", "label")),
        (["title", "text", "author", "label"], Columns("text", None, "label")),
        (["id", "sentence"], Columns("sentence", None, None)),
    ],
)
def test_columns_are_found_where_there_is_one_obvious_choice(names, expected) -> None:
    rows = Dataset.from_dict({name: ["x"] for name in names})
    assert find_columns(rows, "x.csv", None, None, None) == expected


def test_columns_that_are_named_are_taken() -> None:
    rows = Dataset.from_dict({name: ["x"] for name in ("text", "a", "b", "label")})
    assert find_columns(rows, "x.csv", "a", "b", "text") == Columns("a", "b", "text")


@pytest.mark.parametrize(
    ("names", "pair", "expected"),
    [
        (["review", "title", "label"], "title", Columns("review", "title", "label")),
        (["text", "text_pair", "title"], "title", Columns("text", "title", None)),
        (["sentence1", "sentence2", "other"], "sentence2", Columns("sentence1", "sentence2", None)),
        (["a", "text"], "text", Columns("a", "text", None)),
    ],
)
def test_a_second_text_that_is_named_is_taken_and_is_not_the_first(names, pair, expected) -> None:
    rows = Dataset.from_dict({name: ["x"] for name in names})
    assert find_columns(rows, "x.csv", None, pair, None) == expected


def test_a_table_without_text_is_said_to_have_none() -> None:
    rows = Dataset.from_dict({"label": ["x"], "n": [1]})
    with pytest.raises(
        ValueError, match=exactly("data.path must hold a column of text to classify, but x.csv has label, n")
    ):
        find_columns(rows, "x.csv", None, None, None)


@pytest.mark.parametrize(
    ("given", "first", "second", "name"),
    [
        ({"text": "label"}, "text", "label", "label"),
        ({"text": "title", "label": "title"}, "text", "label", "title"),
        ({"text_pair": "label"}, "text_pair", "label", "label"),
        ({"text": "title", "text_pair": "title"}, "text_pair", "text", "title"),
    ],
)
def test_a_column_is_one_thing_so_that_no_label_is_read_as_text(given, first, second, name) -> None:
    rows = Dataset.from_dict({name: ["x"] for name in ("text", "title", "label")})
    message = f"data.{first} must be another column than data.{second}, but is {name!r} in x.csv too"
    with pytest.raises(ValueError, match=exactly(message)):
        find_columns(rows, "x.csv", **{"text": None, "text_pair": None, "label": None, **given})


@pytest.mark.parametrize("role", ["text", "text_pair", "label"])
def test_a_misspelt_column_is_said_with_those_there_are(role) -> None:
    rows = Dataset.from_dict({"text": ["x"], "label": [1]})
    given = {"text": "text", "text_pair": None, "label": "label"} | {role: "lable"}
    with pytest.raises(ValueError, match=exactly(f"data.{role} must be one of text, label in x.csv, but is 'lable'")):
        find_columns(rows, "x.csv", **given)


def test_columns_that_could_be_any_are_asked_for() -> None:
    rows = Dataset.from_dict({"a": ["x"], "b": ["x"], "n": [1], "label": [1]})
    with pytest.raises(ValueError, match=exactly("data.text must be one of a, b in x.csv, but is not given")):
        find_columns(rows, "x.csv", None, None, None)


HEADERLESS = "; the first line of a CSV or TSV file is taken for its columns' names: add a header"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label": "3"}, "data.text must be one of Bears, Short-sellers, in {path}, but is not given"),
        ({"text": "text"}, "data.text must be one of 3, Bears, Short-sellers, in {path}, but is 'text'"),
    ],
)
def test_a_table_without_a_header_is_said_to_want_one(tmp_path, caplog, given, message) -> None:
    path = tmp_path / "x.csv"
    path.write_text('3,Bears,"Short-sellers,"\n2,Cup,"On Sunday,"\n')
    rows = open_table(str(path))["train"]
    assert caplog.messages == [f"The first line of {path} is taken for its columns' names; add a header if it is a row"]
    with pytest.raises(ValueError, match=exactly(message.format(path="x.csv") + HEADERLESS)):
        find_columns(rows, "x.csv", **{"text": None, "text_pair": None, "label": None, **given})


def test_a_sentence_is_no_name_of_a_column(tmp_path, caplog) -> None:
    (tmp_path / "x.tsv").write_text(f"gj04\t\t{'Our friends ' * 4}\ngj05\t\ta\n")
    [name] = [name for name in open_table(str(tmp_path / "x.tsv"))["train"].column_names if "friends" in name]
    assert len(caplog.messages) == 1
    rows = Dataset.from_dict({name: ["x"], "other": ["x"]})
    with pytest.raises(ValueError, match=f"but is not given{HEADERLESS}"):
        find_columns(rows, "x.tsv", None, None, None)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_text_that_is_missing_is_said_with_its_row(tmp_path, suffix) -> None:
    path = write(tmp_path / f"x{suffix}", [{"text": "a", "label": 1}, {"text": None, "label": 0}])
    rows = open_table(str(path))["train"]
    message = "data.text must hold a text in every row, but 'text' has none in row 1 of the train split of x; leave such rows out"
    with pytest.raises(ValueError, match=exactly(message)):
        check_texts(rows, Columns("text", None, "label").texts, "x", "train")


def test_numbers_are_no_texts() -> None:
    rows = Dataset.from_dict(
        {"text": ["a"], "other": [1.5]}, Features({"text": Value("string"), "other": Value("float64")})
    )
    message = "data.text_pair must hold text, but 'other' holds float64 in the test split of x"
    with pytest.raises(TypeError, match=exactly(message)):
        check_texts(rows, Columns("text", "other", None).texts, "x", "test")


def test_the_case_of_a_suffix_says_nothing(tmp_path) -> None:
    (tmp_path / "x.CSV").write_text("text,label\na,1\n")
    assert list(open_table(str(tmp_path / "x.CSV"))["train"]) == [{"text": "a", "label": "1"}]
    assert list(open_table(str(tmp_path))["train"]) == [{"text": "a", "label": "1"}]


@pytest.mark.parametrize(("name", "content"), [("x.csv", "text,label\n"), ("x.csv", ""), ("x.jsonl", "")])
def test_a_table_without_rows_is_said_to_have_none(tmp_path, name, content) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=exactly(f"data.path must hold rows, but {tmp_path}/{name} has none")):
        open_table(str(tmp_path / name))


def test_a_line_that_is_no_json_is_named(tmp_path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": 1}\n\n{"text": "b", "label": }\n')
    with pytest.raises(ValueError, match=r"but line 3 of x\.jsonl is not \(Expecting value at character 24\)$"):
        open_table(str(tmp_path / "x.jsonl"))


def test_two_columns_of_one_name_are_refused(tmp_path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,text,label\na,b,1\n")
    reason = "columns must have names of their own, but 2 are called 'text'"
    with pytest.raises(
        ValueError, match=exactly(f"data.path must be a table that can be read, but {path} is not: {reason}")
    ):
        open_table(str(path))


def test_what_is_no_table_is_said_in_one_line(tmp_path) -> None:
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "x.jsonl").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_text("text,label\na,1,2,3\n")
    for name, kind in {
        "x.txt": ValueError,
        "x.jsonl": ValueError,
        "x.csv": ValueError,
        "empty": ValueError,
        "none.csv": FileNotFoundError,
        "none": FileNotFoundError,
    }.items():
        with pytest.raises(kind, match=r"\Adata.path must [^\n]+, but [^\n]+\Z"):
            open_table(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"\Adata.path must [^\n]+, but is 'nobody/nothing' [^\n]+\Z"):
        open_table("nobody/nothing", "x")


def test_a_packed_table_is_to_be_unpacked(tmp_path) -> None:
    for name in ("train.jsonl.gz", "dev.csv.ZIP"):
        (tmp_path / name).write_bytes(b"x")
    formats = ".jsonl, .json, .parquet, .csv, .tsv"
    message = f"data.path must be a table ({formats}), but {tmp_path}/train.jsonl.gz is packed; unpack it"
    with pytest.raises(ValueError, match=exactly(message)):
        open_table(str(tmp_path / "train.jsonl.gz"))
    message = f"data.path must hold tables ({formats}), but {tmp_path}/dev.csv.ZIP is packed; unpack it"
    with pytest.raises(ValueError, match=exactly(message)):
        open_table(str(tmp_path))


def test_a_class_label_stays_what_the_hub_says(tmp_path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"text": ["a"], "label": [1]}, features).to_parquet(tmp_path / "x.parquet")
    rows = open_table(str(tmp_path / "x.parquet"))["train"]
    assert rows.features["label"].names == ["no", "yes"]
    assert np.array(rows["label"]).tolist() == [1]


def test_only_the_column_that_is_wanted_is_read(monkeypatch) -> None:
    read = []
    fetch = Dataset.__getitem__

    def noted(rows: Dataset, key: Any) -> Any:
        read.append(rows.column_names)
        return fetch(rows, key)

    monkeypatch.setattr(Dataset, "__getitem__", noted)
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "large": ["x" * 9] * 3}).select([2, 0])
    assert column_values(rows, "text") == ["c", "a"]
    check_texts(rows, {"text": "text"}, "x", "train")
    assert read == [["text"]] * 2


def test_an_array_of_json_is_read_whatever_its_file_is_called(tmp_path) -> None:
    for name in ("x.json", "x.jsonl"):
        (tmp_path / name).write_text(json.dumps([{"text": "a", "label": 0}, {"text": "b", "label": 1}]))
        assert open_table(str(tmp_path / name))["train"]["text"][:] == ["a", "b"]


def test_whole_numbers_beyond_64_bits_are_read_as_real_ones(tmp_path) -> None:
    rows = [{"text": "a", "n": 2**63 + 5, "label": 0}, {"text": "b", "n": 1, "label": 1}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert open_table(str(tmp_path / "x.jsonl"))["train"]["n"][:] == [float(2**63 + 5), 1.0]


@pytest.mark.parametrize("last", ["more", 0.5, None])
def test_json_lines_that_are_read_in_parts_are_one_table(tmp_path, monkeypatch, last) -> None:
    monkeypatch.setattr("lit_llm.data.tables.ROWS_AT_ONCE", 2)
    rows = [{"text": f"{n}", "value": last if n == 4 else n} for n in range(5)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = open_table(str(tmp_path / "x.jsonl"))["train"]
    assert found["text"][:] == ["0", "1", "2", "3", "4"]
    assert found["value"][:] == [0, 1, 2, 3, last]


@pytest.mark.parametrize("stray", ["", 'an inch is 1"'])
def test_quotes_of_a_long_tsv_file_are_judged_by_a_part_of_it(tmp_path, monkeypatch, stray) -> None:
    monkeypatch.setattr("lit_llm.data.delimited.LOOKED_AT", 300)
    cells = [f'"over\ntwo lines, {n}"' if n % 7 == 3 else f"plain {n}" for n in range(200)]
    cells[10] = stray or cells[10]
    lines = ["text\tlabel", *(f"{cell}\t{n % 2}" for n, cell in enumerate(cells) if not (stray and '"o' in cell))]
    (tmp_path / "x.tsv").write_text("\n".join(lines) + "\n")
    found = open_table(str(tmp_path / "x.tsv"))["train"]["text"][:]
    assert found == ([c for c in cells if '"o' not in c] if stray else [c.strip('"') for c in cells])


def test_a_card_that_is_not_utf_8_says_nothing(tmp_path) -> None:
    (tmp_path / "README.md").write_bytes(b"caf\xe9")
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n')
    assert open_table(str(tmp_path))["train"]["text"][:] == ["a"]


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ("a", "Error tokenizing data. C error: Expected 1 fields in line 3, saw 2"),
        ("a, b", "a row must have as many cells as the header, 1, but the first one has 2"),
    ],
)
def test_what_separates_cells_is_said_of_a_csv_file_with_semicolons(tmp_path: Path, first: str, reason: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"text;label\n{first};1\nb, c;2\n")
    apart = "; cells must be apart by commas in a .csv file, by tabs in a .tsv file"
    message = f"data.path must be a table that can be read, but {path} is not: {reason}{apart}"
    with pytest.raises(ValueError, match=exactly(message)):
        open_table(str(path))
