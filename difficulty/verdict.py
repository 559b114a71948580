"""A ranking in words: the hardest and the easiest task, which neighbours in rank differ, and "is lower t harder".

Neighbours in rank are told apart where the two-sided test of their difference holds at 95 % for all neighbours together
(Holm 1979); a task whose value is only a bound is told apart from none, unless it is a lower bound of a value above the
others. That a task is harder than a cleaner one is said where it would happen to no pair of all in 97.5 % of rankings
of equally hard tasks (Bonferroni). The difference of two values, each with an error of d degrees of freedom, is taken
to have Student's t with d of them to 2 d, where the two errors are equal (Welch 1947, Biometrika 34, p. 28). Of two
seeds alone, whose errors differ much from task to task, the claim is made in up to a tenth of such rankings.
"""

__all__ = ["groups", "verdict_on"]

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

from difficulty.estimate import Estimate
from difficulty.intervals import INTERVAL_LEVEL
from difficulty.process import Array
from difficulty.rank_correlation import kendall, with_interval
from difficulty.tasks import Task, runs

MOSTLY = 0.7  # tau from which an order holds in tendency although single tasks lie otherwise
TOLD_APART = 0.95  # confidence at which all neighbours in rank that are told apart are so


def verdict_on(name: str, estimate: Estimate, replicates: Array, tasks: Sequence[Task]) -> str:
    """One sentence: the hardest and easiest task, how many neighbours in rank differ, and "is lower t harder"."""
    centre = estimate.centre
    ranked = np.flatnonzero(~np.isnan(centre))
    if len(ranked) < 2:
        return f"{name}: fewer than two tasks have a value; no ranking is possible."
    order = estimate.order
    position = np.arange(len(ranked), dtype=np.float64)
    tau, low, high = with_interval(float(kendall(centre[ranked], -position)), kendall(replicates[:, ranked], -position))
    if np.isnan(tau):
        return (
            f"{name}: no task can be told from another: all values are equal, or none was learned, or the budget ended "
            "first for all."
        )
    without = ", ".join(f"{task.first}..{task.last}" for task in tasks if np.isnan(centre[task.index]))
    apart = int(_told_apart(order, estimate).sum())
    return (
        f"{name}: {_extremes(estimate, order, tasks)}"
        f"{f', of those with a value (t {without} have none)' if without else ''}; "
        f"{apart} of {len(order) - 1} neighbours in rank can be told apart at {TOLD_APART:.0%}; "
        f"'lower t is harder' {_lower_is_harder(estimate, replicates, tasks, (tau, low, high))} "
        f"(tau {tau:+.2f} [{low:+.2f}, {high:+.2f}])."
    )


def _extremes(estimate: Estimate, order: npt.NDArray[np.int64], tasks: Sequence[Task]) -> str:
    """The hardest and the easiest task, as far as either can be named."""
    # How easy a task is whose value is an upper bound is not known, nor that of a task that was not learned.
    sure, hard = ~estimate.flagged[order], estimate.surely_hard[order]
    finite = np.isfinite(estimate.centre[order])
    top = order[sure | hard] if (sure | hard).any() else order
    bottom = order[sure & finite] if (sure & finite).any() else order[finite & ~hard]
    # Values may tie that are bounds, as where the budget ended first, or where nothing was learned.
    tied = top[estimate.centre[top] == estimate.centre[top[-1]]]
    spans = ", ".join(f"{tasks[i].first}..{tasks[j].last}" for i, j in runs(sorted(tied.tolist())))
    named = f"hardest t {spans}{' alike' if len(tied) > 1 else ''}"
    if not len(bottom) or bottom[0] in tied:
        return f"{named}, the easiest cannot be named, since all others are flagged"
    easiest = tasks[bottom[0]]
    where = "" if bottom[0] == order[0] else " (of those that are not flagged)"
    return f"{named}, easiest t {easiest.first}..{easiest.last}{where}"


