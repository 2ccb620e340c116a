import functools
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lit_llm.batch import IGNORE_INDEX
from lit_llm.data import cache
from lit_llm.data.chat import CHAT_TEMPLATE
from lit_llm.data.instructions import InstructionData
from lit_llm.data.sampling import BatchLoader
from lit_llm.models.llama import Llama
from lit_llm.objectives.causal_lm import CausalLM
from tests.writing import exactly, pairs

SMALL = {"tokenizer": "bytes", "seq_len": 128, "batch_size": 2, "validation_fraction": 0.2, "test_fraction": 0.2}
SPLITS = ("train", "validation", "test")


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return write(tmp_path / "chat.jsonl", pairs(80))


def opened(path: Path, stage: str = "fit", **changes: Any) -> InstructionData:
    data = InstructionData(path=str(path), **(SMALL | changes))
    data.prepare_data()
    data.setup(stage)
    return data


def answers(data: InstructionData, batches: Any) -> list[str]:
    """The answers in the labels, decoded."""
    text = [data.tokenizer.decode(row[row != IGNORE_INDEX].tolist()) for b in batches for row in b["labels"]]
    return [answer for row in text for answer in row.split("<|endoftext|>")[:-1]]


def all_answers(data: InstructionData) -> dict[str, list[str]]:
    loaders = {name: data._loader(name, None) for name in SPLITS}
    return {name: answers(data, loader) for name, loader in loaders.items()}


# Labels.


@pytest.mark.parametrize("packed", [True, False])
def test_the_labels_are_the_answers_each_once(chat: Path, packed: bool) -> None:
    found = all_answers(opened(chat, packed=packed))
    assert sorted(itertools.chain(*found.values())) == sorted(row["response"] for row in pairs(80))
    assert all(found.values())


def test_a_batch_by_hand(tmp_path: Path) -> None:
    talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "de")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]}]
    data = opened(
        write(tmp_path / "x.jsonl", rows), batch_size=1, validation_fraction=0.0, test_fraction=0.0, seq_len=48
    )
    [batch] = data.train_dataloader()
    end = data.tokenizer.eos_token_id

    def written(values: torch.Tensor) -> str:
        return data.tokenizer.decode([v for v in values.tolist() if v not in (IGNORE_INDEX, end)])

    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert written(ids) == "user\naassistant\nbuser\ncassistant\nde"
    assert ids[39:].tolist() == [end] * 9  # of 40 tokens, the last is only a label
    assert labels[: labels.tolist().index(end) + 1].tolist() == [IGNORE_INDEX] * 17 + [*data.tokenizer.encode("b"), end]
    assert labels[36:39].tolist() == [*data.tokenizer.encode("de"), end]
    assert (labels != IGNORE_INDEX).sum() == 5
    assert batch["document_ids"][0].tolist() == [0] * 39 + [1] * 9
    assert batch["positions"][0].tolist() == [*range(39), *range(9)]


