"""Relative entropy from a score: exact ones, those of a fit, or a trained denoiser's estimate of eps (F3, F4, F6, F9).

With eh = E[eps | x_t] and y = x_t/alpha = x0 + s eps,

    F = |eh|^2 - s div_y eh,    q = D - y.eh/s,    f = dtau F - dlog(alpha) q     (F3)
    KL = 1/2 E[f^2] - 1/12 E[f^3], everything at the log-midpoint                 (F4)

and for any approximate f on pairs (x0, eps) that it was not fitted to, with the conditional time score g, which is f
with eps in place of eh and its divergence D/s (F6):

    cross = 1/2 E[f g],    bound = 1/2 E[f g]^2/E[f^2],    slope = E[f g]/E[f^2].

The divergence of a network is exact for few dimensions and otherwise Hutchinson's estimate with Rademacher probes. The
square of one probe is biased, by factors of 10^6 at high noise, so E[f^2] is the U-statistic over at least two probes.
"""

__all__ = [
    "Cross",
    "coarse_log_ratio",
    "conditional_covariance",
    "conditional_scores",
    "cross_estimate",
    "kl_of_denoiser",
    "quadratic_kl",
    "time_score",
]

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from difficulty.errors import InputError
from difficulty.process import Process
from difficulty.randomness import stream
from difficulty.relative_entropy.pairs import Pairs, make_pairs

Array = npt.NDArray[np.float64]
# (x, alpha, sigma) -> F, q, each (n,)
Scores = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]

SCORE_STREAM = 37
# Up to this many dimensions the divergence is computed exactly, one backward pass each.
EXACT_DIVERGENCE = 16
LOW_SLOPE, UNUSABLE_SLOPE, UNUSABLE_ERROR = 0.8, 0.3, 0.5


@dataclass(frozen=True)
class Cross:
    """Held-out figures of an approximate time score (F6).

    Args:
        cross, cross_se: 1/2 E[f g] and its standard error, nats.
        bound: certified lower bound of the KL, nats.
        slope: E[f g]/E[f^2]; 1 where the score is calibrated.
    """

    cross: float
    cross_se: float
    bound: float
    slope: float


def time_score(flow: Tensor, dilation: Tensor, dtau: float, dlog_alpha: float) -> Tensor:
    """f = dtau F - dlog(alpha) q."""
    return dtau * flow - dlog_alpha * dilation


def quadratic_kl(f: Tensor) -> float:
    """KL in nats from the time score over a small step (F4), with the cubic term."""
    return float(0.5 * f.square().mean() - f.pow(3).mean() / 12)


