"""Held-out draws and what is known about them before anything is learned.

The draws (x0, eps, t) of a task are fixed: the same for every network, prediction, training seed and machine, and the
same whatever other tasks there are. On them stand the floor, the loss of the best denoiser known beforehand, and the
loss of the network that outputs zero.
"""

__all__ = [
    "Floors", "HeldOutDraws", "check_draws", "heldout_draws", "heldout_rows", "posterior_eps_at", "standard_error",
    "standard_errors", "task_draws", "zero_losses",
]  # fmt: skip

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.datasets import Dataset
from difficulty.denoiser import Denoiser
from difficulty.devices import free_bytes, full_precision
from difficulty.errors import InputError
from difficulty.laws import Law
from difficulty.process import Array, Process
from difficulty.randomness import normal, stream
from difficulty.tasks import Task
from difficulty.wiener import Wiener

# Of the covariance of the linear denoiser.
SHRINKAGES = (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 0.6, 1.0)
# Share of the free memory that held-out draws may take.
DRAWS_SHARE = 0.5
# Of n samples in D dimensions, n D min(n, D) at most, and n at least: what their decomposition costs.
DECOMPOSED, LEAST_DECOMPOSED = 1e11, 512
HELDOUT_STREAM = 2  # first counter of the random streams; training draws begin with others (`experts.py`)


@dataclass(frozen=True, eq=False)
class HeldOutDraws:
    """The fixed draws of one task, x0 and eps (M, *), t (M,), or of K tasks with a leading axis."""

    x0: Tensor
    eps: Tensor
    t: Tensor

    def of_task(self, index: int) -> "HeldOutDraws":
        """Those of one of the K tasks."""
        return HeldOutDraws(self.x0[index], self.eps[index], self.t[index])


def task_draws(dataset: Dataset, task: Task, count: int) -> HeldOutDraws:
    """Fixed draws of a task: held-out samples in turn, fresh noise, t stratified over the task.

    The same for every network, prediction and training seed, on every machine.
    """
    rng = stream(HELDOUT_STREAM, task.first, task.last)
    rows = _dealt(rng, len(dataset.heldout), count)
    strata = (rng.permutation(count) + 0.5) / count
    return HeldOutDraws(
        dataset.heldout[torch.from_numpy(rows)],
        normal((count, *dataset.shape), HELDOUT_STREAM, task.first, task.last, 1),
        torch.from_numpy(task.first + np.floor(strata * task.length).astype(np.int64)),
    )


def heldout_rows(samples: int, tasks: Sequence[Task], count: int) -> npt.NDArray[np.int64]:
    """Which of so many held-out samples the fixed draws of tasks take, (K, count)."""
    return np.stack([_dealt(stream(HELDOUT_STREAM, task.first, task.last), samples, count) for task in tasks])


def _dealt(rng: np.random.Generator, samples: int, count: int) -> npt.NDArray[np.int64]:
    """All samples in turn, in another order every time."""
    rounds = math.ceil(count / samples)
    return np.concatenate([rng.permutation(samples) for _ in range(rounds)])[:count]


def standard_error(values: Array, rows: npt.NDArray[np.int64]) -> Array:
    """Standard error of the mean of values (..., M) over M draws, of which those of one held-out sample hang together.

    With residuals summed over the draws of each of the G samples, sqrt(G / (G - 1) sum_g r_g^2) / M (Liang and Zeger
    1986, Biometrika 73, p. 13); where every draw has a sample of its own that is the usual one.

    Args:
        values: NaN or infinite ones make the error NaN, as does a single sample.
        rows: the sample of each draw, (M,).
    """
    order = np.argsort(rows, kind="stable")
    first = np.flatnonzero(np.diff(rows[order], prepend=-1))
    if len(first) == 1:
        return np.full(values.shape[:-1], np.nan)
    with np.errstate(invalid="ignore", over="ignore"):
        residual = (values - values.mean(-1, keepdims=True))[..., order]
        squares = np.add.reduceat(residual, first, axis=-1) ** 2
        return np.asarray(np.sqrt(len(first) / (len(first) - 1) * squares.sum(-1)) / len(rows))


def standard_errors(values: Array, rows: npt.NDArray[np.int64]) -> Array:
    """Of the means of values (K, M) of K tasks, whose draws take the samples in ``rows`` (K, M); shape (K,)."""
    return np.stack([standard_error(*of_task) for of_task in zip(values, rows, strict=True)])


