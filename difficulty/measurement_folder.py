"""A finished measurement folder: its tables read and checked, the estimates they hold, and the ranking made of them."""

__all__ = [
    "SAMPLE_QUALITY",
    "check_config",
    "convergence_estimates",
    "make_ranking",
    "rank_folder",
    "read_tables",
    "relative_entropy_estimates",
]

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from difficulty.convergence import CONVERGENCE_COLUMNS, DEFINITIONS
from difficulty.errors import InputError
from difficulty.estimate import Estimate
from difficulty.expert_plan import LEAST_BUDGET
from difficulty.expert_samples import QUALITY_COLUMNS, quality_estimates
from difficulty.losses import LOSS_COLUMNS
from difficulty.process_file import read_process
from difficulty.ranking import Ranking, rank_tasks
from difficulty.records import check_columns, fingerprint_array, read_run, read_table
from difficulty.stability import STABILITY_COLUMNS, stability_sentences, variants_of
from difficulty.tasks import Task, make_tasks

SAMPLE_QUALITY = "sample-quality"
# Definitions that refer to the floor, and what is said of them where it is no Bayes loss.
OVER_THE_FLOOR = ("excess_nats", "log_regret", "paper_style_floor", "power_law")
BEST_KNOWN = "over the best loss known, so a lower bound"
# How the columns of relative_entropy.csv become measures of a task; the value of a task is the mean over its pairs.
ENTROPY_MEASURES: Mapping[str, tuple[str, str, str]] = {
    "relative_entropy": ("kl", "nats per step", "mean KL(p_{t-1} || p_t) over the task; depends on the schedule"),
    "relative_entropy_per_dlogsnr2": ("per_dlogsnr2", "nats per (d log-SNR)^2", "the same, free of the step length"),
}
RESOLVED = 1e-24  # nats per (d log-SNR)^2: less is zero up to rounding
ENTROPY_COLUMNS: Mapping[str, type] = {
    "t": int, "log_snr": float, "kl": float, "ci_low": float, "ci_high": float, "per_dlogsnr2": float, "valid": bool,
}  # fmt: skip


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True)


class _Digest(_Facts):
    sha256: str


class _ProcessFacts(_Digest):
    T: int


class _HeldOutFacts(_Digest):
    shape: list[int] = Field(min_length=2)


class _DataFacts(_Facts):
    train: _Digest
    heldout: _HeldOutFacts


class _ProbeFacts(_Facts):
    """What reading a folder of ``difficulty probe`` again needs of its config."""

    tasks: int
    grid: str
    process_fingerprint: _ProcessFacts
    dataset_fingerprint: _DataFacts


class _PlanFacts(_Facts):
    budget: int = Field(ge=LEAST_BUDGET)
    seeds: list[int] = Field(min_length=1)


class _MeasureFacts(_ProbeFacts):
    """The same of ``difficulty measure``."""

    measures: list[Literal["convergence", "sample-quality", "relative-entropy"]] = Field(min_length=1)
    plan: _PlanFacts
    estimator: str


