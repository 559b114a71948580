"""Held-out draws and what is known about them before anything is learned.

The draws (x0, eps, t) of a task are fixed: the same for every network, prediction, training seed and machine, and the
same whatever other tasks there are. On them stand the floor, the loss of the best denoiser known beforehand, and the
loss of the network that outputs zero.
"""

__all__ = ["HeldOutDraws", "floor_losses", "heldout_draws", "posterior_eps_at", "wiener", "zero_losses"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.datasets import Dataset
from difficulty.denoiser import Denoiser
from difficulty.laws import GaussianMixture, Law
from difficulty.process import Process
from difficulty.randomness import normal, stream
from difficulty.tasks import Task

HELDOUT_STREAM = 2  # first counter of the random streams; training draws begin with others (`experts.py`)


@dataclass(frozen=True, eq=False)
class HeldOutDraws:
    """The fixed draws of every task: x0 and eps (K, M, *), t (K, M)."""

    x0: Tensor
    eps: Tensor
    t: Tensor


def heldout_draws(dataset: Dataset, tasks: Sequence[Task], count: int) -> HeldOutDraws:
    """Fixed draws per task: held-out samples in turn, fresh noise, t stratified over the task.

    The same for every network, prediction and training seed, on every machine.
    """
    clean, noise, times = [], [], []
    for task in tasks:
        rng = stream(HELDOUT_STREAM, task.first, task.last)
        rounds = math.ceil(count / len(dataset.heldout))
        rows = np.concatenate([rng.permutation(len(dataset.heldout)) for _ in range(rounds)])[:count]
        strata = (rng.permutation(count) + 0.5) / count
        clean.append(dataset.heldout[torch.from_numpy(rows)])
        noise.append(normal((count, *dataset.shape), HELDOUT_STREAM, task.first, task.last, 1))
        times.append(torch.from_numpy(task.first + np.floor(strata * task.length).astype(np.int64)))
    return HeldOutDraws(torch.stack(clean), torch.stack(noise), torch.stack(times))


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
    with torch.no_grad():
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


def floor_losses(
    dataset: Dataset, process: Process, draws: HeldOutDraws
) -> tuple[npt.NDArray[np.float64], Tensor | None]:
    """Losses (K, M) of the best denoiser known beforehand, and E[eps | x_t] (K, M, *) where the law is exact."""
    law = dataset.law or wiener(dataset)
    estimate = posterior_eps_at(law, process, draws.x0.flatten(0, 1), draws.eps.flatten(0, 1), draws.t.flatten())
    losses = (estimate - draws.eps.flatten(0, 1).double()).square().flatten(1).sum(1).reshape(draws.t.shape)
    posterior = estimate.float().reshape(draws.x0.shape) if dataset.law else None
    return losses.numpy(), posterior


def wiener(dataset: Dataset) -> GaussianMixture:
    """The Gaussian of the train samples' mean and covariance; its posterior mean is the best linear denoiser."""
    flat = dataset.train.flatten(1).double().numpy()
    covariance = np.atleast_2d(np.cov(flat, rowvar=False))
    return GaussianMixture([1.0], flat.mean(0, keepdims=True), covariance[None])


def posterior_eps_at(law: Law, process: Process, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """E[eps | x_t] in float64 at draws x0, eps (n, *) and integer t (n,)."""
    estimate = torch.empty(x0.shape, dtype=torch.float64)
    for step in t.unique().tolist():
        rows = t == step
        alpha, sigma = float(process.alpha[step]), float(process.sigma[step])
        x_t = (alpha * x0[rows].double() + sigma * eps[rows].double()).flatten(1)
        estimate[rows] = law.posterior_eps(x_t, alpha, sigma).reshape(x0[rows].shape)
    return estimate