def test_packed_and_unpacked_give_equal_losses_and_gradients(tmp_path: Path, tiny_llama) -> None:
    path, found = write(tmp_path / "x.jsonl", pairs(24)), {}
    for packed in (True, False):
        data = opened(path, packed=packed, batch_size=5, validation_fraction=0.0, test_fraction=0.0)
        objective = CausalLM(Llama, vocab_size=257)
        objective.network = tiny_llama(vocab_size=257, max_seq_len=128, qk_norm=True, num_kv_heads=2)
        total = targets = 0.0
        for batch in data._loader("train", None):
            loss, count = objective.loss(batch)
            loss.backward()
            total, targets = total + loss.item(), targets + count.item()
        found[packed] = total / targets, targets, {n: p.grad / targets for n, p in objective.network.named_parameters()}
    (loss, targets, gradients), (other_loss, other_targets, other_gradients) = found[True], found[False]
    assert targets == other_targets > 500
    assert loss == pytest.approx(other_loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def test_an_example_does_not_see_its_neighbours_in_the_row(chat: Path, tiny_llama) -> None:
    data, network = opened(chat), tiny_llama(vocab_size=257, max_seq_len=128)
    batch = next(iter(data.train_dataloader()))
    first = batch["document_ids"] == 0
    assert (~first).any(dim=1).all()
    changed = batch["input_ids"].masked_fill(first, 7)
    with torch.no_grad():
        before, after = (
            network(ids, document_ids=batch["document_ids"], positions=batch["positions"])
            for ids in (batch["input_ids"], changed)
        )
    assert torch.equal(before[~first], after[~first])
    assert not torch.equal(before[first], after[first])


# Rows.


def test_packed_rows_have_one_length_and_unpacked_ones_that_of_the_longest(chat: Path) -> None:
    packed, unpacked = opened(chat), opened(chat, packed=False)
    for batch in packed.train_dataloader():
        assert batch.keys() == {"input_ids", "labels", "document_ids", "positions"}
        assert all(value.shape == (2, 128) and value.dtype == torch.long for value in batch.values())
    for batch in unpacked.train_dataloader():
        assert batch.keys() == {"input_ids", "labels"}
        assert (batch["labels"][:, -1] != IGNORE_INDEX).any()
    assert packed.split_rows("train") < 0.6 * unpacked.split_rows("train")


@pytest.mark.parametrize("packed", [True, False])
def test_evaluation_counts_the_bytes_of_the_answers(chat: Path, packed: bool) -> None:
    data = opened(chat, packed=packed)
    for name, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
        said = sum(len(answer.encode()) for answer in all_answers(data)[name])
        assert sum(batch["num_bytes"].sum().item() for batch in loader) == pytest.approx(said)


@pytest.mark.parametrize("packed", [True, False])
def test_prediction_says_which_conversation_each_label_is_of(chat: Path, packed: bool) -> None:
    data, found = opened(chat, packed=packed), {}
    for batch in data.predict_dataloader():
        counted = batch["labels"] != IGNORE_INDEX
        for document in batch["documents"][counted].unique().tolist():
            mine = counted & (batch["documents"] == document)
            found[data.predict_split.ids[document]] = data.tokenizer.decode(batch["labels"][mine][:-1].tolist())
    rows = pairs(80)
    assert found == {id: rows[int(id.rsplit("/")[-1])]["response"] for id in data.predict_split.ids}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_see_each_conversation_once(chat: Path, packed: bool, world_size: int) -> None:
    data = opened(chat, packed=packed)
    for name, seed in (("train", 5), ("validation", None)):
        whole = data._loader(name, seed)
        parts = [BatchLoader(whole.cut, whole.num_rows, 1, seed, rank, world_size) for rank in range(world_size)]
        found = sorted(itertools.chain(*(answers(data, part) for part in parts)))
        everything = sorted(answers(data, BatchLoader(whole.cut, whole.num_rows, 1)))
        if seed is None:
            assert found == everything
        else:  # an incomplete global batch is left out of the epoch
            assert all(found.count(answer) <= everything.count(answer) for answer in found)
            assert sum(map(len, parts)) == whole.num_rows // world_size * world_size


def same(one: Any, other: Any) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_goes_on_where_it_stopped_and_the_next_has_another_order(chat: Path, packed: bool) -> None:
    loader = opened(chat, packed=packed).train_dataloader()
    epochs = [list(loader), list(loader)]
    assert not same(*epochs)
    reading = opened(chat, packed=packed).train_dataloader()
    list(reading)
    for _ in zip(range(3), reading):
        pass
    fresh = opened(chat, packed=packed).train_dataloader()
    fresh.load_state_dict(reading.state_dict())
    assert same(list(fresh), epochs[1][3:])


def test_another_seed_is_another_order(chat: Path) -> None:
    assert not same(*(list(opened(chat, seed=seed).train_dataloader()) for seed in (1, 2)))


# Sources and splits.


def test_every_table_that_text_is_read_from_holds_conversations_as_well(chat: Path, tmp_path: Path) -> None:
    import pandas as pd

    expected = {name: sorted(found) for name, found in all_answers(opened(chat)).items()}
    frame = pd.DataFrame(pairs(80))
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    (tmp_path / "hub").mkdir()
    frame.rename(columns={"prompt": "q", "response": "a"}).to_parquet(tmp_path / "hub/train.parquet")
    (tmp_path / "hub/notes.txt").write_text("not a table")
    for path, columns in (
        (tmp_path / "a.csv", {}),
        (tmp_path / "a.tsv", {}),
        (tmp_path / "hub", {"prompt": "q", "response": "a"}),
    ):
        assert {name: sorted(found) for name, found in all_answers(opened(path, **columns)).items()} == expected


def test_a_conversation_that_is_there_twice_is_in_one_split_once(tmp_path: Path, chat: Path) -> None:
    data = opened(write(tmp_path / "twice.jsonl", pairs(80) + pairs(80)))
    assert data.manifest["dropped"] == {"duplicate": 80}
    assert {k: sorted(v) for k, v in all_answers(data).items()} == {
        k: sorted(v) for k, v in all_answers(opened(chat)).items()
    }


def test_unanswered_rows_are_refused_or_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [*pairs(40), {"prompt": "a", "response": ""}])
    message = (
        f"an assistant's turn must say something, but is empty in row 40 of {path}; set data.unanswered to drop to "
        f"leave such rows out"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        opened(path)
    assert opened(path, unanswered="drop").manifest["dropped"] == {"empty": 1}


# The template and the tokeniser.


def test_the_template_goes_with_the_tokeniser_into_checkpoints(chat: Path, tmp_path: Path) -> None:
    data = opened(chat)
    assert data.tokenizer.chat_template == CHAT_TEMPLATE
    assert data.state_dict()["tokenizer"]["chat_template.jinja"] == CHAT_TEMPLATE
    assert data.vocab_size == 257
    (tmp_path / "other.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    )
    other = opened(chat, chat_template=str(tmp_path / "other.jinja"))
    assert other.tokenizer.chat_template != CHAT_TEMPLATE
    assert other.cache.folder != data.cache.folder
    (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    assert opened(chat, chat_template=str(tmp_path / "other.jinja")).cache.folder != other.cache.folder


def test_a_tokeniser_is_trained_on_the_training_conversations(chat: Path) -> None:
    data = opened(chat, tokenizer="bpe-300")
    assert 257 < data.vocab_size <= 300
    assert len(data.tokenizer.encode("assistant\n")) < 6
    assert sorted(itertools.chain(*all_answers(data).values())) == sorted(row["response"] for row in pairs(80))


def test_a_second_run_tokenises_nothing_even_with_rows_of_another_kind(
    chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(chat)
    monkeypatch.setattr(cache, "replacing", None)
    second = opened(chat, seq_len=64, packed=False, overlong="cut", batch_size=3, seed=4)
    assert second.cache.folder == first.cache.folder


def test_a_cache_from_before_conversations_became_other_tokens_is_not_taken(
    chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(chat)
    monkeypatch.setattr("lit_llm.data.instructions.CONVERSATIONS_FORMAT", 1)
    assert opened(chat).cache.folder != first.cache.folder


def test_a_checkpoint_of_other_tokens_is_refused(chat: Path) -> None:
    message = f"data.tokenizer must be the checkpoint's, but is bytes of {chat}, which differs"
    with pytest.raises(ValueError, match=exactly(message)):
        opened(chat).load_state_dict(opened(chat, tokenizer="bpe-300").state_dict())


def test_conversations_that_have_changed_since_training_are_not_gone_on_with(chat: Path) -> None:
    state = opened(chat).state_dict()
    opened(chat).require_unchanged(state)
    lines = chat.read_text(encoding="utf-8").splitlines()
    chat.write_text("\n".join(lines[: len(lines) // 2]), encoding="utf-8")
    with pytest.raises(ValueError, match="must hold the documents that the checkpoint was trained on to go on"):
        opened(chat).require_unchanged(state)


# Long conversations.


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """Sixty conversations of at most 100 tokens, one with a long answer, and one with a long question."""
    short = [row for row in pairs(120) if len(row["prompt"] + row["response"]) < 70][:60]
    more = [{"prompt": "long answer", "response": "x" * 150}, {"prompt": "y" * 150, "response": "never reached"}]
    return write(tmp_path / "long.jsonl", [*short, *more])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("overlong", "counts", "lost"),
    [("drop", {"dropped": 2}, 2), ("cut", {"cut": 1, "dropped": 1}, 1)],
)
def test_what_is_longer_than_a_row_is_left_out_or_cut_and_counted(
    long: Path, packed: bool, overlong: str, counts: dict[str, int], lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lit_llm"):
        data = opened(long, overlong=overlong, packed=packed, seq_len=100, validation_fraction=0.0, test_fraction=0.0)
    assert "reached" not in " ".join(answers(data, data._loader("train", None)))
    assert data.manifest["overlong"] == {
        "seq_len": 100,
        "rule": overlong,
        "train": counts,
        "validation": {},
        "test": {},
    }
    said = ", ".join(f"{count} {what}" for what, count in counts.items())
    assert f"More than 100 tokens in the train split of {long}: {said}" in caplog.text
    assert len(data.examples("train").documents) == 62 - lost
    widest = max(batch["input_ids"].shape[1] for batch in data.train_dataloader())
    assert widest == 100 if packed or overlong == "cut" else widest < 100


def test_a_cut_answer_keeps_its_beginning_and_its_share_of_the_bytes(long: Path) -> None:
    data = opened(long, overlong="cut", seq_len=100, validation_fraction=0.0, test_fraction=0.0, packed=False)
    batches = list(data._loader("train", None))
    kept = max((labels != IGNORE_INDEX).sum().item() for batch in batches for labels in batch["labels"])
    assert kept == 100 + 1 - len("_user\nlong answer_assistant\n")
    largest = max(batch["num_bytes"].max().item() for batch in batches)
    assert largest == pytest.approx(150 * kept / 151)


def test_what_is_too_long_can_be_refused(long: Path) -> None:
    message = (
        "data.seq_len must hold every conversation, but is 100 where long.jsonl/61 needs 180; raise it, or set "
        "data.overlong to drop or cut"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        opened(long, overlong="refuse", seq_len=100, validation_fraction=0.0, test_fraction=0.0)
    opened(long, overlong="refuse", seq_len=180, validation_fraction=0.0, test_fraction=0.0)


# Refusals.


def test_other_bad_data_is_refused_in_one_line(tmp_path: Path, chat: Path) -> None:
    (tmp_path / "a.txt").write_text("hi")
    cases = [
        (
            {"path": tmp_path / "a.txt"},
            f"data.path must be a table (.jsonl, .json, .parquet, .csv, .tsv), but is {tmp_path / 'a.txt'}",
        ),
        (
            {"path": Path("stdlib-none.jsonl")},
            "data.path must be a file, a folder, a hub data set or one of stdlib-instructions, but is "
            "stdlib-none.jsonl, which does not exist",
        ),
        (
            {"path": write(tmp_path / "none.jsonl", [{"prompt": "a", "response": ""}]), "unanswered": "drop"},
            f"data.path must hold conversations, but {tmp_path / 'none.jsonl'} has none (1 empty)",
        ),
        (
            {"path": chat, "batch_size": 999},
            "data.batch_size must be at most the rows there are to train on, but is 999 on 1 device where the training "
            f"split of {chat} has {opened(chat).split_rows('train')} rows of 128 tokens; lower it, give more conversations, or raise data.seq_len where they are too long",
        ),
        (
            {"path": chat, "chat_template": "none.jinja"},
            "data.chat_template must be a file, but is none.jinja, which does not exist",
        ),
        ({"path": chat, "seq_len": 0}, "data.seq_len must be at least 1, but is 0"),
    ]
    for options, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=exactly(message)):
            opened(**options)


def test_an_objective_trains_on_it(chat: Path, tmp_path: Path) -> None:
    data = opened(chat)
    small = functools.partial(Llama, d_model=16, num_layers=1, num_heads=2, max_seq_len=128)
    trainer = Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(CausalLM(small), datamodule=data)
    trainer.validate(CausalLM(small), datamodule=data, verbose=False)
    metrics = trainer.callback_metrics
    assert metrics["val/loss"] == pytest.approx(np.log(257), rel=1e-3)
    assert metrics["val/bits_per_byte"] > 8
