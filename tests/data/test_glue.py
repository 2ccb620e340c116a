import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from lightning.pytorch import LightningModule, Trainer
from transformers import BertConfig, BertForSequenceClassification

from lit_llm.batch import IGNORE_INDEX, inputs
from lit_llm.data import table_tokenizer
from lit_llm.data.augmentation import TextAugmentation
from lit_llm.data.glue import GLUEData
from lit_llm.data.glue_tasks import TASKS
from lit_llm.data.tokenizer import fingerprint, train_bert_bpe
from lit_llm.objectives.classification import Classification
from lit_llm.objectives.regression import Regression
from tests.writing import exactly, prose

TOKENIZER = "bert-bpe-300"


def write_csv(path: Path, rows: list[tuple], header: str = "text,label") -> str:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def rows(count: int, classes: int = 2) -> list[tuple[str, int]]:
    draw = np.random.default_rng(0)
    return [(f"word{n} " + "ab " * int(draw.integers(1, 20)), n % classes) for n in range(count)]


def made(stage: str = "fit", **arguments: Any) -> GLUEData:
    data = GLUEData(**{"tokenizer": TOKENIZER, "batch_size": 4, **arguments})
    data.prepare_data()
    data.setup(stage)
    return data


def awaiting(path: str, stage: str = "predict", **arguments: Any) -> GLUEData:
    """Data set up for prediction or another stage, before a checkpoint is loaded."""
    data = GLUEData(path=path, **{"tokenizer": TOKENIZER, "batch_size": 4, **arguments})
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=stage), global_rank=0, world_size=1)
    data.prepare_data()
    data.setup(stage)
    return data


def predicting(path: str, state: dict[str, Any], **arguments: Any) -> GLUEData:
    data = awaiting(path, **arguments)
    data.load_state_dict(state)
    return data


@pytest.fixture
def table(tmp_path: Path) -> str:
    return write_csv(tmp_path / "x.csv", rows(60))


@pytest.fixture
def hub(tmp_path: Path) -> str:
    """All GLUE tasks in the hub's layout, with two dozen rows each and hidden labels in the test splits."""
    configs = []
    for name, task in TASKS.items():
        if name == "mnli_mismatched":
            continue
        suffixes = ("_matched", "_mismatched") if name == "mnli" else ("",)
        splits = ["train", *(f"{kind}{suffix}" for kind in ("validation", "test") for suffix in suffixes)]
        label = ClassLabel(names=list(task.class_names)) if task.class_names else Value("float32")
        names = [name for name in (task.columns.text, task.columns.text_pair) if name]
        features = Features({**dict.fromkeys(names, Value("string")), "label": label, "idx": Value("int32")})
        (tmp_path / name).mkdir()
        for split in splits:
            labels = [-1 if split.startswith("test") else n % (len(task.class_names) or 5) for n in range(24)]
            content = {column: [f"{column} {split} {n}" for n in range(24)] for column in names}
            content |= {"label": labels, "idx": list(range(24))}
            Dataset.from_dict(content, features).to_parquet(tmp_path / name / f"{split}-00000-of-00001.parquet")
        files = [{"split": split, "path": f"{name}/{split}-*"} for split in splits]
        configs.append({"config_name": name, "data_files": files})
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return str(tmp_path)


# The tasks.


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_read_from_the_hubs_layout_with_its_facts(hub, task) -> None:
    data = made(task=task, path=hub)
    known = TASKS[task]
    assert data.monitor == (f"val/{known.metric}", "max")
    assert data.submission.file.endswith(".tsv")
    assert data.submission.limits == ((0, 5) if task == "stsb" else (-np.inf, np.inf))
    assert (data.num_classes, data.num_targets) == ((len(known.class_names), None) if known.class_names else (None, 1))
    assert data.class_names == list(known.class_names)
    assert {name: len(split) for name, split in data.splits.items()} == dict.fromkeys(
        ("train", "validation", "test"), 24
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].dtype == (torch.long if known.class_names else torch.float32)
    assert data.predict_split == "test"
    assert data.test_dataloader() == []
    assert "labels" not in next(iter(data.predict_dataloader()))
    [texts] = data.texts("validation", [3])
    end = known.splits
    assert texts[known.columns.text] == f"{known.columns.text} validation{end} 3"
    assert texts["idx"] == 3


def test_the_monitor_is_known_before_any_data_is_read() -> None:
    assert GLUEData(task="cola").monitor == ("val/mcc", "max")
    assert GLUEData(task="stsb").monitor == ("val/pearson", "max")
    assert GLUEData().monitor == ("val/accuracy", "max")
    assert GLUEData(path="x.csv").monitor is None


def test_without_a_path_a_task_is_the_hubs_and_no_task_the_embedded_one(monkeypatch) -> None:
    assert (GLUEData(task="mnli_mismatched").path, GLUEData(task="mnli_mismatched").subset) == ("nyu-mll/glue", "mnli")
    columns = {"docstring": ["Do it.", "Go."] * 8, "body": ["return do()", "return go(1)"] * 8, "label": [0, 1] * 8}
    features = Features(
        {"docstring": Value("string"), "body": Value("string"), "label": ClassLabel(names=["other", "described"])}
    )
    found = dict.fromkeys(("train", "validation", "test"), Dataset.from_dict(columns, features))
    monkeypatch.setattr("lit_llm.data.glue.open_docmatch", lambda: found)
    data = made()
    assert data.class_names == ["other", "described"]
    assert data.submission is None
    assert len(data.test_dataloader()) == 4


