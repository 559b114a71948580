"""Agreement of two orders: Kendall's tau-b and Spearman's rho over the last axis, and their intervals.

    tau  share of concordant minus share of discordant pairs, corrected for ties
    rho  Pearson correlation of the ranks, ties sharing their mean rank

Infinities are the largest values and tie with one another.
"""

__all__ = ["agreement_words", "kendall", "spearman", "with_interval"]

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from difficulty.intervals import INTERVAL_LEVEL
from difficulty.process import Array

AGREEMENT = 0.7
PAIRS_AT_ONCE = 2**22


def _pair_signs(values: Array) -> npt.NDArray[np.int8]:
    """Signs of the differences of all pairs of the last axis, (..., K (K - 1) / 2)."""
    i, j = np.triu_indices(values.shape[-1], 1)
    first, second = values[..., i], values[..., j]
    return (first > second).astype(np.int8) - (first < second)


def kendall(first: Array, second: Array) -> Array:
    """Kendall's tau-b of (..., K) and (..., K); NaN where one side is all ties."""
    first, second = np.broadcast_arrays(first, second)
    *shape, K = first.shape
    rows_first, rows_second = (values.reshape(math.prod(shape), K) for values in (first, second))
    found = np.empty(len(rows_first))
    step = max(1, PAIRS_AT_ONCE // max(1, K * K // 2))  # of a thousand tasks the pairs of all rows would take gigabytes
    for start in range(0, len(found), step):
        a, b = (_pair_signs(rows[start : start + step]) for rows in (rows_first, rows_second))
        together, of_a, of_b = ((x * y).sum(-1, dtype=np.float64) for x, y in ((a, b), (a, a), (b, b)))
        with np.errstate(invalid="ignore"):
            found[start : start + step] = together / np.sqrt(of_a * of_b)
    return found.reshape(shape)


def spearman(first: Array, second: Array) -> Array:
    """Spearman's rho of (..., K) and (..., K); NaN where one side is all ties."""
    a, b = (ranks - ranks.mean(-1, keepdims=True) for ranks in (rankdata(first, axis=-1), rankdata(second, axis=-1)))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def with_interval(estimate: float, drawn: Array) -> tuple[float, float, float]:
    """A correlation, 0 where the estimates are all tied, and its interval from replicates; NaN if these are tied too.

    Noise in the replicates can only lower an agreement, so the estimate is made to belong to its own interval.
    """
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return np.nan, np.nan, np.nan
    estimate = estimate if np.isfinite(estimate) else 0.0
    low, high = np.quantile(known, [(1 - INTERVAL_LEVEL) / 2, (1 + INTERVAL_LEVEL) / 2])
    return estimate, min(float(low), estimate), max(float(high), estimate)


def agreement_words(low: float, high: float, learned: npt.NDArray[np.bool_]) -> str:
    """What the interval of a correlation says: agreement is claimed from 0.7, contradiction from -0.7, else a part.

    Args:
        low, high: the interval.
        learned: which of the points that it compares were learned on both sides; networks that learned nothing agree.
    """
    if learned.sum() <= len(learned) / 2:
        return "cannot be compared, since half of the tasks or more were not learned"
    if low <= 0 <= high:
        return "are not shown to agree"
    said, sure = ("agree", low > AGREEMENT) if low > 0 else ("contradict each other", high < -AGREEMENT)
    return said if sure else f"{said} in part"
