"""Does the order of difficulty depend on the definition, the prediction, the seed, the process, the grid, the network?

    python benchmarks/convergence_study.py --out results/convergence-study

Measures experts on three data sets (one with an exact floor), four processes and three predictions, and shared
networks on the same tasks. The measurements are ordinary folders of `difficulty measure` and `difficulty probe` below
``--runs``; finished ones are kept, an interrupted one goes on, so that the same command continues. An hour to an hour
and a half on one core of a shared machine. From them ``--out`` gets

    cells.csv        one row per folder: what was measured
    tasks.csv        cell, task, bounds in t and log-SNR
    difficulty.csv   cell, task, definition: value, rank, their intervals, censored; over the best loss that any
                     prediction or shared network of the same data, process and tasks knows
    curves.csv       cell, task, iteration: excess in nats, mean and span of the seeds (tasks cut in t)
    agreement.csv    two cells and a definition: Kendall's tau and Spearman's rho with intervals; ``question`` says what
                     differs between them
    definitions.csv  two definitions in one cell: Kendall's tau; ``lower t`` stands for the order of t itself
    summary.csv      question and definition: least, median and greatest rho, share of pairs with rho >= 0.95
    sample_quality.csv  samples while one expert denoises its own task, see `difficulty/expert_samples.py`
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from difficulty.agreement import agreement_table, rank_over_joint_floor
from difficulty.convergence import DEFINITIONS
from difficulty.datasets import load_dataset
from difficulty.expert_plan import ExpertPlan
from difficulty.measurement import measure
from difficulty.measurement_folder import convergence_estimates
from difficulty.probe import probe
from difficulty.process import get_process
from difficulty.randomness import stream
from difficulty.rank_correlation import kendall, with_interval
from difficulty.ranking import Ranking
from difficulty.records import finish_run, read_json, read_table, start_run, write_table
from training.run import Cadence, train
from training.trainer import TrainPlan

DATA = ("digits-mixture", "digits", "photo-patches-8")
PROCESSES = ("vp-linear", "vp-cosine", "edm", "flow-matching")
PREDICTIONS = ("eps", "x0", "v")


@dataclass(frozen=True)
class Scale:
    """How large a study is.

    Args:
        data, predictions: what is crossed, on the first of ``processes`` with tasks cut in t; on ``log_snr_data`` also
            with all processes and tasks cut in log-SNR.
        exact: the data set measured at the default budget; must have an exact law.
        budget: iterations of the other experts on tasks cut in t; ``exact_budget`` of the exact ones, and
            ``log_snr_budget`` of all on tasks cut in log-SNR.
        tasks, log_snr_tasks: number of tasks on the two grids.
        seeds: experts per task.
        draws: held-out draws per task.
        steps: iterations of the shared networks; ``long_steps`` of the one that is trained longer.
        quality_data, quality_predictions, quality_tasks: where samples are judged (first process, tasks cut in t).
    """

    data: tuple[str, ...] = DATA
    processes: tuple[str, ...] = PROCESSES
    predictions: tuple[str, ...] = PREDICTIONS
    log_snr_data: tuple[str, ...] = DATA
    exact: str = "digits-mixture"
    budget: int = 500
    exact_budget: int = 2000
    log_snr_budget: int = 250
    tasks: int = 20
    log_snr_tasks: int = 10
    seeds: int = 3
    draws: int = 1024
    steps: int = 2000
    long_steps: int = 20000
    quality_data: tuple[str, ...] = ("digits-mixture",)
    quality_predictions: tuple[str, ...] = ("v",)
    quality_tasks: int = 10


@dataclass(frozen=True)
class Cell:
    """One measurement of experts."""

    data: str
    process: str
    prediction: str
    grid: str
    tasks: int
    budget: int
    measures: tuple[str, ...] = ("convergence",)

    @property
    def name(self) -> str:
        """Its folder."""
        judged = "_samples" if "sample-quality" in self.measures else ""
        return f"{self.data}_{self.process}_{self.prediction}_{self.grid}{judged}"


@dataclass(frozen=True)
class Shared:
    """One network on all t, probed on the tasks of the vp-linear cell of the same data and prediction."""

    data: str
    prediction: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.data}_shared_{self.prediction}_seed{self.seed}_{self.steps}"


def cells_in_t(scale: Scale) -> Iterator[Cell]:
    """Experts of every prediction on the first process, tasks cut in t."""
    for data in scale.data:
        budget = scale.exact_budget if data == scale.exact else scale.budget
        for prediction in scale.predictions:
            yield Cell(data, scale.processes[0], prediction, "t", scale.tasks, budget)


def cells_in_log_snr(scale: Scale) -> Iterator[Cell]:
    """Experts of every prediction on every process, tasks cut in log-SNR."""
    for data in scale.log_snr_data:
        for process in scale.processes:
            for prediction in scale.predictions:
                yield Cell(data, process, prediction, "log-snr", scale.log_snr_tasks, scale.log_snr_budget)


def cells_with_samples(scale: Scale) -> Iterator[Cell]:
    """Experts whose samples are judged."""
    for data in scale.quality_data:
        for prediction in scale.quality_predictions:
            yield Cell(
                data, scale.processes[0], prediction, "t", scale.quality_tasks, scale.budget,
                ("convergence", "sample-quality"),
            )  # fmt: skip


def shared_networks(scale: Scale) -> Iterator[Shared]:
    """Every prediction on every data set; the first with all seeds, and once trained for longer."""
    for data in scale.data:
        for prediction in scale.predictions:
            for seed in range(scale.seeds if prediction == scale.predictions[0] else 1):
                yield Shared(data, prediction, seed, scale.steps)
    yield Shared(scale.exact, scale.predictions[0], 0, scale.long_steps)


def measure_cells(scale: Scale, cells: Iterable[Cell], runs: Path) -> None:
    """Experts of every cell, one folder each; finished folders are left alone."""
    for cell in cells:
        if finished(runs / cell.name):
            continue
        began = time.monotonic()
        plan = ExpertPlan(
            prediction=cell.prediction, seeds=tuple(range(scale.seeds)), budget=cell.budget, heldout_draws=scale.draws
        )
        measure(
            cell.data, cell.process, out=runs / cell.name, tasks=cell.tasks, grid=cell.grid,
            measures=cell.measures, plan=plan,
        )  # fmt: skip
        print(f"{cell.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def probe_shared(scale: Scale, runs: Path) -> None:
    """Train the shared networks and probe each on the tasks of the experts of the same data and prediction."""
    process = get_process(scale.processes[0])
    for shared in shared_networks(scale):
        if finished(runs / f"{shared.name}_probe"):
            continue
        began = time.monotonic()
        data = load_dataset(shared.data)
        plan = TrainPlan(steps=shared.steps, prediction=shared.prediction, seed=shared.seed)
        if not finished(runs / shared.name):
            cadence = Cadence(evaluate=shared.steps // 20, checkpoint=shared.steps // 4, sample=0)
            train(data, process, plan, runs / shared.name, cadence=cadence)
        experts = runs / f"{shared.data}_{process.name}_{shared.prediction}_t"
        probe(
            runs / shared.name, data, out=runs / f"{shared.name}_probe", tasks=scale.tasks, draws=scale.draws,
            floor_from=None if data.law else experts,
        )  # fmt: skip
        print(f"{shared.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def finished(folder: Path) -> bool:
    """Whether a results folder is complete."""
    return (folder / "run.json").exists() and read_json(folder / "run.json")["status"] == "finished"


def join_floors(scale: Scale, runs: Path) -> None:
    """Every cell without exact law over the best loss known on its tasks, by any prediction or shared network."""
    for group in _judged_alike(scale):
        if load_dataset(group[0].data).law is not None:
            continue
        # The shared networks were judged on the first process, tasks cut in t.
        probes = [s for s in shared_networks(scale) if s.data == group[0].data and group[0].grid == "t"]
        folders = [runs / cell.name for cell in group]
        for folder in folders:
            others = [other for other in folders if other != folder] + [runs / f"{s.name}_probe" for s in probes]
            rank_over_joint_floor(folder, others)


def collect(scale: Scale, runs: Path) -> dict[str, pd.DataFrame]:
    """The tables of the study by file name."""
    cells = [*cells_in_t(scale), *cells_in_log_snr(scale)]
    shared = list(shared_networks(scale))
    facts = [
        {"cell": c.name, "data": c.data, "process": c.process, "prediction": c.prediction, "grid": c.grid,
         "kind": "experts", "seeds": scale.seeds, "iterations": c.budget}
        for c in cells
    ] + [
        {"cell": s.name, "data": s.data, "process": scale.processes[0], "prediction": s.prediction, "grid": "t",
         "kind": "shared network", "seeds": 1, "iterations": s.steps}
        for s in shared
    ]  # fmt: skip
    folders = {cell.name: runs / cell.name for cell in cells} | {s.name: runs / f"{s.name}_probe" for s in shared}
    rankings = {name: Ranking.load(folder) for name, folder in folders.items()}
    agreement = pd.concat([*_agreements(scale, runs)], ignore_index=True)
    samples = [_sample_rows(c, runs / c.name) for c in cells_with_samples(scale)]
    return {
        "cells": pd.DataFrame(facts),
        "tasks": pd.concat([_task_rows(name, ranking) for name, ranking in rankings.items()], ignore_index=True),
        "difficulty": pd.concat([_value_rows(name, found) for name, found in rankings.items()], ignore_index=True),
        "curves": pd.concat([_curve_rows(c.name, runs / c.name) for c in cells_in_t(scale)], ignore_index=True),
        "agreement": agreement,
        "definitions": pd.concat([_definition_rows(c.name, runs / c.name) for c in cells], ignore_index=True),
        "summary": summarise(agreement),
        "sample_quality": pd.concat(samples, ignore_index=True),
    }


def _task_rows(cell: str, ranking: Ranking) -> pd.DataFrame:
    columns = ["t_first", "t_last", "log_snr_high", "log_snr_low"]
    rows = [[cell, task.index, *(getattr(task, name) for name in columns)] for task in ranking.tasks]
    return pd.DataFrame(rows, columns=["cell", "task", *columns])


def _value_rows(cell: str, ranking: Ranking) -> pd.DataFrame:
    parts = []
    for name, found in ranking.measures.items():
        columns = {
            "cell": cell, "task": range(len(found.value)), "definition": name, "value": found.value,
            "ci_low": found.ci_low, "ci_high": found.ci_high, "rank": found.rank, "rank_low": found.rank_low,
            "rank_high": found.rank_high, "censored": found.flagged,
        }  # fmt: skip
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _curve_rows(cell: str, folder: Path) -> pd.DataFrame:
    losses = read_table(folder / "losses.csv", ["task", "iteration", "excess_nats"])
    spread = losses.groupby(["task", "iteration"])["excess_nats"].agg(["mean", "min", "max"]).reset_index()
    return spread.assign(cell=cell)[["cell", "task", "iteration", "mean", "min", "max"]]


def _sample_rows(cell: Cell, folder: Path) -> pd.DataFrame:
    tasks = Ranking.load(folder).tasks
    middle = [0.5 * (task.log_snr_high + float(task.log_snr_low or task.log_snr_high - 2)) for task in tasks]
    table = read_table(folder / "sample_quality.csv", ["task"])
    return table.assign(data=cell.data, prediction=cell.prediction, log_snr=np.array(middle)[table["task"]])


def _agreements(scale: Scale, runs: Path) -> Iterator[pd.DataFrame]:
    """Agreement tables with the columns question and data."""
    measures = list(DEFINITIONS)
    for group in _judged_alike(scale):
        table = agreement_table([runs / c.name for c in group], measures)
        within = table["first"].str.contains(" seed ")
        yield table.assign(question=np.where(within, "seeds", "predictions"), data=group[0].data)
    for cell in cells_in_t(scale):
        same = (cell.data, cell.prediction)
        for shared in shared_networks(scale):
            if (shared.data, shared.prediction) == same:
                question = "networks" if shared.steps == scale.steps else "networks, shared one trained longer"
                pair = [runs / cell.name, runs / f"{shared.name}_probe"]
                yield _between(question, cell.data, pair, ["excess_nats"])
        others = [runs / c.name for c in cells_in_log_snr(scale) if (c.data, c.prediction) == same]
        if others:
            yield _between("processes", cell.data, others, measures)
            yield _between("grids", cell.data, [runs / cell.name, others[0]], measures)


def _judged_alike(scale: Scale) -> list[list[Cell]]:
    """Cells that differ in the prediction alone."""
    groups: dict[str, list[Cell]] = {}
    for cell in [*cells_in_t(scale), *cells_in_log_snr(scale)]:
        groups.setdefault(f"{cell.data} {cell.process} {cell.grid}", []).append(cell)
    return list(groups.values())


def _between(question: str, data: str, folders: Sequence[Path], measures: Sequence[str]) -> pd.DataFrame:
    table = agreement_table(folders, measures)
    return table[~table["first"].str.contains(" seed ")].assign(question=question, data=data)


def _definition_rows(cell: str, folder: Path) -> pd.DataFrame:
    """Kendall's tau between every two definitions and between each and the order of t, clean tasks hardest."""
    table = read_table(folder / "convergence.csv")
    estimates = convergence_estimates(table, int(table["task"].nunique()))
    centres = {name: estimate.centre for name, estimate in estimates.items()}
    drawn = {name: e.replicates(2000, stream(0, index)) for index, (name, e) in enumerate(estimates.items())}
    lower_t = -np.arange(len(next(iter(centres.values()))), dtype=np.float64)
    centres["lower t"], drawn["lower t"] = lower_t, np.tile(lower_t, (2000, 1))
    rows = [
        [cell, a, b, *with_interval(float(kendall(centres[a], centres[b])), kendall(drawn[a], drawn[b]))]
        for a, b in combinations(centres, 2)
    ]
    return pd.DataFrame(rows, columns=["cell", "first", "second", "kendall", "kendall_low", "kendall_high"])


