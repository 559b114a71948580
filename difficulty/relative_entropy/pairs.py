"""The pairs of noise levels whose marginals are compared, and what holds for every law of the data.

A pair is (t_from, t) with t_from < t: consecutive timesteps (t-1, t), or the two ends of a coarse interval. For any law
with second moment E|x0|^2 the data-processing inequality bounds the relative entropy by that of the joint with x0 (F7),

    KL(p_from || p_t) <= D/2 (r - 1 - log r) + (alpha_from - alpha_t)^2 E|x0|^2 / (2 sigma_t^2),
    r = (sigma_from/sigma_t)^2.

A ratio KL/UB near 1 says that the schedule alone, not the data, makes the number. The pair (0, 1) is left out: on data
that lie on a point, a curve or a plane its relative entropy is infinite.
"""

__all__ = ["EXCLUDED_FIRST", "Pairs", "make_pairs", "upper_bound"]

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from difficulty.errors import InputError
from difficulty.process import Process

Array = npt.NDArray[np.float64]

EXCLUDED_FIRST = "pair (0, 1) is excluded: for data on a point, curve or plane its relative entropy is infinite"


@dataclass(frozen=True, eq=False)
class Pairs:
    """Noise levels to compare; every field has shape (m,).

    Args:
        t_from, t: the less and the more noisy timestep.
        alpha_from, sigma_from, alpha_to, sigma_to: their scales.
    """

    t_from: npt.NDArray[np.int64]
    t: npt.NDArray[np.int64]
    alpha_from: Array
    sigma_from: Array
    alpha_to: Array
    sigma_to: Array

    def __len__(self) -> int:
        return len(self.t)

    @property
    def first(self) -> Array:
        """(alpha, sigma) of the less noisy side, shape (m, 2)."""
        return np.stack([self.alpha_from, self.sigma_from], 1)

    @property
    def second(self) -> Array:
        """(alpha, sigma) of the noisier side, shape (m, 2)."""
        return np.stack([self.alpha_to, self.sigma_to], 1)

    @property
    def dtau(self) -> Array:
        """Step of tau = log(sigma/alpha), positive; +inf where alpha ends at 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.sigma_to / self.sigma_from) - np.log(self.alpha_to / self.alpha_from)

    @property
    def dlog_alpha(self) -> Array:
        """Step of log alpha; -inf where alpha ends at 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha_to / self.alpha_from)

    @property
    def tau(self) -> Array:
        """Log noise scale in the middle of the pair; +inf where alpha ends at 0."""
        with np.errstate(divide="ignore"):
            ends = np.log(self.sigma_from) - np.log(self.alpha_from) + np.log(self.sigma_to) - np.log(self.alpha_to)
        return 0.5 * ends

    @property
    def noise_from(self) -> Array:
        """sigma/alpha of the less noisy side: the scale of its noise in the units of the data."""
        return self.sigma_from / np.maximum(self.alpha_from, 1e-12)

    @property
    def log_snr(self) -> Array:
        """Log-SNR in the middle of the pair."""
        return -2.0 * self.tau

    def take(self, rows: npt.ArrayLike) -> "Pairs":
        """The pairs at the given positions."""
        index = np.asarray(rows)
        fields = (self.t_from, self.t, self.alpha_from, self.sigma_from, self.alpha_to, self.sigma_to)
        return Pairs(*(field[index] for field in fields))


def make_pairs(process: Process, t: Sequence[int] | None = None, tasks: int | None = None) -> Pairs:
    """Consecutive pairs (t-1, t), or the coarse intervals between K+1 timesteps spread evenly over 1..T.

    Args:
        process: whose noise levels.
        t: the timesteps t of the pairs, in 2..T (1 is allowed and reported as excluded); default all of 2..T.
        tasks: K, the number of coarse intervals; excludes ``t``.

    Raises:
        InputError: if both are given, or one lies outside its range.
    """
    if t is not None and tasks is not None:
        raise InputError("give either pairs (single steps) or tasks (coarse intervals), not both")
    if tasks is not None:
        if not 1 <= tasks <= process.T - 1:
            raise InputError(f"tasks must lie in 1..{process.T - 1} for T = {process.T}, got {tasks}")
        edges = np.unique(np.rint(np.linspace(1, process.T, tasks + 1)).astype(np.int64))
        return _pairs(process, edges[:-1], edges[1:])
    last = np.arange(2, process.T + 1) if t is None else np.asarray(t)
    if last.ndim != 1 or not len(last) or not np.issubdtype(last.dtype, np.integer):
        raise InputError(f"pairs must be a list of whole timesteps t in 2..{process.T}, got {t!r}")
    if ((last < 1) | (last > process.T)).any():
        raise InputError(f"pairs are named by t in 2..{process.T}, got {last[(last < 1) | (last > process.T)][0]}")
    return _pairs(process, last - 1, last)


def _pairs(process: Process, t_from: npt.NDArray[np.int64], t: npt.NDArray[np.int64]) -> Pairs:
    return Pairs(
        t_from.astype(np.int64),
        t.astype(np.int64),
        process.alpha[t_from],
        process.sigma[t_from],
        process.alpha[t],
        process.sigma[t],
    )


def upper_bound(pairs: Pairs, dim: int, second_moment: float, *, reverse: bool = False) -> Array:
    """The bound F7 on KL(p_from || p_t) in nats, or on KL(p_t || p_from) with ``reverse``, shape (m,).

    Args:
        pairs: where.
        dim: D.
        second_moment: E|x0|^2.
    """
    first, second = (pairs.sigma_to, pairs.sigma_from) if reverse else (pairs.sigma_from, pairs.sigma_to)
    noise = 0.5 * dim * excess((first / second) ** 2 - 1.0)
    return noise + (pairs.alpha_from - pairs.alpha_to) ** 2 * second_moment / (2.0 * second**2)


def excess(d: Array) -> Array:
    """d - log(1 + d) for d >= -1, by its series near 0, where the difference would cancel."""
    small = np.abs(d) < 1e-3
    with np.errstate(divide="ignore"):
        direct = d - np.log1p(np.where(small, 0.5, d))
    powers = d * d * (0.5 + d * (-1 / 3 + d * (0.25 + d * (-0.2 + d * (1 / 6 - d / 7)))))
    return np.where(small, powers, direct)
