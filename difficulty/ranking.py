"""ranking.json: per measure the order of the tasks from easiest to hardest, with an interval for every rank.

Rank 1 is the easiest task, rank K the hardest. A rank interval is the 90 % bootstrap interval of the rank. Neighbours
in rank are told apart where replicates reverse their order in so few cases that the two-sided test holds at 95 % for
all neighbours together (Holm 1979); a task whose value is only a bound is told apart from none, unless it is a lower
bound of a value above the others. Measures are compared by Kendall's tau.
"""

__all__ = ["Estimate", "MeasureRanking", "Ranking", "RankingTask", "TauBetween", "rank_tasks"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from scipy.stats import rankdata

from difficulty.errors import InputError
from difficulty.intervals import INTERVAL_LEVEL, Z90
from difficulty.process import Array, Process
from difficulty.randomness import stream
from difficulty.rank_correlation import agreement_words, kendall, with_interval
from difficulty.records import read_json, write_json
from difficulty.tasks import Task, runs

RANKING_FORMAT: Literal["denoising-difficulty/ranking/1"] = "denoising-difficulty/ranking/1"
REPLICATES = 4000
MOSTLY = 0.7  # tau from which an order holds in tendency although single tasks lie otherwise
TOLD_APART = 0.95  # confidence at which all neighbours in rank that are told apart are so


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RankingTask(_Record):
    """One task with its boundaries in every axis that users think in; both ends belong to the task."""

    index: int
    t_first: int
    t_last: int
    u_first: float
    u_last: float
    sigma_first: float  # noise-to-signal scale sigma/alpha, what EDM calls sigma
    sigma_last: float | None  # None where alpha is 0
    log_snr_high: float
    log_snr_low: float | None  # None where alpha is 0

    @classmethod
    def of(cls, task: Task, process: Process) -> "RankingTask":
        """The record of a task of a process."""
        finite = task.log_snr_low > float("-inf")
        return cls(
            index=task.index,
            t_first=task.first,
            t_last=task.last,
            u_first=task.first / process.T,
            u_last=task.last / process.T,
            sigma_first=float(process.sigma[task.first] / process.alpha[task.first]),
            sigma_last=float(process.sigma[task.last] / process.alpha[task.last]) if finite else None,
            log_snr_high=task.log_snr_high,
            log_snr_low=task.log_snr_low if finite else None,
        )


class MeasureRanking(_Record):
    """The tasks as one measure ranks them; every list has one entry per task, in task order."""

    unit: str
    value: list[float | None]  # None where the measure is undefined for a task; such a task has no rank
    ci_low: list[float | None]
    ci_high: list[float | None]
    rank: list[int | None]  # 1 is the easiest
    rank_low: list[int | None]
    rank_high: list[int | None]
    flagged: list[bool]  # censored or not valid: the value is a bound, not an estimate
    order: list[int]  # task indices from easiest to hardest
    note: str = ""


class TauBetween(_Record):
    """Kendall's tau between two measures over the tasks that both rank, with its bootstrap interval."""

    first: str
    second: str
    tau: float | None
    ci_low: float | None
    ci_high: float | None
    tasks: int


class Ranking(_Record):
    """Content of ranking.json."""

    format: Literal["denoising-difficulty/ranking/1"] = RANKING_FORMAT
    process: dict[str, Any]  # fingerprint
    dataset: dict[str, Any]  # fingerprint
    grid: str
    interval_level: float
    tasks: list[RankingTask]
    measures: dict[str, MeasureRanking]
    kendall_tau: list[TauBetween]
    verdict: list[str]
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> "Ranking":
        count = len(self.tasks)
        if not count or [task.index for task in self.tasks] != list(range(count)):
            raise ValueError("tasks must be numbered 0..K-1")
        bounds = [(task.t_first, task.t_last) for task in self.tasks]
        if any(first > last for first, last in bounds) or any(
            a[1] + 1 != b[0] for a, b in pairwise(bounds)
        ):
            raise ValueError("tasks must cover t without gap or overlap, cleanest first")
        if not self.measures:
            raise ValueError("there must be a measure")
        for name, measure in self.measures.items():
            lists = (
                measure.value, measure.ci_low, measure.ci_high, measure.rank, measure.rank_low, measure.rank_high,
                measure.flagged,
            )  # fmt: skip
            if any(len(entries) != count for entries in lists):
                raise ValueError(f"measure {name!r} does not have one entry per task")
            if len(set(measure.order)) != len(measure.order) or not set(measure.order) <= set(range(count)):
                raise ValueError(f"measure {name!r} has an order that is no order of the tasks")
        return self

    @classmethod
    def load(cls, path: Path) -> "Ranking":
        """Read ranking.json, given the file or its results folder.

        Raises:
            InputError: if it is missing, truncated, of another version or inconsistent.
        """
        file = path / "ranking.json" if path.is_dir() else path
        content = read_json(file)
        found = content.get("format") if isinstance(content, dict) else None
        if found != RANKING_FORMAT:
            raise InputError(f"{file} has format {found!r}; this version reads {RANKING_FORMAT!r}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise InputError(f"{file} is not a valid ranking: {where}: {first['msg']}") from None

    def doubts(self, measure: str) -> list[str]:
        """Sentences on tasks whose place by a measure is not sure, for whoever builds on their order."""
        found, chosen = [], self.measures[measure]
        missing = np.array([value is None for value in chosen.value])
        for what, mask in (
            ("has no value", missing),
            ("is a bound, not valid, or of a task that was not learned", np.array(chosen.flagged) & ~missing),
        ):
            spans = [f"{task.t_first}..{task.t_last}" for task in self.tasks if mask[task.index]]
            if spans:
                found.append(f"{measure} {what} at t {', '.join(spans)}: the place of these tasks is not sure.")
        return found

    def save(self, path: Path) -> None:
        """Write ranking.json atomically."""
        write_json(path, self.model_dump())


@dataclass(frozen=True, eq=False)
class Estimate:
    """One measure's difficulty per task with its 90 % interval; larger is harder.

    Args:
        unit: of the value.
        value, ci_low, ci_high: shape (K,); NaN where the measure gives none. An interval may be open on one side, where
            the value is a bound, or on both, where its error is not known.
        log: whether the interval is symmetric on the log scale.
        flagged: (K,), the value is censored or not valid.
        hardest_if_missing: whether a missing value means that the task could not be learned (it is ranked hardest),
            rather than that the measure says nothing about it (it is not ranked).
        note: for the reader.
        unlearned: (K,), flagged because the network did not learn the task: the value is how far it is from that, and
            may be large or small, but says nothing of how easy the task is. None means no task.
    """

    unit: str
    value: Array
    ci_low: Array
    ci_high: Array
    log: bool
    flagged: npt.NDArray[np.bool_]
    hardest_if_missing: bool
    note: str = ""
    unlearned: npt.NDArray[np.bool_] | None = None

    @property
    def centre(self) -> Array:
        """The value per task, +inf where missing means hardest."""
        return np.where(np.isnan(self.value) & self.hardest_if_missing, np.inf, self.value)

    @property
    def end_not_seen(self) -> npt.NDArray[np.bool_]:
        """Tasks (K,) whose value is a lower bound: its interval is open above."""
        return np.isfinite(self.value) & np.isfinite(self.ci_low) & np.isnan(self.ci_high)

    def replicates(self, count: int, rng: np.random.Generator) -> Array:
        """Values (count, K) as they might have come out: normal about the value on the interval's own scale.

        Missing values are +inf where they mean hardest, NaN otherwise. A lower bound, with an interval open above, is
        +inf as well if no task whose end was seen has more; if one has, half the time. A value without an interval may
        be any.
        """
        to_scale = np.log if self.log else np.asarray
        with np.errstate(invalid="ignore", divide="ignore"):
            centre, low, high = (to_scale(a) for a in (self.value, self.ci_low, self.ci_high))
        sides = np.stack([centre - low, high - centre])
        known = np.isfinite(sides)
        sd = np.where(known, sides, 0.0).sum(0) / np.maximum(known.sum(0), 1) / Z90
        anywhere = np.isfinite(centre) & ~known.any(0)
        if anywhere.any():
            sd[anywhere] = 1e6 * (1.0 + np.ptp(centre[np.isfinite(centre)]))
        drawn = centre + sd * rng.standard_normal((count, len(centre)))
        seen = centre[np.isfinite(centre) & ~self.end_not_seen]
        beyond = (centre >= seen.max(initial=-np.inf)) | (rng.random((count, 1)) < 0.5)
        drawn = np.where(self.end_not_seen & beyond, np.inf, drawn)
        return np.where(np.isnan(centre), np.inf if self.hardest_if_missing else np.nan, drawn)


def rank_tasks(
    estimates: Mapping[str, Estimate],
    tasks: Sequence[Task],
    process: Process,
    *,
    dataset: Mapping[str, Any],
    grid: str,
    provenance: Mapping[str, Any],
    notes: Sequence[str] = (),
    seed: int = 0,
) -> Ranking:
    """Rank the tasks by every measure, with intervals, and compare the measures; the first is the reference.

    Args:
        estimates: by measure name.
        tasks: of the process.
        process: the forward process.
        dataset: fingerprint of the data.
        grid: how the tasks were cut.
        provenance: where the estimates come from.
        notes: sentences to put after the verdict.
        seed: of the bootstrap.
    """
    replicates = {
        name: estimate.replicates(REPLICATES, stream(seed, index))
        for index, (name, estimate) in enumerate(estimates.items())
    }
    measures = {name: _rank_one(estimate, replicates[name]) for name, estimate in estimates.items()}
    names = list(estimates)
    taus = [
        _kendall(first, second, estimates, replicates) for i, first in enumerate(names) for second in names[i + 1 :]
    ]
    verdict = [_verdict_on(name, estimates[name], replicates[name], tasks) for name in names]
    verdict += _groups(names[0], estimates[names[0]], replicates[names[0]], tasks)
    # Ten measures have 45 pairs; in words only the agreement with the first is said, the file has all.
    verdict += [_agreement(tau) for tau in taus if tau.first == names[0]]
    return Ranking(
        process=process.fingerprint,
        dataset=dict(dataset),
        grid=grid,
        interval_level=INTERVAL_LEVEL,
        tasks=[RankingTask.of(task, process) for task in tasks],
        measures=measures,
        kendall_tau=taus,
        verdict=[*verdict, *notes],
        provenance=dict(provenance),
    )


def _rank_one(estimate: Estimate, replicates: Array) -> MeasureRanking:
    centre = estimate.centre
    ranked = np.flatnonzero(~np.isnan(centre))
    order = ranked[np.argsort(centre[ranked], kind="stable")]
    K = len(centre)
    rank = np.full(K, np.nan)
    rank[order] = np.arange(1, len(order) + 1)
    low, high = np.full(K, np.nan), np.full(K, np.nan)
    if len(ranked):
        # Tasks that tie, as all do that could not be learned, may take any of the places that they share.
        for bound, tie, tail in ((low, "min", (1 - INTERVAL_LEVEL) / 2), (high, "max", (1 + INTERVAL_LEVEL) / 2)):
            places = rankdata(replicates[:, ranked], method=tie, axis=1)
            bound[ranked] = np.quantile(places, tail, axis=0, method="closest_observation")
        # The rank of the estimate itself belongs to its interval.
        low, high = np.fmin(low, rank), np.fmax(high, rank)
        if estimate.unlearned is not None:
            high[estimate.unlearned & ~np.isnan(rank)] = len(ranked)  # no place is too hard for it
    return MeasureRanking(
        unit=estimate.unit,
        value=_floats(estimate.value),
        ci_low=_floats(estimate.ci_low),
        ci_high=_floats(estimate.ci_high),
        rank=_ints(rank),
        rank_low=_ints(low),
        rank_high=_ints(high),
        flagged=estimate.flagged.tolist(),
        order=order.tolist(),
        note=estimate.note,
    )


def _floats(values: Array) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _ints(values: Array) -> list[int | None]:
    return [None if np.isnan(value) else int(value) for value in values]


def _kendall(
    first: str, second: str, estimates: Mapping[str, Estimate], replicates: Mapping[str, Array]
) -> TauBetween:
    a, b = estimates[first].centre, estimates[second].centre
    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 3:
        return TauBetween(first=first, second=second, tau=None, ci_low=None, ci_high=None, tasks=int(both.sum()))
    drawn = kendall(replicates[first][:, both], replicates[second][:, both])
    tau, low, high = _floats(np.array(with_interval(float(kendall(a[both], b[both])), drawn)))
    return TauBetween(first=first, second=second, tau=tau, ci_low=low, ci_high=high, tasks=int(both.sum()))


def _verdict_on(name: str, estimate: Estimate, replicates: Array, tasks: Sequence[Task]) -> str:
    """One sentence: the hardest and easiest task, how many neighbours in rank differ, and "is lower t harder"."""
    centre = estimate.centre
    ranked = np.flatnonzero(~np.isnan(centre))
    if len(ranked) < 2:
        return f"{name}: fewer than two tasks have a value; no ranking is possible."
    order = _order(centre)
    position = np.arange(len(ranked), dtype=np.float64)
    tau, low, high = with_interval(float(kendall(centre[ranked], -position)), kendall(replicates[:, ranked], -position))
    if np.isnan(tau):
        return f"{name}: no task can be told from another: none was learned, or the budget ended first for all."
    without = ", ".join(f"{task.first}..{task.last}" for task in tasks if np.isnan(centre[task.index]))
    apart = int(_told_apart(order, estimate, replicates).sum())
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
    sure, hard = ~estimate.flagged[order], _surely_hard(estimate)[order]
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
        return "is not decided, since most tasks are flagged"
    reversed_pair = _reversed_pair(centre, replicates, sure)
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


def _reversed_pair(centre: Array, replicates: Array, sure: npt.NDArray[np.int64]) -> tuple[int, int] | None:
    """Of the tasks surely harder than the easiest cleaner one the pair (cleaner, noisier) farthest apart in rank."""
    rank = {int(index): place for place, index in enumerate(_order(centre))}
    found = []
    for position in range(1, len(sure)):
        i, j = min(sure[:position].tolist(), key=lambda index: rank[index]), int(sure[position])
        if (replicates[:, j] <= replicates[:, i]).mean() < (1 - TOLD_APART) / 2 / len(sure):
            found.append((i, j))
    return max(found, key=lambda pair: rank[pair[1]] - rank[pair[0]], default=None)


def _order(centre: Array) -> npt.NDArray[np.int64]:
    """The tasks that have a rank, easiest first."""
    ranked = np.flatnonzero(~np.isnan(centre))
    return ranked[np.argsort(centre[ranked], kind="stable")]


def _told_apart(order: npt.NDArray[np.int64], estimate: Estimate, replicates: Array) -> npt.NDArray[np.bool_]:
    """Which neighbours in rank differ, (len(order) - 1,), by Holm's step-down at ``TOLD_APART`` for all of them."""
    easier, harder = replicates[:, order[:-1]], replicates[:, order[1:]]
    # One more than was counted: of so many replicates none is no zero.
    p = np.minimum(1.0, 2 * ((easier >= harder).sum(0) + 1) / (len(replicates) + 1))
    known = ~estimate.flagged
    p[~(known[order[:-1]] & (known | _surely_hard(estimate))[order[1:]])] = 1.0
    steps = np.argsort(p)
    passed = np.minimum.accumulate(p[steps] * np.arange(len(p), 0, -1) <= 1 - TOLD_APART)
    apart = np.zeros(len(p), dtype=bool)
    apart[steps] = passed
    return apart


def _surely_hard(estimate: Estimate) -> npt.NDArray[np.bool_]:
    """Tasks (K,) that were not learned, or whose value is at least what is stated."""
    unlearned = False if estimate.unlearned is None else estimate.unlearned
    return np.isinf(estimate.centre) | estimate.end_not_seen | unlearned


def _groups(name: str, estimate: Estimate, replicates: Array, tasks: Sequence[Task]) -> list[str]:
    """One sentence: the order from easiest to hardest and which neighbours in it are told apart; none without order."""
    order = _order(estimate.centre)
    if len(order) < 2 or np.isinf(estimate.centre[order]).all():
        return []
    signs = np.where(_told_apart(order, estimate, replicates), " < ", " ~ ")
    names = [f"{tasks[i].first}..{tasks[i].last}{'*' if estimate.flagged[i] else ''}" for i in order]
    text = names[0] + "".join(sign + later for sign, later in zip(signs, names[1:], strict=True))
    unlearned = estimate.unlearned is not None and estimate.unlearned[order].any()
    bound = f", * a bound{' or not learned' if unlearned else ''}" if estimate.flagged[order].any() else ""
    return [f"{name} from easiest to hardest t (< told apart at {TOLD_APART:.0%}, ~ not{bound}): {text}."]


def _agreement(tau: TauBetween) -> str:
    if tau.tau is None or tau.ci_low is None or tau.ci_high is None:
        return f"{tau.first} and {tau.second}: too few common tasks to compare."
    return (
        f"{tau.first} and {tau.second} {agreement_words(tau.ci_low, tau.ci_high)} "
        f"(Kendall tau {tau.tau:+.2f} [{tau.ci_low:+.2f}, {tau.ci_high:+.2f}], {tau.tasks} tasks)."
    )
