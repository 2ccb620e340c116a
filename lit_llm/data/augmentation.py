"""Text augmentation: small random changes to training examples that keep their labels valid."""

from __future__ import annotations

import numpy as np


class TextAugmentation:
    """Masks, swaps and deletes tokens; special tokens stay in place, and each text keeps at least one token.

    The result depends only on seed, epoch and row, so a resumed run sees the same examples as an uninterrupted one.

    Args:
        dropout: Probability that a token is replaced by the mask token (or, if the tokeniser has none, by the unknown
            or padding token), from 0 to below 1. Usual values are 0.05 to 0.2.
        swap: Probability that a token swaps places with the next one.
        deletion: Probability that a token is deleted.

    Raises:
        ValueError: When a probability is not from 0 to below 1, or all are 0.

    Source:
        Swap and deletion: Wei and Zou, 2019, arXiv:1901.11196 ("EDA"), applied to tokens instead of words, and swapping
        neighbours instead of any two. Dropout: Xie et al., 2017, arXiv:1703.02573 ("blank noising").

    Example:
        >>> ids, special = np.array([1, 10, 11, 12, 2]), np.array([True, False, False, False, True])
        >>> changed, _ = TextAugmentation(deletion=0.5)(ids, special, 4, np.random.default_rng(0))
        >>> changed.tolist()
        [1, 11, 2]
    """

    def __init__(self, dropout: float = 0.0, swap: float = 0.0, deletion: float = 0.0) -> None:
        for name, chance in {"dropout": dropout, "swap": swap, "deletion": deletion}.items():
            if not 0 <= chance < 1:
                raise ValueError(f"augmentation.{name} must be from 0 to below 1, but is {chance}")
        if dropout == swap == deletion == 0:
            raise ValueError("augmentation must change something, but dropout, swap and deletion are all 0")
        self.dropout, self.swap, self.deletion = dropout, swap, deletion

    def __call__(
        self, ids: np.ndarray, special: np.ndarray, mask_token: int, chance: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augments one row.

        Args:
            ids: Tokens of the row.
            special: Whether each token is special.
            mask_token: Token that replaces a dropped one.
            chance: Random generator.

        Returns:
            The new tokens, and the index in the row that each came from.
        """
        swap, drop, delete = chance.random((3, len(ids))) < [[self.swap], [self.dropout], [self.deletion]]
        places = np.arange(len(ids))
        for place in np.flatnonzero(swap[:-1] & ~special[:-1] & ~special[1:]):
            places[[place, place + 1]] = places[[place + 1, place]]
        changed = np.where(drop & ~special, mask_token, ids)
        deleted = delete & ~special
        texts = np.cumsum(special)  # index of the text: special tokens separate texts
        left = np.bincount(texts[~special & ~deleted], minlength=texts.max(initial=0) + 1)
        deleted[np.flatnonzero(deleted & (left[texts] == 0) & np.append(True, special[:-1]))] = False
        places = places[~deleted]  # deletion is by place after the swaps
        return changed[places], places
