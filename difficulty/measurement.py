"""The measurement of task difficulty from data to ranking: experts, relative entropy, and the folder they are kept in.

A measurement folder holds run.json, process.csv, losses.csv, convergence.csv and stability.csv (experts),
sample_quality.csv (samples with one expert each), relative_entropy.csv (marginals), ranking.json, and figures drawn
from these files; where the floor is the best known loss, floor.npy holds it per held-out draw, so that another model
can be compared with it draw by draw. ``rank_folder`` makes ranking.json again from the tables.
"""

__all__ = ["MEASURES", "Measurement", "check_config", "measure", "rank_folder", "read_tables"]

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from difficulty.convergence import (
    CONVERGENCE_COLUMNS,
    DEFINITIONS,
    LOSS_COLUMNS,
    best_known,
    convergence_table,
    loss_table,
)
from difficulty.datasets import Dataset, load_dataset
from difficulty.errors import InputError, choose
from difficulty.expert_plan import LEAST_BUDGET, ExpertPlan
from difficulty.expert_samples import QUALITY_COLUMNS, SampleQuality, quality_estimates
from difficulty.experts import ExpertCurves, choose_expert_engine, train_experts
from difficulty.floors import FLOOR_FILE
from difficulty.process import Process, get_process
from difficulty.process_file import read_process, write_process
from difficulty.ranking import Estimate, Ranking, rank_tasks
from difficulty.ranks import launched_ranks
from difficulty.records import (
    check_columns,
    fingerprint_array,
    finish_run,
    read_run,
    read_table,
    start_run,
    write_array,
    write_table,
)
from difficulty.relative_entropy import ESTIMATORS, kl
from difficulty.stability import STABILITY_COLUMNS, stability_sentences, stability_table, variants_of
from difficulty.tasks import Task, make_tasks

SAMPLE_QUALITY = "sample-quality"
PARTIAL_EXPERTS = "experts.partial.safetensors"
# Definitions that refer to the floor, and what is said of them where it is no Bayes loss.
OVER_THE_FLOOR = ("excess_nats", "log_regret", "paper_style_floor", "power_law")
BEST_KNOWN = "over the best loss known, so a lower bound"
# Progress of a stage by name: called with (stage, done, in all).
StageProgress = Callable[[str, int, int], None]

# How the columns of relative_entropy.csv become measures of a task; the value of a task is the mean over its pairs.
ENTROPY_MEASURES: Mapping[str, tuple[str, str, str]] = {
    "relative_entropy": ("kl", "nats per step", "mean KL(p_{t-1} || p_t) over the task; depends on the schedule"),
    "relative_entropy_per_dlogsnr2": ("per_dlogsnr2", "nats per (d log-SNR)^2", "the same, free of the step length"),
}


