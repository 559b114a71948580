"""Samplers for every process: from x_T = sigma_T eps down a grid of t to clean data.

The probability flow is dx = x0 dalpha + eps dsigma along any process, with the denoiser's estimates x0 and eps. In the
coordinate y = x/alpha, s = sigma/alpha it is dy = eps ds. Siblings differ in how they integrate it and on which grid:

    ddim          x' = alpha' x0 + sigma' eps; Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0
    euler         x' = x + dalpha x0 + dsigma eps, Euler's step along a flow's velocity (Lipman et al. 2023, arXiv
                  2210.02747); as x = alpha x0 + sigma eps it is ddim's, and the two names share one function
    heun          x' = x + dalpha (x0 + x0')/2 + dsigma (eps + eps')/2, primes at Euler's step: Heun for flows
    edm-heun      Heun's step of dy = eps ds, even in s^(1/7); Karras et al. 2022, arXiv 2206.00364, alg. 1 and eq. 5
    ancestral     x' ~ q(x' | x, x0), the Gaussian posterior; Ho et al. 2020, eq. 7
    dpm-solver++  second-order multistep; Lu et al. 2022, arXiv 2211.01095, alg. 2, by the scheduler of diffusers

All but edm-heun take steps of equal width in t. What divides by alpha (edm-heun, dpm-solver++) or cannot read x0 where
alpha = 0 (prediction of eps or score) starts one timestep below such a T. Timesteps are whole numbers: a network
knows no others. Start and added noise come from the seed alone, so that two networks are sampled with the same noise.
"""

__all__ = ["SAMPLERS", "Sampler", "draw_samples", "sampling_grid"]

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from difficulty.denoiser import Denoiser
from difficulty.errors import InputError, choose
from difficulty.process import Array, Process
from difficulty.randomness import check_seed, normal
from training.conditional import Condition, ConditionalNetwork, Guided
from training.streams import PRIOR, SAMPLER

CHUNK = 1024  # samples per forward pass
STEPS = 50  # unless asked for
KARRAS_RHO = 7.0

Estimate = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # x, t -> x0, eps
Noise = Callable[[int], Tensor]  # number of the step -> standard normal of the shape of x
Solve = Callable[[Estimate, Process, list[int], Tensor, Noise], Tensor]


