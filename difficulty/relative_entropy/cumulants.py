"""What a fit lacks that no direction shows: tensors of third and fourth cumulants of the data against those of the fit.

In many dimensions a law of many independent parts, a rotated cube say, looks Gaussian in every direction that a fit or
its held-out tests look in, while its relative entropy is another one. Two questions are asked of them all together.

Is the fit refuted? The radius r = sum_i z_i^2 sums what is small along each axis. Its variance in the rows must be
that in draws of the fit, standardised as the rows are, to ``REFUTED`` standard deviations of such draws, at every
level: there is one law behind all of them, and parts that are too wide and too narrow may cancel at one. A law of one
radius for all axes has that of the data whatever they are, and of all laws with it the smallest fourth cumulants: there
their squared norm in the whitened rows must not exceed that in the draws by so much. Of independent parts it is about
D/3 times as large.

How much is lacking, if it is? With y = alpha x0 + sigma eps and z = y/sqrt(v), v = alpha^2 lam + sigma^2 along the
principal axes, noise adds nothing to the cumulants kappa_k for k > 2, and to first order in them

    p(z) = N(z) (1 + sum_k <kappa_k, H_k(z)>/k!),   k-th order part of the time score: -<omega kappa_k, H_k(z)>/k!,
    omega_{i..l} = w_i + ... + w_l,   w_i = 2 b_i dtau + dlog(alpha),   b_i = s^2/(lam_i + s^2).

Hermite polynomials are orthogonal, so 1/2 sum_k |omega kappa_k|^2/k!, with the difference of data and fit for kappa,
is a part of what is lacking. Far from a Gaussian the first order may overstate it, and refuse a fit that is right.
Norms of tensors need no tensor: for rows x, x' of covariance C

    <h_3(x), h_3(x')> = G^3 - 3 G (q + q') + 6 g + 3 G T_2,
    <h_4(x), h_4(x')> = G^4 - 6 G^2 (q + q' - T_2) + 24 G g
                        + 3 (q + q')^2 - 6 T_2 (q + q') - 12 (r + r') + 6 T_4 + 3 T_2^2

with G = x.x', g = x.C^2 x', q = x.C x, r = x.C^3 x, T_j = tr C^j has the mean |kappa_k|^2 (h_k is the Hermite tensor of
C), and its mean over pairs of different rows is unbiased but for the estimated C; what that adds is seen in draws of
the fit. The weights become a scale of the axes: by the inequality of the means (w_i + ... + w_l)^2 >=
k^2 (w_i ... w_l)^(2/k) where all have one sign; axes of the other sign are left out.
"""

__all__ = ["DRAWS", "lacking"]

import itertools
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.relative_entropy.pairs import Pairs
from difficulty.threads import together

Array = npt.NDArray[np.float64]

ORDERS = (3, 4)
# Standard deviations of the radius's variance beyond which a fit is refuted, and draws of the fit that give them.
REFUTED, DRAWS = 4.0, 12
# Rows of which all pairs are formed, and rows at a time: 6 MiB of float32.
MOST_ROWS, CHUNK = 3000, 512


def lacking(
    rows: Array, drawn: Sequence[Array], eigenvalues: Array, pairs: Pairs, *, gaussian: bool, one_radius: bool = False,
    threads: int = 1,
) -> Array:  # fmt: skip
    """Relative entropy that the cumulants of the rows have and those of a fit do not, nats, and its error, (m, 2).

    Both are 0 if neither the radius nor the fourth cumulants refute the fit, and at levels without an end.

    Args:
        rows: along principal axes, shape (n, r).
        drawn: ``DRAWS`` independent draws of the fit in the same axes, each of shape (n, r).
        eigenvalues: variances of the rows along the axes, shape (r,).
        pairs: m pairs of noise levels.
        gaussian: whether the fit is Gaussian and has no such cumulants.
        one_radius: whether it is a law of one radius for all axes.
        threads: levels, or draws, side by side.
    """
    x, *references = (_standard(part, eigenvalues) for part in (rows, *drawn))
    square, *expected_squares = (part**2 for part in (x, *references))
    found = np.zeros((len(pairs), 2))
    finite = np.flatnonzero(np.isfinite(pairs.tau) & np.isfinite(pairs.dtau) & np.isfinite(pairs.dlog_alpha))
    totals = eigenvalues + np.exp(2 * pairs.tau[finite])[:, None]
    by_radius = any(_refuted(square, expected_squares, total) for total in totals)
    if not by_radius and not (one_radius and _more_than_a_radius(x, references, eigenvalues, threads)):
        return found
    first, second, reference = (part[:MOST_ROWS] for part in (x, *references[:2]))
    other = None if gaussian else reference

    def beyond(j: int, total: Array) -> tuple[float, float]:
        w = 2 * math.exp(2 * pairs.tau[j]) / total * pairs.dtau[j] + pairs.dlog_alpha[j]
        value, error = _norms(first, other, eigenvalues / total, w, total)
        excess, its_error = _norms(second, other, eigenvalues / total, w, total)
        return value - excess, math.hypot(error, its_error)

    levels = zip(finite.tolist(), totals, strict=True)
    found[finite] = together([partial(beyond, *level) for level in levels], threads)
    return found