ENTROPY_COLUMNS: Mapping[str, type] = {
    "t": int, "log_snr": float, "kl": float, "ci_low": float, "ci_high": float, "per_dlogsnr2": float, "valid": bool,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a measurement found; the tables are those of the CSV files of the same names."""

    process: Process
    tasks: list[Task]
    ranking: Ranking
    losses: pd.DataFrame | None
    convergence: pd.DataFrame | None
    relative_entropy: pd.DataFrame | None


def measure(
    data: str | Path | Dataset,
    process: str | Process = "vp-linear",
    *,
    out: str | Path,
    tasks: int = 20,
    grid: str = "t",
    measures: Sequence[str] = ("convergence", "relative-entropy"),
    plan: ExpertPlan | None = None,
    estimator: str = "auto",
    processes: int | None = None,
    progress: StageProgress | None = None,
) -> Measurement:
    """Measure the difficulty of every denoising task and write a measurement folder.

    Under torchrun every rank must make the same call; the experts are shared among them, rank 0 writes the folder, and
    all return the same.

    Args:
        data: see ``load_dataset``.
        process: see ``get_process``.
        out: folder to write; an interrupted measurement with the same arguments goes on where it stopped.
        tasks: number of tasks.
        grid: a name in ``difficulty.tasks.GRIDS``.
        measures: names in ``MEASURES``; sample-quality brings convergence along, since both need the experts.
        plan: how experts are trained.
        estimator: of the relative entropy.
        processes: that share the experts on this machine; None for the choice of ``choose_engine``.
        progress: called with (stage, done, in all).

    Raises:
        InputError: if an argument cannot be used; nothing is written then.
    """
    plan, out = plan or ExpertPlan(), Path(out)
    measures = list(dict.fromkeys(["convergence", *measures] if SAMPLE_QUALITY in measures else measures))
    stages = list(dict.fromkeys(choose("measure", name, MEASURES) for name in measures))
    if not stages:
        raise InputError(f"no measure is asked for; known are {', '.join(MEASURES)}")
    dataset, process = load_dataset(data), get_process(process)
    cut = make_tasks(process, tasks, grid)
    ranks = launched_ranks()
    # Chosen here only so that what does not fit is refused before anything is written.
    watched = SAMPLE_QUALITY in measures
    ranks.on_first(lambda: choose_expert_engine(dataset, process, cut, plan, processes, watched=watched))
    choose("estimator", estimator, ESTIMATORS)
    config = {
        "data": dataset.name,
        "process": process.name,
        "tasks": tasks,
        "grid": grid,
        "measures": measures,
        "plan": asdict(plan),
        "estimator": estimator,
        "dataset_fingerprint": dataset.fingerprint,
        "process_fingerprint": process.fingerprint,
    }
    began = time.monotonic()
    run = ranks.on_first(lambda: _open_folder(out, config, process))
    request = _Request(dataset, process, cut, measures, plan, estimator, processes, out, progress)
    if not ranks.first:
        if _measure_experts in stages:
            _train(request, None)
        return ranks.share(None)
    facts: dict[str, Any] = {}
    for stage in stages:
        facts |= stage(request)
    ranking = _rank(out, run)
    (out / PARTIAL_EXPERTS).unlink(missing_ok=True)
    finish_run(out, run, wall_seconds=round(time.monotonic() - began, 1), **facts)
    tables = (_optional(out / f"{name}.csv") for name in ("losses", "convergence", "relative_entropy"))
    return ranks.share(Measurement(process, cut, ranking, *tables))


def rank_folder(folder: Path) -> Ranking:
    """Make ranking.json of a finished measurement again from its tables, and return it.

    Raises:
        InputError: if the folder is incomplete or a table is not readable.
    """
    return _rank(folder, read_run(folder, "measure"))


@dataclass(frozen=True, eq=False)
class _Request:
    dataset: Dataset
    process: Process
    tasks: list[Task]
    measures: list[str]
    plan: ExpertPlan
    estimator: str
    processes: int | None
    out: Path
    progress: StageProgress | None

    def report(self, stage: str) -> Callable[[int, int], None] | None:
        """The progress callback of one stage."""
        progress = self.progress
        return None if progress is None else lambda done, total: progress(stage, done, total)


def _open_folder(out: Path, config: dict[str, Any], process: Process) -> dict[str, Any]:
    run = start_run(out, "measure", config)
    write_process(out, process)
    return run


def _measure_experts(request: _Request) -> dict[str, Any]:
    plan, watch = request.plan, None
    if SAMPLE_QUALITY in request.measures:
        path, state = request.out / "sample_quality.csv", request.out / PARTIAL_EXPERTS
        resumed = path.exists() and any(state.parent.glob(f"{state.stem}*"))
        watch = SampleQuality(
            request.dataset,
            request.process,
            request.tasks,
            plan,
            earlier=read_table(path) if resumed else None,
            write=lambda table: write_table(path, table),
        )
    curves = _train(request, watch)
    losses = loss_table(curves, plan.seeds, plan.batch)
    if curves.excess is None:
        write_array(request.out / FLOOR_FILE, best_known(curves).astype(np.float32))
    write_table(request.out / "losses.csv", losses)
    write_table(request.out / "convergence.csv", convergence_table(losses, plan.budget))
    write_table(request.out / "stability.csv", stability_table(losses, plan.budget))
    assert curves.engine is not None
    return {"engine": asdict(curves.engine)}


def _train(request: _Request, watch: SampleQuality | None) -> ExpertCurves:
    return train_experts(
        request.dataset,
        request.process,
        request.tasks,
        request.plan,
        processes=request.processes,
        resume_from=request.out / PARTIAL_EXPERTS,
        progress=request.report("experts"),
        watch=watch,
    )


def _measure_relative_entropy(request: _Request) -> dict[str, Any]:
    table = kl(
        request.dataset, request.process, estimator=request.estimator, progress=request.report("relative entropy")
    )
    write_table(request.out / "relative_entropy.csv", table)
    return {}


# Samples are judged while the experts are trained: two measures, one stage. Each stage writes its tables and returns
# what run.json should say of how it was done.
MEASURES: Mapping[str, Callable[[_Request], dict[str, Any]]] = {
    "convergence": _measure_experts,
    SAMPLE_QUALITY: _measure_experts,
    "relative-entropy": _measure_relative_entropy,
}


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True)


class _Digest(_Facts):
    sha256: str


class _ProcessFacts(_Digest):
    T: int


class _DataFacts(_Facts):
    train: _Digest
    heldout: _Digest


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


def _rank(folder: Path, run: Mapping[str, Any]) -> Ranking:
    config = check_config(run, folder)
    process = read_process(folder, config["process_fingerprint"])
    tasks = make_tasks(process, config["tasks"], config["grid"])
    tables = read_tables(folder, config)
    estimates: dict[str, Estimate] = {}
    sources: dict[str, str] = {}
    notes = []
    if "convergence" in config["measures"]:
        table = tables["convergence"]
        known = "" if (tables["losses"]["floor_kind"] == "exact").all() else BEST_KNOWN
        estimates |= convergence_estimates(table, len(tasks), known)
        sources["convergence.csv"] = _digest(folder / "convergence.csv")
        notes += _failures(table, tasks)
        if len(config["plan"]["seeds"]) == 1:
            notes.append(
                "Only one seed was trained: how far another would lie is not known, so that no value of convergence "
                "has an interval and nothing is told apart; train at least two."
            )
        if known:
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
    missing = {
        name: set(table[(table["definition"] == name) & table["value"].isna()]["task"])
        for name in ("excess_nats", "paper_style")
    }
    # Of a stuck expert the excess is known; paper_style has no value for it, nor for a diverged one.
    diverged, stuck = missing["excess_nats"], missing["paper_style"] - missing["excess_nats"]
    found = []
    for failed, what in ((diverged, "diverged"), (stuck, "are no better than a network that outputs zero (stuck)")):
        if failed:
            spans = ", ".join(f"{tasks[k].first}..{tasks[k].last}" for k in sorted(failed))
            found.append(f"Experts of t {spans} {what}.")
    return found


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
        )
    return estimates


def relative_entropy_estimates(table: pd.DataFrame, tasks: Sequence[Task]) -> dict[str, Estimate]:
    """Mean over the valid pairs of each task, with its interval; a task with no valid pair has no value.

    The errors of neighbouring pairs come from the same fit and are taken as fully correlated: the interval of the mean
    is the mean of the intervals, which is the widest it can be.
    """
    table = table[table["valid"]]
    # d log-SNR squared of a pair, to carry the interval of kl over to kl per (d log-SNR)^2.
    step = table["kl"] / table["per_dlogsnr2"]
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


def _optional(path: Path) -> pd.DataFrame | None:
    return read_table(path) if path.exists() else None
