import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_llm.data.seq2seq import PairColumns, Seq2SeqData
from lit_llm.data.tokenizer import fingerprint
from tests.writing import exactly, pairs


def table(folder: Path, **columns: list[str]) -> str:
    path = folder / "table.jsonl"
    rows = zip(*columns.values(), strict=True)
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    return str(path)


def opened(path: str, **options) -> Seq2SeqData:
    data = Seq2SeqData(path=path, **({"tokenizer": "t5-bpe-400", "batch_size": 4} | options))
    data.prepare_data()
    data.setup("fit")
    return data


def test_a_batch_is_the_tables_texts_with_the_end_after_each(tmp_path: Path) -> None:
    rows = pairs(40)
    path = table(tmp_path, prompt=[row["prompt"] for row in rows], response=[row["response"] for row in rows])
    data = opened(path)
    seen = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        split = "train" if loader.shuffle_seed is not None else "validation"
        for batch in loader:
            texts = data.texts(split, batch["rows"].tolist())
            for row, text in enumerate(texts):
                read = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
                written = batch["labels"][row][batch["labels"][row] != -100].tolist()
                assert read[-1] == written[-1] == data.tokenizer.eos_token_id
                assert data.tokenizer.decode(read[:-1]) == text["prompt"]
                assert data.tokenizer.decode(written[:-1]) == text["response"]
                seen.append(text["prompt"])
            for name, padding in (("input_ids", data.tokenizer.pad_token_id), ("labels", -100)):
                assert (batch[name] != padding).any(dim=0).all()  # padded to its longest row
    assert sorted(seen) == sorted(row["prompt"] for row in rows)
    assert len(data.splits["validation"]) == 4


def test_long_texts_are_cut_before_their_end_token(tmp_path: Path) -> None:
    path = table(tmp_path, source=["one two three four " * 9] * 20, target=["five six " * 9] * 20)
    data = opened(path, max_source_len=7, max_target_len=5, validation_fraction=0.0)
    before = fingerprint(data.tokenizer)
    batch = next(iter(data.train_dataloader()))
    assert (batch["input_ids"].shape, batch["labels"].shape) == ((4, 7), (4, 5))
    assert set(batch["input_ids"][:, -1].tolist()) == set(batch["labels"][:, -1].tolist()) == {1}
    assert fingerprint(data.tokenizer) == before


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(20)]
    path = table(tmp_path, target=texts, source=texts, other=texts)
    assert opened(path).columns == PairColumns("source", "target")
    assert opened(path, source="other").columns == PairColumns("other", "target")
    assert opened(path, source="target", target="other").columns == PairColumns("target", "other")
    message = f"data.source must be one of target, source, other in {path}, but is 'x'"
    with pytest.raises(ValueError, match=exactly(message)):
        opened(path, source="x")
    path = table(tmp_path, a=texts, b=texts)
    message = f"data.source must be one of a, b in {path}, but is not given"
    with pytest.raises(ValueError, match=exactly(message)):
        opened(path)
    with pytest.raises(ValueError, match=exactly(message.replace("source", "target"))):
        opened(path, source="a")