def _refuted(square: Array, expected_squares: Sequence[Array], total: Array) -> bool:
    """Whether the variance of the radius is not that of the draws at a level of variances ``total``."""
    expected = np.array([(part @ (1 / total)).var() for part in expected_squares])
    return bool(abs((square @ (1 / total)).var() - expected.mean()) > REFUTED * expected.std(ddof=1))


def _more_than_a_radius(x: Array, drawn: Sequence[Array], eigenvalues: Array, threads: int) -> bool:
    """Whether the squared norm of the fourth cumulants of whitened rows is beyond that of draws of the fit."""
    white = np.ones(x.shape[1])
    calls = [partial(_norm_squared, 4, [part[:MOST_ROWS] / np.sqrt(eigenvalues)], white) for part in (x, *drawn)]
    value, *expected = (norm for norm, _ in together(calls, threads))
    return bool(value - np.mean(expected) > REFUTED * np.std(expected, ddof=1))


def _norms(x: Array, y: Array | None, covariance: Array, w: Array, total: Array) -> tuple[float, float]:
    """1/2 sum_k |omega kappa_k|^2/k! of x, or of its difference to y, and its error."""
    # Of the two signs that one whose axes carry more.
    sign = np.sign(w[np.abs(w * covariance).argmax()])
    weight = np.where(np.sign(w) == sign, np.abs(w), 0.0)
    value, variance = 0.0, 0.0
    for k in ORDERS:
        scale = weight ** (1 / k)
        sides = [part * (scale / np.sqrt(total)) for part in (x, y) if part is not None]
        norm, error = _norm_squared(k, sides, covariance * scale**2)
        factor = 0.5 * k**2 / math.factorial(k)
        value, variance = value + factor * norm, variance + (factor * error) ** 2
    return value, math.sqrt(variance)


def _norm_squared(k: int, rows: list[Array], covariance: Array) -> tuple[float, float]:
    """|kappa_k of the first rows minus that of the second, if there are any|^2, and its error if that is 0."""
    c = torch.from_numpy(covariance).float()
    sides = [_side(torch.from_numpy(part).float(), c) for part in rows]
    n, total, square = len(rows[0]), 0.0, 0.0
    for first in range(0, n, CHUNK):
        kernel = torch.zeros(len(rows[0][first : first + CHUNK]), n - first)
        for a, b in itertools.product(sides, sides):
            left, right = tuple(value[first : first + CHUNK] for value in a), tuple(value[first:] for value in b)
            part = _kernel(k, left, right, c)
            kernel += part if a is b else -part
        # It is symmetric: what lies above the diagonal stands for all.
        kernel.triu_(1)
        total += 2 * float(kernel.double().sum())
        square += 2 * float(kernel.square().double().sum())
    pairs = n * (n - 1)
    return total / pairs, math.sqrt(2 * square) / pairs


def _side(x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    return x, x * c**2, (x.square() * c).sum(1), (x.square() * c**3).sum(1)


def _kernel(k: int, a: tuple[Tensor, ...], b: tuple[Tensor, ...], c: Tensor) -> Tensor:
    """The two inner products at the head of this module, (n, n')."""
    x, _, q, r = (part[:, None] if part.ndim == 1 else part for part in a)
    other, weighted, q_other, r_other = b
    gram, g = x @ other.T, x @ weighted.T
    both, t2 = q + q_other, float(c.square().sum())
    if k == 3:
        return gram * (gram.square() - 3 * both + 3 * t2) + 6 * g
    t4 = float((c**4).sum())
    square = gram.square()
    constant = 3 * both.square() - 6 * t2 * both - 12 * (r + r_other) + 6 * t4 + 3 * t2**2
    return square * (square - 6 * (both - t2)) + 24 * gram * g + constant


def _standard(rows: Array, eigenvalues: Array) -> Array:
    """The rows moved and turned so that their mean is 0 and their covariance diag(eigenvalues), exactly."""
    centred = rows - rows.mean(0)
    values, axes = np.linalg.eigh(centred.T @ centred / len(rows))
    return centred @ (axes / np.sqrt(values.clip(min=1e-300))) @ axes.T * np.sqrt(eigenvalues)