# Any table.


def test_each_example_is_read_with_its_own_label_whatever_the_order(table) -> None:
    data = made(path=table, validation_fraction=0.2, test_fraction=0.1)
    seen = []
    for name, loader in {
        "train": data.train_dataloader(),
        "validation": data.val_dataloader(),
        "test": data.test_dataloader(),
    }.items():
        for batch in loader:
            for raw, label, ids in zip(
                data.texts(name, batch["rows"].tolist()), batch["labels"].tolist(), batch["input_ids"], strict=True
            ):
                assert data.label_name(label) == raw["label"]
                assert data.tokenizer.decode(ids, skip_special_tokens=True) == raw["text"]
                seen.append(raw["text"])
    assert len(seen) == len(set(seen)) == len(data.splits["train"]) // 4 * 4 + 12 + 6


def test_pairs_of_any_columns_have_types(tmp_path) -> None:
    table = write_csv(tmp_path / "x.tsv", [], "")
    Path(table).write_text("left\tright\tsame\n" + "".join(f"l{n}\tr{n}\t{n % 2 * 0.5}\n" for n in range(30)))
    data = made(path=table, text="left", text_pair="right", label="same")
    assert (data.num_classes, data.num_targets, data.class_names) == (None, 1, [])
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].dtype == torch.float32
    assert batch["token_type_ids"].max() == 1


def test_long_texts_are_cut_and_batches_padded_to_their_longest(table) -> None:
    data = made(path=table, max_seq_len=10)
    lengths = {batch["input_ids"].shape[1] for batch in data.train_dataloader()}
    assert max(lengths) == 10
    for batch in data.val_dataloader():
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]


def test_a_validation_of_some_batches_reads_texts_of_all_lengths(tmp_path) -> None:
    path = write_csv(tmp_path / "x.csv", [(f"{n} " + "ab " * (1 + n % 2 * 20), n % 2) for n in range(200)])
    data = made(path=path, tokenizer="bytes", validation_fraction=0.2, test_fraction=0.2)

    def classes(limit: float) -> tuple[list[int], ...]:
        data.trainer = SimpleNamespace(limit_val_batches=limit, limit_test_batches=limit, global_rank=0, world_size=1)
        loaders = data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()
        return tuple([int(batch["labels"].float().mean()) for batch in loader] for loader in loaders)

    longest_first = [1] * 5 + [0] * 5
    assert classes(1.0) == (longest_first,) * 3
    for limit in (1, 5, 0.5):
        *evaluated, predicted = classes(limit)
        assert predicted == longest_first
        for found in evaluated:
            assert sorted(found[:5]) != [1] * 5
            assert sorted(found, reverse=True) == longest_first


def test_flags_balance_classes_and_leave_lengths_alone(tmp_path) -> None:
    table = write_csv(tmp_path / "x.csv", [(f"a{n}", int(n % 10 == 0)) for n in range(100)])
    data = made(path=table, balance_classes=True, length_grouping=False, validation_fraction=0.0)
    assert data.class_counts == [90, 10]
    labels = torch.cat([batch["labels"] for batch in data.train_dataloader()])
    assert labels.sum() == 50
    assert data.val_dataloader() == []


@pytest.mark.parametrize("class_weights", [None, "balanced"])
def test_a_rare_class_of_long_texts_has_no_batches_to_itself_if_its_weight_is_to_count(tmp_path, class_weights) -> None:
    rows = [("a b c d e f" if n % 10 == 0 else "a", int(n % 10 == 0)) for n in range(100)]
    data = GLUEData(
        path=write_csv(tmp_path / "x.csv", rows), tokenizer="bert-bpe-260", batch_size=10, validation_fraction=0.0
    )
    data.trainer = Trainer(accelerator="cpu", logger=False)
    data.trainer.strategy.connect(Classification(partial(torch.nn.Linear, 1), class_weights=class_weights))
    data.setup("fit")
    rare = [batch["labels"].sum().item() for batch in data.train_dataloader()]
    assert (len(rare), sum(rare)) == (10, 10)
    assert max(rare) < 5 if class_weights else max(rare) == 10
    assert next(iter(data.ordered_dataloader("train")))["labels"].all()  # the longest first, as ever


def test_augmentation_changes_training_examples_anew_in_each_epoch_and_no_others(table) -> None:
    plain, changed = (
        made(path=table, augmentation=augmentation, validation_fraction=0.2)
        for augmentation in (None, TextAugmentation(dropout=0.3))
    )

    def epoch(loader) -> dict[int, list[int]]:
        return {
            int(r): ids[m == 1].tolist()
            for b in loader
            for r, ids, m in zip(b["rows"], b["input_ids"], b["attention_mask"])
        }

    loader = changed.train_dataloader()
    first, second = epoch(loader), epoch(loader)
    original = epoch(plain.train_dataloader())
    shared = first.keys() & second.keys() & original.keys()
    assert (
        len({(str(first[r]), str(second[r]), str(original[r])) for r in shared if first[r] != second[r]})
        > len(shared) / 2
    )
    assert all(len(first[r]) == len(original[r]) for r in shared)
    assert epoch(plain.val_dataloader()) == epoch(changed.val_dataloader())
    again = changed.train_dataloader()
    again.load_state_dict({"epoch": 1, "row": 0, "num_rows": again.num_rows})
    assert epoch(again) == second


