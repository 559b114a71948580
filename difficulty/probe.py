"""How well one trained network does each denoising task: an existing checkpoint judged on fixed draws.

The draws (x0, eps, t) are those of `heldout.py`: the same for every model, prediction and machine, stratified over t
within each task. probe.csv has one row per task:

    heldout_loss  E |eps - eps_hat|^2 summed over dimensions, with its standard error
    floor         the Bayes loss of an exact law; else the best loss that a measurement of experts knows
                  (``floor_from``), else that of a linear denoiser; there the model itself may be the best
    excess_nats   (loss - floor)/2, nats per unit log-SNR, with its 90 % interval over draws; of an exact law
                  E |eps_hat - E[eps | x_t]|^2 / 2, the same without the noise of the floor
    linear_loss   loss of the best linear denoiser of the train samples
    untrained     the loss is above it by more than its noise and ``NOTICED`` per dimension, or is no number

Without an exact law floor.npy holds, per draw, the losses of the best denoiser known, this model included.
Experts and one shared network rank tasks differently: a ranking says which it is in its provenance.

What a task comes to is kept until the last one is done, so that an interrupted probe goes on at the next task. A folder
is of one model: its weights are known by their hash.
"""

__all__ = ["PROBE_COLUMNS", "Probe", "Prober", "probe", "probe_estimates"]

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from difficulty.datasets import Dataset, load_dataset
from difficulty.devices import full_precision, same_to_rounding
from difficulty.errors import InputError, first_line
from difficulty.estimate import Estimate
from difficulty.floors import FLOOR_FILE, joint_floor, read_floor
from difficulty.heldout import Floors, HeldOutDraws, check_draws, heldout_rows, standard_errors, task_draws
from difficulty.intervals import Z90
from difficulty.latents import autoencoder_of, check_posterior, latent_dataset
from difficulty.measurement_folder import check_config
from difficulty.models import TrainedModel, load_model
from difficulty.process import Array, Process, get_process
from difficulty.process_file import write_process
from difficulty.ranking import Ranking, rank_tasks
from difficulty.records import finish_run, read_array, read_run, start_run, write_array, write_table
from difficulty.tasks import Task, make_tasks

