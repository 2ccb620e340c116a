import numpy as np
import pytest
import torch

from lit_llm.data.augmentation import TextAugmentation
from lit_llm.data.collation import Collation
from lit_llm.data.tokenizer import byte_tokenizer, train_bert_bpe
from tests.examples import twenty_tokens
from tests.writing import prose

TEXTS = [prose(number)[: 5 + 7 * (number % 6)] for number in range(40)]
PAIRS = [prose(number + 40)[: 3 + 11 * (number % 5)] for number in range(40)]
LABELS = np.arange(40)
TOKENIZER = train_bert_bpe(TEXTS + PAIRS, 400)


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["one", "two"])
def test_a_batch_is_what_the_tokenizer_itself_makes(pairs) -> None:
    split = Collation(TEXTS, pairs, LABELS, TOKENIZER, 12)
    rows = np.array([7, 3, 21, 3])
    batch = split.batch(rows)
    second = None if pairs is None else [pairs[row] for row in rows]
    wanted = TOKENIZER(
        [TEXTS[row] for row in rows], second, truncation=True, max_length=12, padding="longest", return_tensors="pt"
    )
    assert set(batch) == {*wanted, "labels", "rows"}
    for name, value in wanted.items():
        assert torch.equal(batch[name], value)
        assert batch[name].dtype == torch.long
    assert batch["labels"].tolist() == batch["rows"].tolist() == rows.tolist()


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["one", "two"])
def test_how_many_examples_are_cut_is_said(pairs, caplog) -> None:
    seconds = [None] * len(TEXTS) if pairs is None else pairs
    lengths = [len(TOKENIZER(*example)["input_ids"]) for example in zip(TEXTS, seconds)]
    limit = sorted(lengths)[20]
    count = sum(length > limit for length in lengths)
    with caplog.at_level("INFO", logger="lit_llm"):
        Collation(TEXTS, pairs, LABELS, TOKENIZER, max(lengths))
        assert not caplog.text
        Collation(TEXTS, pairs, LABELS, TOKENIZER, limit)
    assert 0 < count < 20
    assert f"Cut {count} of 40 examples ({count / 40:.1%}) at {limit} tokens" in caplog.text


def test_a_batch_is_as_long_as_its_own_longest_example() -> None:
    split = Collation(TEXTS, None, None, TOKENIZER, 64)
    for rows in (np.array([0, 6]), np.array([5, 0])):
        batch = split.batch(rows)
        assert batch["input_ids"].shape[1] == split.lengths[rows].max()
        assert batch["attention_mask"].sum(1).tolist() == split.lengths[rows].tolist()
        assert "labels" not in batch


def test_a_mark_spelt_in_a_text_is_text() -> None:
    split = Collation(["a [SEP] b"], None, None, TOKENIZER, 8)
    assert (split.ids == TOKENIZER.sep_token_id).sum() == 1


def test_a_tokenizer_without_types_gives_none() -> None:
    batch = Collation(TEXTS, None, None, byte_tokenizer(), 8).batch(np.arange(3))
    assert set(batch) == {"input_ids", "attention_mask", "rows"}


def test_augmentation_depends_on_seed_epoch_and_row_alone_and_keeps_the_types() -> None:
    split, augmentation = Collation(TEXTS, PAIRS, LABELS, TOKENIZER, 40), TextAugmentation(0.1, 0.1, 0.2)
    alone = split.batch(np.array([5]), augmentation, (0, 1))
    among = split.batch(np.array([2, 5, 9]), augmentation, (0, 1))
    length = int(alone["attention_mask"].sum())
    for name in ("input_ids", "token_type_ids"):
        assert torch.equal(alone[name][0], among[name][1, :length])
    others = [split.batch(np.array([5]), augmentation, chance)["input_ids"] for chance in ((0, 2), (1, 1))]
    assert not any(torch.equal(other, alone["input_ids"]) for other in others)
    ids, types = alone["input_ids"][0], alone["token_type_ids"][0]
    first_end = int((ids == TOKENIZER.sep_token_id).nonzero()[0])
    assert types.tolist() == [0] * (first_end + 1) + [1] * (length - first_end - 1)
    assert alone["labels"].tolist() == [5]


def test_equal_texts_are_changed_in_different_ways() -> None:
    split = Collation([TEXTS[5] * 3] * 2, None, None, TOKENIZER, 60)
    one, other = (split.batch(np.array([row]), TextAugmentation(deletion=0.3))["input_ids"] for row in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("unknown", "is_word"), [("a", True), ("[SEP]", False)])
def test_a_token_for_unknown_words_is_changed_as_words_are_unless_it_is_a_mark_too(unknown: str, is_word: bool) -> None:
    tokenizer = twenty_tokens()
    tokenizer.unk_token = unknown
    split = Collation(["b c d e f g h i"], None, None, tokenizer, 64)
    split.ids[:-1] = tokenizer.unk_token_id
    changed = split.batch(np.array([0]), TextAugmentation(dropout=0.9))["input_ids"]
    assert (tokenizer.mask_token_id in changed) == is_word