def heldout_draws(dataset: Dataset, tasks: Sequence[Task], count: int) -> HeldOutDraws:
    """Fixed draws of tasks, in one tensor each."""
    found = [task_draws(dataset, task, count) for task in tasks]
    return HeldOutDraws(*(torch.stack([getattr(draws, name) for draws in found]) for name in ("x0", "eps", "t")))


def check_draws(dataset: Dataset, tasks: int, count: int) -> None:
    """Raise InputError if the draws of so many tasks do not fit in memory, or have no standard error."""
    if len(dataset.heldout) < 2:
        raise InputError(f"{dataset.name} has one held-out sample; a standard error needs at least 2")
    # Data and noise, and what is known of them.
    each = (3 if dataset.law else 2) * tasks * dataset.dim * torch.float32.itemsize
    room = int(DRAWS_SHARE * free_bytes(torch.device("cpu")))
    if each * count > room:
        raise InputError(
            f"{count} held-out draws for each of {tasks} tasks in {dataset.dim} dimensions need "
            f"{each * count / 2**30:.2g} GiB, and {room / 2**30:.2g} are to be had; ask for fewer draws or tasks"
        )


def zero_losses(
    template: Denoiser, draws: HeldOutDraws, posterior: Tensor | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Losses (K, M) of the network that outputs zero: what an expert knows before it learns anything.

    Beside them, where E[eps | x_t] (K, M, *) is known, its squared distance to that, as for the experts.
    """
    device = template.alpha.device
    # With the baseline of the experts, or like them without: else an expert's own start would not be zero's.
    silent = Denoiser(
        _Zero(), template.process, template.prediction, template.data_std, baseline=template.baseline
    ).to(device)
    losses, excess = [], []
    with torch.no_grad(), full_precision():
        for k in range(len(draws.t)):
            x0, eps, t = (values[k].to(device) for values in (draws.x0, draws.eps, draws.t))
            losses.append(silent.eps_losses(x0, eps, t))
            if posterior is not None:
                alpha, sigma = silent.scales(t, x0)
                distance = silent.eps(alpha * x0 + sigma * eps, t) - posterior[k].to(device)
                excess.append(distance.square().flatten(1).sum(1))
    return torch.stack(losses).cpu().numpy(), torch.stack(excess).cpu().numpy() if excess else None


class _Zero(torch.nn.Module):
    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Floors:
    """The best denoiser known beforehand: the posterior mean of an exact law, else the best linear one.

    Args:
        dataset: its law, or its train samples, make the denoiser.
        process: of the noise.
    """

    def __init__(self, dataset: Dataset, process: Process) -> None:
        self.dataset, self.process = dataset, process

    @functools.cached_property
    def linear(self) -> Wiener:
        """Of the train samples, as many as can be decomposed in a minute."""
        flat = self.dataset.train.flatten(1)
        n, dim = flat.shape
        most = max(LEAST_DECOMPOSED, int(max(DECOMPOSED / dim**2, math.sqrt(DECOMPOSED / dim))))
        if n > most:
            flat = flat[torch.linspace(0, n - 1, most).long()]
        return Wiener(flat.double().numpy(), np.ones(len(flat)))

    def linear_losses(self, draws: HeldOutDraws) -> npt.NDArray[np.float64]:
        """Losses (M,) of the best linear denoiser on the draws of a task, its covariance shrunk as is best there."""
        alpha, sigma = (torch.from_numpy(a)[draws.t] for a in (self.process.alpha, self.process.sigma))
        x0, eps = draws.x0.flatten(1), draws.eps.flatten(1)
        return min(self.linear.losses(x0, eps, alpha, sigma, SHRINKAGES), key=torch.mean).numpy()

    def losses(self, draws: HeldOutDraws) -> tuple[npt.NDArray[np.float64], Tensor | None]:
        """Losses (M,) on the draws of a task, and E[eps | x_t] (M, *) where the law is exact."""
        law = self.dataset.law
        if law is None:
            return self.linear_losses(draws), None
        posterior = posterior_eps_at(law, self.process, draws.x0, draws.eps, draws.t)
        losses = (posterior - draws.eps.double()).square().flatten(1).sum(1)
        return losses.numpy(), posterior.float()


def posterior_eps_at(law: Law, process: Process, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """E[eps | x_t] in float64 at draws x0, eps (n, *) and integer t (n,)."""
    estimate = torch.empty(x0.shape, dtype=torch.float64)
    for step in t.unique().tolist():
        rows = t == step
        alpha, sigma = float(process.alpha[step]), float(process.sigma[step])
        x_t = (alpha * x0[rows].double() + sigma * eps[rows].double()).flatten(1)
        estimate[rows] = law.posterior_eps(x_t, alpha, sigma).reshape(x0[rows].shape)
    return estimate
