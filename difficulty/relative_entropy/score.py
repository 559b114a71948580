"""Relative entropy from time scores: exact ones, those of a fit, or those of a denoiser (F3, F4, F6, F9).

With eh = E[eps | x_t] and y = x_t/alpha = x0 + s eps,

    F = |eh|^2 - s div_y eh,    q = D - y.eh/s,    f = dtau F - dlog(alpha) q     (F3)
    KL = 1/2 E[f^2] - 1/12 E[f^3], everything at the log-midpoint                 (F4)

and for any approximate f on pairs (x0, eps) that it was not fitted to, with the conditional time score g, which is f
with eps in place of eh and its divergence D/s (F6):

    cross = 1/2 E[f g],    bound = 1/2 E[f g]^2/E[f^2],    slope = E[f g]/E[f^2].

Over a step of any size the log-ratio is the integral of -f at fixed x (F9).
"""

__all__ = [
    "GAUSS_NODES",
    "LARGEST_STEP",
    "Cross",
    "coarse_log_ratio",
    "conditional_covariance",
    "conditional_scores",
    "cross_estimate",
    "quadratic_kl",
    "time_score",
]

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
# (x, alpha, sigma) -> F, q, each (n,)
Scores = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]

# Places in [0, 1] and weights of Gauss and Legendre's rule with 8 nodes.
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(8)
GAUSS_NODES = (0.5 * (_POINTS + 1), 0.5 * _WEIGHTS)
# Step of log s beyond which the small-step formula F4 is not relied on.
LARGEST_STEP = 0.3


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
    scores: Scores,
    x: Tensor,
    first: tuple[float, float],
    second: tuple[float, float],
    nodes: tuple[Array, Array] = GAUSS_NODES,
) -> Tensor:
    """log p_first(x) - log p_second(x) at fixed x for a step of any size (F9), shape (n,).

    F dtau - q dlog(alpha) is an exact differential at fixed x, so any path between the two levels serves; this one is
    straight in (tau, log alpha).

    Args:
        scores: (x, alpha, sigma) -> F, q, each (n,).
        x: points, shape (n, D).
        first, second: (alpha, sigma) of the two levels.
        nodes: places along the path in [0, 1] and weights that add up to 1, each (k,).
    """
    (a1, s1), (a2, s2) = first, second
    tau = np.array([np.log(s1 / a1), np.log(s2 / a2)])
    log_alpha = np.log([a1, a2])
    total = torch.zeros(len(x), dtype=x.dtype)
    for u, w in zip(*nodes, strict=True):
        alpha = float(np.exp(log_alpha @ [1 - u, u]))
        sigma = alpha * float(np.exp(tau @ [1 - u, u]))
        total += w * time_score(*scores(x, alpha, sigma), float(np.diff(tau)[0]), float(np.diff(log_alpha)[0]))
    return -total
