"""Significance tests: whether settings differ by more than the spread over seeds."""

from __future__ import annotations

import math
from statistics import mean, stdev


def paired_p(one: list[float], other: list[float]) -> float | None:
    """p-value of the two-sided paired t-test; `None` if undefined: fewer than two pairs, or all differ by the same.

    Equal differences have no spread to compare them with; they occur with few seeds and accuracies on few examples.

    Source: Student, "The probable error of a mean", Biometrika 6 (1908); `scipy.stats.ttest_rel`.

    Example:
        >>> round(paired_p([1.0, 2.0, 3.0], [1.5, 2.7, 3.6]), 4)
        0.0091
        >>> paired_p([1.0], [2.0])
        >>> paired_p([0.70, 0.72], [0.71, 0.73])
    """
    from scipy.stats import ttest_rel

    differences = [a - b for a, b in zip(one, other, strict=True)]
    if all(math.isclose(difference, differences[0], abs_tol=1e-12) for difference in differences):
        return None
    p = float(ttest_rel(one, other).pvalue)
    return p if math.isfinite(p) else None


def verdict(best: list[float], other: list[float], name: str, other_name: str, mode: str) -> str:
    """One line that says whether two settings differ significantly (p < 0.05) over seeds.

    Args:
        best: Metric of the setting that was chosen as better, for each seed.
        other: Metric of the other setting for the same seeds.
        name: Name of the better setting.
        other_name: Name of the other setting.
        mode: Whether `min` or `max` is best.

    Example:
        >>> verdict([1.0, 1.1, 1.2], [2.0, 2.1, 2.3], "best trial 1", "runner-up 0", "min").split(": ")[0]
        'The best trial 1 differs from the runner-up 0 by more than seeds do'
    """
    p, ahead = paired_p(best, other), (mean(best) - mean(other)) * (1 if mode == "min" else -1) < 0
    figures = f"{mean(best):.4f} ± {stdev(best):.4f} against {mean(other):.4f} ± {stdev(other):.4f}"
    found = "differs from" if p is not None and p < 0.05 else "does not differ from"
    turned = "" if ahead or found != "differs from" else " (and is worse with them)"
    return (
        f"The {name} {found} the {other_name} by more than seeds do{turned}: {figures} over {len(best)} new seeds, "
        f"p = {'–' if p is None else f'{p:.2g}'} (paired t-test)"
    )