def conditional_scores(x0: Tensor, eps: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """F and q of p(y | x0), which average to those of p(y); each (n,)."""
    square = eps.square().sum(1)
    return square - eps.shape[1], eps.shape[1] - square - (x0 * eps).sum(1) / s


def conditional_covariance(f: Tensor, g: Tensor) -> Tensor:
    """Mean of f g over the noise given x0, free of the noise of E[f|x0] E[g|x0], since E[g|x0] = 0; shape (..., n).

    Odd and even parts of opposite noise do not mix, which removes most of the Monte Carlo error at low noise.

    Args:
        f, g: shape (..., n, 2, p): n rows, opposite noise, p >= 2 draws.
    """
    odd = ((f[..., 0, :] - f[..., 1, :]) * (g[..., 0, :] - g[..., 1, :])).mean(-1) / 4
    even_f, even_g = f.mean(-2), g.mean(-2)
    centred = even_f - even_f.mean(-1, keepdim=True)
    return odd + (centred * even_g).sum(-1) / (f.shape[-1] - 1)


def cross_estimate(f: Tensor, g: Tensor) -> Cross:
    """F6 from time scores of shape (n, 2, p), as in ``conditional_covariance``."""
    terms = conditional_covariance(f, g)
    product, energy = float(terms.mean()), float(f.square().mean())
    bound = 0.5 * max(product, 0.0) ** 2 / energy
    return Cross(0.5 * product, 0.5 * float(terms.std()) / len(terms) ** 0.5, bound, product / energy)


def coarse_log_ratio(
    scores: Scores, x: Tensor, first: tuple[float, float], second: tuple[float, float], nodes: int = 8
) -> Tensor:
    """log p_first(x) - log p_second(x) at fixed x for a step of any size (F9), shape (n,).

    F dtau - q dlog(alpha) is an exact differential at fixed x, so any path between the two levels serves; this one is
    straight in (tau, log alpha), with Gauss-Legendre nodes.
    """
    (a1, s1), (a2, s2) = first, second
    points, weights = np.polynomial.legendre.leggauss(nodes)
    tau = np.array([np.log(s1 / a1), np.log(s2 / a2)])
    log_alpha = np.log([a1, a2])
    total = torch.zeros(len(x), dtype=x.dtype)
    for u, w in zip(0.5 * (points + 1), 0.5 * weights, strict=True):
        alpha = float(np.exp(log_alpha @ [1 - u, u]))
        sigma = alpha * float(np.exp(tau @ [1 - u, u]))
        total += w * time_score(*scores(x, alpha, sigma), float(np.diff(tau)[0]), float(np.diff(log_alpha)[0]))
    return -total


def kl_of_denoiser(
    eps_model: Callable[[Tensor, Tensor], Tensor],
    heldout: Tensor,
    process: Process,
    t: npt.ArrayLike,
    *,
    rows: int = 512,
    draws: int = 2,
    probes: int = 2,
    seed: int = 0,
) -> pd.DataFrame:
    """KL(p_{t-1} || p_t) from a trained denoiser, asked at real t in the middle of each pair.

    Args:
        eps_model: (x_t (B, *), t (B,) real) -> estimate of eps, of the shape of x_t; differentiable in x_t.
        heldout: samples that it was not trained on, (n, *).
        process: that it was trained for.
        t: of the pairs (t-1, t).
        rows: at most so many held-out samples.
        draws: noise draws per sample and sign, at least 2.
        probes: of Hutchinson's estimate, at least 2; unused up to 16 dimensions.
        seed: of noise and probes.

    Returns:
        A row per pair: t, kl (F4), cross, cross_se, bound, slope (F6), estimate (kl where the slope is at least 0.8,
        else cross), valid, reason.

    Raises:
        InputError: if fewer than two draws or probes are asked for.
    """
    if draws < 2 or probes < 2:
        raise InputError(f"draws and probes must be at least 2 each, got {draws} and {probes}")
    pairs = make_pairs(process, np.asarray(t).tolist())
    x0 = heldout[:rows].double()
    table = []
    for i in range(len(pairs)):
        noise = stream(SCORE_STREAM, seed, i).standard_normal((len(x0), 1, draws, *x0.shape[1:]))
        eps = torch.from_numpy(np.concatenate([noise, -noise], 1))
        table.append({"t": int(pairs.t[i])} | _one_pair(eps_model, x0, eps, process, pairs, i, probes, seed))
    return pd.DataFrame(table)


def _one_pair(
    eps_model: Callable[[Tensor, Tensor], Tensor], x0: Tensor, eps: Tensor, process: Process, pairs: Pairs, i: int,
    probes: int, seed: int,
) -> dict[str, object]:  # fmt: skip
    middle = float(process.t_at(pairs.log_snr[i]))
    alpha, sigma = (float(v) for v in process.alpha_sigma(middle))
    s, dtau, dlog = sigma / alpha, float(pairs.dtau[i]), float(pairs.dlog_alpha[i])
    shape = eps.shape[:3]
    clean = x0[:, None, None].expand_as(eps).flatten(0, 2)
    noise = eps.flatten(0, 2)
    x_t = alpha * clean + sigma * noise
    times = torch.full((len(x_t),), middle, dtype=torch.float64)
    eh, divergences = _divergences(eps_model, x_t, times, probes, seed, i)
    x_t, flat = x_t.detach(), eh.flatten(1)
    dilation = flat.shape[1] - (x_t / alpha).flatten(1).mul(flat).sum(1) / s
    # div_y = alpha div_x, so s div_y = sigma div_x.
    f = torch.stack([time_score(flat.square().sum(1) - sigma * d, dilation, dtau, dlog) for d in divergences])
    m = len(f)
    # U-statistic over probes: no term is the square of one probe's error.
    second = (f.sum(0).square() - f.square().sum(0)) / (m * (m - 1)) if m > 1 else f[0].square()
    mean = f.mean(0)
    g = time_score(*conditional_scores(clean.flatten(1), noise.flatten(1), s), dtau, dlog)
    terms = conditional_covariance(mean.reshape(shape), g.reshape(shape))
    product, energy = float(terms.mean()), float(second.mean())
    cross, cross_se = 0.5 * product, 0.5 * float(terms.std()) / len(terms) ** 0.5
    kl = 0.5 * energy - float(mean.pow(3).mean()) / 12
    slope = product / energy if energy > 0 else 0.0
    bound = 0.5 * max(product, 0.0) ** 2 / energy if energy > 0 else 0.0
    usable = slope >= UNUSABLE_SLOPE and cross_se <= UNUSABLE_ERROR * cross
    return {
        "kl": kl, "cross": cross, "cross_se": cross_se, "bound": bound, "slope": slope,
        "estimate": kl if slope >= LOW_SLOPE else cross, "valid": usable,
        "reason": "" if usable else "the denoiser's time score is not calibrated here; only the lower bound holds (F6)",
    }  # fmt: skip


def _divergences(
    eps_model: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, probes: int, seed: int, pair: int
) -> tuple[Tensor, list[Tensor]]:
    """eh (B, *) and its divergence in x: once exactly, or one Hutchinson estimate per probe, each (B,)."""
    x = x.requires_grad_(True)
    dim = x[0].numel()
    with torch.enable_grad():
        eh = eps_model(x, t)
        if dim <= EXACT_DIVERGENCE:
            flat = eh.flatten(1)
            total = torch.zeros(len(x), dtype=x.dtype)
            for k in range(dim):
                total += torch.autograd.grad(flat[:, k].sum(), x, retain_graph=True)[0].flatten(1)[:, k].double()
            return eh.detach().double(), [total]
        found = []
        for p in range(probes):
            signs = stream(SCORE_STREAM, seed, pair, p + 1).integers(0, 2, x.shape) * 2.0 - 1.0
            v = torch.from_numpy(signs)
            gradient = torch.autograd.grad((eh * v.to(eh.dtype)).sum(), x, retain_graph=True)[0]
            found.append((gradient.double() * v).flatten(1).sum(1))
    return eh.detach().double(), found
