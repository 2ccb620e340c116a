"""Stratification: cuts splits and draws samples in the proportions of the classes."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from lit_llm.data.cleaning import content_hash
from lit_llm.data.table_files import UNLABELLED_TEST
from lit_llm.data.tables import Columns, Split

log = logging.getLogger(__name__)


def strata(labels: np.ndarray) -> np.ndarray:
    """The stratum of each row: its class, or the decile of its value."""
    if labels.dtype == np.int64:
        return labels
    return np.searchsorted(np.quantile(labels, np.arange(0.1, 1, 0.1)), labels)


def standing(kinds: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row, how many rows of its kind have a smaller key, and how many there are of its kind.

    Example:
        >>> [x.tolist() for x in standing(np.array([0, 0, 0, 1, 1]), np.array([7, 5, 8, 2, 1]))]
        [[1, 0, 2, 1, 0], [3, 3, 3, 2, 2]]
    """
    before, sizes = np.zeros(len(kinds), np.int64), np.zeros(len(kinds), np.int64)
    for kind in np.unique(kinds):
        mine = keys[kinds == kind]
        before[kinds == kind] = np.searchsorted(np.sort(mine), mine)
        sizes[kinds == kind] = len(mine)
    return before, sizes


def kinds_of_texts(kinds: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Renumbers kinds so that all rows with one key have the same kind: the rarest among theirs.

    This way a rare kind loses no row to a more common one.

    Example:
        >>> kinds_of_texts(np.array([7, 7, 7, 5, 5]), np.array([1, 2, 3, 3, 4])).tolist()
        [1, 1, 0, 0, 0]
    """
    _, number, sizes = np.unique(kinds, return_inverse=True, return_counts=True)
    rarity = np.argsort(np.argsort(sizes, kind="stable"))[number]
    _, text = np.unique(keys, return_inverse=True)
    rarest = np.full(len(keys), len(sizes))
    np.minimum.at(rarest, text, rarity)
    return rarest[text]


def rooms(sizes: np.ndarray, validation_fraction: float, test_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of rows of each kind to test and to validate on, from the size of each kind."""
    test, both = (np.ceil(part * sizes - 0.5) for part in (test_fraction, test_fraction + validation_fraction))
    return test, both - test


def cut_splits(split: Split, columns: Columns, validation_fraction: float, test_fraction: float) -> dict[str, Split]:
    """Cuts splits out of a training split: the same fraction of each class, chosen by a hash of the texts.

    The same table is therefore always cut the same way. Rows with equal texts stay together, even if their classes
    differ: in the order of the hashes, all rows of a text go to the first of test and validation with room for them,
    else they stay in training. If a class consists mostly of texts with too many rows to fit, at most half of its
    other rows (or the given fractions of them, if more) are cut, so that some are left to train on.

    Pairs with the same first text stay together too, unless that would leave a split less than half as large. If no
    first text repeats, both texts are hashed, so that splits stay as they were in earlier versions.
    """
    first = columns.text_pair and split.column(columns.text)
    if not first or len(set(first)) == len(first):
        return _cut(split, columns, validation_fraction, test_fraction)
    by_first, by_both = (
        _cut(split, each, validation_fraction, test_fraction) for each in (replace(columns, text_pair=None), columns)
    )
    holds = all(
        name in by_first and 2 * len(by_first[name]) >= len(cut) for name, cut in by_both.items() if name != "train"
    )
    return by_first if holds else by_both


def _keys(split: Split, columns: Columns) -> np.ndarray:
    """A hash of the texts of each row."""
    texts = zip(*(split.column(name) for name in (columns.text, columns.text_pair) if name), strict=True)
    return np.array([content_hash("\0".join(text)) for text in texts], dtype=np.uint64)


def _cut(split: Split, columns: Columns, validation_fraction: float, test_fraction: float) -> dict[str, Split]:
    keys = _keys(split, columns)
    kinds = kinds_of_texts(strata(split.labels), keys)
    _, first, text, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    sizes, cut = np.bincount(kinds), test_fraction + validation_fraction
    others = np.bincount(kinds, counts[text] <= np.maximum(*rooms(sizes, validation_fraction, test_fraction))[kinds])
    sizes = np.minimum(sizes, others * max(1, 0.5 / cut))
    to_test, to_validation = rooms(sizes, validation_fraction, test_fraction)
    room = {"test": to_test.tolist(), "validation": to_validation.tolist()}
    place = np.full(len(counts), "train", dtype=object)
    for number, (kind, count) in enumerate(zip(kinds[first].tolist(), counts.tolist(), strict=True)):
        for name, left in room.items():
            if count <= left[kind]:
                left[kind] -= count
                place[number] = name
                break
    rows = {name: np.flatnonzero((place == name)[text]) for name in (*room, "train")}
    return {name: split.select(mine) for name, mine in rows.items() if len(mine)}


def with_all_splits(
    splits: dict[str, Split], columns: Columns, validation_fraction: float, test_fraction: float
) -> dict[str, Split]:
    """The splits in order, missing ones cut out of the training split; a fraction of 0 cuts none.

    A test split without labels can only be predicted, so a labelled one is cut in addition. Rows of the source's own
    labelled splits whose texts are trained on too are kept, with a warning.
    """
    if judged := [name for name, split in splits.items() if name != "train" and split.labels is not None]:
        trained_on = _keys(splits["train"], columns)
        for name in judged:
            if seen := np.isin(_keys(splits[name], columns), trained_on).sum():
                log.warning(
                    f"{seen:,} of the {len(splits[name]):,} rows of the {name} split are in the training split too, "
                    f"which makes its metrics too good; leave them out of one of the two"
                )
    if test_fraction and "test" in splits and splits["test"].labels is None:
        splits = {UNLABELLED_TEST if name == "test" else name: split for name, split in splits.items()}
    validation_fraction = 0.0 if "validation" in splits else validation_fraction
    test_fraction = 0.0 if "test" in splits else test_fraction
    if validation_fraction or test_fraction:
        splits = splits | cut_splits(splits["train"], columns, validation_fraction, test_fraction)
    return {name: splits[name] for name in ("train", "validation", "test", UNLABELLED_TEST) if name in splits}


def some_of(split: Split, count: int, seed: int) -> Split:
    """At most `count` rows of a training split, in the proportions of the classes, but at least one of each.

    With the same seed, a larger sample contains the smaller ones.
    """
    if len(split) <= count:
        return split
    keys = np.random.default_rng(seed).permutation(len(split))
    before, sizes = standing(strata(split.labels), keys)
    return split.select(np.sort(np.lexsort((keys, before / sizes))[:count]))


def few_of(split: Split, labels_per_class: int, seed: int, path: str) -> tuple[Split, Split]:
    """Draws `labels_per_class` rows of each class, and returns them and all others.

    With the same seed, a larger draw contains the smaller ones.

    Raises:
        ValueError: When labels are real numbers, or a class has fewer rows.
    """
    if split.labels.dtype != np.int64:
        raise ValueError(
            f"data.labels_per_class must be None where labels are real numbers, but is {labels_per_class} for {path}"
        )
    before, sizes = standing(split.labels, np.random.default_rng(seed).permutation(len(split)))
    if sizes.min() < labels_per_class:
        raise ValueError(
            f"data.labels_per_class must be at most the rows of the smallest class, {sizes.min()}, but is "
            f"{labels_per_class} for {path}"
        )
    few = before < labels_per_class
    return split.select(np.flatnonzero(few)), split.select(np.flatnonzero(~few))