PROBE_COLUMNS: Mapping[str, type] = {
    "task": int, "t_first": int, "t_last": int, "heldout_loss": float, "heldout_se": float, "floor": float,
    "floor_kind": str, "excess_nats": float, "excess_se": float, "ci_low": float, "ci_high": float,
    "linear_loss": float, "untrained": bool,
}  # fmt: skip
PARTIAL = "probe.partial.npy"
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
    device: str = "cpu",
    vae: str | None = None,
    posterior: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] = lambda message: None,
) -> Probe:
    """Judge a trained model on every task and write a probe folder.

    Args:
        model: see ``load_model``.
        data: see ``load_dataset``; its held-out samples are used. A model of latents is given images as latents of
            its own autoencoder.
        process: needed only for a function of the user's, which has none of its own.
        out: folder to write; an interrupted probe with the same arguments goes on where it stopped.
        tasks, grid: see ``make_tasks``.
        draws: fixed draws per task.
        floor_from: folder of a measurement of experts with the same data, process, tasks and draws.
        device: where the network of a model that is named runs; the draws are the same anywhere, the losses to
            rounding.
        vae: autoencoder to make latents with, as ``Autoencoder`` takes it, in place of the model's own.
        posterior: a name in ``POSTERIORS``; None for that of the model's run, or the mean.
        progress: called with (tasks done, in all).
        tell: called with sentences for the user.

    Raises:
        InputError: if model, data, process or floor do not fit together, or the folder holds an interrupted probe of
            another model.
    """
    model = model if isinstance(model, TrainedModel) else load_model(model, device)
    dataset, out = _data_for(model, load_dataset(data), vae, posterior, device, tell), Path(out)
    chosen = _process_of(model, process)
    prober = Prober(dataset, chosen, tasks, grid, draws=draws, floor_from=floor_from)
    prober.check(model)  # refused here, before anything is written, if it does not fit
    config = {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "data": dataset.name,
        "process": chosen.name,
        "tasks": tasks,
        "grid": grid,
        "draws": draws,
        "floor_from": None if floor_from is None else str(floor_from),
        "dataset_fingerprint": dataset.fingerprint,
        "process_fingerprint": chosen.fingerprint,
        **dataset.provenance,
    }
    began = time.monotonic()
    run = start_run(out, "probe", config)
    write_process(out, chosen)
    partial = out / PARTIAL
    found = prober(model, progress, path=partial)
    table = prober.table(found)
    write_table(out / "probe.csv", table)
    if not prober.exact:
        write_array(out / FLOOR_FILE, joint_floor([prober.floor, found[0]]).astype(np.float32))
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
    partial.unlink()
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
        check_draws(dataset, tasks if dataset.law else 1, draws)  # of an exact law the posterior of all is kept
        self.dataset, self.process, self.draws = dataset, process, draws
        self.tasks = make_tasks(process, tasks, grid)
        best = None if floor_from is None else _experts_floor(floor_from, dataset, process, self.tasks, draws)
        self.exact = dataset.law is not None
        self.floor_kind = "exact" if self.exact else "linear" if best is None else "upper_bound"
        self.noticed = NOTICED * dataset.dim
        floors, linear, known = Floors(dataset, process), [], []
        for k in range(len(self.tasks)):
            # A task's draws are made whenever they are needed: those of all tasks might not fit in memory.
            own = self._draws_of(k)
            linear.append(floors.linear_losses(own))
            known.append(floors.losses(own) if self.exact else (linear[-1], None))
        self.linear = np.stack(linear)
        self.floor = np.stack([losses for losses, _ in known]) if best is None else best
        self.posterior = [posterior for _, posterior in known]

    def check(self, model: TrainedModel) -> None:
        """Raise InputError unless the model keeps the shape of samples and treats each by itself and always alike."""
        draws, rows = self._draws_of(0), next(self._groups())
        first, again, beside = (self._estimate(model, draws, part) for part in (rows, rows, np.tile(rows[::2], 2)))
        if not all(part.isfinite().all() for part in (first, again, beside)):
            return  # said of the tasks where it is so
        if not same_to_rounding(again, first):
            raise InputError(f"{model.name} gives another output every time; probe it without dropout or other chance")
        if not same_to_rounding(beside[: GROUP // 2], first[::2]):
            raise InputError(f"what {model.name} gives for a sample depends on its batch; use no batch norm")

    def __call__(
        self,
        model: TrainedModel,
        progress: Callable[[int, int], None] | None = None,
        *,
        path: Path | None = None,
    ) -> Array:
        """Per draw (2, K, M): |eps - eps_hat|^2 and |eps_hat - E[eps | x_t]|^2; without an exact law the first twice.

        Args:
            model: to be judged.
            progress: called with (tasks done, in all).
            path: of a file that keeps what is done, for the next call; left to the caller.

        Raises:
            InputError: if the model cannot take the draws, or the file is of another model or not readable.
        """
        found = np.empty((2, len(self.tasks), self.draws))
        done = 0
        if path is not None and path.exists():
            earlier = self._read(path, model)
            done = earlier.shape[1]
            found[:, :done] = earlier
        for k in range(done, len(self.tasks)):
            draws = self._draws_of(k)
            estimates = torch.cat([self._estimate(model, draws, rows) for rows in self._groups()])[: self.draws]
            goal = self.posterior[k]
            found[0, k] = _squared(estimates, draws.eps)
            found[1, k] = found[0, k] if goal is None else _squared(estimates, goal)
            if path is not None:
                write_array(path, found[:, : k + 1])
            if progress is not None:
                progress(k + 1, len(self.tasks))
        return found

    def table(self, found: Array) -> pd.DataFrame:
        """probe.csv of what a call found."""
        losses, distance = found
        # Paired draw by draw: the noise that both share cancels.
        excess = 0.5 * (distance if self.exact else losses - self.floor)
        gain, mean = self.linear - losses, excess.mean(1)
        # Of x_t, which the noise in it divides by sigma, and of what a model returns.
        snr = np.exp([task.log_snr_high for task in self.tasks])
        rounding = self.dataset.dim * np.finfo(np.float32).eps ** 2 * (1 + snr)
        rows = heldout_rows(len(self.dataset.heldout), self.tasks, self.draws)
        excess_se, loss_se, gain_se = (standard_errors(values, rows) for values in (excess, losses, gain))
        se = np.hypot(excess_se, rounding)
        columns = {
            "task": np.arange(len(self.tasks)),
            "t_first": [task.first for task in self.tasks],
            "t_last": [task.last for task in self.tasks],
            "heldout_loss": losses.mean(1),
            "heldout_se": loss_se,
            "floor": self.floor.mean(1),
            "floor_kind": self.floor_kind,
            "excess_nats": mean,
            "excess_se": se,
            "ci_low": mean - Z90 * se,
            "ci_high": mean + Z90 * se,
            "linear_loss": self.linear.mean(1),
            "untrained": ~(gain.mean(1) > -np.maximum(Z90 * gain_se, self.noticed)),
        }
        return pd.DataFrame(columns, columns=list(PROBE_COLUMNS))

    def _draws_of(self, task: int) -> HeldOutDraws:
        return task_draws(self.dataset, self.tasks[task], self.draws)

    def _groups(self) -> Iterator[npt.NDArray[np.int64]]:
        """Draws by ``GROUP``; the last group is filled up with its first draw."""
        for start in range(0, self.draws, GROUP):
            rows = np.arange(start, start + GROUP)
            yield np.where(rows < self.draws, rows, start)

    def _read(self, path: Path, model: TrainedModel) -> Array:
        """What an interrupted call kept, (2, tasks done, M), if it was of this model."""
        try:
            earlier = read_array(path)
        except InputError:
            raise InputError(f"{path} is not readable; delete it to start afresh") from None
        if earlier.shape[::2] != (2, self.draws) or not 1 <= earlier.shape[1] <= len(self.tasks):
            raise InputError(f"{path} has shape {earlier.shape}; delete it to start afresh")
        draws, rows = self._draws_of(0), next(self._groups())
        again = _squared(self._estimate(model, draws, rows), draws.eps[rows])
        if not np.allclose(again, earlier[0, 0, rows], rtol=1e-3, equal_nan=True):
            raise InputError(f"{path} is of another {model.name}, probed in part; delete it to start afresh")
        return earlier

    def _estimate(self, model: TrainedModel, draws: HeldOutDraws, rows: npt.NDArray[np.int64]) -> Tensor:
        """The model's estimate of eps at some draws of a task."""
        x0, eps, t = draws.x0[rows], draws.eps[rows], draws.t[rows]
        shape = (-1, *(1,) * (x0.ndim - 1))
        tables = (torch.as_tensor(a, dtype=torch.float32) for a in (self.process.alpha, self.process.sigma))
        alpha, sigma = (table[t].reshape(shape) for table in tables)
        try:
            with torch.no_grad(), full_precision():
                estimate = model.eps(alpha * x0 + sigma * eps, t)
        except InputError:
            raise
        except torch.OutOfMemoryError:
            raise InputError(f"{model.name} and {len(x0)} samples do not fit on the GPU; use --device cpu") from None
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            reason = first_line(error)
            raise InputError(f"{model.name} cannot take samples of shape {tuple(x0.shape[1:])} ({reason})") from None
        if not isinstance(estimate, Tensor):
            raise InputError(f"{model.name} returns a {type(estimate).__name__}; it must return a tensor")
        if tuple(estimate.shape) != tuple(x0.shape):
            raise InputError(f"{model.name} maps {tuple(x0.shape)} to {tuple(estimate.shape)}; it must keep the shape")
        if not estimate.is_floating_point():
            raise InputError(f"{model.name} returns {estimate.dtype}; it must return real numbers")
        return estimate.cpu()


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
        unlearned=table["untrained"].to_numpy(dtype=bool),
    )
    return {"excess_nats": estimate}


def _data_for(
    model: TrainedModel,
    dataset: Dataset,
    vae: str | None,
    posterior: str | None,
    device: str,
    tell: Callable[[str], None],
) -> Dataset:
    """The data as the model takes them: images as latents, if it takes those and they are not latents already."""
    known = model.latents or {}
    if vae is None and not known:
        check_posterior(posterior or "mean", vae)
        return dataset
    if vae is None and model.takes(dataset.shape):
        tell(f"{dataset.name} has the shape of latents, and is taken for such")
        return dataset
    autoencoder = autoencoder_of({"spec": vae, **known}, vae, device)
    return latent_dataset(dataset, autoencoder, posterior or known.get("posterior", "mean"), tell)


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
    config = check_config(read_run(folder, "measure"), folder)
    process.check_fingerprint(config["process_fingerprint"], str(folder))
    if config["dataset_fingerprint"] != dataset.fingerprint:
        raise InputError(f"{folder} was measured on other data; measure {dataset.name} first")
    recorded = [(task.t_first, task.t_last) for task in Ranking.load(folder).tasks]
    if recorded != [(task.first, task.last) for task in tasks]:
        raise InputError(
            f"{folder} has other tasks; measure {len(tasks)} tasks of this grid, or probe with its --tasks and --grid"
        )
    best = read_floor(folder, len(tasks))
    if best.shape[1] != draws:
        raise InputError(f"{folder} was measured on {best.shape[1]} draws per task, not {draws}; both need as many")
    return best


def _squared(estimates: Tensor, goal: Tensor) -> Array:
    """Squared distance summed over dimensions, (n,)."""
    return (estimates.double() - goal.double()).square().flatten(1).sum(1).numpy()


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
