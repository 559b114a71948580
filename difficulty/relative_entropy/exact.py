"""Relative entropy of a law whose marginals are known in closed form.

A Gaussian has F2. A mixture in one dimension is integrated over its components (trapezoid rule, which converges
exponentially for such integrands), and a ring over its radius rho = |x_{1:2}|, since the marginal in its plane has

    p_t(rho) = rho/sigma^2 exp(-(rho^2 + alpha^2 r^2)/(2 sigma^2)) I0(alpha r rho/sigma^2)    (Rice)

and the other D - 2 axes, independent and without variance, add F2 and their part of the profile. Any other law takes
F1 with draws of it, a mixture's beside Gaussians of known moments (``mixture_means``); then the only error is that of
Monte Carlo. Common draws of (x0, eps) serve all pairs, so that the curve over t is smooth.
"""

__all__ = ["estimate_exact", "kl_of_law", "known_law"]

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.datasets import Dataset
from difficulty.errors import InputError
from difficulty.laws import GaussianMixture, Law, Ring, Scales
from difficulty.randomness import torch_generator
from difficulty.relative_entropy.estimate import Estimate, Settings, log_interval
from difficulty.relative_entropy.gaussian import gaussian_kl, gaussian_profile
from difficulty.relative_entropy.mixture_means import Draws, mixture_kl, mixture_rates
from difficulty.relative_entropy.montecarlo import kl_from_log_ratio, nonnegative_terms
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.rates import add_rates, rates_of_scores

Array = npt.NDArray[np.float64]

EXACT_STREAM = 11
# log s that stands for alpha = 0, where s is infinite.
TAU_AT_INFINITY = 30.0
# Places of the quadrature: 60 within a standard deviation resolve the boundary between components 9 of them away.
NODES, REACH = 1081, 9.0
# Gauss and Legendre's rule for the radius: so many nodes over at most 18 standard deviations leave rounding alone.
RADII, RADIUS_WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(200))

# Points (q, d) of the marginal at (alpha, sigma) and their weights (q,), which sum to 1.
Rule = Callable[[Scales], tuple[Tensor, Tensor]]


def known_law(dataset: Dataset) -> Law:
    """The data set's own law.

    Raises:
        InputError: if it is not known.
    """
    if dataset.law is None:
        raise InputError(f"the law of {dataset.name} is not known; use estimator 'auto' instead of 'exact'")
    return dataset.law


def estimate_exact(dataset: Dataset, pairs: Pairs, settings: Settings) -> Estimate:
    """KL of the data set's own law.

    Raises:
        InputError: if the law is not known.
    """
    law = known_law(dataset)
    m = len(pairs)
    if isinstance(law, GaussianMixture) and len(law.means) == 1:
        values, mean = law.eigenvalues[0].numpy(), law.rotated_means[0].numpy()
        kl, kl_reverse = gaussian_kl(pairs, values, mean), gaussian_kl(pairs, values, mean, reverse=True)
        se = np.zeros(m)
        tau = np.minimum(pairs.tau, TAU_AT_INFINITY)
        i_min = gaussian_profile(tau, values, mean)[:, 3]
    elif isinstance(law, GaussianMixture) and law.dim == 1:
        kl, kl_reverse, i_min = _integrated(law, pairs, lambda scales: _points(law, scales), 0)
        se = np.zeros(m)
    elif isinstance(law, Ring):
        plane = Ring(2, law.radius)
        kl, kl_reverse, i_min = _integrated(plane, pairs, lambda scales: _radii(plane, scales), law.dim - 2)
        se = np.zeros(m)
    else:
        kl, se, kl_reverse, i_min = kl_of_law(law, pairs, law_draws(law, settings.samples, settings.seed), settings)
    low, high = log_interval(kl, np.divide(se, kl, out=np.zeros(m), where=kl > 0))
    name = np.full(m, "exact", dtype=object)
    return Estimate(kl, kl_reverse, se, low, high, i_min, name, np.ones(m, bool), np.full(m, "", dtype=object))


def _integrated(law: Law, pairs: Pairs, rule: Rule, codimension: int) -> tuple[Array, Array, Array]:
    """kl, kl_reverse and I_min, each (m,), of a law and of so many independent axes at 0 without variance."""
    null = np.zeros(codimension)
    out = []
    for a, b in zip(pairs.first, pairs.second, strict=True):
        first, second = (float(a[0]), float(a[1])), (float(b[0]), float(b[1]))
        (x, w), (y, v) = rule(first), rule(second)
        out.append((_mean(law.log_ratio(x, first, second), w), _mean(law.log_ratio(y, second, first), v)))
    rates = np.full(len(pairs), np.nan)
    for i in np.flatnonzero(np.isfinite(pairs.tau)):
        tau, s = pairs.tau[[i]], float(np.exp(pairs.tau[i]))
        x, w = rule((1.0, s))
        flow, dilation = law.time_score_parts(x, 1.0, s)
        own = rates_of_scores(flow[None], dilation[None], w)
        rates[i] = add_rates([own, gaussian_profile(tau, null, null)])[0, 3]
    kl, kl_reverse = np.array(out).T
    return kl + gaussian_kl(pairs, null, null), kl_reverse + gaussian_kl(pairs, null, null, reverse=True), rates