def test_fewer_training_examples_leave_the_validation_split_as_it_is(table) -> None:
    whole, some = made(path=table), made(path=table, max_examples=8)
    assert some.class_counts == [4, 4]
    assert some.splits["validation"].column("text") == whole.splits["validation"].column("text")


# Few labels, and many unlabelled examples.


def test_so_many_of_each_class_are_labelled_and_the_others_are_not(table) -> None:
    whole, few, fewer = (made(path=table, labels_per_class=count) for count in (None, 5, 3))
    assert few.class_counts == [5, 5]
    texts = {name: split.column("text") for name, split in few.splits.items()}
    assert sorted(texts["train"] + texts["unlabelled"]) == sorted(whole.splits["train"].column("text"))
    assert texts["validation"] == whole.splits["validation"].column("text")
    assert set(fewer.splits["train"].column("text")) < set(texts["train"])
    assert set(made(path=table, labels_per_class=5, seed=1).splits["train"].column("text")) != set(texts["train"])
    assert few.manifest["splits"]["unlabelled"] == {"examples": 44}
    assert set(next(iter(few.train_dataloader()))) == set(next(iter(whole.train_dataloader())))


def test_an_epoch_reads_each_unlabelled_example_once_as_it_is_and_augmented_and_the_labelled_again_and_again(
    table,
) -> None:
    augmentation = TextAugmentation(dropout=0.3)
    data = made(path=table, labels_per_class=5, unlabelled_ratio=2, batch_size=3, augmentation=augmentation)
    batches = list(data.train_dataloader())
    assert len(batches) == 44 // 6
    weak, strong = ([batch[name] for batch in batches] for name in ("unlabelled", "unlabelled_strong"))
    rows = torch.cat([batch["rows"] for batch in weak]).tolist()
    assert len(set(rows)) == len(rows) == 42
    mask = data.tokenizer.mask_token_id
    for plain, changed in zip(weak, strong, strict=True):
        assert torch.equal(plain["rows"], changed["rows"])
        same = plain["input_ids"] == changed["input_ids"]
        assert (changed["input_ids"][~same] == mask).all()
        for raw, label, ids in zip(
            data.texts("unlabelled", plain["rows"].tolist()), plain["labels"], plain["input_ids"], strict=True
        ):
            assert data.tokenizer.decode(ids, skip_special_tokens=True) == raw["text"]
            assert data.label_name(int(label)) == raw["label"]
    assert any((w["input_ids"] != s["input_ids"]).any() for w, s in zip(weak, strong, strict=True))
    labelled = torch.cat([batch["rows"] for batch in batches])
    assert sorted(labelled[:9].tolist()) != sorted(labelled[9:18].tolist())  # nine of ten per epoch
    assert labelled[:9].unique().numel() == labelled[9:18].unique().numel() == 9
    assert not any((batch["input_ids"] == mask).any() for batch in batches)


@pytest.mark.parametrize("augmentation", [None, TextAugmentation(dropout=0.3)])
def test_two_views_that_are_the_same_are_warned_of(table, caplog, augmentation) -> None:
    made(path=table, labels_per_class=5, unlabelled_ratio=2, batch_size=3, augmentation=augmentation)
    assert ("data.augmentation must make two views" in caplog.text) == (augmentation is None)


def test_it_goes_on_with_labelled_and_unlabelled_examples_where_it_stopped(table) -> None:
    def loader():
        given = {"labels_per_class": 5, "unlabelled_ratio": 2, "batch_size": 3}
        return made(path=table, augmentation=TextAugmentation(dropout=0.3), **given).train_dataloader()

    def flat(batch) -> list:
        return [flat(part) if isinstance(part, dict) else part.tolist() for part in batch.values()]

    first, again = loader(), loader()
    whole = [flat(batch) for _ in range(2) for batch in first]
    reading = iter(again)
    for _ in range(7 + 2):
        reading = iter(again) if again.batch == 0 else reading
        next(reading)
    fresh = loader()
    fresh.load_state_dict(again.state_dict())
    assert [flat(batch) for batch in fresh] == whole[9:]


def test_a_split_without_labels_is_unlabelled_as_is_what_is_left(tmp_path) -> None:
    (tmp_path / "x").mkdir()
    write_csv(tmp_path / "x/train.csv", rows(60))
    write_csv(tmp_path / "x/unlabelled.csv", [(f"new {n}",) for n in range(12)], "text")
    data = made(path=str(tmp_path / "x"), unlabelled_ratio=2)
    assert len(data.splits["train"]) == 54
    batch = next(iter(data.train_dataloader()))
    assert "labels" not in batch["unlabelled"]
    assert data.texts("unlabelled", [3]) == [{"text": "new 3"}]
    data = made(path=str(tmp_path / "x"), unlabelled_ratio=2, labels_per_class=5)
    assert len(data.splits["unlabelled"]) == 44 + 12
    assert "labels" not in next(iter(data.train_dataloader()))["unlabelled"]


