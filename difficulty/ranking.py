"""ranking.json: per measure the order of the tasks from easiest to hardest, with an interval for every rank.

Rank 1 is the easiest task, rank K the hardest. A rank interval is the 90 % bootstrap interval of the rank; two tasks are
told apart only where their intervals do not overlap. Measures are compared by Kendall's tau.
"""

__all__ = ["MeasureRanking", "Ranking", "RankingTask", "TauBetween"]

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from difficulty.errors import InputError
from difficulty.process import Process
from difficulty.records import read_json, write_json
from difficulty.tasks import Task

RANKING_FORMAT = "denoising-difficulty/ranking/1"


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
            a[1] + 1 != b[0] for a, b in zip(bounds, bounds[1:], strict=False)
        ):
            raise ValueError("tasks must cover t without gap or overlap, cleanest first")
        for name, measure in self.measures.items():
            lists = (measure.value, measure.rank, measure.rank_low, measure.rank_high, measure.flagged)
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

    def save(self, path: Path) -> None:
        """Write ranking.json atomically."""
        write_json(path, self.model_dump())
