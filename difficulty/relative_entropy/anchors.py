"""Anchors: the few pairs that are estimated one by one, and the way from them to all others.

Between anchors the ratio of a relative entropy to its closed-form upper bound (F7) is a smooth function of log-SNR,
which the relative entropy itself is not (its step length jumps where a schedule is clipped). The ratio is interpolated.
"""

__all__ = ["Anchors"]

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.interpolate import PchipInterpolator

from difficulty.relative_entropy.estimate import Estimate
from difficulty.relative_entropy.pairs import Pairs, upper_bound

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Anchors:
    """Some of the pairs.

    Args:
        pairs: all of them, (m,).
        at: positions of the anchors, rising, both ends among them, (a,).
    """

    pairs: Pairs
    at: Rows

    @classmethod
    def choose(cls, pairs: Pairs, most: int) -> "Anchors":
        """All of a few pairs, otherwise ``most`` spread evenly in log-SNR with both ends."""
        m = len(pairs)
        if m <= most:
            return cls(pairs, np.arange(m))
        tau = pairs.tau
        last = np.flatnonzero(np.isfinite(tau))[-1]
        even = np.searchsorted(tau, np.linspace(tau[0], tau[last], most)).clip(0, m - 1)
        return cls(pairs, np.unique(np.concatenate([even, [0, 1, last, m - 1]])))

    @property
    def chosen(self) -> Pairs:
        """The pairs at the anchors."""
        return self.pairs.take(self.at)

    def everywhere(
        self, found: Estimate, log_error: Array, quantile: Array, dim: int, second_moment: float
    ) -> Estimate:
        """The estimate at all pairs, with intervals kl * exp(+-quantile log_error).

        Args:
            found: at the anchors; its intervals and standard errors are not used.
            log_error: standard error of log KL at the anchors, (a,).
            quantile: how many standard errors an interval of 90 % takes, (a,).
            dim, second_moment: D and E|x0|^2, for the upper bound.
        """
        kl, reverse, i_min = found.kl, found.kl_reverse, found.i_min
        family, reason = found.estimator, found.reason
        if len(self.at) < len(self.pairs):
            bound = upper_bound(self.pairs, dim, second_moment)
            to = np.minimum(self.pairs.tau, self.pairs.tau[self.at][np.isfinite(self.pairs.tau[self.at])].max() + 1.0)
            x = to[self.at]

            def spread_out(y: Array, scale: Array) -> Array:
                # Zero (the KL of a whitened Gaussian) has no logarithm; the smallest normal number stands for it.
                return np.exp(PchipInterpolator(x, np.log(np.maximum(y / scale[self.at], 1e-300)))(to)) * scale

            kl, reverse = spread_out(kl, bound), spread_out(reverse, bound)
            i_min = spread_out(i_min, np.ones(len(to)))
            log_error, quantile = np.interp(to, x, log_error), np.interp(to, x, quantile)
            everywhere = np.arange(len(to))
            left = np.searchsorted(self.at, everywhere, side="right") - 1
            right = np.minimum(left + (self.at[left] < everywhere), len(self.at) - 1)
            family = family[np.where(to - x[left] <= x[right] - to, left, right)]
            reason = np.where(reason[left] != "", reason[left], reason[right])
        i_min = np.where(family == "bracket", np.nan, i_min)  # bounds of the KL are none of the rate
        width = np.exp(quantile * np.minimum(log_error, 50.0))
        valid = np.asarray(reason == "", dtype=bool)
        return Estimate(kl, reverse, kl * log_error, kl / width, kl * width, i_min, family, valid, reason)
