"""How well one trained network does each denoising task: an existing checkpoint judged on fixed draws.

The draws (x0, eps, t) are those of `heldout.py`: the same for every model, prediction and machine, stratified over t
within each task. probe.csv has one row per task:

    heldout_loss  E |eps - eps_hat|^2 summed over dimensions, with its standard error
    floor         the Bayes loss of an exact law; else the best loss that a measurement of experts knows
                  (``floor_from``), else that of a Gaussian denoiser; there the model itself may be the best
    excess_nats   (loss - floor)/2, nats per unit log-SNR, with its 90 % interval over draws; of an exact law
                  E |eps_hat - E[eps | x_t]|^2 / 2, the same without the noise of the floor
    linear_loss   loss of the Gaussian denoiser
    untrained     the loss is above it by more than its noise and ``NOTICED`` per dimension, or is no number

Without an exact law floor.npy holds, per draw, the losses of the best denoiser known, this model included.
Experts and one shared network rank tasks differently: a ranking says which it is in its provenance.
"""

__all__ = ["PROBE_COLUMNS", "Probe", "Prober", "probe", "probe_estimates"]

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from difficulty.datasets import Dataset, load_dataset
from difficulty.errors import InputError, first_line
from difficulty.floors import FLOOR_FILE, joint_floor, read_floor
from difficulty.heldout import floor_losses, heldout_draws, posterior_eps_at, wiener
from difficulty.intervals import Z90
from difficulty.models import TrainedModel, load_model
from difficulty.process import Array, Process, get_process
from difficulty.process_file import write_process
from difficulty.ranking import Estimate, Ranking, rank_tasks
from difficulty.records import finish_run, read_run, start_run, write_array, write_table
from difficulty.tasks import Task, make_tasks

PROBE_COLUMNS: Mapping[str, type] = {
    "task": int, "t_first": int, "t_last": int, "heldout_loss": float, "heldout_se": float, "floor": float,
    "floor_kind": str, "excess_nats": float, "excess_se": float, "ci_low": float, "ci_high": float,
    "linear_loss": float, "untrained": bool,
}  # fmt: skip
# Draws that a model gets at a time, always as many: a matrix product rounds by its size, and the losses must not depend
# on how they were computed.
GROUP = 16
# Loss per dimension by which a model must be worse than the linear denoiser to be called untrained: that of zeros is 1.
# At high noise the linear one is the best there is, and any network a little worse.
NOTICED = 0.01


@dataclass(frozen=True, eq=False)
class Probe:
    """What a probe found: probe.csv, the ranking, and sentences for the reader."""

    table: pd.DataFrame
    ranking: Ranking
    warnings: list[str]