class Estimator(Protocol):
    """What sampling needs of a denoiser."""

    process: Process
    prediction: str

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Estimate of x0, shape of x_t."""


def _euler(estimate: Estimate, process: Process, grid: list[int], x: Tensor, noise: Noise) -> Tensor:
    for t, s in pairwise(grid):
        x0, eps = estimate(x, t)
        x = float(process.alpha[s]) * x0 + float(process.sigma[s]) * eps
    return x


def _heun(estimate: Estimate, process: Process, grid: list[int], x: Tensor, noise: Noise) -> Tensor:
    for t, s in pairwise(grid):
        x0, eps = estimate(x, t)
        euler = float(process.alpha[s]) * x0 + float(process.sigma[s]) * eps
        if s == 0:  # there is nothing to denoise at clean data
            return euler
        x0_next, eps_next = estimate(euler, s)
        d_alpha, d_sigma = float(process.alpha[s] - process.alpha[t]), float(process.sigma[s] - process.sigma[t])
        x = x + d_alpha * 0.5 * (x0 + x0_next) + d_sigma * 0.5 * (eps + eps_next)
    return x


def _edm_heun(estimate: Estimate, process: Process, grid: list[int], x: Tensor, noise: Noise) -> Tensor:
    for t, s in pairwise(grid):
        x0, eps = estimate(x, t)
        euler = float(process.alpha[s]) * x0 + float(process.sigma[s]) * eps
        if s == 0:
            return euler
        _, eps_next = estimate(euler, s)
        d_scale = float(process.sigma[s] / process.alpha[s] - process.sigma[t] / process.alpha[t])
        x = euler + float(process.alpha[s]) * d_scale * 0.5 * (eps_next - eps)
    return x


def _ancestral(estimate: Estimate, process: Process, grid: list[int], x: Tensor, noise: Noise) -> Tensor:
    for number, (t, s) in enumerate(pairwise(grid)):
        x0, _ = estimate(x, t)
        if s == 0:
            return x0
        ratio = process.alpha[t] / process.alpha[s]
        kept = process.sigma[s] ** 2 / process.sigma[t] ** 2
        added = process.sigma[t] ** 2 - ratio**2 * process.sigma[s] ** 2
        mean = float(ratio * kept) * x + float(process.alpha[s] * added / process.sigma[t] ** 2) * x0
        x = mean + float(np.sqrt(max(added * kept, 0.0))) * noise(number)
    return x


def _dpm_solver(estimate: Estimate, process: Process, grid: list[int], x: Tensor, noise: Noise) -> Tensor:
    try:
        from diffusers import DPMSolverMultistepScheduler
    except ImportError:
        raise InputError("sampler 'dpm-solver++' needs diffusers; install denoising-difficulty[diffusers]") from None
    # The scheduler works on variance-preserving scales. Every process is one after division by sqrt(alpha^2 + sigma^2),
    # which changes no log-SNR, and it is given the sigma/alpha of the grid instead of its own float32 table.
    scale = np.hypot(process.alpha, process.sigma)
    scheduler: Any = DPMSolverMultistepScheduler(prediction_type="sample", algorithm_type="dpmsolver++", solver_order=2)
    scheduler.set_timesteps(timesteps=[t - 1 for t in grid[:-1]])
    scheduler.sigmas = torch.tensor([process.sigma[t] / process.alpha[t] for t in grid], dtype=torch.float32)
    x = x / float(scale[grid[0]])
    for t in grid[:-1]:
        x0, _ = estimate(float(scale[t]) * x, t)
        x = scheduler.step(x0, t - 1, x, return_dict=False)[0]
    return x


def _even_in_t(process: Process, start: int, steps: int) -> Array:
    return np.linspace(start, 1, steps)


def _karras(process: Process, start: int, steps: int) -> Array:
    """t at which sigma/alpha is that of Karras et al. 2022, eq. 5, between those of start and t = 1."""
    first, last = (float(process.sigma[t] / process.alpha[t]) ** (1 / KARRAS_RHO) for t in (start, 1))
    inner = process.t_at(-2 * KARRAS_RHO * np.log(np.linspace(first, last, steps)[1:-1]))
    return np.concatenate([[start], inner, [1]])


@dataclass(frozen=True)
class Sampler:
    """A way from noise to data.

    Args:
        solve: integrates from x at the first t of the grid to t = 0.
        spacing: (process, start, steps) -> real t from start to 1, shape (steps,), steps >= 2.
        divides_by_alpha: whether it cannot start where alpha = 0.
    """

    solve: Solve
    spacing: Callable[[Process, int, int], Array] = _even_in_t
    divides_by_alpha: bool = False


SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler(_euler),
    "euler": Sampler(_euler),
    "heun": Sampler(_heun),
    "edm-heun": Sampler(_edm_heun, _karras, divides_by_alpha=True),
    "ancestral": Sampler(_ancestral),
    "dpm-solver++": Sampler(_dpm_solver, divides_by_alpha=True),
}


def sampling_grid(process: Process, steps: int, prediction: str, method: str = "ddim") -> list[int]:
    """Timesteps from noisy to clean, ending in 0; neighbours that round to one timestep are one step.

    Raises:
        InputError: if the method is unknown or steps is not in 1..T.
    """
    sampler = choose("sampler", method, SAMPLERS)
    if not 1 <= steps <= process.T:
        raise InputError(f"sampling steps must lie in 1..T = {process.T}, got {steps}")
    blind = sampler.divides_by_alpha or prediction.partition(":")[0] in ("eps", "score")
    start = process.noisiest if blind else process.T
    inner = np.rint(sampler.spacing(process, start, steps)).astype(int) if steps > 1 else np.array([start])
    return [*dict.fromkeys(inner.tolist()), 0]


@torch.no_grad()
def draw_samples(
    denoiser: Estimator,
    count: int,
    shape: tuple[int, ...],
    *,
    seed: int,
    method: str = "ddim",
    steps: int | None = None,
    condition: Condition | None = None,
    guidance: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Samples of the model.

    Args:
        denoiser: estimates x0; a ``Denoiser``, or anything like it if there is no condition.
        count: number of samples.
        shape: of one sample.
        seed: names the noise.
        method: a name in ``SAMPLERS``.
        steps: steps of the grid, by default 50, or T where that is less; each takes one network evaluation, with heun
            and edm-heun two.
        condition: wanted classes (count,) or captions for a conditional denoiser; None samples it without.
        guidance: see `conditional.py`; 1 is the conditional model itself.

    Returns:
        float32 (count, *shape) on the CPU.

    Raises:
        InputError: if the method is unknown, steps does not fit, the seed is negative, a condition is given to an
            unconditional denoiser, guidance is not finite or asked for without a condition, or the method needs a
            package that is missing.
    """
    check_seed(seed)
    if not math.isfinite(guidance):
        raise InputError(f"guidance must be a finite number, got {guidance}")
    if condition is None and guidance != 1:
        raise InputError(f"guidance {guidance:g} needs a condition to guide towards; this model is sampled without one")
    told = isinstance(denoiser, Denoiser) and isinstance(denoiser.network, ConditionalNetwork)
    if condition is not None and not told:
        raise InputError("this model was trained without a condition; sample it without one")
    process = denoiser.process
    grid = sampling_grid(process, min(STEPS, process.T) if steps is None else steps, denoiser.prediction, method)
    models = [
        Guided(denoiser, condition[first : first + CHUNK].to(device), guidance)
        if condition is not None and isinstance(denoiser, Denoiser)
        else denoiser
        for first in range(0, count, CHUNK)
    ]

    def estimate(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        parts = zip(models, x.split(CHUNK), strict=True)
        x0 = torch.cat([
            model.x0(part, torch.full((len(part),), t, dtype=torch.int64, device=part.device)) for model, part in parts
        ])  # fmt: skip
        return x0, (x - float(process.alpha[t]) * x0) / float(process.sigma[t])

    def noise(number: int) -> Tensor:
        return normal((count, *shape), seed, SAMPLER, number, 0).to(device)

    start = float(process.sigma[grid[0]]) * normal((count, *shape), seed, PRIOR, 0, 0)
    return SAMPLERS[method].solve(estimate, process, grid, start.to(device), noise).cpu()