@pytest.mark.parametrize("beside", [False, True])
def test_rows_without_a_label_are_unlabelled_where_training_reads_such(tmp_path, beside) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    empty = [(f"empty {n}", "  " * (n % 2)) for n in range(10)]
    write_csv(folder / "train.csv", [row for pair in zip(rows(60), empty * 6) for row in pair][: 60 + 14])
    if beside:
        write_csv(folder / "unlabelled.csv", [(f"new {n}",) for n in range(12)], "text")
    message = "data.label must be there in every row, but is not in row 1 of the training split of .*; leave such rows "
    with pytest.raises(ValueError, match=f"{message}out, or set data.unlabelled_ratio, for semi-supervised training$"):
        made(path=str(folder))
    data = made(path=str(folder), unlabelled_ratio=2, batch_size=4)
    labelled = 74 - 37
    assert len(data.splits["train"]) + len(data.splits["validation"]) == labelled
    news = [f"new {n}" for n in range(12)] * beside
    assert data.splits["unlabelled"].column("text") == news + [f"empty {n % 10}" for n in range(37)]
    batch = next(iter(data.train_dataloader()))
    assert len(batch["labels"]) == 4
    assert len(batch["unlabelled"]["input_ids"]) == 8


def test_unlabelled_texts_are_read_beside_what_is_left_whatever_type_of_text_their_file_has(tmp_path) -> None:
    (tmp_path / "x").mkdir()
    write_csv(tmp_path / "x/train.csv", rows(60))
    large = Dataset.from_dict({"text": [f"new {n}" for n in range(12)]}, Features({"text": Value("large_string")}))
    large.to_parquet(tmp_path / "x/unlabelled.parquet")
    data = made(path=str(tmp_path / "x"), unlabelled_ratio=2, labels_per_class=5)
    assert data.texts("unlabelled", [43, 44])[1] == {"text": "new 0"}
    assert len(data.splits["unlabelled"]) == 44 + 12


# The tokeniser.


def test_the_tokenizer_is_by_default_the_one_beside_the_network(table, tmp_path) -> None:
    beside = train_bert_bpe([prose(n) for n in range(10)], 290)
    beside.save_pretrained(tmp_path / "model")
    data = GLUEData(path=table)
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(tokenizer_path=str(tmp_path / "model")), state=SimpleNamespace(fn="fit")
    )
    assert data.tokenizer.get_vocab() == beside.get_vocab()
    data = GLUEData(path=table)
    assert "[MASK]" in data.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("weights", "made", "message"),
    [
        (False, False, "model.network.path must be a model directory, a run folder or a name on the hub, but is {place}, of which there is nothing here or there"),
        (True, False, "model.weights must be a model directory, a run folder or a name on the hub, but is {place}, of which there is nothing here or there"),
        (False, True, "data.tokenizer must be given where model.network.path has none, but is not, and {place} has none"),
    ],
)  # fmt: skip
def test_a_start_that_is_not_there_or_has_no_tokenizer_is_named_as_it_was_given(
    table, tmp_path, weights, made, message
) -> None:
    place = str(tmp_path / "start")
    if made:
        (tmp_path / "start").mkdir()
    data = GLUEData(path=table)
    module = SimpleNamespace(tokenizer_path=place, hparams={"weights": place if weights else None})
    data.trainer = SimpleNamespace(lightning_module=module, state=SimpleNamespace(fn="fit"))
    with pytest.raises(FileNotFoundError, match=exactly(message.format(place=place))):
        data.tokenizer  # noqa: B018


def test_a_trained_tokenizer_is_trained_once(table, monkeypatch) -> None:
    first = made(path=table).tokenizer
    monkeypatch.setattr(table_tokenizer, "training_of", lambda spec: lambda texts: pytest.fail("trained again"))
    assert made(path=table).tokenizer.get_vocab() == first.get_vocab()


def test_cutting_leaves_the_tokenizer_as_it_was(table) -> None:
    data = made(path=table, max_seq_len=10)
    before = fingerprint(data.tokenizer)
    next(iter(data.train_dataloader()))
    assert fingerprint(data.tokenizer) == before


def test_a_checkpoint_of_other_classes_or_tokens_is_refused(table, tmp_path) -> None:
    data, state = made(path=table), made(path=table).state_dict()
    data.load_state_dict(state)
    other = write_csv(tmp_path / "y.csv", rows(60, classes=3))
    message = "data.label must have the checkpoint's classes, 0, 1, but has 0, 1, 2 in "
    with pytest.raises(ValueError, match=message):
        made(path=other).load_state_dict(state)
    message = f"data.tokenizer must be the checkpoint's, but is bert-bpe-280 of {table}, which differs"
    with pytest.raises(ValueError, match=exactly(message)):
        made(path=table, tokenizer="bert-bpe-280").load_state_dict(state)


