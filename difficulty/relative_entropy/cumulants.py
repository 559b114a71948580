"""What a fit lacks that no direction shows: tensors of third and fourth cumulants of the data against those of the fit.

In many dimensions a law of many independent parts, a rotated cube say, looks Gaussian in every direction that a fit or
its held-out tests look in, while its relative entropy is another one. Two questions are asked of them all together.

Is the fit refuted? The radius r = sum_i z_i^2 sums what is small along each axis. Its variance in the rows must be that
in draws of the fit, standardised as the rows are, to ``REFUTED`` standard deviations of such draws.

How much is lacking, if it is? With y = alpha x0 + sigma eps and z = y/sqrt(v), v = alpha^2 lam + sigma^2 along the
principal axes, noise adds nothing to the cumulants kappa_k for k > 2, and to first order in them

    p(z) = N(z) (1 + sum_k <kappa_k, H_k(z)>/k!),   k-th order part of the time score: -<omega kappa_k, H_k(z)>/k!,
    omega_{i..l} = w_i + ... + w_l,   w_i = 2 b_i dtau + dlog(alpha),   b_i = s^2/(lam_i + s^2).

Hermite polynomials are orthogonal, so 1/2 sum_k |omega kappa_k|^2/k!, with the difference of data and fit for kappa, is
a part of what is lacking. Norms of tensors need no tensor: with h_k^A the Hermite
tensor of covariance A, and rows x of covariance A, x' of covariance C,

    <h_3^A(x), h_3^C(x')> = G^3 - 3 G (q + q') + 6 g + 3 G T_1,
    <h_4^A(x), h_4^C(x')> = G^4 - 6 G^2 (q + q' - T_1) + 24 G g
                            + 3 (q + q')^2 - 6 T_1 (q + q') - 12 (r + r') + 6 T_2 + 3 T_1^2

where G = x.x', g = x.A C x', q = x.C x, q' = x'.A x', r = x.C A C x, r' = x'.A C A x', T_j = tr (A C)^j. With A = C it
has the mean |kappa_k|^2, and its mean over pairs of different rows is unbiased but for the estimated C; what that adds
is seen in draws of the fit. The weights become a scale of the axes: by the inequality of the means (w_i + ... + w_l)^2
>= k^2 (w_i ... w_l)^(2/k) where all have one sign; axes of the other sign are left out.

How far does the first order hold? Far from a Gaussian, as where modes stand apart, it overstates without a limit. With
h(z) = sum_k <omega kappa_k, H_k(z)>/k!, what is lacking is at least 1/2 E[delta h]^2/Var[h], delta the missing time
score. Expectation and variance are both sum_k |omega kappa_k|^2/k! near N; the variance is measured under the data
themselves, from noised rows z and two different clean ones for kappa, and what is lacking shrinks by the factor by
which it is larger.
"""

__all__ = ["DRAWS", "lacking"]

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.randomness import stream
from difficulty.relative_entropy.pairs import Pairs

Array = npt.NDArray[np.float64]

ORDERS = (3, 4)
# Standard deviations of the radius's variance beyond which a fit is refuted, and draws of the fit that give them.
REFUTED, DRAWS = 4.0, 12
# Rows of which all pairs are formed, and rows at a time: 6 MiB of float32.
MOST_ROWS, CHUNK = 3000, 512
# Fewer do for Var[h], of which a factor matters and no percent.
SOME_ROWS, NOISE_STREAM = 2000, 59


def lacking(rows: Array, drawn: Sequence[Array], eigenvalues: Array, pairs: Pairs, *, gaussian: bool) -> Array:
    """Relative entropy that the cumulants of the rows have and those of a fit do not, nats, and its error, (m, 2).

    Both are 0 where the radius does not refute the fit, and at levels without an end.

    Args:
        rows: along principal axes, shape (n, r).
        drawn: ``DRAWS`` independent draws of the fit in the same axes, each of shape (n, r).
        eigenvalues: variances of the rows along the axes, shape (r,).
        pairs: m pairs of noise levels.
        gaussian: whether the fit is Gaussian and has no such cumulants.
    """
    x, *references = (_standard(part, eigenvalues) for part in (rows, *drawn))
    square, *expected_squares = (part**2 for part in (x, *references))
    found = np.zeros((len(pairs), 2))
    for j, (tau, dtau, dlog_alpha) in enumerate(zip(pairs.tau, pairs.dtau, pairs.dlog_alpha, strict=True)):
        if not (np.isfinite(tau) and np.isfinite(dtau) and np.isfinite(dlog_alpha)):
            continue
        total = eigenvalues + math.exp(2 * tau)
        expected = np.array([(part @ (1 / total)).var() for part in expected_squares])
        if abs((square @ (1 / total)).var() - expected.mean()) > REFUTED * expected.std(ddof=1):
            w = 2 * math.exp(2 * tau) / total * dtau + dlog_alpha
            first, second, reference = (part[:MOST_ROWS] for part in (x, *references[:2]))
            level = _Level.of(eigenvalues, total, w)
            value, error = level.norms(first, None if gaussian else reference)
            excess, its_error = level.norms(second, None if gaussian else reference)
            lack = value - excess
            share = level.certain(lack, first, None if gaussian else reference) if lack > 0 else 1.0
            found[j] = share * lack, share * math.hypot(error, its_error)
    return found


