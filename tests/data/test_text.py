import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lit_llm.batch import IGNORE_INDEX
from lit_llm.data import token_cache
from lit_llm.data.cleaning import Cleaning, content_hash
from lit_llm.data.documents import PIECE_CHARACTERS
from lit_llm.data.text import TextData, read_texts
from lit_llm.data.tokenizer import boundary_id, encode_documents, train_bpe
from tests.examples import bytes_with_bos
from tests.writing import exactly, prose

SPLITS = ("train", "validation", "test")
TEXTS = [prose(number) for number in range(60)]
SMALL = {"tokenizer": "bytes", "seq_len": 16, "batch_size": 2, "validation_fraction": 0.2, "test_fraction": 0.2}


def opened(path: Path | str, stage: str = "fit", **changes: Any) -> TextData:
    data = TextData(path=str(path), **(SMALL | changes))
    data.prepare_data()
    data.setup(stage)
    return data


def texts_of(data: TextData, name: str) -> list[str]:
    split = data.cache.split(name)
    edges = [*split.documents["start"].tolist(), len(split.tokens) - 1]
    return [data.tokenizer.decode(split.tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(edges)]


def by_split(data: TextData) -> dict[str, set[str]]:
    return {name: set(texts_of(data, name)) for name in SPLITS}


def labels_of(batches: Any) -> list[int]:
    return [label for batch in batches for label in batch["labels"].flatten().tolist() if label != IGNORE_INDEX]


# Sources.


def as_folder(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.md").write_text(text, encoding="utf-8")
    return folder


def as_table(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path, frame = folder / f"table{suffix}", pd.DataFrame({"text": TEXTS})
        if suffix == ".parquet":
            frame.to_parquet(path)
        elif suffix == ".jsonl":
            path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS), "utf-8")
        else:
            frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
        return path

    return write


def as_hub_folder(folder: Path) -> Path:
    (folder / "data").mkdir()
    pd.DataFrame({"text": TEXTS}).to_parquet(folder / "data/train-00000-of-00001.parquet")
    return folder


SOURCES = {
    "folder": as_folder,
    "jsonl": as_table(".jsonl"),
    "parquet": as_table(".parquet"),
    "csv": as_table(".csv"),
    "tsv": as_table(".tsv"),
    "hub folder": as_hub_folder,
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_every_text_to_one_split(tmp_path: Path, source: str, streaming: bool) -> None:
    data = opened(SOURCES[source](tmp_path), streaming=streaming)
    found = by_split(data)
    assert set.union(*found.values()) == set(TEXTS)
    assert sum(map(len, found.values())) == len(TEXTS)
    assert all(found.values())


@pytest.mark.parametrize("source", SOURCES)
def test_a_texts_split_does_not_depend_on_where_it_comes_from(tmp_path: Path, source: str, corpus: Path) -> None:
    (tmp_path / "other").mkdir()
    assert by_split(opened(SOURCES[source](tmp_path / "other"))) == by_split(opened(corpus))


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(prose(number) for number in range(1000)), encoding="utf-8")
    data = opened(path)
    pieces = [piece for name in SPLITS for piece in texts_of(data, name)]
    assert sum(map(len, pieces)) == len(path.read_text(encoding="utf-8"))
    assert all(piece in path.read_text(encoding="utf-8") for piece in pieces)


@pytest.mark.parametrize("source", ["folder", "hub folder"])
def test_a_stream_trains_on_the_training_documents_in_their_order(tmp_path: Path, source: str) -> None:
    path = SOURCES[source](tmp_path)
    data = opened(path, streaming=True)
    training = by_split(data)["train"]
    boundary = boundary_id(data.tokenizer)
    encoded = encode_documents(data.tokenizer, [text for text in TEXTS if text in training])
    expected = itertools.cycle([token for ids in encoded for token in [boundary, *ids]])
    batches = list(itertools.islice(data.train_dataloader(), 400))
    assert labels_of(batches) == list(itertools.islice(expected, 400 * 32 + 1))[1:]
    assert sum(map(len, encoded)) < 400 * 32  # more than one epoch


def test_chinese_survives_cleaning_tokenising_and_packing(tmp_path: Path) -> None:
    text = "\n".join(text for text in TEXTS if "篇" in text)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data = opened(tmp_path, validation_fraction=0.0, test_fraction=0.0, seq_len=1)
    loader = data.train_dataloader()
    loader.shuffle_seed, loader.batch_size = None, loader.num_rows
    [batch] = list(loader)
    assert data.tokenizer.decode(batch["labels"].flatten().tolist(), skip_special_tokens=True) == text


# Splits.


def test_no_document_is_in_two_splits_even_when_it_is_there_twice(corpus: Path) -> None:
    for number in range(60):
        (corpus / f"copy-{number}.txt").write_text(prose(number), encoding="utf-8", newline="\r\n")
    data = opened(corpus)
    found = by_split(data)
    assert sum(map(len, found.values())) == len(set.union(*found.values()))
    assert data.manifest["dropped"] == {"duplicate": 60}


def test_a_corpus_that_grows_keeps_its_documents_where_they_are(corpus: Path) -> None:
    before = by_split(opened(corpus))
    for number in range(60, 90):
        (corpus / f"{number - 60:02}-new.txt").write_text(prose(number), encoding="utf-8")
    after = by_split(opened(corpus))
    assert all(before[name] < after[name] for name in SPLITS)


def test_a_source_with_splits_of_its_own_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, texts in {"train": TEXTS[:40], "validation": TEXTS[40:50], "test": TEXTS[50:]}.items():
        pd.DataFrame({"text": texts}).to_parquet(tmp_path / f"data/{name}-00000-of-00001.parquet")
    found = by_split(opened(tmp_path))
    assert found == {"train": set(TEXTS[:40]), "validation": set(TEXTS[40:50]), "test": set(TEXTS[50:])}


def test_without_fractions_everything_is_for_training(corpus: Path) -> None:
    data = opened(corpus, validation_fraction=0.0, test_fraction=0.0)
    assert by_split(data) == {"train": set(TEXTS), "validation": set(), "test": set()}
    assert list(data.val_dataloader()) == list(data.test_dataloader()) == []


def test_only_the_first_documents_are_read_where_that_is_asked_for(corpus: Path) -> None:
    assert set.union(*by_split(opened(corpus, max_documents=30)).values()) == set(TEXTS[:30])


def test_a_limit_on_documents_is_not_forgotten_when_streaming(corpus: Path) -> None:
    opened(corpus, streaming=True)
    limited = opened(corpus, streaming=True, max_documents=30)
    assert set.union(*by_split(limited).values()) == set(TEXTS[:30])


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_by_position_a_file_is_one_text_whose_end_is_held_out(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(prose(number) for number in range(1, 400, 4)), encoding="ascii")
    text = path.read_text()
    data = opened(path, tokenizer=tokenizer, split_by="position", validation_fraction=0.1, test_fraction=0.0)
    n = len(text)
    assert n > 2 * PIECE_CHARACTERS
    assert {name: texts_of(data, name) for name in SPLITS} == {
        "train": [text[: int(n * 0.9)]],
        "validation": [text[int(n * 0.9) :]],
        "test": [],
    }
    nano = np.array([data.tokenizer.get_vocab().get(c, -1) for c in text[int(n * 0.9) :]])
    if tokenizer == "characters":
        assert np.array_equal(data.cache.split("validation").tokens[1:-1], nano)
        assert data.vocab_size == 2 + len(set(text[: int(n * 0.9)]))
    assert data.cache.split("validation").ids == [f"book.txt[{int(n * 0.9)}:{n}]"]
    assert data.cache.split("train").documents["content"].tolist() == [content_hash(text[: int(n * 0.9)])]


def test_by_position_each_document_gives_its_end_to_validation_and_test(corpus: Path) -> None:
    (corpus / "copy.txt").write_text(prose(0), encoding="utf-8")
    (corpus / "short.txt").write_text("ab", encoding="utf-8")
    data = opened(corpus, split_by="position", validation_fraction=0.25, test_fraction=0.25)
    found = {name: texts_of(data, name) for name in SPLITS}
    assert found["train"] == [text[: int(len(text) * 0.5)] for text in [*TEXTS, "ab"]]
    assert found["validation"] == [text[int(len(text) * 0.5) : int(len(text) * 0.75)] for text in TEXTS]
    assert found["test"] == [text[int(len(text) * 0.75) :] for text in [*TEXTS, "ab"]]
    assert data.manifest["dropped"] == {"duplicate": 1}


def test_by_position_a_source_with_splits_of_its_own_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, texts in {"train": TEXTS[:40], "validation": TEXTS[40:]}.items():
        pd.DataFrame({"text": texts}).to_parquet(tmp_path / f"data/{name}-00000-of-00001.parquet")
    data = opened(tmp_path, split_by="position", validation_fraction=0.5, test_fraction=0.2)
    assert texts_of(data, "train") == [text[: int(len(text) * 0.8)] for text in TEXTS[:40]]
    assert texts_of(data, "test") == [text[int(len(text) * 0.8) :] for text in TEXTS[:40]]
    assert texts_of(data, "validation") == TEXTS[40:]


def test_by_position_a_stream_trains_on_the_beginnings(corpus: Path) -> None:
    data = opened(corpus, split_by="position", streaming=True)
    expected = data.cache.split("train").tokens[1:]
    assert labels_of(itertools.islice(data.train_dataloader(), 400))[: len(expected)] == expected.tolist()


def test_a_cache_made_before_there_was_a_choice_of_splits_is_still_found(corpus: Path) -> None:
    assert "split_by" not in opened(corpus).manifest
    assert opened(corpus, split_by="position").manifest["split_by"] == "position"


# Batches.


def test_batches_have_the_fields_and_types_of_the_contract(corpus: Path) -> None:
    data = opened(corpus)
    for loader, optional in (
        (data.train_dataloader(), set()),
        (data.val_dataloader(), {"num_bytes"}),
        (data.test_dataloader(), {"num_bytes"}),
        (data.predict_dataloader(), {"num_bytes", "documents"}),
    ):
        for batch in loader:
            assert batch.keys() == {"input_ids", "labels"} | optional
            rows = len(batch["input_ids"])
            for name, value in batch.items():
                assert value.dtype == (torch.float32 if name == "num_bytes" else torch.int64)
                assert value.shape == ((rows,) if name == "num_bytes" else (rows, 16))
            inside = batch["labels"][:, :-1] != IGNORE_INDEX
            assert torch.equal(batch["input_ids"][:, 1:][inside], batch["labels"][:, :-1][inside])
            assert 0 <= batch["input_ids"].min() <= batch["input_ids"].max() < data.vocab_size


def test_training_rows_are_full_and_each_comes_once_an_epoch(corpus: Path) -> None:
    data = opened(corpus, batch_size=1)
    stream = data.cache.split("train").tokens.astype(np.int64)
    rows = {tuple(batch["labels"][0].tolist()) for batch in data.train_dataloader()}
    expected = {tuple(stream[s + 1 : s + 17].tolist()) for s in range(0, len(stream) - 16, 16)}
    assert rows == expected


@pytest.mark.parametrize("name", ["validation", "test"])
def test_evaluation_counts_every_token_and_every_byte_of_its_split_once(corpus: Path, name: str) -> None:
    data = opened(corpus, batch_size=3)
    batches = list(data.val_dataloader() if name == "validation" else data.test_dataloader())
    assert labels_of(batches) == data.cache.split(name).tokens[1:].tolist()
    size = sum(len(text.encode()) for text in texts_of(data, name))
    assert sum(batch["num_bytes"].sum().item() for batch in batches) == pytest.approx(size, rel=1e-6)
    assert len(batches) == len(data.val_dataloader() if name == "validation" else data.test_dataloader())


def test_prediction_knows_each_labels_document(corpus: Path) -> None:
    data = opened(corpus)
    labels: dict[int, list[int]] = {}
    for batch in data.predict_dataloader():
        for label, document in zip(batch["labels"].flatten().tolist(), batch["documents"].flatten().tolist()):
            labels.setdefault(document, []).append(label)
    texts = [data.tokenizer.decode([i for i in ids if i > 0]) for _, ids in sorted(labels.items())]
    assert texts == texts_of(data, "test")
    assert data.predict_split.name == "test"
    assert opened(corpus, test_fraction=0.0).predict_split.name == "validation"


def test_document_ids_come_when_attention_is_to_stay_inside_documents(corpus: Path) -> None:
    data = opened(corpus, mask_documents=True, seq_len=300)
    boundary = boundary_id(data.tokenizer)
    for batch in itertools.chain(data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
        expected = [[row[: t + 1].count(boundary) for t in range(300)] for row in batch["input_ids"].tolist()]
        assert batch["document_ids"].tolist() == expected
    streamed = next(iter(opened(corpus, mask_documents=True, streaming=True).train_dataloader()))
    assert streamed["document_ids"].shape == streamed["input_ids"].shape


def test_the_seed_alone_decides_the_order(corpus: Path) -> None:
    def order(seed: int) -> list[int]:
        return labels_of(opened(corpus, seed=seed).train_dataloader())

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("streaming", [False, True])
def test_training_goes_on_where_it_stopped(corpus: Path, streaming: bool) -> None:
    uninterrupted = labels_of(itertools.islice(opened(corpus, streaming=streaming).train_dataloader(), 12))
    stopped = opened(corpus, streaming=streaming).train_dataloader()
    seen = labels_of(itertools.islice(stopped, 5))
    resumed = opened(corpus, streaming=streaming).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    assert seen + labels_of(itertools.islice(resumed, 7)) == uninterrupted


# The cache and the tokeniser.


def test_a_second_run_tokenises_nothing(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(corpus, tokenizer="bpe-300")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(token_cache.DocumentEncoder, "encode", refuse)
    monkeypatch.setattr("lit_llm.data.tokenizer.train_bpe", refuse)
    second = opened(corpus, tokenizer="bpe-300", seq_len=8, batch_size=1, seed=9)
    assert second.cache.folder == first.cache.folder
    assert by_split(second) == by_split(first)


@pytest.mark.parametrize(
    "change",
    [
        {"max_documents": 59},
        {"cleaning": Cleaning(drop_duplicates=False)},
        {"validation_fraction": 0.25},
        {"test_fraction": 0.25},
        {"tokenizer": "bpe-300"},
        {"tokenizer": "characters"},
        {"split_by": "position"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_tokens_changes_the_cache(corpus: Path, change: dict[str, Any]) -> None:
    assert opened(corpus, **change).cache.folder != opened(corpus).cache.folder


def test_a_cache_from_before_the_cleaning_changed_is_not_taken_and_its_runs_go_on_only_on_equal_texts(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_then() -> tuple[Path, dict[str, Any]]:
        with monkeypatch.context() as then:
            then.setattr("lit_llm.data.cleaning.BREAK", re.compile("(?!)"))  # form feeds were deleted
            then.setattr("lit_llm.data.token_data.CLEANING_FORMAT", 1)
            data = opened(corpus)
            return data.cache.folder, data.state_dict()

    folder, state = of_then()
    data = opened(corpus)
    assert data.cache.folder != folder
    data.require_unchanged(state)
    for path in corpus.iterdir():
        path.write_text(path.read_text() + "one\ftwo")
    with pytest.raises(ValueError, match="must hold the documents that the checkpoint was trained on to go on"):
        opened(corpus).require_unchanged(of_then()[1])


def test_a_changed_file_is_tokenised_anew(corpus: Path) -> None:
    opened(corpus)
    (corpus / "00.txt").write_text("something else altogether\n")
    assert "something else altogether\n" in set.union(*by_split(opened(corpus)).values())


def test_a_trained_tokenizer_has_seen_training_documents_alone(corpus: Path) -> None:
    data = opened(corpus, tokenizer="bpe-320")
    again = train_bpe(texts_of(data, "train"), 320)
    assert data.tokenizer.get_vocab() == again.get_vocab()
    assert data.vocab_size == len(again)


def test_a_saved_tokenizer_is_used_as_it_is(corpus: Path, tmp_path: Path) -> None:
    own = train_bpe(TEXTS, 290)
    own.save_pretrained(tmp_path / "own")
    data = opened(corpus, tokenizer=str(tmp_path / "own"))
    assert data.vocab_size == 290
    texts = texts_of(data, "validation")
    boundary = boundary_id(own)
    expected = [token for ids in encode_documents(own, texts) for token in [boundary, *ids]] + [boundary]
    assert data.cache.split("validation").tokens.tolist() == expected


def test_the_tokenizers_own_bos_stands_between_the_boundary_and_a_document(corpus: Path, tmp_path: Path) -> None:
    bytes_with_bos().save_pretrained(tmp_path / "own")
    data, streamed = (opened(corpus, tokenizer=str(tmp_path / "own"), streaming=way) for way in (False, True))
    own, tokens = data.tokenizer, data.cache.split("train").tokens.tolist()
    after_boundaries = [after for token, after in itertools.pairwise(tokens) if token == own.eos_token_id]
    assert after_boundaries == [own.bos_token_id] * data.manifest["splits"]["train"]["documents"]
    labels = labels_of(itertools.islice(streamed.train_dataloader(), 9))
    assert labels[0] == own.bos_token_id
    assert {b for a, b in itertools.pairwise(labels) if a == own.eos_token_id} == {own.bos_token_id}


def test_only_a_bos_that_opens_documents_gives_the_cache_another_name(corpus: Path, tmp_path: Path) -> None:
    bytes_with_bos().save_pretrained(tmp_path / "own")
    assert opened(corpus, tokenizer=str(tmp_path / "own")).manifest["opening"] == "<s>"
    for tokenizer in ("bytes", "bert-bpe-300"):
        data = opened(corpus, tokenizer=tokenizer)
        assert "opening" not in data.manifest
        assert data._recipe(data.tokenizer) == {}


def test_a_saved_tokenizer_that_gets_another_boundary_is_another_one(corpus: Path, tmp_path: Path) -> None:
    opened(corpus, tokenizer="bpe-300").tokenizer.save_pretrained(tmp_path / "tokenizer")
    before = opened(corpus, tokenizer=str(tmp_path / "tokenizer"))
    config = tmp_path / "tokenizer/tokenizer_config.json"
    content = json.loads(config.read_text())
    content["eos_token"] = "!"
    config.write_text(json.dumps(content))
    after = opened(corpus, tokenizer=str(tmp_path / "tokenizer"))
    assert before.cache.folder != after.cache.folder
    assert after.tokenizer.eos_token == "!"
    assert after.cache.split("train").tokens[0] == after.tokenizer.eos_token_id != before.tokenizer.eos_token_id


def test_a_checkpoint_of_other_tokens_is_refused(corpus: Path) -> None:
    data, other = opened(corpus), opened(corpus, tokenizer="bpe-300")
    data.load_state_dict(opened(corpus, seq_len=8).state_dict())
    message = f"data.tokenizer must be the checkpoint's, but is bytes of {corpus}, which differs"
    with pytest.raises(ValueError, match=exactly(message)):
        data.load_state_dict(other.state_dict())


def awaiting(path: Path, stage: str, **changes: Any) -> TextData:
    """Data set up for a stage, before a checkpoint is loaded."""
    data = TextData(path=str(path), **(SMALL | changes))
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=stage), global_rank=0, world_size=1)
    data.prepare_data()
    data.setup(stage)
    return data


STAGES = (("validate", "validation"), ("test", "test"), ("predict", "test"))


@pytest.mark.parametrize("kind", ["file", "grown file", "folder"])
def test_documents_that_have_changed_since_training_are_not_gone_on_with_and_said_where_evaluated(
    kind: str, tmp_path: Path, caplog
) -> None:
    path, text = tmp_path / "text.txt", "\n\n".join(TEXTS * 30)
    if kind == "folder":
        as_folder(path := tmp_path)
    else:
        path.write_text(text, encoding="utf-8")
    state = opened(path).state_dict()
    count = state["documents"]["contents"][0]
    for stage in ("fit", "validate", "test", "predict"):
        data = awaiting(path, stage, seq_len=8)
        data.load_state_dict(state)
        assert data.doubt is None
    if kind == "folder":
        for number in range(9):
            (path / f"more{number}.md").write_text(f"{number} more", encoding="utf-8")
    else:
        path.write_text(text + text[::-1] if kind == "grown file" else f"x\n{text}", encoding="utf-8")
    now = opened(path).state_dict()["documents"]["contents"][0]
    how = f"had {count} documents then and has {now} now" if now != count else "has other documents now"
    message = (
        f"data.path must hold the documents that the checkpoint was trained on to go on from it, but the train split "
        f"of {path} {how}; put those back, or start a new run with --model.weights"
    )
    for refuses in (lambda data: data.load_state_dict(state), lambda data: data.require_unchanged(state)):
        with pytest.raises(ValueError, match=exactly(message)):
            refuses(awaiting(path, "fit"))
    for stage, split in STAGES:
        caplog.clear()
        data = awaiting(path, stage)
        data.load_state_dict(state)
        [said] = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert said == data.doubt
        assert said == (
            f"Documents that the checkpoint was trained on may be in the {split} split, since the train split of "
            f"{path} {how}"
        )
    message = f"data.tokenizer must be the checkpoint's, but is bpe-300 of {path}, which differs, as the train"
    with pytest.raises(ValueError, match=message):
        awaiting(path, "test", tokenizer="bpe-300").load_state_dict(state)
    del state["documents"]  # as in older checkpoints
    awaiting(path, "fit").load_state_dict(state)


def test_documents_that_are_elsewhere_or_read_by_other_options_are_gone_on_with(corpus: Path, tmp_path: Path) -> None:
    state = opened(corpus).state_dict()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(corpus, elsewhere)
    (elsewhere / "more.md").write_text("another path is another source", encoding="utf-8")
    for path, options in ((elsewhere, {}), (corpus, {"max_documents": 40}), (corpus / "../corpus", {})):
        data = awaiting(path, "fit", **options)
        data.load_state_dict(state)
        assert data.doubt is None
    shutil.copytree(corpus, tmp_path / "new")
    shutil.rmtree(corpus)
    shutil.move(tmp_path / "new", corpus)  # the same files with other modification times
    awaiting(corpus, "fit").load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "now"),
    [
        ({"test_fraction": 0.5}, "0.2 (validation), 0.5 (test)"),
        ({"split_by": "position"}, "0.2 (validation by position), 0.2 (test by position)"),
        ({"streaming": True, "validation_fraction": 0.1}, "0.1 (validation), 0.2 (test)"),
    ],
    ids=["fraction", "split_by", "stream"],
)
def test_texts_that_are_split_otherwise_than_in_training_are_not_gone_on_with_and_said_where_evaluated(
    corpus: Path, changes: dict[str, Any], now: str, caplog
) -> None:
    state = opened(corpus, streaming=changes.get("streaming", False)).state_dict()
    change = f"of {corpus} 0.2 (validation), 0.2 (test) was cut out then and {now} is now"
    with pytest.raises(ValueError, match=re.escape(f"to go on from it, but {change}; put those back")):
        awaiting(corpus, "fit", **changes).require_unchanged(state)
    for stage, split in STAGES:
        caplog.clear()
        data = awaiting(corpus, stage, **changes)
        data.load_state_dict(state)
        assert data.doubt == f"Documents that the checkpoint was trained on may be in the {split} split, since {change}"
        assert data.doubt in caplog.messages


def test_a_fraction_that_cuts_nothing_may_be_another(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name} {n}"}) for n in range(40)))
    awaiting(tmp_path, "fit", test_fraction=0.5).load_state_dict(opened(tmp_path).state_dict())


def test_a_split_of_the_sources_own_is_not_doubted_when_training_grows(tmp_path: Path) -> None:
    for name, count in (("train", 40), ("test", 5)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name} {n}"}) for n in range(count)))
    state = opened(tmp_path).state_dict()
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": f"train {n}"}) for n in range(50)))
    for stage, doubts in (("test", False), ("validate", True)):
        data = awaiting(tmp_path, stage)
        data.load_state_dict(state)
        assert (data.doubt is not None) is doubts


def test_splits_that_a_folder_has_got_since_are_not_gone_on_with_and_said_where_evaluated(tmp_path: Path) -> None:
    for name in (*SPLITS, "more"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {text}" for text in TEXTS), encoding="utf-8")
    state = opened(tmp_path, validation_fraction=0.0, test_fraction=0.5).state_dict()
    older = {**state, "documents": {key: state["documents"][key] for key in ("source", "contents")}}
    (tmp_path / "more.txt").unlink()  # each text is named after a split now
    cut = f"of {tmp_path} 0 (validation), 0.5 (test) was cut out then and 0 (validation), 0 (test) is now"
    for known, change in ((state, cut), (older, f"the train split of {tmp_path} ")):
        with pytest.raises(ValueError, match=re.escape(change)):
            awaiting(tmp_path, "fit").require_unchanged(known)
        data = awaiting(tmp_path, "test", validation_fraction=0.0, test_fraction=0.5)
        data.load_state_dict(known)
        assert change in data.doubt


def test_a_stream_does_not_say_what_it_holds(corpus: Path) -> None:
    state = opened(corpus, streaming=True).state_dict()
    (corpus / "more.md").write_text("more", encoding="utf-8")
    awaiting(corpus, "fit", streaming=True).load_state_dict(state)


def test_facts_are_there_without_calling_the_hooks(corpus: Path) -> None:
    data = TextData(path=str(corpus), **SMALL)
    assert data.vocab_size == 257
    assert data.manifest["splits"]["train"]["documents"] > 0


def test_texts_are_read_cleaned_and_whole(corpus: Path) -> None:
    (corpus / "zz.txt").write_bytes(b"cafe\xcc\x81\r\n\x00")
    (corpus / "zzz.txt").write_text(TEXTS[0], encoding="utf-8")
    assert list(read_texts(str(corpus), None, "text", None, Cleaning())) == [*TEXTS, "café\n"]
    assert list(read_texts(str(corpus), None, "text", 3, Cleaning())) == TEXTS[:3]


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "data.seq_len must be at least 1, but is 0"),
        ({"batch_size": -1}, "data.batch_size must be at least 1, but is -1"),
        (
            {"validation_fraction": -0.1},
            "data.validation_fraction and data.test_fraction must be at least 0 and leave something to train on, "
            "but are -0.1 and 0.2",
        ),
        (
            {"validation_fraction": 0.5, "test_fraction": 0.5},
            "data.validation_fraction and data.test_fraction must be at least 0 and leave something to train on, "
            "but are 0.5 and 0.5",
        ),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        TextData(path="/no/such/folder", **(SMALL | changes))


def test_no_tokenizer_is_refused_in_one_line(corpus: Path) -> None:
    data = TextData(path=str(corpus), **SMALL)
    data.tokenizer_spec = None  # as with `--data.tokenizer null`
    message = "data.tokenizer must be given, but is None; to start from model.weights name their folder or run"
    with pytest.raises(ValueError, match=exactly(message)):
        data.prepare_data()


def test_a_negative_number_of_documents_is_refused_in_the_grammar(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"\Adata\.max_documents must .*, but is -1"):
        opened(corpus, max_documents=-1)


def test_a_missing_path_is_refused() -> None:
    message = (
        "data.path must be a file, a folder, a hub data set or one of stdlib, stdlib-code, stdlib-prose, "
        "but is /no/such/folder, which does not exist"
    )
    with pytest.raises(FileNotFoundError, match=exactly(message)):
        opened("/no/such/folder")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "no documents"), (b" \n\t\n", "1 empty"), (b"\x00\x01", "1 empty")]
)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-300"])
def test_a_file_without_text_is_refused_with_the_reason(
    tmp_path: Path, content: bytes, reason: str, tokenizer: str
) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=exactly(f"data.path must hold text, but {path} has none ({reason})")):
        opened(path, tokenizer=tokenizer)