def test_the_checkpoints_classes_in_another_order_are_found_by_their_names_but_not_to_train_on(tmp_path) -> None:
    sentences = [f"{word} things {n}" for n in range(30) for word in ("bad", "good")]
    path = write_csv(tmp_path / "x.csv", [(text, text.split()[0]) for text in sentences])
    state = made(path=path).state_dict()
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    content = {"text": sentences, "label": [int(text.startswith("bad")) for text in sentences]}
    Dataset.from_dict(content, features).to_parquet(tmp_path / "x.parquet")
    data = made("validate", path=str(tmp_path / "x.parquet"))
    next(iter(data.val_dataloader()))
    data.load_state_dict(state)
    batch = next(iter(data.val_dataloader()))
    assert data.class_names == ["bad", "good"]
    said = [data.label_name(label) for label in batch["labels"].tolist()]
    assert said == [row["text"].split()[0] for row in data.texts("validation", batch["rows"].tolist())]
    data = awaiting(str(tmp_path / "x.parquet"), "fit")
    message = f"data.label must have the checkpoint's classes, bad, good, but has good, bad in {tmp_path / 'x.parquet'}"
    with pytest.raises(ValueError, match=exactly(message)):
        data.load_state_dict(state)


@pytest.mark.parametrize(
    ("changed", "how"),
    [
        (rows(80), "had 60 rows then and has 80 now"),
        ([(text.replace("word7", "word"), label) for text, label in rows(60)], "has other rows now"),
        ([(text, 1 if n == 8 else label) for n, (text, label) in enumerate(rows(60))], "has other rows now"),
    ],
)
def test_a_table_that_has_changed_since_training_is_not_gone_on_with_and_said_where_it_is_evaluated(
    table, caplog, changed, how
) -> None:
    options = {"tokenizer": "bytes", "test_fraction": 0.2}
    state = made(path=table, **options).state_dict()
    for stage in ("fit", "validate", "test", "predict"):
        awaiting(table, stage, **options, max_examples=30).load_state_dict(state)
    assert not caplog.messages
    write_csv(Path(table), changed)
    change = f"the train split of {table} {how}"
    message = (
        f"data.path must hold the rows that the checkpoint was trained on to go on from it, but {change}; put those "
        f"back, or start a new run with --model.weights"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        awaiting(table, "fit", **options).load_state_dict(state)
    for stage, split in (("validate", "validation"), ("test", "test"), ("predict", "test")):
        caplog.clear()
        awaiting(table, stage, **options).load_state_dict(state)
        assert caplog.messages == [
            f"Rows that the checkpoint was trained on may be in the {split} split, since {change}"
        ]
    del state["trained_on"]["contents"]  # as in older checkpoints
    awaiting(table, "fit", **options).load_state_dict(state)


def test_other_fractions_than_in_training_are_not_gone_on_with_and_said_where_what_they_cut_is_evaluated(
    table, tmp_path, caplog
) -> None:
    options = {"tokenizer": "bytes"}
    state = made(path=table, **options).state_dict()
    change = f"of {table} 0.1 (validation), 0 (test) was cut out then and 0.1 (validation), 0.2 (test) is now"
    with pytest.raises(ValueError, match=re.escape(f"to go on from it, but {change}; put those back")):
        awaiting(table, "fit", **options, test_fraction=0.2).load_state_dict(state)
    awaiting(table, "test", **options, test_fraction=0.2).load_state_dict(state)
    [said] = caplog.messages
    assert said == f"Rows that the checkpoint was trained on may be in the test split, since {change}"
    write_csv(tmp_path / "train.csv", rows(40))
    write_csv(tmp_path / "test.csv", rows(20))
    options |= {"path": str(tmp_path)}
    awaiting(stage="fit", **options, test_fraction=0.2).load_state_dict(made(**options).state_dict())  # cuts nothing


def test_a_test_split_of_its_own_may_change(tmp_path, caplog) -> None:
    write_csv(tmp_path / "train.csv", rows(40))
    write_csv(tmp_path / "test.csv", rows(100)[60:])
    options = {"path": str(tmp_path), "tokenizer": "bytes"}
    state = made(**options).state_dict()
    write_csv(tmp_path / "test.csv", rows(100)[80:])
    for stage in ("fit", "test"):
        awaiting(stage=stage, **options).load_state_dict(state)
    write_csv(tmp_path / "train.csv", rows(60))
    awaiting(stage="test", **options).load_state_dict(state)
    assert not caplog.messages


def test_beside_a_test_split_without_labels_which_is_predicted_another_is_cut(tmp_path, caplog) -> None:
    write_csv(tmp_path / "train.csv", rows(60))
    write_csv(tmp_path / "test.csv", [(f"new {n}",) for n in range(7)], "text")
    options = {"path": str(tmp_path), "tokenizer": "bytes", "test_fraction": 0.2}
    data = made("test", **options)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 42,
        "validation": 6,
        "test": 12,
        "unlabelled test": 7,
    }
    assert [len(batch["labels"]) for batch in data.test_dataloader()] == [4, 4, 4]
    predicted = predicting(state=data.state_dict(), **options)
    texts = predicted.texts(predicted.predict_split, list(range(7)))
    assert [text["text"] for text in texts] == [f"new {n}" for n in range(7)]
    assert all("labels" not in batch for batch in predicted.predict_dataloader())
    write_csv(tmp_path / "train.csv", rows(80))
    for stage, doubts in (("test", 1), ("predict", 0)):
        caplog.clear()
        awaiting(stage=stage, **options).load_state_dict(data.state_dict())
        assert len(caplog.messages) == doubts


