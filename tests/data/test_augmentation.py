import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.data.augmentation import TextAugmentation
from tests.writing import exactly

IDS = np.array([1, *range(10, 30), 2, *range(30, 50), 2])
SPECIAL = IDS < 10
MASK = 5
CHANCES = st.floats(0, 0.95)


def change(augmentation: TextAugmentation, seed: int = 0, ids: np.ndarray = IDS) -> np.ndarray:
    return augmentation(ids, ids < 10, MASK, np.random.default_rng(seed))[0]


@given(CHANCES, CHANCES, st.floats(0.01, 0.95), st.integers(0, 100))
def test_special_tokens_stay_and_no_token_changes_its_text(dropout, swap, deletion, seed) -> None:
    changed, places = TextAugmentation(dropout, swap, deletion)(IDS, SPECIAL, MASK, np.random.default_rng(seed))
    texts = np.split(IDS[places], np.flatnonzero(IDS[places] == 2) + 1)
    assert IDS[places][0] == 1
    assert [text[-1] for text in texts[:-1]] == [2, 2]
    assert set(texts[0][1:-1]) <= set(range(10, 30))
    assert set(texts[1][:-1]) <= set(range(30, 50))
    assert all(len(text) > 1 for text in texts[:-1])
    assert ((changed == IDS[places]) | ((changed == MASK) & (IDS[places] >= 10))).all()


def test_dropped_tokens_become_the_mask_at_the_rate_asked_for() -> None:
    many = np.array([1, *[10] * 20_000, 2])
    changed = change(TextAugmentation(dropout=0.1), ids=many)
    assert len(changed) == len(many)
    assert abs((changed == MASK).mean() - 0.1) < 0.01


def test_deleted_tokens_go_at_the_rate_asked_for_in_order() -> None:
    many = np.arange(10, 20_000)
    changed = change(TextAugmentation(deletion=0.2), ids=many)
    assert abs(len(changed) / len(many) - 0.8) < 0.02
    assert (np.diff(changed) > 0).all()


def test_swapped_tokens_are_all_there_in_another_order() -> None:
    changed = change(TextAugmentation(swap=0.3))
    assert sorted(changed) == sorted(IDS)
    assert 0 < (changed != IDS).sum() < len(IDS)


def test_the_seed_decides() -> None:
    augmentation = TextAugmentation(0.1, 0.1, 0.1)
    assert change(augmentation).tolist() == change(augmentation).tolist()
    assert change(augmentation).tolist() != change(augmentation, seed=1).tolist()


def test_an_empty_text_stays_empty() -> None:
    ids = np.array([1, 2, 2])
    assert change(TextAugmentation(deletion=0.9, swap=0.9, dropout=0.9), ids=ids).tolist() == [1, 2, 2]


def test_what_changes_nothing_or_everything_is_refused() -> None:
    message = "augmentation must change something, but dropout, swap and deletion are all 0"
    with pytest.raises(ValueError, match=exactly(message)):
        TextAugmentation()
    with pytest.raises(ValueError, match=exactly("augmentation.swap must be from 0 to below 1, but is 1.0")):
        TextAugmentation(swap=1.0)
