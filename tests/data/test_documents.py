import gzip
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo

from lit_llm.data.corpora import stdlib_prose
from lit_llm.data.documents import Corpus, mixture, open_corpus
from tests.writing import exactly, prose

TEXTS = ["first\n\nand more", "第二篇", 'third, with "quotes"\tand a tab', "fourth"]


def read(path: Path | str, **options: object) -> list[str]:
    return [document.text for document in open_corpus(str(path), **options).read()]


def table(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame({"number": range(len(texts)), column: texts})
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".json":
        path.write_text(json.dumps(frame.to_dict("records"), ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")), encoding="utf-8")
    return path


def hub_layout(folder: Path) -> Path:
    table(folder / "data/train-00000-of-00001.parquet", TEXTS[:2])
    table(folder / "data/validation-00000-of-00001.parquet", TEXTS[2:3])
    table(folder / "data/test-00000-of-00001.parquet", TEXTS[3:])
    return folder


def test_an_embedded_corpus_is_read_by_its_name() -> None:
    assert list(open_corpus("stdlib-prose").read()) == list(stdlib_prose())


def test_a_folder_holds_a_document_a_file_in_the_order_of_their_names(corpus: Path) -> None:
    (corpus / "deeper").mkdir()
    (corpus / "deeper/note.md").write_text("# note", encoding="utf-8")
    (corpus / "deeper/code.py").write_text("x = 1", encoding="utf-8")
    (corpus / "picture.png").write_bytes(b"\x89PNG")
    (corpus / ".hidden.txt").write_text("hidden", encoding="utf-8")
    documents = list(open_corpus(str(corpus)).read())
    names = [f"{number:02}.txt" for number in range(60)] + ["deeper/code.py", "deeper/note.md"]
    assert [document.id for document in documents] == names
    assert [document.text for document in documents] == [*map(prose, range(60)), "x = 1", "# note"]
    assert {document.split for document in documents} == {None}


def test_a_linked_folder_is_read_and_each_folder_once(tmp_path: Path) -> None:
    texts = {"mine/a.txt": "a", "mine/deeper/b.txt": "b", "theirs/c.txt": "c", "theirs/.hidden/d.txt": "d"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    links = {
        "linked": "../theirs",
        "twice": "../theirs",
        "alias": "deeper",
        "itself": ".",
        "deeper/up": ".",
        ".x": "..",
    }
    for name, to in links.items():
        (tmp_path / "mine" / name).symlink_to(to, target_is_directory=True)
    documents = list(open_corpus(str(tmp_path / "mine")).read())
    assert [(d.id, d.text) for d in documents] == [("a.txt", "a"), ("deeper/b.txt", "b"), ("linked/c.txt", "c")]


def test_a_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(prose(number) for number in range(400)), encoding="utf-8")
    pieces = read(path)
    assert "".join(pieces) == path.read_text(encoding="utf-8")
    assert len(pieces) > 5
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    assert all(8192 <= len(piece) < 9000 for piece in pieces[:-1])


@pytest.mark.parametrize("line_end", ["\r\n", "\r"])
def test_a_file_with_other_line_ends_is_cut_in_the_same_places(tmp_path: Path, line_end: str) -> None:
    text = "\n\n".join(prose(number) for number in range(400))
    (tmp_path / "unix.txt").write_bytes(text.encode())
    (tmp_path / "other.txt").write_bytes(text.replace("\n", line_end).encode())
    assert len(read(tmp_path / "other.txt")) == pytest.approx(len(read(tmp_path / "unix.txt")), abs=2)


def test_a_mixture_is_its_sources_one_after_another_with_what_each_knows(corpus: Path, tmp_path: Path) -> None:
    sources = {str(path): open_corpus(str(path)) for path in (corpus, hub_layout(tmp_path / "hub"))}
    mixed = mixture(sources)
    found = list(mixed.read(None))
    expected = [(name, document) for name, source in sources.items() for document in source.read(None)]
    assert [document.text for document in found] == [document.text for _, document in expected]
    assert [document.id for document in found] == [f"{name}:{document.id}" for name, document in expected]
    assert [mixed.source_of(document).has_validation for document in found] == [False] * 60 + [True] * 4
    assert json.loads(json.dumps(mixed.identity)) == mixed.identity
    assert [document.text for document in mixed.head(1).read(None)] == [prose(0), *TEXTS[2:], TEXTS[0]]
    assert mixed.source_of(found[0]._replace(source=None)) is mixed


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "marked.txt") == ["hello"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ".tsv"])
@pytest.mark.parametrize("column", ["text", "内容"])
def test_a_table_holds_a_document_a_row(tmp_path: Path, suffix: str, column: str) -> None:
    path = table(tmp_path / f"table{suffix}", TEXTS, column)
    assert read(path, column=column) == TEXTS


@pytest.mark.parametrize("name", ["A.TXT", "A.Md", "A.JSONL", "A.TSV"])
def test_a_suffix_may_be_in_upper_case(tmp_path: Path, name: str) -> None:
    lower = table(tmp_path / name.lower(), TEXTS)  # lines of JSON if read as text
    upper = tmp_path / "folder" / name
    upper.parent.mkdir()
    upper.write_bytes(lower.read_bytes())
    assert read(upper) == read(lower)
    in_folder = [lower.read_text(encoding="utf-8")] if upper.suffix in (".TXT", ".Md") else TEXTS
    assert read(upper.parent) == in_folder


def test_tables_beside_texts_are_left_out_and_said_to_be(tmp_path: Path, caplog) -> None:
    table(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.txt").write_text("a text", encoding="utf-8")
    (tmp_path / "c.txt.gz").write_bytes(b"")
    with caplog.at_level("INFO"):
        assert read(tmp_path) == ["a text"]
    assert caplog.messages[-1] == f"Reading 1 text files of {tmp_path}; ignoring a.jsonl and 1 more"


def test_an_empty_cell_is_an_empty_document(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text('{"text": null}\n{"text": "x"}\n')
    assert read(path) == ["", "x"]


@pytest.mark.parametrize("word", ["NA", "None", "null", "nan", "12", "1.50", "true"])
def test_a_csv_cell_is_text_whatever_it_says(tmp_path: Path, word: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"text\n{word}\n")
    assert read(path) == [word]


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_row_with_more_cells_than_the_header_is_refused(tmp_path: Path, in_folder: bool) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"some words {n}, and more {n}\n" for n in range(9)))
    reason = "a row must have as many cells as the header, 1, but the first one has 2"
    message = f"data.path must be a table that can be read, but {tmp_path / 'a.csv'} is not: {reason}"
    with pytest.raises(ValueError, match=exactly(message)):
        read(tmp_path if in_folder else tmp_path / "a.csv")


def test_a_cell_may_hold_a_book(tmp_path: Path) -> None:
    book = "word, " * 50_000
    assert read(table(tmp_path / "a.csv", [book])) == [book]


def test_a_quote_at_a_tsv_cells_head_alone_is_text(tmp_path: Path) -> None:
    texts = ['"Hello, he said' if number in (10, 60) else f"text {number}" for number in range(100)]
    (tmp_path / "a.tsv").write_text("text\n" + "\n".join(texts) + "\n")
    assert read(tmp_path / "a.tsv") == texts


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_in_hub_layout_keeps_its_splits_with_training_last(tmp_path: Path, streaming: bool) -> None:
    corpus = open_corpus(str(hub_layout(tmp_path)), streaming=streaming)
    documents = list(corpus.read())
    assert (corpus.has_validation, corpus.has_test) == (True, True)
    assert {(document.split, document.text) for document in documents} == {
        ("train", TEXTS[0]), ("train", TEXTS[1]), ("validation", TEXTS[2]), ("test", TEXTS[3]),
    }  # fmt: skip
    assert [document.split for document in documents][-2:] == ["train", "train"]
    assert len({document.id for document in documents}) == 4


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_a_folder_of_tables_is_one_corpus(tmp_path: Path, suffix: str) -> None:
    table(tmp_path / f"one{suffix}", TEXTS[:2])
    table(tmp_path / f"two{suffix}", TEXTS[2:])
    (tmp_path / "README.md").write_text("# About\n")
    corpus = open_corpus(str(tmp_path))
    assert sorted(document.text for document in corpus.read()) == sorted(TEXTS)
    assert (corpus.has_validation, corpus.has_test) == (False, False)


@pytest.mark.parametrize(
    ("names", "train", "validation", "test"),
    [
        (["train.jsonl", "extra.jsonl"], ["extra", "train"], [], []),
        (["a.jsonl", "b.jsonl", "c.json", "d.parquet", "e.csv", "f.tsv"], list("abcdef"), [], []),
        (["books.jsonl", "web.jsonl", "test_prep.jsonl"], ["books", "test_prep", "web"], [], []),
        (["books.jsonl", "wiki_test.jsonl", "dev-2.csv"], ["books"], ["dev-2"], ["wiki_test"]),
        (["train_a.jsonl", "train_b.jsonl", "dev_matched.jsonl"], ["train_a", "train_b"], ["dev_matched"], []),
        (["train/a.jsonl", "test/b.jsonl", "test/train.jsonl", "c.jsonl"], ["c", "train", "a"], [], ["b"]),
        (["data/train-00000-of-00001.parquet", "dataset_infos.json"], ["train-00000-of-00001"], [], []),
        (
            ["a.csv", "x_test-00000-of-00001-55aa9a0c3be2d7ff.csv"],
            ["a"],
            [],
            ["x_test-00000-of-00001-55aa9a0c3be2d7ff"],
        ),
    ],
)
def test_every_table_of_a_folder_is_read_for_what_its_name_clearly_says_or_for_training(
    tmp_path: Path, names: list[str], train: list[str], validation: list[str], test: list[str]
) -> None:
    for name in names:
        table(tmp_path / name, [Path(name).stem])
    corpus = open_corpus(str(tmp_path))
    found = {kind: [d.text for d in corpus.read() if d.split == kind] for kind in ("train", "validation", "test")}
    assert found == {"train": train, "validation": validation, "test": test}
    assert (corpus.has_validation, corpus.has_test) == (bool(validation), bool(test))


@pytest.mark.parametrize(
    ("names", "train", "validation", "test"),
    [
        (["train.txt", "valid.txt", "test.txt"], ["train.txt#0"], ["valid.txt#0"], ["test.txt#0"]),
        (["wiki.train.txt", "wiki.valid.txt", "README.md"], ["wiki.train.txt#0"], ["wiki.valid.txt#0"], []),
        (["train/a.txt", "train/b.md", "test/a.txt"], ["train/a.txt", "train/b.md"], [], ["test/a.txt"]),
        (
            ["train/driving_test.txt", "valid/night_train.txt"],
            ["train/driving_test.txt"],
            ["valid/night_train.txt"],
            [],
        ),
        (["train.py", "test.py", "model.py"], [], [], []),
        (["test_a.py", "test_b.py", "test.py"], [], [], []),
        (["train/a.txt", "train/b.txt"], [], [], []),
    ],
)
def test_a_folder_of_texts_keeps_its_splits_if_every_text_is_named_after_one(
    tmp_path: Path, names: list[str], train: list[str], validation: list[str], test: list[str]
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = open_corpus(str(tmp_path))
    found = {kind: [d.id for d in corpus.read() if d.split == kind] for kind in ("train", "validation", "test")}
    assert found == {"train": train, "validation": validation, "test": test}
    assert (corpus.has_validation, corpus.has_test) == (bool(validation), bool(test))
    assert [*train, *validation, *test] or [d.id for d in corpus.read()] == sorted(names)
    assert len(list(corpus.head(1).read())) == max(sum(map(bool, found.values())), 1)


def test_a_text_named_after_no_split_leaves_a_folder_without_them_and_is_named(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    for name in ("train.txt", "valid.txt", "notes.txt"):
        (tmp_path / name).write_text(name)
    open_corpus(str(tmp_path))
    [message] = caplog.messages
    assert message == f"Not reading the splits of {tmp_path} from its files' names, as notes.txt is named after none"


def test_a_text_named_after_a_split_is_cut_at_blank_lines_unless_documents_are_to_be_whole(tmp_path: Path) -> None:
    text = "\n\n".join(map(prose, range(200)))
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    for in_pieces in (True, False):
        documents = list(open_corpus(str(tmp_path), in_pieces=in_pieces).read())
        for split in ("train", "validation"):
            texts = [document.text for document in documents if document.split == split]
            assert "".join(texts) == text
            assert (len(texts) > 1) is in_pieces


def test_texts_of_an_array_of_json_may_spell_dates(tmp_path: Path) -> None:
    dates = [f"2024-01-{n:02}" for n in range(1, 9)]
    (tmp_path / "x.json").write_text(json.dumps([{"text": date} for date in dates]))
    assert [document.text for document in open_corpus(str(tmp_path / "x.json")).read()] == dates


def test_a_table_whose_name_only_begins_as_a_splits_is_said_to_be_trained_on(tmp_path: Path, caplog) -> None:
    for name in ("books", "test_prep"):
        table(tmp_path / f"{name}.jsonl", [name])
    with caplog.at_level("INFO"):
        open_corpus(str(tmp_path))
    file = tmp_path / "test_prep.jsonl"
    assert caplog.messages == [f"Reading {file} for training; for test its name must end in the word"]


@pytest.mark.parametrize("others", [True, False])
def test_a_packed_table_alone_or_beside_others_is_refused(tmp_path: Path, others: bool) -> None:
    if others:
        table(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    message = f"data.path must hold text or tables, but {tmp_path / 'b.jsonl.gz'} is packed; unpack it"
    with pytest.raises(ValueError, match=exactly(message)):
        open_corpus(str(tmp_path))


def test_a_corpus_can_be_read_again_and_again(corpus: Path, tmp_path: Path) -> None:
    for source in (corpus, table(tmp_path / "table.csv", TEXTS), hub_layout(tmp_path / "hub")):
        opened = open_corpus(str(source))
        assert list(opened.read()) == list(opened.read())


def test_the_head_is_the_first_documents_and_another_corpus(corpus: Path) -> None:
    whole = open_corpus(str(corpus))
    head = whole.head(3)
    assert list(head.read()) == list(whole.read())[:3]
    assert head.identity != whole.identity


def test_the_head_of_a_corpus_with_splits_is_the_first_documents_of_each(tmp_path: Path) -> None:
    head = open_corpus(str(hub_layout(tmp_path))).head(1)
    assert sorted((d.split, d.text) for d in head.read()) == [
        ("test", TEXTS[3]), ("train", TEXTS[0]), ("validation", TEXTS[2]),
    ]  # fmt: skip


def test_the_head_of_a_head_differs_from_the_head_of_the_whole(corpus: Path) -> None:
    whole = open_corpus(str(corpus))
    assert [len(list(c.read())) for c in (whole.head(3).head(50), whole.head(50))] == [3, 50]
    assert whole.head(3).head(50).identity != whole.head(50).identity


def test_the_identity_changes_with_a_files_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(1, 1))
    before = open_corpus(str(path)).identity
    assert open_corpus(str(path)).identity == before
    os.utime(path, ns=(2, 2))
    assert open_corpus(str(path)).identity != before
    path.write_text("more")
    os.utime(path, ns=(1, 1))
    assert open_corpus(str(path)).identity != before


def test_the_identity_changes_with_the_column_and_with_a_new_file(corpus: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "table.csv", TEXTS)
    assert open_corpus(str(path)).identity != open_corpus(str(path), column="number").identity
    before = open_corpus(str(corpus)).identity
    (corpus / "new.txt").write_text("new")
    assert open_corpus(str(corpus)).identity != before


def test_the_identity_of_a_folder_with_a_card_changes_with_the_card_and_with_packed_files(tmp_path: Path) -> None:
    def opened(train: str, test: str, time: int) -> Corpus:
        files = [{"split": "train", "path": train}, {"split": "test", "path": test}]
        configs = [{"config_name": "default", "data_files": files}]
        (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
        os.utime(tmp_path / "README.md", ns=(time, time))
        return open_corpus(str(tmp_path))

    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n'))
    first = opened("one.jsonl", "two.jsonl.gz", time=1)
    assert [(d.split, d.text) for d in first.read()] == [("test", "two"), ("train", "one")]
    swapped = opened("two.jsonl.gz", "one.jsonl", time=2)
    assert [(d.split, d.text) for d in swapped.read()] == [("test", "one"), ("train", "two")]
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n{"text": "more"}\n'))
    grown = opened("two.jsonl.gz", "one.jsonl", time=2)
    assert len({json.dumps(corpus.identity) for corpus in (first, swapped, grown)}) == 3


def test_the_identity_is_plain_enough_for_json(corpus: Path, tmp_path: Path) -> None:
    for source in (corpus, table(tmp_path / "table.csv", TEXTS), hub_layout(tmp_path / "hub"), "stdlib-prose"):
        opened = open_corpus(str(source))
        assert isinstance(opened, Corpus)
        assert json.loads(json.dumps(opened.identity)) == opened.identity


# Refusals.

NOT_THERE = (
    "data.path must be a file, a folder, a hub data set or one of stdlib, stdlib-code, stdlib-prose, "
    "but is {}, which does not exist"
)


@pytest.mark.parametrize("path", ["/no/such/folder", "missing.txt", "table.parquet", "a/b/c", "with space"])
def test_a_missing_path_is_named(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=exactly(NOT_THERE.format(path))):
        open_corpus(path)


def test_a_hub_data_set_that_has_changed_is_another_corpus(tmp_path: Path, monkeypatch) -> None:
    """The data sets are in the library's cache, which is used without a connection."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    identities = []
    for number, revision in enumerate(("1a" * 20, "2b" * 20)):
        folder = tmp_path / "me___corpus/default/0.0.0" / revision
        folder.mkdir(parents=True)
        rows = Dataset.from_dict({"text": [f"version {revision}"]})
        rows.save_to_disk(tmp_path / revision)
        shutil.copy(next((tmp_path / revision).glob("*.arrow")), folder / "corpus-train.arrow")
        splits = SplitDict({"train": SplitInfo("train", num_examples=1, dataset_name="corpus")})
        names = {"builder_name": "parquet", "dataset_name": "corpus", "config_name": "default", "version": "0.0.0"}
        DatasetInfo(features=rows.features, splits=splits, **names).write_to_directory(folder)
        os.utime(folder, (number, number))
        corpus = open_corpus("me/corpus")
        identities.append(corpus.identity)
        assert [document.text for document in corpus.read()] == [f"version {revision}"]
    assert open_corpus("me/corpus").identity == identities[1] != identities[0]


def test_a_folder_in_hub_layout_may_be_beneath_the_home(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    hub_layout(tmp_path / "mine")
    files = [{"split": "train", "path": "data/train-*"}]
    card = json.dumps([{"config_name": "default", "data_files": files}])
    (tmp_path / "mine" / "README.md").write_text(f"---\nconfigs: {card}\n---\n")
    assert read("~/mine") == TEXTS[:2]


def test_a_name_that_is_not_on_the_hub_is_said_with_the_reason() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        open_corpus("nobody/nothing-of-the-kind")
    message = str(caught.value)
    assert message.startswith(NOT_THERE.split("but is")[0] + "but is 'nobody/nothing-of-the-kind' (subset None): ")
    assert "\n" not in message


def test_a_folder_without_text_says_what_it_could_hold(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    message = (
        f"data.path must hold files of text (.txt, .md, .py, .jsonl, .json, .parquet, .csv, .tsv), but is {tmp_path} "
        f"with 1 other files"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        open_corpus(str(tmp_path))


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("plain then é".encode("latin-1"))
    message = (
        f"data.path must hold UTF-8 text, but {path} has byte 0xe9 at offset 11; "
        f"convert it, for example with `iconv -f latin1 -t utf-8`"
    )
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match=exactly(message)):
            read(source)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".tsv"])
def test_a_missing_column_is_said_with_those_there_are(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"table{suffix}", TEXTS, column="body")
    with pytest.raises(ValueError, match=exactly(f"data.column must be one of number, body in {path}, but is 'text'")):
        read(path)


def test_a_column_of_numbers_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "table.parquet", TEXTS)
    message = f"data.column must hold text, but 'number' holds int in row 0 of {path}"
    with pytest.raises(TypeError, match=exactly(message)):
        read(path, column="number")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("broken.json", b'{"text": "a"}\n{"text": \n'),
        ("number.jsonl", b'{"text": "a"}\n12\n'),
        ("half.jsonl", b'{"text": "\\ud83d"}\n'),
        ("latin.jsonl", b'{"text": "\xe9"}\n'),
        ("latin.csv", b"text\n\xe9\n"),
        ("empty.csv", b""),
        ("broken.parquet", b"not a table at all"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\Adata\.path must be a table that can be read, but [^\n]+\Z") as caught:
        read(path)
    assert f"{path} is not: " in str(caught.value)
    reasons = {
        "broken.jsonl": "a line must be JSON, but line 2 of broken.jsonl is not (Expecting value at character 11)",
        "broken.json": "a line must be JSON, but line 2 of broken.json is not (Expecting value at character 11)",
        "number.jsonl": "a line must be a row, but line 2 of number.jsonl is 12",
        "latin.jsonl": "JSON must be UTF-8 text, but latin.jsonl has byte 0xe9 where it is not; convert it, for example "
        "with `iconv -f latin1 -t utf-8`",
        "half.jsonl": "a text must be of whole characters, but line 1 of half.jsonl holds one half of a surrogate pair",
    }
    assert str(caught.value).endswith(reasons.get(name, ""))


def test_an_empty_table_has_no_documents_or_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(b"")
    try:
        assert read(path) == []
    except ValueError as error:
        assert str(error).startswith("data.path must ")  # noqa: PT017 (either answer is right)