def test_a_task_of_which_some_is_cut_to_test_on_predicts_its_own_test_split(hub) -> None:
    data = made(task="cola", path=hub, test_fraction=0.25)
    assert len(data.splits["train"]) == 18
    assert len(data.test_dataloader()) == 2
    assert [row["sentence"] for row in data.texts(data.predict_split, [5])] == ["sentence test 5"]


def test_a_table_without_labels_is_predicted_whole_with_what_the_checkpoint_knows(table, tmp_path) -> None:
    state = made(path=table).state_dict()
    new = awaiting(write_csv(tmp_path / "new.csv", [("ab ab",), ("ab",)], "text"))
    assert getattr(new, "tokenizer", None) is None
    new.load_state_dict(state)
    [batch] = new.predict_dataloader()
    assert batch["rows"].tolist() == [0, 1]
    assert "labels" not in batch
    assert (new.class_names, new.predict_split) == (["0", "1"], "test")
    assert new.tokenizer.get_vocab() == made(path=table).tokenizer.get_vocab()


def test_a_checkpoint_has_all_chat_templates_of_the_tokeniser(table, tmp_path) -> None:
    tokenizer = train_bert_bpe(["ab " * 9], 300)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    state = made(path=table, tokenizer=str(tmp_path / "tokenizer")).state_dict()
    new = predicting(write_csv(tmp_path / "new.csv", [("ab",)], "text"), state)
    assert new.tokenizer.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("labels", [[0, 1, 0], [1, 1, 1], [-1, -1, -1]])
def test_a_single_table_is_predicted_whole_whichever_labels_it_has(table, tmp_path, labels) -> None:
    state = made(path=table).state_dict()
    path = write_csv(tmp_path / "new.csv", [(f"ab {n}", label) for n, label in enumerate(labels)])
    new = predicting(path, state)
    [batch] = new.predict_dataloader()
    assert sorted(batch["rows"].tolist()) == [0, 1, 2]
    assert ("labels" in batch) == (-1 not in labels)
    assert [labels[row] for row in batch["rows"]] == batch.get("labels", torch.tensor([-1] * 3)).tolist()
    assert new.class_names == ["0", "1"]
    new.task = TASKS["sst2"]
    assert new.submission is None  # a leaderboard accepts only its own test split


def test_a_table_to_predict_keeps_the_labels_that_are_known_where_others_are_missing_or_new(
    table, tmp_path, caplog
) -> None:
    caplog.set_level("INFO")
    classes, values = made(path=table), made(path=write_csv(tmp_path / "y.csv", [(t, n / 7) for t, n in rows(60)]))
    path = write_csv(tmp_path / "new.csv", [(f"ab {n}", label) for n, label in enumerate(["1", "", "unknown", "0"])])
    for trained, none in ((classes, IGNORE_INDEX), (values, float("nan"))):
        labels = predicting(path, trained.state_dict()).splits["test"].labels
        np.testing.assert_array_equal(labels, np.array([1, none, none, 0], trained.splits["train"].labels.dtype))
    said = f"2 of 4 rows of {path} have no label that is known from training, such as None in row 1"
    assert said in caplog.messages
    path = write_csv(tmp_path / "none.csv", [("ab", "unknown"), ("ab ab", "")])
    assert predicting(path, classes.state_dict()).splits["test"].labels is None


@pytest.mark.parametrize(
    ("fractions", "split"), [((0.1, 0.0), "validation"), ((0.1, 0.2), "test"), ((0.0, 0.0), "train")]
)
def test_of_the_runs_own_table_what_it_was_not_trained_on_is_predicted(table, fractions, split, caplog) -> None:
    held_out = dict(zip(("validation_fraction", "test_fraction"), fractions, strict=True))
    trained = made(path=table, **held_out)
    data = predicting(table, trained.state_dict(), **held_out)
    caplog.set_level("INFO")
    batches = list(data.predict_dataloader())
    rows = sorted(row for batch in batches for row in batch["rows"].tolist())
    assert data.predict_split == split
    assert data.texts(split, rows) == trained.texts(split, rows)
    assert len(rows) == len(trained.splits[split])
    assert all("labels" in batch for batch in batches)
    alone = ", on which it was trained, as there is no other split" if split == "train" else ""
    assert caplog.messages[-1] == f"Predicting the {len(rows)} rows of the {split} split of {table}{alone}"


def test_of_another_folder_with_splits_the_last_is_predicted_by_the_checkpoints_tokens(table, tmp_path, caplog) -> None:
    (tmp_path / "new").mkdir()
    write_csv(tmp_path / "new/train.csv", rows(9))
    write_csv(tmp_path / "new/test.csv", [("ab", 1), ("ab ab", 0)])
    caplog.set_level("INFO")
    data = predicting(str(tmp_path / "new"), made(path=table).state_dict())
    [batch] = data.predict_dataloader()
    assert [batch["labels"][batch["rows"].tolist().index(row)] for row in range(2)] == [1, 0]
    assert caplog.messages[-1] == f"Predicting all 2 rows of the test split of {tmp_path}/new"