def _lower_is_harder(
    estimate: Estimate, replicates: Array, tasks: Sequence[Task], interval: tuple[float, float, float]
) -> str:
    """What the ranks say of the claim: that it holds, that it fails and where, or that it is not decided."""
    centre = estimate.centre
    ranked = np.flatnonzero(~np.isnan(centre))
    tau, low, high = interval
    sure = ranked[~estimate.flagged[ranked]]
    places = np.arange(len(sure), dtype=np.float64)
    _, low_sure, high_sure = with_interval(float(kendall(centre[sure], -places)), kendall(replicates[:, sure], -places))
    if len(sure) <= len(ranked) / 2:
        return "is not decided, since half of the tasks or more are flagged"
    reversed_pair = _reversed_pair(estimate, sure)
    if high < 0 and high_sure < 0:
        return "fails (higher t is harder)"
    if reversed_pair:
        cleaner, noisier = (tasks[index] for index in reversed_pair)
        exception = f"t {noisier.first}..{noisier.last} is harder than t {cleaner.first}..{cleaner.last}"
        return f"{'holds in tendency but' if low > 0 and tau > MOSTLY else 'fails:'} {exception}"
    if low > 0 and low_sure > 0:
        first = tasks[ranked[0]].first
        where = f" for t of {first} and above" if first > 1 else ""
        strict = centre[ranked[0]] == centre[ranked].max() and tau >= 0.9
        return f"holds{'' if strict else ' in tendency'}{where}"
    return "is not decided" + (" without the tasks that are flagged" if low > 0 or high < 0 else "")


def _reversed_pair(estimate: Estimate, sure: npt.NDArray[np.int64]) -> tuple[int, int] | None:
    """Of the tasks surely harder than a cleaner one the pair (cleaner, noisier) farthest apart in rank."""
    rank = np.empty(len(estimate.value), dtype=np.int64)
    rank[estimate.order] = np.arange(len(estimate.order))
    cleaner, noisier = (sure[places] for places in np.triu_indices(len(sure), 1))
    found = np.flatnonzero(_doubt(estimate, cleaner, noisier) < (1 - TOLD_APART) / 2 / max(len(cleaner), 1))
    if not len(found):
        return None
    pair = found[(rank[noisier] - rank[cleaner])[found].argmax()]
    return int(cleaner[pair]), int(noisier[pair])


def _doubt(estimate: Estimate, easier: npt.NDArray[np.int64], harder: npt.NDArray[np.int64]) -> Array:
    """How probable, pair by pair, it is that equally hard tasks differ by so much, (pairs,)."""
    centre, half = estimate.scaled
    error = half / student_t.ppf((1 + INTERVAL_LEVEL) / 2, estimate.degrees)
    with np.errstate(invalid="ignore", divide="ignore"):
        both = np.hypot(error[easier], error[harder])
        distance = (centre[harder] - centre[easier]) / both
        shares = (error[easier] / both) ** 4 + (error[harder] / both) ** 4
    degrees = estimate.degrees / np.where(both > 0, shares, 1.0)
    p = np.nan_to_num(student_t.sf(distance, degrees), nan=1.0)
    beyond, anywhere = estimate.surely_beyond, estimate.of_unknown_error
    p = np.where(beyond[harder], 0.0, p)
    return np.where(beyond[easier] | anywhere[easier] | anywhere[harder], 1.0, p)


def _told_apart(order: npt.NDArray[np.int64], estimate: Estimate) -> npt.NDArray[np.bool_]:
    """Which neighbours in rank differ, (len(order) - 1,), by Holm's step-down at ``TOLD_APART`` for all of them."""
    p = np.minimum(1.0, 2 * _doubt(estimate, order[:-1], order[1:]))
    known = ~estimate.flagged
    p[~(known[order[:-1]] & (known | estimate.surely_hard)[order[1:]])] = 1.0
    steps = np.argsort(p)
    passed = np.minimum.accumulate(p[steps] * np.arange(len(p), 0, -1) <= 1 - TOLD_APART)
    apart = np.zeros(len(p), dtype=bool)
    apart[steps] = passed
    return apart


def groups(name: str, estimate: Estimate, tasks: Sequence[Task]) -> list[str]:
    """One sentence: the order from easiest to hardest and which neighbours in it are told apart; none without order."""
    order = estimate.order
    if len(order) < 2 or np.isinf(estimate.centre[order]).all():
        return []
    signs = np.where(_told_apart(order, estimate), " < ", " ~ ")
    names = [f"{tasks[i].first}..{tasks[i].last}{'*' if estimate.flagged[i] else ''}" for i in order]
    text = names[0] + "".join(sign + later for sign, later in zip(signs, names[1:], strict=True))
    unlearned = estimate.unlearned is not None and estimate.unlearned[order].any()
    bound = f", * a bound{' or not learned' if unlearned else ''}" if estimate.flagged[order].any() else ""
    return [f"{name} from easiest to hardest t (< told apart at {TOLD_APART:.0%}, ~ not{bound}): {text}."]
