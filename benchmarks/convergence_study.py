"""Does the order of difficulty depend on the definition, the prediction, the seed, the process, the grid, the network?

    python benchmarks/convergence_study.py

Measures experts on three data sets (one with an exact floor), four processes and three predictions, and shared
networks on the same tasks. The measurements are ordinary folders of `difficulty measure` and `difficulty probe` below
``--runs``; finished ones are kept, an interrupted one goes on, so that the same command continues. About an hour on one
core.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from difficulty.datasets import load_dataset
from difficulty.experts import ExpertPlan
from difficulty.measurement import measure
from difficulty.probe import probe
from difficulty.process import get_process
from difficulty.records import read_json
from training.run import Cadence, train
from training.trainer import TrainPlan

DATA = ("digits-mixture", "digits", "photo-patches-8")
PROCESSES = ("vp-linear", "vp-cosine", "edm", "flow-matching")
PREDICTIONS = ("eps", "x0", "v")


@dataclass(frozen=True)
class Scale:
    """How large a study is.

    Args:
        data, processes, predictions: what is crossed.
        exact: the data set measured at the default budget; must have an exact law.
        budget: iterations of the other experts on tasks cut in t; ``exact_budget`` of the exact ones, and
            ``log_snr_budget`` of all on tasks cut in log-SNR.
        tasks, log_snr_tasks: number of tasks on the two grids.
        seeds: experts per task.
        draws: held-out draws per task.
        steps: iterations of the shared networks; ``long_steps`` of the one that is trained longer.
    """

    data: tuple[str, ...] = DATA
    processes: tuple[str, ...] = PROCESSES
    predictions: tuple[str, ...] = PREDICTIONS
    exact: str = "digits-mixture"
    budget: int = 500
    exact_budget: int = 2000
    log_snr_budget: int = 400
    tasks: int = 20
    log_snr_tasks: int = 12
    seeds: int = 3
    draws: int = 1024
    steps: int = 2000
    long_steps: int = 20000


@dataclass(frozen=True)
class Cell:
    """One measurement of experts."""

    data: str
    process: str
    prediction: str
    grid: str
    tasks: int
    budget: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.data}_{self.process}_{self.prediction}_{self.grid}"


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
    for data in scale.data:
        for process in scale.processes:
            for prediction in scale.predictions:
                yield Cell(data, process, prediction, "log-snr", scale.log_snr_tasks, scale.log_snr_budget)


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
            measures=("convergence",), plan=plan,
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/convergence-study"))
    parser.add_argument("--data", nargs="+", default=DATA, choices=DATA)
    options = parser.parse_args(arguments)
    scale = replace(Scale(), data=tuple(options.data))
    measure_cells(scale, cells_in_t(scale), options.runs)
    probe_shared(scale, options.runs)
    measure_cells(scale, cells_in_log_snr(scale), options.runs)


if __name__ == "__main__":
    main()
