"""The best linear denoiser of some data: the Wiener filter of their mean and covariance.

With data mean m and covariance Q diag(lam) Q^T, at y = x_t/alpha = x0 + s eps,

    w(y) = E[eps | y] = [(y - m) - Q diag(lam/(lam + s^2)) Q^T (y - m)]/s,    s div w = D - sum lam/(lam + s^2).

Where samples are few for their dimensions, the small eigenvalues of their covariance are far too small and it knows
nothing off their span, so that at little noise its filter is worse than none. What helps is the filter of a covariance
that is shrunk by a share d towards the mean of its eigenvalues (Ledoit and Wolf 2004, "A well-conditioned estimator for
large-dimensional covariance matrices"):

    (1 - d) Q diag(lam) Q^T + d (sum lam/D) I.

How much helps most depends on the noise, and is more than makes the covariance itself best where the spectrum falls.
"""

__all__ = ["Wiener"]

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]


class Wiener:
    """The best linear denoiser of rows (n, D) with counts (n,), in float64.

    Attributes:
        dim: D.
        mean, axes, eigenvalues: m (D,), Q (D, r) with r = min(n, D), and lam (r,), falling.
    """

    def __init__(self, rows: Array, counts: Array) -> None:
        mean = np.average(rows, axis=0, weights=counts)
        scaled = (rows - mean) * np.sqrt(counts / counts.sum())[:, None]
        _, values, axes = np.linalg.svd(scaled, full_matrices=False)
        self.dim = rows.shape[1]
        self.mean, self.axes, self.eigenvalues = (torch.from_numpy(a.copy()) for a in (mean, axes.T, values**2))

    def eps(self, y: Tensor, tau: float) -> Tensor:
        """w at y (n, D) of log noise scale tau = log s, float64."""
        s, z = math.exp(tau), y - self.mean
        return (z - ((z @ self.axes) * (self.eigenvalues / (self.eigenvalues + s**2))) @ self.axes.T) / s

    def divergence(self, tau: float) -> float:
        """s div w."""
        return self.dim - float((self.eigenvalues / (self.eigenvalues + math.exp(2 * tau))).sum())

    def losses(
        self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, shrinkages: Sequence[float] = (0.0,)
    ) -> list[Tensor]:
        """|E[eps | x_t] - eps|^2 at x_t = alpha x0 + sigma eps, float64 (n,), for each shrinkage of the covariance.

        Args:
            x0, eps: (n, D).
            alpha, sigma: (n,).
            shrinkages: d in [0, 1].
        """
        clean, noise = x0.double() - self.mean, eps.double()
        along_clean, along_noise = clean @ self.axes, noise @ self.axes
        # What lies off the axes; there are none of those where samples are many.
        spanned = self.axes.shape[1] == self.dim
        off_clean, off_noise = (
            (part[:, :0] if spanned else part - along @ self.axes.T)
            for part, along in ((clean, along_clean), (noise, along_noise))
        )
        a, s = alpha.double()[:, None], sigma.double()[:, None]

        def squares(of_clean: Tensor, of_noise: Tensor, variance: Tensor) -> Tensor:
            error = a * (s * of_clean - a * variance * of_noise) / (a.square() * variance + s.square())
            return error.square().sum(1)

        found = []
        for share in shrinkages:
            rest = share * self.eigenvalues.sum() / self.dim
            along = squares(along_clean, along_noise, (1 - share) * self.eigenvalues + rest)
            found.append(along + squares(off_clean, off_noise, rest))
        return found