def test_a_corpus_shorter_than_a_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("abc")
    message = (
        f"data.seq_len must leave at least one row to train on, but is 16 where the training split of {path} has "
        f"5 tokens; lower it or give more text"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        opened(path, validation_fraction=0.0, test_fraction=0.0)
    opened(path, validation_fraction=0.0, test_fraction=0.0, seq_len=4, batch_size=1)


def test_a_corpus_of_one_document_that_is_not_for_training_is_refused_with_what_helps(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text(next(text for n in range(99) if content_hash(text := f"{n} " * 5_000) / 2**64 < 0.5))
    message = (
        f"data.path must leave a document to train on, but {path} has 1 to validate on, 0 to test on and none besides; "
        f"give more text, or set data.split_by to position"
    )
    fractions = {"validation_fraction": 0.5, "test_fraction": 0.0}
    with pytest.raises(ValueError, match=exactly(message)):
        opened(path, **fractions)
    opened(path, split_by="position", **fractions)


def test_an_empty_validation_split_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("one document and no more, long enough for a row or two")
    assert content_hash(path.read_text()) / 2**64 > 0.5  # a training document
    message = (
        f"data.validation_fraction must leave a document to validate on, but is 0.2, which takes none of the 1 of "
        f"{path}; raise it, set data.split_by to position, or set it to 0 to go without"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        opened(path)
    opened(path, validation_fraction=0.0)


def test_a_batch_larger_than_the_rows_is_refused(corpus: Path) -> None:
    tokens = len(opened(corpus).cache.split("train").tokens)
    rows = (tokens - 1) // 16
    message = (
        f"data.batch_size must be at most the rows there are to train on, but is {rows + 1} on 1 device where the "
        f"training split of {corpus} has {rows} rows of 16 tokens; lower it or data.seq_len"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        opened(corpus, batch_size=rows + 1)
    opened(corpus, batch_size=rows)
    opened(corpus, batch_size=rows + 1, streaming=True)


def test_a_missing_column_is_refused(tmp_path: Path) -> None:
    path = as_table(".jsonl")(tmp_path)
    with pytest.raises(ValueError, match=exactly(f"data.column must be one of text in {path}, but is 'body'")):
        opened(path, column="body")


def test_bytes_that_are_not_utf8_are_refused(corpus: Path) -> None:
    (corpus / "10.txt").write_bytes(b"caf\xe9")
    message = (
        f"data.path must hold UTF-8 text, but {corpus / '10.txt'} has byte 0xe9 at offset 3; "
        f"convert it, for example with `iconv -f latin1 -t utf-8`"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        opened(corpus)


def test_a_refused_corpus_leaves_no_cache(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "cache"))
    (corpus / "59.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"byte 0xff"):
        opened(corpus)
    assert list((tmp_path / "cache/tokens").iterdir()) == []


@pytest.mark.parametrize("streaming", [False, True])
def test_an_encoders_documents_stand_between_its_marks(corpus: Path, streaming: bool) -> None:
    data = TextData(str(corpus), tokenizer="bert-bpe-300", seq_len=64, batch_size=2, streaming=streaming)
    data.prepare_data()
    data.setup("fit")
    ids = torch.cat([batch["input_ids"].flatten() for batch in itertools.islice(data.train_dataloader(), 20)])
    start, end = data.tokenizer.cls_token_id, data.tokenizer.sep_token_id
    assert (ids == start).sum() > 10
    ends = (ids[:-1] == end).nonzero().flatten()
    inside = ends[(ends + 1) % 64 != 0]
    assert (ids[inside + 1] == start).all()
    assert abs(int((ids == end).sum()) - int((ids == start).sum())) <= 3


# Mixtures.

LETTERS, DIGITS = 40, 8
"""Numbers of documents of two sources, which are distinguished by their characters."""


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `letters/`, which is large, and `digits/`, which is small."""
    draw = np.random.default_rng(0)
    for name, count, characters in (("letters", LETTERS, "abcdef"), ("digits", DIGITS, "0123")):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number:02}.txt").write_text("".join(draw.choice(list(characters), 50)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mixed(weights: dict[str, Any], stage: str = "fit", **changes: Any) -> TextData:
    data = TextData(weights, **(SMALL | changes))
    data.prepare_data()
    data.setup(stage)
    return data


def are_digits(data: TextData, ids: torch.Tensor) -> list[bool]:
    """Whether each row starts in a document of digits; the boundary before a document belongs to it."""
    texts = (data.tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist())
    return [text[0].isdigit() for text in texts]


@pytest.mark.parametrize(("letters", "digits"), [(1, 1), (3, 1), (1, 9), (0.3, 0.1)])
def test_each_source_gives_its_share_of_the_rows_whatever_its_size(two: Path, letters: float, digits: float) -> None:
    data = mixed({"letters/": letters, "digits/": digits}, batch_size=1, validation_fraction=0.0, test_fraction=0.0)
    loader = data.train_dataloader()
    assert len(loader) == (len(data.cache.split("train").tokens) - 1) // 16 == 153
    for _ in range(3):
        rows = torch.cat([batch["input_ids"] for batch in loader])
        assert len(rows) == 153
        kinds = are_digits(data, rows)
        assert abs(sum(kinds) - 153 * digits / (letters + digits)) < 1
        times = [list(map(tuple, rows[np.array(kinds) == kind].tolist())) for kind in (False, True)]
        for source in times:
            counts = [source.count(row) for row in set(source)]
            assert max(counts) - min(counts) <= 1


def test_a_mixed_order_is_a_function_of_the_seed_and_goes_on_where_it_stopped(two: Path) -> None:
    weights = {"letters/": 1, "digits/": 2}
    uninterrupted = labels_of(itertools.islice(mixed(weights, seed=3).train_dataloader(), 12))
    stopped, resumed = (mixed(weights, seed=3).train_dataloader() for _ in range(2))
    seen = labels_of(itertools.islice(stopped, 5))
    resumed.load_state_dict(stopped.state_dict())
    assert seen + labels_of(itertools.islice(resumed, 7)) == uninterrupted
    assert labels_of(itertools.islice(mixed(weights, seed=4).train_dataloader(), 12)) != uninterrupted


def test_a_mixed_document_says_of_which_source_it_is_and_keeps_the_split_that_it_has_alone(two: Path) -> None:
    data = mixed({"letters/": 1, "digits": 1})
    for name in SPLITS:
        alone = [(path, opened(path).cache.split(name)) for path in ("letters/", "digits")]
        assert data.cache.split(name).ids == [f"{path}:{document}" for path, split in alone for document in split.ids]
        expected = {}
        for path, split in alone:
            start = sum(about["tokens"] for about in expected.values())
            size = split.documents["num_bytes"].sum()
            counts = {"documents": len(split.documents), "bytes": size, "tokens": len(split.tokens) - 1}
            expected[path] = {"start": start} | counts
        assert data.manifest["splits"][name]["sources"] == expected
    assert data.manifest["weights"] == {"letters/": 1, "digits": 1}
    assert data.manifest["corpus"] == "letters/ + digits"
    assert json.loads(json.dumps(data.manifest)) == data.manifest


def test_what_two_sources_have_is_of_the_first(two: Path) -> None:
    (two / "digits/copy.txt").write_text((two / "letters/00.txt").read_text())
    for first, second in (("letters", "digits"), ("digits", "letters")):
        data = mixed({first: 1, second: 1})
        ids = [document for name in SPLITS for document in data.cache.split(name).ids]
        own = {"letters": "letters:00.txt", "digits": "digits:copy.txt"}
        assert own[first] in ids
        assert own[second] not in ids
        assert data.manifest["dropped"] == {"duplicate": 1}


def test_a_source_with_splits_of_its_own_keeps_them_and_the_other_is_cut(two: Path) -> None:
    (two / "own/data").mkdir(parents=True)
    for name, texts in {"train": TEXTS[:40], "validation": TEXTS[40:]}.items():
        pd.DataFrame({"text": texts}).to_parquet(two / f"own/data/{name}-00000-of-00001.parquet")
    data = mixed({"letters": 1, "own": 1}, validation_fraction=0.4, test_fraction=0.2)
    assert [text for text in texts_of(data, "validation") if text in TEXTS] == TEXTS[40:]
    assert len(data.cache.split("validation").ids) > 20  # those of the letters are split by content
    assert {text for text in texts_of(data, "train") + texts_of(data, "test") if text in TEXTS} == set(TEXTS[:40])
    by_position = mixed({"letters": 1, "own": 1}, split_by="position")
    assert [text for text in texts_of(by_position, "validation") if text in TEXTS] == TEXTS[40:]
    assert len(by_position.cache.split("validation").ids) == 20 + LETTERS


def test_weights_do_not_decide_the_cache_but_sources_and_their_order_do(two: Path) -> None:
    def folder(weights: dict[str, float], **changes: Any) -> Path:
        return mixed(weights, **changes).cache.folder

    both = folder({"letters": 1, "digits": 1})
    assert folder({"letters": 5, "digits": 0.5}) == both
    others = [folder({"digits": 1, "letters": 1}), folder({"letters": 1}), opened("letters").cache.folder]
    others.append(folder({"letters": 1, "digits": 1}, max_documents=7))
    assert len({both, *others}) == 5
    assert mixed({"digits": 1, "letters": 3}, batch_size=1).row_sources("train", 1).tolist() == [0]
    (two / "digits/00.txt").write_text("9" * 50)
    assert folder({"letters": 1, "digits": 1}) != both


def test_of_a_mixture_all_rows_are_evaluated_and_each_says_its_source(two: Path) -> None:
    data = mixed({"letters/": 9, "digits/": 1}, batch_size=3)
    assert data.sources == ["letters", "digits"]
    for name, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = list(loader)
        assert labels_of(batches) == data.cache.split(name).tokens[1:].tolist()
        for batch in batches:
            assert batch["sources"].dtype == torch.int64
            assert batch["sources"].tolist() == list(map(int, are_digits(data, batch["input_ids"])))
    assert "sources" not in next(iter(data.train_dataloader()))
    assert "sources" not in next(iter(opened("letters").val_dataloader()))


def test_the_first_documents_of_a_mixture_are_those_of_each_source(two: Path) -> None:
    data = mixed({"letters": 1, "digits": 1}, max_documents=7)
    ids = [document for name in SPLITS for document in data.cache.split(name).ids]
    assert sorted(ids) == [f"{source}:{n:02}.txt" for source in ("digits", "letters") for n in range(7)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ({}, "data.path must be a path, or a mapping of paths to weights, but is {}"),
        *(
            ({"a": 1, "b/": weight}, f"data.path must give each source a finite weight above 0, but b/ has {weight!r}")
            for weight in (0, -1, float("inf"), float("nan"), "x", True, None)
        ),
    ],
)
def test_what_is_no_mixture_is_refused_before_anything_is_read(path: Any, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        TextData(path, **SMALL)


def test_a_mixture_is_not_streamed() -> None:
    message = "data.streaming must be false where data.path is a mixture, but is true; tokenise the sources first"
    with pytest.raises(ValueError, match=exactly(message)):
        TextData({"a": 1}, streaming=True)


def test_a_missing_source_is_named(two: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"\Adata\.path must .*, but is /no/such/folder, which does not exist\Z"
    ):
        mixed({"letters": 1, "/no/such/folder": 1})


@pytest.mark.parametrize("content", [" \n", "abc", None], ids=["empty", "short", "what another has"])
def test_a_source_without_a_row_to_train_on_is_named(two: Path, content: str | None) -> None:
    (two / "less.txt").write_text((two / "letters/00.txt").read_text() if content is None else content)
    assert content_hash((two / "less.txt").read_text()) / 2**64 > 0.4  # a training document
    message = (
        "data.path must have a row of 16 tokens to train on of each source, but less.txt has none of its own; lower "
        "data.seq_len, or leave the source out"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        mixed({"letters": 1, "less.txt": 1}, test_fraction=0.0)
    mixed({"letters": 1, "less.txt": 1}, "test")
