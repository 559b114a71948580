"""Samplers in closed form for every process: from x_T = sigma_T eps down a grid of t to clean data.

One step goes from (alpha, sigma) to (alpha', sigma') with the estimates x0 and eps of the denoiser. The probability
flow is dx = x0 dalpha + eps dsigma along any process, so that siblings differ only in how they integrate it:

    ddim       x' = alpha' x0 + sigma' eps; Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0. This is Euler's
               step for EDM and for flow matching
    heun       x' = x + dalpha (x0 + x0')/2 + dsigma (eps + eps')/2, primes at Euler's step; Karras et al. 2022, alg. 1
    ancestral  x' ~ q(x' | x, x0), the Gaussian posterior; Ho et al. 2020, eq. 7

Start and added noise come from the seed alone, so that two networks are sampled with the same noise.
"""

__all__ = ["SAMPLERS", "draw_samples", "sampling_grid"]

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from difficulty.denoiser import Denoiser
from difficulty.errors import InputError, choose
from difficulty.process import Process
from difficulty.randomness import normal
from training.conditional import Guided, LabelledNetwork
from training.streams import PRIOR, SAMPLER

CHUNK = 1024  # samples per forward pass

Estimate = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Step = Callable[[Estimate, Process, Tensor, Tensor, int, int], Tensor]  # x, noise to add, t, next t


class Estimator(Protocol):
    """What sampling needs of a denoiser."""

    process: Process
    prediction: str

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Estimate of x0, shape of x_t."""


def _ddim(estimate: Estimate, process: Process, x: Tensor, noise: Tensor, t: int, s: int) -> Tensor:
    x0, eps = estimate(x, t)
    return float(process.alpha[s]) * x0 + float(process.sigma[s]) * eps


def _heun(estimate: Estimate, process: Process, x: Tensor, noise: Tensor, t: int, s: int) -> Tensor:
    x0, eps = estimate(x, t)
    euler = float(process.alpha[s]) * x0 + float(process.sigma[s]) * eps
    if s == 0:  # there is nothing to denoise at clean data
        return euler
    x0_next, eps_next = estimate(euler, s)
    d_alpha, d_sigma = float(process.alpha[s] - process.alpha[t]), float(process.sigma[s] - process.sigma[t])
    return x + d_alpha * 0.5 * (x0 + x0_next) + d_sigma * 0.5 * (eps + eps_next)


def _ancestral(estimate: Estimate, process: Process, x: Tensor, noise: Tensor, t: int, s: int) -> Tensor:
    x0, _ = estimate(x, t)
    if s == 0:
        return x0
    ratio = process.alpha[t] / process.alpha[s]
    kept = process.sigma[s] ** 2 / process.sigma[t] ** 2
    added = process.sigma[t] ** 2 - ratio**2 * process.sigma[s] ** 2
    mean = float(ratio * kept) * x + float(process.alpha[s] * added / process.sigma[t] ** 2) * x0
    return mean + float(np.sqrt(max(added * kept, 0.0))) * noise


SAMPLERS: Mapping[str, Step] = {"ddim": _ddim, "heun": _heun, "ancestral": _ancestral}


def sampling_grid(process: Process, steps: int, prediction: str) -> list[int]:
    """Timesteps from noisy to clean, ending in 0.

    A prediction from which x0 cannot be read where alpha = 0 starts one timestep below.

    Raises:
        InputError: if steps is not in 1..T.
    """
    if not 1 <= steps <= process.T:
        raise InputError(f"sampling steps must lie in 1..T = {process.T}, got {steps}")
    blind = process.alpha[-1] == 0 and prediction in ("eps", "score", "edm")
    start = process.T - 1 if blind else process.T
    inner = np.rint(np.linspace(start, 1, steps)).astype(int) if steps > 1 else np.array([start])
    return [*dict.fromkeys(inner.tolist()), 0]


@torch.no_grad()
def draw_samples(
    denoiser: Estimator,
    count: int,
    shape: tuple[int, ...],
    *,
    seed: int,
    method: str = "ddim",
    steps: int = 50,
    labels: Tensor | None = None,
    guidance: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Samples of the model.

    Args:
        denoiser: estimates x0; a ``Denoiser``, or anything like it if there are no labels.
        count: number of samples.
        shape: of one sample.
        seed: names the noise.
        method: a name in ``SAMPLERS``.
        steps: network evaluations, twice as many for heun.
        labels: wanted classes (count,) for a conditional denoiser.
        guidance: see `conditional.py`; 1 is the conditional model itself.

    Returns:
        float32 (count, *shape) on the CPU.

    Raises:
        InputError: if the method is unknown, steps does not fit, or labels are given to an unconditional denoiser.
    """
    step = choose("sampler", method, SAMPLERS)
    if labels is not None and not (isinstance(denoiser, Denoiser) and isinstance(denoiser.network, LabelledNetwork)):
        raise InputError("this model was trained without labels; sample it without them")
    process = denoiser.process
    grid = sampling_grid(process, steps, denoiser.prediction)
    start = float(process.sigma[grid[0]]) * normal((count, *shape), seed, PRIOR, 0, 0)

    models = [
        Guided(denoiser, labels[first : first + CHUNK].to(device), guidance)
        if labels is not None and isinstance(denoiser, Denoiser)
        else denoiser
        for first in range(0, count, CHUNK)
    ]
    x = start.to(device)
    for number, (t, s) in enumerate(pairwise(grid)):
        noise = normal((count, *shape), seed, SAMPLER, number, 0).to(device) if method == "ancestral" and s else x
        parts = zip(models, x.split(CHUNK), noise.split(CHUNK), strict=True)
        x = torch.cat([step(partial(_estimate, model), process, part, z, t, s) for model, part, z in parts])
    return x.cpu()


def _estimate(model: Estimator, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """(x0, eps) at one timestep for all samples."""
    x0 = model.x0(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device))
    return x0, (x - float(model.process.alpha[t]) * x0) / float(model.process.sigma[t])