@pytest.mark.parametrize("name", ["score", "target", "class", "category"])
def test_no_other_column_is_taken_for_labels_than_the_one_that_was_trained_on(table, tmp_path, name) -> None:
    state = made(path=table).state_dict()
    new = predicting(write_csv(tmp_path / "new.csv", [("ab", "0.7"), ("ab ab", "0.1")], f"text,{name}"), state)
    assert "labels" not in next(iter(new.predict_dataloader()))
    named = write_csv(tmp_path / "named.csv", [("ab", "0.7", 1), ("ab ab", "0.1", 0)], f"text,{name},truth")
    batch = next(iter(predicting(named, state, label="truth").predict_dataloader()))
    assert dict(zip(batch["rows"].tolist(), batch["labels"].tolist(), strict=True)) == {0: 1, 1: 0}


def test_the_text_to_predict_is_the_column_that_was_trained_on(tmp_path) -> None:
    trained = made(path=write_csv(tmp_path / "x.csv", [(text, label) for text, label in rows(60)], "review,label"))
    new = predicting(write_csv(tmp_path / "new.csv", [("good", "ab")], "score,review"), trained.state_dict())
    assert (new.columns.text, new.columns.label) == ("review", None)


@pytest.mark.parametrize("columns", ["id,sentence1", "id,sentence1,sentence_b", "id,premise,hypothesis"])
def test_a_table_to_predict_without_the_second_text_that_was_trained_on_is_refused(tmp_path, columns) -> None:
    pairs = [(text, f"ab {n}", label) for n, (text, label) in enumerate(rows(60))]
    trained = made(path=write_csv(tmp_path / "x.csv", pairs, "sentence1,sentence2,label"))
    path = write_csv(tmp_path / "new.csv", [("a", "ab", "ba")[: columns.count(",") + 1]] * 3, columns)
    message = (
        f"data.path must hold a second text, as the checkpoint was trained on 'sentence2', but {path} has "
        f"{columns.replace(',', ', ')}; name another column by data.text_pair"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        predicting(path, trained.state_dict())
    if len(names := columns.split(",")) == 3:
        named = predicting(path, trained.state_dict(), text_pair=names[2])
        assert (named.columns.text, named.columns.text_pair) == (names[1], names[2])


def test_a_table_of_pairs_is_not_read_as_such_by_a_checkpoint_that_was_trained_on_one_text(table, tmp_path) -> None:
    state = made(path=table).state_dict()
    path = write_csv(tmp_path / "new.csv", [("ab", "ba")] * 3, "premise,hypothesis")
    with pytest.raises(
        ValueError, match=exactly(f"data.text must be one of premise, hypothesis in {path}, but is not given")
    ):
        predicting(path, state)
    named = predicting(path, state, text="hypothesis")
    assert (named.columns.text, named.columns.text_pair) == ("hypothesis", None)
    message = "data.text_pair must be None for a checkpoint that was trained on one text, but is 'hypothesis'"
    with pytest.raises(ValueError, match=exactly(message)):
        predicting(path, state, text_pair="hypothesis")


def test_a_checkpoint_that_does_not_say_what_it_was_trained_on_predicts_a_single_table_whole(table) -> None:
    state = made(path=table).state_dict()
    del state["trained_on"]
    assert len(predicting(table, state).splits["test"]) == 60


@pytest.mark.parametrize("name", ["mine", "house_valuation", "validation"])
@pytest.mark.parametrize("own", [True, False])
def test_of_another_table_it_is_said_where_but_a_part_is_evaluated(table, tmp_path, name, own, caplog) -> None:
    state = made(path=table).state_dict()
    path = table if own else write_csv(tmp_path / f"{name}.csv", rows(80))
    data = GLUEData(path=path, tokenizer=TOKENIZER)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"), global_rank=0, world_size=1)
    data.expect(state)
    data.setup("validate")
    data.load_state_dict(state)
    caplog.clear()
    data.val_dataloader()
    part = (
        f"Evaluating 8 of the 80 rows of {data.path}, the part that training on it would leave for validation; a table "
        f"called validation is evaluated whole"
    )
    assert caplog.messages == ([] if own or name == "validation" else [part])


# Errors.


def test_a_table_with_nothing_to_test_on_is_refused(table) -> None:
    made("test", path=table, test_fraction=0.1)
    message = (
        f"data.path must hold a test split with labels to test on, but {table} has none; raise data.test_fraction "
        f"where the checkpoint was trained, or call a table that is only to test on test"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        made("test", path=table)


def test_an_unknown_task_is_said_with_those_there_are() -> None:
    message = (
        "data.task must be one of cola, sst2, mrpc, stsb, qqp, mnli, mnli_mismatched, qnli, rte, wnli, but is 'sst'"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        GLUEData(task="sst")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 100}, "data.batch_size must be at most the examples there are to train on, but is 100 on 1 device where {path} has 54; lower it"),
        ({"label": "lable"}, "data.label must be one of text, label in {path}, but is 'lable'"),
        ({"validation_fraction": 0.001}, "data.validation_fraction must leave an example to validate on, but is 0.001, which takes none of the 60 of {path}; raise it, or set it to 0 to go without"),
        ({"text_pair": "label"}, "data.text_pair must be another column than data.label, but is 'label' in {path} too"),
        ({"text_pair": "other", "tokenizer": "bytes"}, "data.tokenizer must put a mark between two texts, but bytes has none; bert-uncased-bpe-8192 is one that does"),
        ({"max_seq_len": 2}, "data.max_seq_len must leave room for text beside 2 special tokens, but is 2"),
        ({"labels_per_class": 28}, "data.labels_per_class must be at most the rows of the smallest class, 27, but is 28 for {path}"),
        ({"unlabelled_ratio": -1}, "data.unlabelled_ratio must be at least 0, but is -1"),
        ({"unlabelled_ratio": 2}, "data.unlabelled_ratio must leave a batch of data.batch_size within the unlabelled examples, but is 2 with batches of 4 on 1 device where {path} has 0; lower one, or set data.labels_per_class"),
        ({"max_examples": 0}, "data.max_examples must be at least 1, but is 0"),
        ({"validation_fraction": 0.6, "test_fraction": 0.4}, "data.validation_fraction and data.test_fraction must be at least 0 and leave something to train on, but are 0.6 and 0.4"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_said_in_one_line(table, arguments, message) -> None:
    if arguments.get("text_pair") == "other":
        write_csv(Path(table), [(text, label, text) for text, label in rows(60)], "text,label,other")
    with pytest.raises(ValueError, match=exactly(message.format(path=table))):
        made(path=table, **arguments)


def test_a_table_of_nothing_but_text_is_not_asked_to_name_it_as_label(tmp_path) -> None:
    path = write_csv(tmp_path / "x.csv", [("a",), ("b",)], "text")
    message = f"data.path must hold a column of labels beside the text, but {path} has only 'text'"
    with pytest.raises(ValueError, match=exactly(message)):
        made(path=path)


def test_few_classes_are_said_with_the_examples_that_are_trained_on(tmp_path, caplog) -> None:
    caplog.set_level("INFO", logger="lit_llm.data.examples")
    for classes in (3, 21):
        path = write_csv(tmp_path / f"{classes}.csv", rows(90, classes))
        made(path=path, validation_fraction=0.2, test_fraction=0.0, labels_per_class=3)
    assert caplog.messages == ["Training examples of each class: 0: 3, 1: 3, 2: 3"]


def test_whole_numbers_are_values_for_an_objective_of_values(tmp_path) -> None:
    path = write_csv(tmp_path / "x.csv", [(f"a{n}", n % 5 + 1) for n in range(30)])
    for objective, facts in ((Regression, (None, 1)), (Classification, (5, None))):
        data = GLUEData(path=path, tokenizer=TOKENIZER, batch_size=4)
        data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(size_name=objective.size_name))
        data.trainer.state = SimpleNamespace(fn="fit")
        assert data.splits
        assert (data.num_classes, data.num_targets) == facts


def test_values_cannot_be_balanced(tmp_path) -> None:
    table = write_csv(tmp_path / "x.csv", [(f"a{n}", n / 3) for n in range(30)])
    message = "data.balance_classes must be false where labels are real numbers, but is true"
    with pytest.raises(ValueError, match=exactly(message)):
        made(path=table, balance_classes=True, validation_fraction=0.0)
    message = f"data.labels_per_class must be None where labels are real numbers, but is 3 for {table}"
    with pytest.raises(ValueError, match=exactly(message)):
        made(path=table, labels_per_class=3)


def test_a_network_learns_from_it(tmp_path) -> None:
    table = write_csv(tmp_path / "x.csv", [(f"{'good' if n % 2 else 'bad'} thing {n}", n % 2) for n in range(120)])

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            config = BertConfig(
                vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            )
            self.network, self.right = BertForSequenceClassification(config), []

        def training_step(self, batch, batch_idx):
            return self.network(**inputs(batch), labels=batch["labels"]).loss

        def validation_step(self, batch, batch_idx):
            self.right += (self.network(**inputs(batch)).logits.argmax(1) == batch["labels"]).tolist()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    module = Classifier()
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, check_val_every_n_epoch=3, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=GLUEData(path=table, tokenizer=TOKENIZER, batch_size=8))
    assert len(module.right) == 12
    assert np.mean(module.right) > 0.9


def test_a_text_without_tokens_is_said_with_its_row(tmp_path) -> None:
    texts = [{"text": "" if n in (5, 7) else f"ab {n}", "label": n % 2} for n in range(20)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    data = made(path=str(path), tokenizer="bytes", validation_fraction=0.0)
    message = (
        f"data.path must hold texts of a token or more, but {path} has 2 of 20 without, the first of them '' in row 5 of "
        f"a split; leave such rows out, or name a data.tokenizer that marks the end of a text"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        data.train_dataloader()
    marked = made(path=str(path), validation_fraction=0.0)
    assert sum(len(batch["rows"]) for batch in marked.train_dataloader()) == 20