def summarise(agreement: pd.DataFrame) -> pd.DataFrame:
    """Per question, data and definition: least, median and greatest Spearman's rho; data "all" joins them."""
    both = pd.concat([agreement.assign(data="all"), agreement])
    grouped = both.groupby(["question", "data", "measure"], sort=False)["spearman"]
    table = grouped.agg(pairs="size", least="min", median="median", greatest="max").reset_index()
    return table.assign(share_095=grouped.agg(lambda rho: (rho >= 0.95).mean()).to_numpy())


def write_study(scale: Scale, runs: Path, out: Path, command: str) -> None:
    """Collect the study into a results folder."""
    run = start_run(out, "convergence-study", {"command": command, "scale": asdict(scale)})
    tables = collect(scale, runs)
    for name, table in tables.items():
        write_table(out / f"{name}.csv", _rounded(table))
    folders = [folder for folder in runs.iterdir() if finished(folder)]
    seconds = sum(read_json(folder / "run.json").get("wall_seconds", 0.0) for folder in folders)
    finish_run(out, run, command=command, wall_seconds=round(seconds))


def _rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Five significant digits, which is more than the intervals bear and keeps the files small."""
    floats = table.select_dtypes("float").columns
    text = table[floats].map(lambda value: float(f"{value:.5g}"))
    return table.assign(**{name: text[name] for name in floats})


def main(arguments: Sequence[str] | None = None, scale: Scale | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/convergence-study"))
    parser.add_argument("--log-snr-data", nargs="+", default=DATA, choices=DATA, help="data sets under all processes")
    options = parser.parse_args(arguments)
    scale = scale or Scale(log_snr_data=tuple(options.log_snr_data))
    command = ["python", "benchmarks/convergence_study.py", *(sys.argv[1:] if arguments is None else arguments)]
    measure_cells(scale, cells_in_t(scale), options.runs)
    probe_shared(scale, options.runs)
    measure_cells(scale, cells_with_samples(scale), options.runs)
    measure_cells(scale, cells_in_log_snr(scale), options.runs)
    join_floors(scale, options.runs)
    write_study(scale, options.runs, options.out, shlex.join(command))


if __name__ == "__main__":
    main()