def probe(
    model: str | Path | TrainedModel,
    data: str | Path | Dataset,
    process: str | Process | None = None,
    *,
    out: str | Path,
    tasks: int = 20,
    grid: str = "t",
    draws: int = 1024,
    floor_from: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Probe:
    """Judge a trained model on every task and write a probe folder.

    Args:
        model: see ``load_model``.
        data: see ``load_dataset``; its held-out samples are used.
        process: needed only for a function of the user's, which has none of its own.
        out: folder to write.
        tasks, grid: see ``make_tasks``.
        draws: fixed draws per task.
        floor_from: folder of a measurement of experts with the same data, process, tasks and draws.
        progress: called with (tasks done, in all).

    Raises:
        InputError: if model, data, process or floor do not fit together.
    """
    model = model if isinstance(model, TrainedModel) else load_model(model)
    dataset, out = load_dataset(data), Path(out)
    chosen = _process_of(model, process)
    prober = Prober(dataset, chosen, tasks, grid, draws=draws, floor_from=floor_from)
    prober.check(model)  # refused here, before anything is written, if it does not fit
    config = {
        "model": model.name,
        "data": dataset.name,
        "process": chosen.name,
        "tasks": tasks,
        "grid": grid,
        "draws": draws,
        "floor_from": None if floor_from is None else str(floor_from),
        "dataset_fingerprint": dataset.fingerprint,
        "process_fingerprint": chosen.fingerprint,
    }
    began = time.monotonic()
    run = start_run(out, "probe", config)
    write_process(out, chosen)
    table, known = prober(model, progress)
    write_table(out / "probe.csv", table)
    if known is not None:
        write_array(out / FLOOR_FILE, known.astype(np.float32))
    warnings = _warnings(table)
    ranking = rank_tasks(
        probe_estimates(table),
        prober.tasks,
        chosen,
        dataset=dataset.fingerprint,
        grid=grid,
        provenance={"kind": "shared network", "model": model.name, "draws": draws},
        notes=warnings,
    )
    ranking.save(out / "ranking.json")
    finish_run(out, run, wall_seconds=round(time.monotonic() - began, 1))
    return Probe(table, ranking, warnings)


class Prober:
    """Judges models on the same fixed draws, as often as wanted.

    Args:
        dataset, process: of the models.
        tasks, grid: see ``make_tasks``.
        draws: fixed draws per task.
        floor_from: folder of a measurement of experts with the same data, process, tasks and draws.

    Raises:
        InputError: if draws are too few or the floor is of something else.
    """

    def __init__(
        self,
        dataset: Dataset,
        process: Process,
        tasks: int = 20,
        grid: str = "t",
        *,
        draws: int = 1024,
        floor_from: Path | None = None,
    ) -> None:
        if draws < 2:
            raise InputError(f"draws must be at least 2, got {draws}")
        self.process = process
        self.tasks = make_tasks(process, tasks, grid)
        self.draws = heldout_draws(dataset, self.tasks, draws)
        best = None if floor_from is None else _experts_floor(floor_from, dataset, process, self.tasks, draws)
        flat = (self.draws.x0.flatten(0, 1), self.draws.eps.flatten(0, 1), self.draws.t.flatten())
        linear = posterior_eps_at(wiener(dataset), process, *flat).reshape(self.draws.eps.shape)
        self.linear = _squared(linear, self.draws.eps)
        self.noticed = NOTICED * dataset.dim
        self.floor, self.posterior = floor_losses(dataset, process, self.draws)
        self.floor_kind = "exact"
        if self.posterior is None:
            self.floor, self.floor_kind = (self.linear, "linear") if best is None else (best, "upper_bound")

    def check(self, model: TrainedModel) -> None:
        """Raise InputError unless the model maps samples of the data to their shape."""
        self._estimate(model, 0, np.arange(1))

    def __call__(
        self, model: TrainedModel, progress: Callable[[int, int], None] | None = None
    ) -> tuple[pd.DataFrame, Array | None]:
        """probe.csv, and without an exact law the losses per draw of the best denoiser known, this model included."""
        estimates = torch.empty_like(self.draws.eps)
        count = estimates.shape[1]
        for k in range(len(self.tasks)):
            for start in range(0, count, GROUP):
                # The last group is filled up with its first draw.
                rows = np.arange(start, start + GROUP)
                filled = self._estimate(model, k, np.where(rows < count, rows, start))
                estimates[k, start : start + GROUP] = filled[: count - start]
            if progress is not None:
                progress(k + 1, len(self.tasks))
        losses = _squared(estimates, self.draws.eps)
        # Paired draw by draw: the noise that both share cancels.
        excess = 0.5 * (losses - self.floor if self.posterior is None else _squared(estimates, self.posterior))
        mean, se = excess.mean(1), excess.std(1, ddof=1) / np.sqrt(count)
        gain = self.linear - losses
        columns = {
            "task": np.arange(len(self.tasks)),
            "t_first": [task.first for task in self.tasks],
            "t_last": [task.last for task in self.tasks],
            "heldout_loss": losses.mean(1),
            "heldout_se": losses.std(1, ddof=1) / np.sqrt(count),
            "floor": self.floor.mean(1),
            "floor_kind": self.floor_kind,
            "excess_nats": mean,
            "excess_se": se,
            "ci_low": mean - Z90 * se,
            "ci_high": mean + Z90 * se,
            "linear_loss": self.linear.mean(1),
            "untrained": ~(gain.mean(1) > -np.maximum(Z90 * gain.std(1, ddof=1) / np.sqrt(count), self.noticed)),
        }
        known = None if self.posterior is not None else joint_floor([self.floor, losses])
        return pd.DataFrame(columns, columns=list(PROBE_COLUMNS)), known

    def _estimate(self, model: TrainedModel, task: int, rows: npt.NDArray[np.int64]) -> Tensor:
        """The model's estimate of eps at some draws of a task."""
        x0, eps, t = self.draws.x0[task, rows], self.draws.eps[task, rows], self.draws.t[task, rows]
        shape = (-1, *(1,) * (x0.ndim - 1))
        tables = (torch.as_tensor(a, dtype=torch.float32) for a in (self.process.alpha, self.process.sigma))
        alpha, sigma = (table[t].reshape(shape) for table in tables)
        try:
            with torch.no_grad():
                estimate = model.eps(alpha * x0 + sigma * eps, t)
        except InputError:
            raise
        except Exception as error:  # the user's own code may raise anything
            reason = first_line(error)
            raise InputError(f"{model.name} cannot take samples of shape {tuple(x0.shape[1:])} ({reason})") from None
        if not isinstance(estimate, Tensor):
            raise InputError(f"{model.name} returns a {type(estimate).__name__}; it must return a tensor")
        if tuple(estimate.shape) != tuple(x0.shape):
            raise InputError(f"{model.name} maps {tuple(x0.shape)} to {tuple(estimate.shape)}; it must keep the shape")
        return estimate


def probe_estimates(table: pd.DataFrame) -> dict[str, Estimate]:
    """The excess of probe.csv as an estimate of task difficulty."""
    value, se = table["excess_nats"].to_numpy(dtype=np.float64), table["excess_se"].to_numpy(dtype=np.float64)
    estimate = Estimate(
        unit="nats per unit log-SNR",
        value=value,
        ci_low=value - Z90 * se,
        ci_high=value + Z90 * se,
        log=False,
        flagged=(table["untrained"] | (table["floor_kind"] == "linear")).to_numpy(dtype=bool),
        hardest_if_missing=True,
        note="one shared network; intervals over held-out draws only",
    )
    return {"excess_nats": estimate}


def _process_of(model: TrainedModel, process: str | Process | None) -> Process:
    if model.process is None:
        if process is None:
            raise InputError(f"{model.name} has no process of its own; name the one it was trained on with --process")
        return get_process(process)
    if process is not None:
        asked = get_process(process)
        try:
            asked.check_fingerprint(model.process.fingerprint, model.name)
        except InputError:
            raise InputError(
                f"{model.name} was trained with process {model.process.name!r} and cannot be probed with "
                f"{asked.name!r}; leave --process out"
            ) from None
    return model.process


def _experts_floor(folder: Path, dataset: Dataset, process: Process, tasks: list[Task], draws: int) -> Array:
    """Best known loss (K, M) of a measurement on the same draws."""
    if dataset.law is not None:
        raise InputError(f"the Bayes loss of {dataset.name} is known exactly; leave the floor of {folder} out")
    run = read_run(folder, "measure")
    process.check_fingerprint(run["config"]["process_fingerprint"], str(folder))
    if run["config"]["dataset_fingerprint"] != dataset.fingerprint:
        raise InputError(f"{folder} was measured on other data; measure {dataset.name} first")
    recorded = [(task.t_first, task.t_last) for task in Ranking.load(folder).tasks]
    if recorded != [(task.first, task.last) for task in tasks]:
        raise InputError(f"{folder} has other tasks; probe with its --tasks and --grid")
    best = read_floor(folder, len(tasks))
    if best.shape[1] != draws:
        raise InputError(f"{folder} was measured on {best.shape[1]} draws per task; probe with as many, not {draws}")
    return best


def _squared(estimates: Tensor, goal: Tensor) -> Array:
    """Squared distance summed over dimensions, (K, M)."""
    return (estimates.double() - goal.double()).square().flatten(2).sum(2).numpy()


def _warnings(table: pd.DataFrame) -> list[str]:
    found = []
    bad = table[table["untrained"] & np.isfinite(table["heldout_loss"])]
    if len(bad):
        found.append(f"At t {_spans(bad)} the model is worse than a linear denoiser: it was hardly trained there.")
    broken = table[~np.isfinite(table["heldout_loss"])]
    if len(broken):
        found.append(f"At t {_spans(broken)} the model returns NaN or infinity.")
    if (table["floor_kind"] == "linear").any():
        found.append(
            "The floor is that of a linear denoiser, so the excess is a gain when negative; give --floor-from a "
            "measurement for the excess over the best known loss."
        )
    return found


def _spans(rows: pd.DataFrame) -> str:
    return ", ".join(f"{first}..{last}" for first, last in zip(rows["t_first"], rows["t_last"], strict=True))