def test_docstrings_are_written_from_the_bodies_they_belong_to(monkeypatch) -> None:
    from datasets import Dataset

    rows = [{"docstring": f"Say {n}.", "body": f"return {n}", "label": label} for n in range(30) for label in (1, 0)]
    splits = dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows))
    monkeypatch.setattr("lit_llm.data.seq2seq.open_docmatch", lambda: splits)
    data = opened("stdlib-docstrings")
    assert data.columns == PairColumns("body", "docstring")
    assert [len(split) for split in data.splits.values()] == [30, 30, 30]
    assert {row["label"] for row in data.texts("test", list(range(30)))} == {1}
    assert data.predict_split == "test"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "bytes"}, "data.tokenizer must end a text with its end token and have padding, but bytes does "),
        ({"batch_size": 19}, "data.batch_size must be at most the examples there are to train on, but is 19 on 1 dev"),
        ({"max_target_len": 1}, "data.max_target_len must be at least 2, but is 1"),
        ({"validation_fraction": 1.0}, "data.validation_fraction and data.test_fraction must be at least 0 and leave"),
        ({"validation_fraction": 0.01}, "data.validation_fraction must leave an example to validate on, but is 0.01"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    path = table(tmp_path, source=[f"a {n}" for n in range(20)], target=[f"b {n}" for n in range(20)])
    with pytest.raises(ValueError, match=rf"\A{re.escape(message)}"):
        opened(path, **options)


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path, source=["a", None, "c"], target=["a", "b", "c"])
    message = (
        f"data.source must hold a text in every row, but 'source' has none in row 1 of the train split of {path}; "
        f"leave such rows out"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        opened(path)


@pytest.mark.parametrize("header", ["source", "source,target"])
def test_a_test_split_without_texts_to_write_is_only_predicted(header: str, tmp_path: Path, caplog) -> None:
    for split in ("train", "validation"):
        lines = ["source,target", *(f"{split} {n},{n}" for n in range(20))]
        (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    lines = [header, *(f"test {n}{',' * header.count(',')}" for n in range(5))]
    (tmp_path / "test.csv").write_text("\n".join(lines) + "\n")
    with caplog.at_level("INFO", logger="lit_llm"):
        data = opened(str(tmp_path))
    said = f"The test split of {tmp_path} has no texts to write, so it can only be used for predictions"
    assert caplog.messages.count(said) == 1
    assert data.test_dataloader() == []
    cut = opened(str(tmp_path), test_fraction=0.2)
    assert ["labels" in batch for batch in cut.test_dataloader()] == [True]
    for each in (data, cut):
        assert "labels" in next(iter(each.val_dataloader()))
        rows = []
        for batch in each.predict_dataloader():
            assert "labels" not in batch
            rows += batch["rows"].tolist()
        assert sorted(rows) == list(range(5))


def test_only_a_test_split_may_be_without_texts_to_write(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("source,target\n" + "a,b\n" * 20)
    (tmp_path / "validation.csv").write_text("source\n" + "a\n" * 5)
    message = f"data.target must be one of source in the validation split of {tmp_path}, but is 'target'"
    with pytest.raises(ValueError, match=exactly(message)):
        opened(str(tmp_path))


def test_a_source_with_several_texts_to_write_is_in_one_split(tmp_path: Path) -> None:
    path = table(tmp_path, source=[f"text {n % 40}" for n in range(120)], target=[f"text {n}" for n in range(120)])
    splits = opened(path, validation_fraction=0.2, test_fraction=0.1).splits
    found = {name: set(split.column("source")) for name, split in splits.items()}
    assert {name: len(sources) for name, sources in found.items()} == {"train": 28, "validation": 8, "test": 4}
    assert len(set.union(*found.values())) == 40


def test_another_tokeniser_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path, source=[f"some text {n}" for n in range(20)], target=["another"] * 20)
    state = opened(path).state_dict()
    message = f"data.tokenizer must be the checkpoint's, but is t5-bpe-360 of {path}, which differs"
    with pytest.raises(ValueError, match=exactly(message)):
        opened(path, tokenizer="t5-bpe-360").load_state_dict(state)


def test_training_does_not_go_on_where_a_text_to_write_has_changed(tmp_path: Path) -> None:
    texts = [f"some text {n}" for n in range(20)]
    state = opened(table(tmp_path, source=texts, target=["one"] * 20)).state_dict()
    data = opened(path := table(tmp_path, source=texts, target=["one"] * 19 + ["two"]))
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    message = (
        f"data.path must hold the rows that the checkpoint was trained on to go on from it, but the train split of "
        f"{path} has other rows now; put those back, or start a new run with --model.weights"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        data.load_state_dict(state)


def test_texts_of_one_length_come_together(tmp_path: Path) -> None:
    texts = ["x " * (1 + n % 30) for n in range(300)]
    path = table(tmp_path, source=texts, target=["y"] * 300)
    padding = []
    for grouping in (True, False):
        batches = list(opened(path, length_grouping=grouping).train_dataloader())
        padding.append(sum((batch["attention_mask"] == 0).sum().item() for batch in batches))
    assert padding[0] < 0.2 * padding[1]
    assert all(tensor.dtype == torch.long for tensor in batches[0].values())


# Predicting.


def predicting(path: str, state: dict[str, Any], **options) -> Seq2SeqData:
    """Data set up for prediction, before and after a checkpoint is loaded, as by a trainer."""
    data = Seq2SeqData(path=path, **({"tokenizer": "t5-bpe-400", "batch_size": 4} | options))
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="predict"), global_rank=0, world_size=1)
    data.prepare_data()
    data.setup("predict")
    assert getattr(data, "vocab_size", None) is None
    data.load_state_dict(state)
    return data


@pytest.fixture
def trained(tmp_path: Path) -> Seq2SeqData:
    rows = [row | {"id": str(n)} for n, row in enumerate(pairs(60))]
    (tmp_path / "own").mkdir()
    names = {"id": "id", "text": "prompt", "wanted": "response"}
    path = table(tmp_path / "own", **{name: [row[key] for row in rows] for name, key in names.items()})
    return opened(path, source="text", target="wanted", validation_fraction=0.2)


@pytest.mark.parametrize("columns", [("text",), ("text", "wanted"), ("other", "text", "target")])
def test_another_table_is_predicted_whole_with_what_the_checkpoint_knows(trained, tmp_path, columns, caplog) -> None:
    texts = [f"{n} the moon{' and the sea' * (n % 3)}" for n in range(7)]
    path = table(tmp_path, **{name: texts if name == "text" else ["none of it"] * 7 for name in columns})
    named = {"source": "text", "target": "wanted"}  # as in the run's config
    caplog.set_level("INFO")
    for options in ({}, named):
        data = predicting(path, trained.state_dict(), **options)
        batches = list(data.predict_dataloader())
        rows = [row for batch in batches for row in batch["rows"].tolist()]
        assert sorted(rows) == list(range(7))
        read = [ids[mask == 1][:-1] for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"])]
        assert [data.tokenizer.decode(ids) for ids in read] == [texts[row] for row in rows]
        assert all("labels" not in batch for batch in batches)
        assert data.tokenizer.get_vocab() == trained.tokenizer.get_vocab()
        assert data.predict_split == "test"
        assert list(data.texts("test", [3])[0]) == list(columns)
        assert caplog.messages[-1] == f"Predicting all 7 rows of {path}"


def test_of_another_folder_with_splits_the_last_is_predicted(trained, tmp_path) -> None:
    (tmp_path / "new").mkdir()
    for split, count in (("train", 9), ("test", 2)):
        lines = ["text,wanted", *(f"{split} {n}," for n in range(count))]
        (tmp_path / f"new/{split}.csv").write_text("\n".join(lines) + "\n")
    data = predicting(str(tmp_path / "new"), trained.state_dict())
    assert [row["text"] for row in data.texts("test", [0, 1])] == ["test 0", "test 1"]
    assert {name: len(split) for name, split in data.splits.items()} == {"test": 2}


@pytest.mark.parametrize(("fraction", "split"), [(0.0, "validation"), (0.3, "test")])
def test_of_the_runs_own_table_what_it_was_not_trained_on_is_predicted(trained, fraction, split) -> None:
    own = {"source": "text", "target": "wanted", "validation_fraction": 0.2, "test_fraction": fraction}
    run = opened(trained.path, **own)
    data = predicting(trained.path, run.state_dict(), **own)
    assert data.predict_split == split
    rows = [row for batch in data.predict_dataloader() for row in batch["rows"].tolist()]
    assert data.texts(split, sorted(rows)) == run.texts(split, list(range(len(run.splits[split]))))


def test_a_table_to_predict_without_the_text_to_read_is_refused_by_its_option(trained, tmp_path) -> None:
    path = table(tmp_path, a=["x"] * 3, b=["y"] * 3)
    for options, given in (({}, "not given"), ({"source": "text", "target": "wanted"}, "'text'")):
        message = f"data.source must be one of a, b in {path}, but is {given}"
        with pytest.raises(ValueError, match=exactly(message)):
            predicting(path, trained.state_dict(), **options)
    assert len(predicting(path, trained.state_dict(), source="b").splits["test"]) == 3


def test_without_a_checkpoint_a_table_is_predicted_with_the_tokeniser_beside_the_weights(trained, tmp_path) -> None:
    trained.tokenizer.save_pretrained(tmp_path / "model")
    data = Seq2SeqData(path=table(tmp_path, source=["one", "two"]))
    module = SimpleNamespace(tokenizer_path=str(tmp_path / "model"))
    data.trainer = SimpleNamespace(
        state=SimpleNamespace(fn="predict"), lightning_module=module, global_rank=0, world_size=1
    )
    assert data.vocab_size == trained.vocab_size
    [batch] = data.predict_dataloader()
    assert sorted(batch["rows"].tolist()) == [0, 1]
