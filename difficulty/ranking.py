"""ranking.json: per measure the order of the tasks from easiest to hardest, with an interval for every rank.

Rank 1 is the easiest task, rank K the hardest. A rank interval is the 90 % bootstrap interval of the rank. Measures are
compared by Kendall's tau; what the order says in words is the business of `verdict.py`.
"""

__all__ = ["MeasureRanking", "Ranking", "RankingTask", "TauBetween", "rank_tasks"]

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from scipy.stats import rankdata

from difficulty.errors import InputError
from difficulty.estimate import Estimate
from difficulty.intervals import INTERVAL_LEVEL
from difficulty.process import Array, Process
from difficulty.randomness import stream
from difficulty.rank_correlation import agreement_words, kendall, with_interval
from difficulty.records import read_json, write_json
from difficulty.tasks import Task
from difficulty.verdict import groups, verdict_on

RANKING_FORMAT: Literal["denoising-difficulty/ranking/1"] = "denoising-difficulty/ranking/1"
REPLICATES = 4000


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
    verdict = [verdict_on(name, estimates[name], replicates[name], tasks) for name in names]
    verdict += groups(names[0], estimates[names[0]], tasks)
    # Ten measures have 45 pairs; in words only the agreement with the first is said, the file has all.
    verdict += _agreement([tau for tau in taus if tau.first == names[0]], estimates)
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
    ranked, order = np.flatnonzero(~np.isnan(centre)), estimate.order
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


def _agreement(taus: Sequence[TauBetween], estimates: Mapping[str, Estimate]) -> list[str]:
    """One sentence per pair, and one for all pairs without a tau."""
    said, unknown = [], []
    for tau in taus:
        if tau.tau is None or tau.ci_low is None or tau.ci_high is None:
            unknown.append(tau.second)
            continue
        pair = [estimates[name] for name in (tau.first, tau.second)]
        both = ~np.isnan([estimate.centre for estimate in pair]).any(0)
        learned = np.all([estimate.learned for estimate in pair], axis=0)[both]
        said.append(
            f"{tau.first} and {tau.second} {agreement_words(tau.ci_low, tau.ci_high, learned)} "
            f"(Kendall tau {tau.tau:+.2f} [{tau.ci_low:+.2f}, {tau.ci_high:+.2f}], {tau.tasks} tasks)."
        )
    if unknown:
        said.append(
            f"{taus[0].first} is not compared with {', '.join(unknown)}: fewer than 3 tasks have a value in both, or "
            "one ties them all."
        )
    return said