def _mean(log_ratio: Tensor, weights: Tensor) -> float:
    """KL in nats from log-ratios at weighted points of the first law."""
    plain = float((weights * log_ratio).sum())
    # Nonnegative terms keep the digits of a small KL; over a long step the points do not reach where exp(-l) is large.
    return plain if plain > 1e-3 else float((weights * nonnegative_terms(log_ratio)).sum())


def _points(law: GaussianMixture, scales: Scales) -> tuple[Tensor, Tensor]:
    """Points (K q, 1) at fixed places within every component of the noisy mixture, and their weights (K q,)."""
    alpha, sigma = scales
    z = torch.linspace(-REACH, REACH, NODES, dtype=torch.float64)
    weights = (-0.5 * z.square()).exp()
    spread = (alpha**2 * law.eigenvalues + sigma**2).sqrt()
    x = alpha * law.means + spread * z
    return x.reshape(-1, 1), (law.log_weights.exp()[:, None] * weights / weights.sum()).flatten()


def _radii(plane: Ring, scales: Scales) -> tuple[Tensor, Tensor]:
    """Points (q, 2) on one ray from the centre of the ring's plane, and the weights (q,) of their radii."""
    alpha, sigma = scales
    low, high = max(alpha * plane.radius - REACH * sigma, 0.0), alpha * plane.radius + REACH * sigma
    rho = low + 0.5 * (high - low) * (RADII + 1)
    x = torch.stack([rho, torch.zeros_like(rho)], 1)
    weights = RADIUS_WEIGHTS * rho * plane.log_prob(x, alpha, sigma).exp()
    return x, weights / weights.sum()


def law_draws(law: Law, n: int, seed: int) -> Draws:
    """Clean samples and noise, each (n, D)."""
    generator = torch_generator(EXACT_STREAM, seed)
    component = None
    if isinstance(law, GaussianMixture):
        component = law.components(n, generator)
        x0 = law.sample_of(component, generator)
    else:
        x0 = law.sample(n, generator)
    return Draws(x0, torch.randn(x0.shape, dtype=torch.float64, generator=generator), component)


def kl_of_law(law: Law, pairs: Pairs, draws: Draws, settings: Settings) -> tuple[Array, Array, Array, Array]:
    """kl, se, kl_reverse and I_min of a law by Monte Carlo with draws of it."""
    finite = np.isfinite(pairs.tau)
    i_min = np.full(len(pairs), np.nan)
    if isinstance(law, GaussianMixture):
        steps = [(pairs.first, pairs.second), (pairs.second, pairs.first)]
        (kl, se), (kl_reverse, _) = mixture_kl(law, steps, draws, settings.progress)
        if finite.any():
            i_min[finite] = mixture_rates(law, pairs.tau[finite], draws)[0][:, 3]
        return kl, se, kl_reverse, i_min
    forward, backward = _log_ratios(law, pairs, draws, settings)
    (own, error), (reverse, _) = kl_from_log_ratio(forward), kl_from_log_ratio(backward)
    if finite.any():
        i_min[finite] = rates_of_scores(*time_scores(law, pairs.tau[finite], draws), 1 / len(draws.x0))[:, 3]
    return own.numpy(), error.numpy(), reverse.numpy(), i_min


def _log_ratios(law: Law, pairs: Pairs, draws: Draws, settings: Settings) -> tuple[Tensor, Tensor]:
    """log p_from/p_t at points of p_from, and log p_t/p_from at points of p_t, each (m, n)."""
    x0, eps = draws.x0, draws.eps
    forward, backward = [], []
    for i, (a, b) in enumerate(zip(pairs.first, pairs.second, strict=True)):
        first, second = (float(a[0]), float(a[1])), (float(b[0]), float(b[1]))
        forward.append(law.log_ratio(first[0] * x0 + first[1] * eps, first, second))
        backward.append(law.log_ratio(second[0] * x0 + second[1] * eps, second, first))
        settings.progress(i + 1, len(pairs))
    return torch.stack(forward), torch.stack(backward)


def time_scores(law: Law, tau: Array, draws: Draws) -> tuple[Tensor, Tensor]:
    """F and q at y = x0 + exp(tau) eps, each (m, n)."""
    scores = [law.time_score_parts(draws.x0 + s * draws.eps, 1.0, s) for s in np.exp(tau).tolist()]
    flow, dilation = (torch.stack(column) for column in zip(*scores, strict=True))
    return flow, dilation
