"""The measurement of task difficulty from data to ranking: experts, relative entropy, and the folder they are kept in.

A measurement folder holds run.json, process.csv, losses.csv, convergence.csv and stability.csv (experts),
sample_quality.csv (samples with one expert each), relative_entropy.csv (marginals), ranking.json, and figures drawn
from these files; where the floor is the best known loss, floor.npy holds it per held-out draw, so that another model
can be compared with it draw by draw. `measurement_folder.py` reads them again and makes the ranking.
"""

__all__ = ["MEASURES", "Measurement", "measure"]

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from difficulty.convergence import convergence_table
from difficulty.datasets import Dataset, load_dataset
from difficulty.errors import InputError, choose
from difficulty.expert_plan import ExpertPlan
from difficulty.expert_samples import SampleQuality
from difficulty.experts import ExpertCurves, choose_expert_engine, train_experts
from difficulty.floors import FLOOR_FILE
from difficulty.losses import best_known, loss_table
from difficulty.measurement_folder import SAMPLE_QUALITY, make_ranking
from difficulty.network_file import fingerprint_network, fingerprint_weights
from difficulty.process import Process, get_process
from difficulty.process_file import write_process
from difficulty.ranking import Ranking
from difficulty.ranks import launched_ranks
from difficulty.records import finish_run, read_table, start_run, write_array, write_table
from difficulty.relative_entropy import ESTIMATORS, kl
from difficulty.stability import stability_table
from difficulty.tasks import Task, make_tasks

PARTIAL_EXPERTS = "experts.partial.safetensors"
# Progress of a stage by name: called with (stage, done, in all).
StageProgress = Callable[[str, int, int], None]


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
    if _measure_experts in stages:
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
        **dataset.provenance,
    }
    if (network := fingerprint_network(plan.network)) is not None:
        config["network_file"] = network
    if (weights := fingerprint_weights(plan.network)) is not None:
        config["initial_weights"] = weights
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
    ranking = make_ranking(out, run)
    for path in _states(out):
        path.unlink()
    finish_run(out, run, wall_seconds=round(time.monotonic() - began, 1), **facts)
    tables = (_optional(out / f"{name}.csv") for name in ("losses", "convergence", "relative_entropy"))
    return ranks.share(Measurement(process, cut, ranking, *tables))


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
        path = request.out / "sample_quality.csv"
        resumed = path.exists() and bool(_states(request.out))
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


def _states(out: Path) -> list[Path]:
    """The files from which an interrupted training of experts goes on, one for each of its rounds."""
    name = Path(PARTIAL_EXPERTS)
    return list(out.glob(f"{name.stem}*{name.suffix}"))


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


def _optional(path: Path) -> pd.DataFrame | None:
    return read_table(path) if path.exists() else None