def check_config(run: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config in a run.json of ``difficulty measure`` or ``difficulty probe``.

    Raises:
        InputError: if a fact is missing or of another type.
    """
    facts: type[_ProbeFacts] = _MeasureFacts if run.get("kind") == "measure" else _ProbeFacts
    try:
        facts.model_validate(run.get("config"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("config", *first["loc"]))
        raise InputError(f"{folder / 'run.json'} cannot be used, was it edited? {where}: {first['msg']}") from None
    return run["config"]


def read_tables(folder: Path, config: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The tables of a measurement by name, without ".csv".

    Args:
        folder: of the measurement.
        config: of its run.json.

    Raises:
        InputError: if one is missing, malformed or incomplete.
    """
    measures, tasks, seeds = config["measures"], range(config["tasks"]), config["plan"]["seeds"]
    wanted: dict[str, tuple[Mapping[str, type], Mapping[str, Iterable[Any] | None]]] = {}
    if "convergence" in measures:
        wanted["losses"] = LOSS_COLUMNS, {"task": tasks, "seed": seeds, "iteration": None}
        wanted["convergence"] = CONVERGENCE_COLUMNS, {"task": tasks, "definition": DEFINITIONS}
        stability = {"definition": DEFINITIONS, "variant": variants_of(seeds), "task": tasks}
        wanted["stability"] = STABILITY_COLUMNS, stability
    if SAMPLE_QUALITY in measures:
        kinds = {name: str if name == "metric" else float for name in QUALITY_COLUMNS}
        wanted["sample_quality"] = kinds, {"task": tasks, "seed": seeds, "iteration": None, "metric": None}
    if "relative-entropy" in measures:
        # The pair (0, 1) is never measured.
        wanted["relative_entropy"] = ENTROPY_COLUMNS, {"t": range(2, config["process_fingerprint"]["T"] + 1)}
    return {name: read_table(folder / f"{name}.csv", *asked) for name, asked in wanted.items()}


def rank_folder(folder: Path) -> Ranking:
    """Make ranking.json of a finished measurement again from its tables, and return it.

    Raises:
        InputError: if the folder is incomplete or a table is not readable.
    """
    return make_ranking(folder, read_run(folder, "measure"))


def make_ranking(folder: Path, run: Mapping[str, Any]) -> Ranking:
    """Write ranking.json of a measurement whose tables are there, and return it.

    Args:
        folder: of the measurement.
        run: content of its run.json, finished or not.

    Raises:
        InputError: if run.json lacks a fact or a table is not readable.
    """
    config = check_config(run, folder)
    process = read_process(folder, config["process_fingerprint"])
    tasks = make_tasks(process, config["tasks"], config["grid"])
    tables = read_tables(folder, config)
    estimates: dict[str, Estimate] = {}
    sources: dict[str, str] = {}
    notes = []
    if "convergence" in config["measures"]:
        table = tables["convergence"]
        floor_note = "" if (tables["losses"]["floor_kind"] == "exact").all() else BEST_KNOWN
        estimates |= convergence_estimates(table, len(tasks), floor_note)
        sources["convergence.csv"] = _digest(folder / "convergence.csv")
        notes += _failures(table, tasks)
        if len(config["plan"]["seeds"]) == 1:
            notes.append(
                "Only one seed was trained: how far another would lie is not known, so that no value of convergence "
                "has an interval and nothing is told apart; train at least two."
            )
        if floor_note:
            notes.append(
                f"No exact law is known: {', '.join(OVER_THE_FLOOR)} are taken over the best loss known, an upper "
                "bound of the Bayes loss, and their intervals do not hold the distance to it."
            )
    if SAMPLE_QUALITY in config["measures"]:
        estimates |= quality_estimates(tables["sample_quality"], config["plan"]["budget"], len(tasks))
        sources["sample_quality.csv"] = _digest(folder / "sample_quality.csv")
    if "relative-entropy" in config["measures"]:
        estimates |= relative_entropy_estimates(tables["relative_entropy"], tasks)
        sources["relative_entropy.csv"] = _digest(folder / "relative_entropy.csv")
    ranking = rank_tasks(
        estimates,
        tasks,
        process,
        dataset=config["dataset_fingerprint"],
        grid=config["grid"],
        provenance={"kind": "experts", "plan": config["plan"], "estimator": config["estimator"], "sha256": sources}
        | ({"floor_from": run["floor_from"]} if "floor_from" in run else {}),
        notes=notes,
    )
    verdict = list(ranking.verdict)
    if "convergence" in config["measures"]:
        verdict += stability_sentences(tables["stability"], ranking.measures)
    ranking = ranking.model_copy(update={"process": config["process_fingerprint"], "verdict": verdict})
    ranking.save(folder / "ranking.json")
    return ranking


def _failures(table: pd.DataFrame, tasks: Sequence[Task]) -> list[str]:
    """A sentence that names the tasks whose experts diverged, and one for those whose experts are stuck."""
    diverged, stuck = _diverged_and_stuck(table)
    found = []
    for failed, what in ((diverged, "diverged"), (stuck, "are no better than a network that outputs zero (stuck)")):
        if failed:
            spans = ", ".join(f"{tasks[k].first}..{tasks[k].last}" for k in sorted(failed))
            found.append(f"Experts of t {spans} {what}.")
    return found


def _diverged_and_stuck(table: pd.DataFrame) -> tuple[set[int], set[int]]:
    """Tasks one of whose experts diverged, and others one of whose experts is stuck, as convergence.csv tells them."""
    without = {
        name: set(table[(table["definition"] == name) & table["value"].isna()]["task"])
        for name in ("excess_nats", "paper_style")
    }
    # Of a stuck expert the excess is known; paper_style has no value for it, nor for a diverged one.
    return without["excess_nats"], without["paper_style"] - without["excess_nats"]


def convergence_estimates(table: pd.DataFrame, tasks: int, floor_note: str = "") -> dict[str, Estimate]:
    """The definitions of convergence.csv as estimates of task difficulty.

    Args:
        table: convergence.csv.
        tasks: their number.
        floor_note: for the reader of the definitions that refer to the floor.

    Raises:
        InputError: if a column is missing or a definition does not have one row per task.
    """
    check_columns(table, CONVERGENCE_COLUMNS, "convergence.csv")
    estimates = {}
    unlearned = np.isin(np.arange(tasks), sorted(_diverged_and_stuck(table)[1]))
    for name, part in table.groupby("definition", sort=False):
        part = part.sort_values("task")
        if part["task"].tolist() != list(range(tasks)):
            raise InputError(f"convergence.csv does not have one row per task for {name!r}; measure again")
        estimates[str(name)] = Estimate(
            unit=str(part["unit"].iloc[0]),
            value=part["value"].to_numpy(dtype=np.float64),
            ci_low=part["ci_low"].to_numpy(dtype=np.float64),
            ci_high=part["ci_high"].to_numpy(dtype=np.float64),
            log=part["scale"].iloc[0] == "log",
            flagged=part["censored"].to_numpy(dtype=bool),
            hardest_if_missing=True,
            note=floor_note if name in OVER_THE_FLOOR else "",
            unlearned=unlearned,
            degrees=float(part["degrees"].iloc[0]),
        )
    return estimates


def relative_entropy_estimates(table: pd.DataFrame, tasks: Sequence[Task]) -> dict[str, Estimate]:
    """Mean over the valid pairs of each task, with its interval; a task with no valid pair has no value.

    The errors of neighbouring pairs come from the same fit and are taken as fully correlated: the interval of the mean
    is the mean of the intervals, which is the widest it can be.
    """
    table = table[table["valid"]].copy()
    # Sums of squares of what should cancel, each good to 1e-16 of its parts.
    rounding = table["per_dlogsnr2"] < RESOLVED
    # d log-SNR squared of a pair, to carry the interval of kl over to kl per (d log-SNR)^2.
    step = (table["kl"] / table["per_dlogsnr2"]).where(~rounding, 1.0)
    table.loc[rounding, ["kl", "per_dlogsnr2", "ci_low", "ci_high"]] = 0.0
    estimates = {}
    for name, (column, unit, note) in ENTROPY_MEASURES.items():
        scale = 1.0 if column == "kl" else step
        rows = pd.DataFrame(
            {
                "t": table["t"],
                "value": table[column],
                "ci_low": table["ci_low"] / scale,
                "ci_high": table["ci_high"] / scale,
            }
        )
        means = np.full((3, len(tasks)), np.nan)
        share = np.zeros(len(tasks))
        for task in tasks:
            # The pair named t = 1 is (0, 1), which is never measured.
            pairs = task.last - max(task.first, 2) + 1
            inside = rows[(rows["t"] >= task.first) & (rows["t"] <= task.last)]
            if len(inside):
                means[:, task.index] = inside[["value", "ci_low", "ci_high"]].mean().to_numpy()
                share[task.index] = len(inside) / max(pairs, 1)
        estimates[name] = Estimate(
            unit=unit,
            value=means[0],
            ci_low=means[1],
            ci_high=means[2],
            log=True,
            flagged=share < 0.5,
            hardest_if_missing=False,
            note=note + "; flagged where fewer than half of a task's pairs are valid",
        )
    return estimates


def _digest(path: Path) -> str:
    return fingerprint_array(np.frombuffer(path.read_bytes(), dtype=np.uint8))["sha256"]