@dataclass(frozen=True, eq=False)
class _Level:
    """One noise level; rows are divided by ``deviation`` per axis.

    Args:
        eigenvalues: lam, (r,).
        deviation: sqrt(v), (r,).
        weight: |w| of the axes of one sign, 0 for the others, (r,).
    """

    eigenvalues: Array
    deviation: Array
    weight: Array

    @classmethod
    def of(cls, eigenvalues: Array, total: Array, w: Array) -> "_Level":
        # Of the two signs that one whose axes carry more.
        sign = np.sign(w[np.abs(w * eigenvalues / total).argmax()])
        return cls(eigenvalues, np.sqrt(total), np.where(np.sign(w) == sign, np.abs(w), 0.0))

    def norms(self, x: Array, y: Array | None) -> tuple[float, float]:
        """1/2 sum_k |omega kappa_k|^2/k! of x, or of its difference to y, and its error if it is 0."""
        value, variance = 0.0, 0.0
        for k in ORDERS:
            norm, error = self._norm_squared(k, [part for part in (x, y) if part is not None])
            factor = 0.5 * k**2 / math.factorial(k)
            value, variance = value + factor * norm, variance + (factor * error) ** 2
        return value, math.sqrt(variance)

    def _norm_squared(self, k: int, rows: list[Array]) -> tuple[float, float]:
        scale = self.weight ** (1 / k)
        c = _tensor(self.eigenvalues / self.deviation**2 * scale**2)
        sides = [_side(_tensor(part * (scale / self.deviation)), c, c) for part in rows]
        n, total, square = len(rows[0]), 0.0, 0.0
        for first in range(0, n, CHUNK):
            kernel = torch.zeros(len(rows[0][first : first + CHUNK]), n)
            for a, b in itertools.product(sides, sides):
                part = _kernel(k, _chunk(a, first), b, c, c)
                kernel += part if a is b else -part
            kernel.diagonal(first).zero_()
            total += float(kernel.double().sum())
            square += float(kernel.square().double().sum())
        pairs = n * (n - 1)
        return total / pairs, math.sqrt(2 * square) / pairs

    def certain(self, lack: float, x: Array, y: Array | None) -> float:
        """Share of what seems lacking that Var[h] under the data leaves, in (0, 1]."""
        x = x[:SOME_ROWS]
        s = np.sqrt((self.deviation**2 - self.eigenvalues).clip(min=0.0))
        noised = x + s * stream(NOISE_STREAM, len(x)).standard_normal(x.shape)
        clean = [part[: len(x)] for part in (x, y) if part is not None]
        n, kernel = len(x), torch.zeros(len(x), len(x))
        for k in ORDERS:
            # The weights once: half of them on each side.
            scale = self.weight ** (0.5 / k)
            a, c = _tensor(scale**2), _tensor(self.eigenvalues / self.deviation**2 * scale**2)
            left = _side(_tensor(noised * (scale / self.deviation)), a, c)
            for sign, part in zip((1, -1), clean, strict=False):
                right = _side(_tensor(part * (scale / self.deviation)), c, a)
                kernel += sign * k / math.factorial(k) * _kernel(k, left, right, a, c)
        kernel.fill_diagonal_(0)
        mean = float(kernel.double().mean())
        # Row i and the clean rows j, k make K_ij K_ik: error of the rows i, and of the pairs (j, k).
        row = (kernel.double().sum(1).square() - kernel.double().square().sum(1)) / ((n - 1) * (n - 2))
        pair = (kernel.T @ kernel / n).fill_diagonal_(0)
        error = math.hypot(float(row.std()) / math.sqrt(n), math.sqrt(2 * float(pair.double().square().mean())) / n)
        # A standard error less than measured: the data must show that h varies more than it does near a Gaussian.
        return 2 * lack / max(2 * lack, float(row.mean()) - mean**2 - error)


_Side = tuple[Tensor, Tensor, Tensor, Tensor]


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(values).float()


def _side(x: Tensor, own: Tensor, other: Tensor) -> _Side:
    """Rows of covariance ``own`` that meet rows of covariance ``other``: x, A C x, q and r of this module's head."""
    square = x.square()
    return x, x * (own * other), square @ other, square @ (other**2 * own)


def _chunk(side: _Side, first: int) -> _Side:
    x, weighted, q, r = (part[first : first + CHUNK] for part in side)
    return x, weighted, q, r


def _kernel(k: int, left: _Side, right: _Side, a: Tensor, c: Tensor) -> Tensor:
    """The two inner products at the head of this module, (n, n'), of rows of covariance a and rows of covariance c."""
    x, _, q, r = left
    other, weighted, q_other, r_other = right
    gram, g = x @ other.T, x @ weighted.T
    both, t1 = q[:, None] + q_other, float((a * c).sum())
    if k == 3:
        return gram * (gram.square() - 3 * both + 3 * t1) + 6 * g
    t2 = float((a * c).square().sum())
    square = gram.square()
    constant = 3 * both.square() - 6 * t1 * both - 12 * (r[:, None] + r_other) + 6 * t2 + 3 * t1**2
    return square * (square - 6 * (both - t1)) + 24 * gram * g + constant


def _standard(rows: Array, eigenvalues: Array) -> Array:
    """The rows moved and turned so that their mean is 0 and their covariance diag(eigenvalues), exactly."""
    centred = rows - rows.mean(0)
    values, axes = np.linalg.eigh(centred.T @ centred / len(rows))
    return centred @ (axes / np.sqrt(values.clip(min=1e-300))) @ axes.T * np.sqrt(eigenvalues)
