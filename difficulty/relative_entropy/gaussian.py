"""Relative entropy of Gaussian data in closed form (F2).

Data with covariance eigenvalues lam_k and mean m have marginals with variances v_t = alpha_t^2 lam + sigma_t^2, so with
d = (v_from - v_t)/v_t,

    KL(p_from || p_t) = 1/2 sum_k (d_k - log(1 + d_k)) + 1/2 (alpha_from - alpha_t)^2 sum_k m_k^2 / v_t,k.

The profile (F5) of the same law, with b_k = s^2/(lam_k + s^2) and, for a mean, c_k = m_k^2/(lam_k + s^2):
    A = 2 sum b^2,   B = -2 sum b,   C = 2 D + sum c,   I_min = 2 sum (b + beta)^2 + beta^2 sum c,   beta = B/C.
"""

__all__ = ["gaussian_kl", "gaussian_profile"]

import numpy as np
import numpy.typing as npt

from difficulty.relative_entropy.pairs import Pairs, excess
from difficulty.relative_entropy.rates import beta_of

Array = npt.NDArray[np.float64]


def gaussian_kl(pairs: Pairs, eigenvalues: Array, mean: Array, *, reverse: bool = False) -> Array:
    """KL(p_from || p_t) in nats, or KL(p_t || p_from) with ``reverse``, shape (m,).

    Args:
        pairs: where.
        eigenvalues: variances along orthogonal axes, shape (D,), zero allowed.
        mean: the mean in the same axes, shape (D,).
    """
    first, second = (pairs.second, pairs.first) if reverse else (pairs.first, pairs.second)
    a1, s1, a2, s2 = (column[:, None] for column in (*first.T, *second.T))
    # The difference of variances is formed from differences of scales: v_from and v_t agree in their leading digits.
    change = (a1 - a2) * (a1 + a2) * eigenvalues + (s1 - s2) * (s1 + s2)
    v = a2**2 * eigenvalues + s2**2
    spread = 0.5 * excess(change / v).sum(1)
    return spread + 0.5 * ((a1 - a2) ** 2 * mean**2 / v).sum(1)


def gaussian_profile(tau: Array, eigenvalues: Array, mean: Array) -> Array:
    """A, B, C, I_min at tau = log s, shape (m, 4)."""
    s2 = np.exp(2 * tau)[:, None]
    v = eigenvalues + s2
    b, c = s2 / v, (mean**2 / v).sum(1)
    mixed, dilation = -2 * b.sum(1), 2.0 * len(eigenvalues) + c
    beta = beta_of(mixed, dilation)
    return np.stack([2 * (b**2).sum(1), mixed, dilation, 2 * ((b + beta[:, None]) ** 2).sum(1) + beta**2 * c], 1)
