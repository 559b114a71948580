"""Exact data laws: densities, scores and posterior means of the noisy marginals in closed form.

For x_t = alpha x0 + sigma eps every law below knows p_t(x), its score, E[x0 | x_t] and tr Cov[x0 | x_t], and with them
the Bayes loss of denoising at any noise level. They are the oracle against which every estimator is tested, and, fitted
to data, the `mixture` estimator of the relative entropy.

Gaussian mixture, components N(m_k, C_k) with C_k = Q_k diag(lam_k) Q_k^T: the marginal is a mixture of
N(alpha m_k, alpha^2 C_k + sigma^2 I), so one eigendecomposition per component serves all noise levels.
Ring of radius r in the first two of D dimensions: with rho = |x_{1:2}|, kappa = alpha r rho/sigma^2, A = I1/I0(kappa),
    E[x0 | x] = r A x_{1:2}/rho,    tr Cov[x0 | x] = r^2 (1 - A^2).

Everything is float64: the log-ratio of neighbouring marginals is as small as 1e-7 where log p itself is of order 100.
Singular laws (zero eigenvalues, the ring) are allowed wherever sigma > 0.
"""

__all__ = ["GaussianMixture", "Law", "Ring", "Scales", "gaussian", "point_mass"]

import math
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.errors import InputError

Scales = tuple[float, float]  # (alpha, sigma)


class Law(ABC):
    """A data law with closed-form noisy marginals. Points are float64 tensors of shape (n, D)."""

    dim: int

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Clean samples x0, shape (n, D)."""

    @abstractmethod
    def log_prob(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """log p_t(x) in nats, shape (n,)."""

    @abstractmethod
    def score(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """grad_x log p_t(x), shape (n, D)."""

    @abstractmethod
    def posterior_mean(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x0 | x_t = x], shape (n, D); the denoiser of least squared error."""

    @abstractmethod
    def posterior_trace(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """tr Cov[x0 | x_t = x], shape (n,)."""

    @abstractmethod
    def laplacian_ratio(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """(Laplacian of p_t)(x) / p_t(x), shape (n,)."""

    @property
    @abstractmethod
    def second_moment(self) -> float:
        """E |x0|^2."""

    def noisy_sample(self, n: int, alpha: float, sigma: float, generator: torch.Generator) -> Tensor:
        """Samples of x_t, shape (n, D)."""
        x0 = self.sample(n, generator)
        return alpha * x0 + sigma * torch.randn(x0.shape, dtype=torch.float64, generator=generator)

    def log_ratio(self, x: Tensor, first: Scales, second: Scales) -> Tensor:
        """log p_first(x) - log p_second(x) in nats, shape (n,)."""
        return self.log_prob(x, *first) - self.log_prob(x, *second)

    def posterior_eps(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[eps | x_t = x] = -sigma score, shape (n, D)."""
        return -sigma * self.score(x, alpha, sigma)

    def time_score_parts(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """F = d log p/d tau in the VE coordinate and q, the dilation score, each of shape (n,).

        d log p_t/dt = tau' F - (log alpha)' q, with F = sigma^2 (Laplacian p)/p and q = D + x . score.
        """
        flow = sigma**2 * self.laplacian_ratio(x, alpha, sigma)
        return flow, self.dim + (x * self.score(x, alpha, sigma)).sum(1)

    def bayes_loss(self, alpha: float, sigma: float, n: int, generator: torch.Generator) -> tuple[float, float]:
        """Least possible E |eps - eps_hat|^2, summed over dimensions, and its standard error.

        The average over x_t of the closed-form posterior variance, which has far less Monte Carlo noise than the
        squared error itself.
        """
        trace = self.posterior_trace(self.noisy_sample(n, alpha, sigma, generator), alpha, sigma)
        loss = (alpha / sigma) ** 2 * trace
        return float(loss.mean()), float(loss.std() / math.sqrt(n))


class GaussianMixture(Law):
    """Mixture of Gaussians with full covariances.

    Args:
        weights: shape (K,), positive; normalised here.
        means: shape (K, D).
        covariances: shape (K, D, D), symmetric positive semi-definite; zero is a point mass.

    Raises:
        InputError: if shapes disagree, a weight is not positive, or a covariance is indefinite.
    """

    def __init__(self, weights: npt.ArrayLike, means: npt.ArrayLike, covariances: npt.ArrayLike) -> None:
        weights, means, covariances = (np.asarray(a, dtype=np.float64) for a in (weights, means, covariances))
        if means.ndim != 2 or weights.shape != means.shape[:1] or covariances.shape != (*means.shape, means.shape[1]):
            raise InputError(
                f"a mixture needs weights (K,), means (K, D), covariances (K, D, D); got {weights.shape}, "
                f"{means.shape}, {covariances.shape}"
            )
        if not (np.isfinite(weights).all() and (weights > 0).all()):
            raise InputError("mixture weights must be positive and finite")
        values, basis = np.linalg.eigh(covariances)
        if (values < -1e-9 * np.maximum(values.max(axis=1, keepdims=True), 1e-300)).any():
            raise InputError("a mixture covariance has a negative eigenvalue; it must be positive semi-definite")
        self.dim = means.shape[1]
        self.log_weights = torch.from_numpy(np.log(weights / weights.sum()))
        self.means = torch.from_numpy(means)
        self.eigenvalues = torch.from_numpy(values.clip(min=0.0))
        self.basis = torch.from_numpy(basis)
        self.rotated_means = torch.einsum("kd,kde->ke", self.means, self.basis)

    @property
    def second_moment(self) -> float:
        per_component = self.means.square().sum(1) + self.eigenvalues.sum(1)
        return float((self.log_weights.exp() * per_component).sum())

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.sample_of(self.components(n, generator), generator)

    def components(self, n: int, generator: torch.Generator) -> Tensor:
        """Components of n draws, int64, shape (n,)."""
        return torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)

    def sample_of(self, component: Tensor, generator: torch.Generator) -> Tensor:
        """One draw of each of the components (n,), shape (n, D)."""
        noise = torch.randn(len(component), self.dim, dtype=torch.float64, generator=generator)
        x = torch.empty_like(noise)
        for k in range(len(self.means)):
            rows = component == k
            # The symmetric root of the covariance: a basis alone depends on the LAPACK of the machine, in its signs and
            # within equal eigenvalues.
            root = (noise[rows] @ self.basis[k]) * self.eigenvalues[k].sqrt() @ self.basis[k].T
            x[rows] = self.means[k] + root
        return x

    def log_prob(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return torch.logsumexp(self._log_joint(*self._residual(x, alpha, sigma)), 0)

    def log_ratio(self, x: Tensor, first: Scales, second: Scales) -> Tensor:
        # p_1/p_2 = sum_k r_k exp(d_k), r_k the posterior of k under p_2 and d_k the log-ratio of component k: no
        # difference of large logarithms is taken, so that a ratio near 1 keeps its digits.
        # Per component and axis, with z1 = z2 + shift:
        #     2 d = z2^2/v2 - z1^2/v1 - log(v1/v2) = (z1^2/v1) shrink - shift (z1 + z2)/v2 - log1p(shrink).
        z1, v1 = self._residual(x, *first)
        z2, v2 = self._residual(x, *second)
        shrink = (v1 - v2) / v2
        shift = (second[0] - first[0]) * self.rotated_means[:, None]
        d = 0.5 * (z1.square() / v1 * shrink - shift * (z1 + z2) / v2 - torch.log1p(shrink)).sum(2)
        log_posterior = torch.log_softmax(self._log_joint(z2, v2), 0)
        near = torch.log1p((log_posterior.exp() * torch.expm1(d.clamp(max=1.0))).sum(0))
        far = torch.logsumexp(log_posterior + d, 0)
        return torch.where(d.abs().amax(0) < 0.5, near, far)

    def score(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        z, v = self._residual(x, alpha, sigma)
        responsibility = torch.softmax(self._log_joint(z, v), 0)
        return self._rotate_back(-responsibility[..., None] * z / v)

    def posterior_mean(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        responsibility, component_mean, _ = self._posterior(x, alpha, sigma)
        return (responsibility[..., None] * component_mean).sum(0)

    def posterior_trace(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        responsibility, component_mean, component_trace = self._posterior(x, alpha, sigma)
        mean = (responsibility[..., None] * component_mean).sum(0)
        within = responsibility * component_trace[:, None]
        between = responsibility * (component_mean - mean).square().sum(2)
        return (within + between).sum(0)

    def laplacian_ratio(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        z, v = self._residual(x, alpha, sigma)
        responsibility = torch.softmax(self._log_joint(z, v), 0)
        return (responsibility * ((z / v).square() - 1 / v).sum(2)).sum(0)

    def _residual(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """x - alpha m_k in the eigenbasis of component k, (K, n, D), and the variances there, (K, 1, D)."""
        z = torch.matmul(x, self.basis) - alpha * self.rotated_means[:, None]
        return z, (alpha**2 * self.eigenvalues + sigma**2)[:, None]

    def _log_joint(self, z: Tensor, v: Tensor) -> Tensor:
        """log w_k + log N(x; k), shape (K, n)."""
        log_det = (2 * math.pi * v).log().sum(2)
        return self.log_weights[:, None] - 0.5 * (z.square() / v).sum(2) - 0.5 * log_det

    def _posterior(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """Responsibilities (K, n), component means E[x0 | x, k] (K, n, D), component traces (K,)."""
        z, v = self._residual(x, alpha, sigma)
        responsibility = torch.softmax(self._log_joint(z, v), 0)
        gain = alpha * self.eigenvalues[:, None] / v
        component_mean = self.means[:, None] + torch.matmul(gain * z, self.basis.transpose(1, 2))
        trace = (self.eigenvalues * sigma**2 / v[:, 0]).sum(1)
        return responsibility, component_mean, trace

    def _rotate_back(self, z: Tensor) -> Tensor:
        return torch.matmul(z, self.basis.transpose(1, 2)).sum(0)


class Ring(Law):
    """Uniform on a circle in the first two of ``dim`` coordinates: a one-dimensional law in D dimensions.

    Args:
        dim: D >= 2.
        radius: radius of the circle, positive.
    """

    def __init__(self, dim: int, radius: float = 1.0) -> None:
        if dim < 2 or radius <= 0:
            raise InputError(f"a ring needs dim >= 2 and radius > 0, got dim = {dim}, radius = {radius}")
        self.dim, self.radius = dim, radius

    @property
    def second_moment(self) -> float:
        return self.radius**2

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        angle = 2 * math.pi * torch.rand(n, dtype=torch.float64, generator=generator)
        x = torch.zeros(n, self.dim, dtype=torch.float64)
        x[:, 0], x[:, 1] = self.radius * angle.cos(), self.radius * angle.sin()
        return x

    def log_prob(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        rho, kappa, _ = self._polar(x, alpha, sigma)
        distance = x[:, 2:].square().sum(1) + (rho - alpha * self.radius).square()
        log_norm = self.dim * math.log(2 * math.pi * sigma**2)
        return torch.special.i0e(kappa).log() - 0.5 * (distance / sigma**2 + log_norm)

    def score(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return (alpha * self.posterior_mean(x, alpha, sigma) - x) / sigma**2

    def posterior_mean(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        rho, _, concentration = self._polar(x, alpha, sigma)
        mean = torch.zeros_like(x)
        mean[:, :2] = self.radius * (concentration / rho.clamp(min=1e-300))[:, None] * x[:, :2]
        return mean

    def posterior_trace(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        _, _, concentration = self._polar(x, alpha, sigma)
        return self.radius**2 * (1 - concentration.square())

    def laplacian_ratio(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        # (Laplacian p)/p = |score|^2 + Laplacian log p, and Laplacian log p = -D/sigma^2 + (alpha/sigma^2)^2 tr Cov.
        trace = self.posterior_trace(x, alpha, sigma)
        curvature = (alpha / sigma**2) ** 2 * trace - self.dim / sigma**2
        return self.score(x, alpha, sigma).square().sum(1) + curvature

    def _polar(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """rho, kappa and A = I1(kappa)/I0(kappa), each (n,)."""
        rho = x[:, :2].norm(dim=1)
        kappa = alpha * self.radius * rho / sigma**2
        return rho, kappa, torch.special.i1e(kappa) / torch.special.i0e(kappa)


def gaussian(dim: int, var: float = 1.0, mean: float = 0.0) -> GaussianMixture:
    """Isotropic Gaussian with the given variance and the same mean in each of ``dim`` dimensions."""
    return GaussianMixture([1.0], np.full((1, dim), mean), var * np.eye(dim)[None])


def point_mass(dim: int, value: float = 0.0) -> GaussianMixture:
    """All data at one point."""
    return gaussian(dim, var=0.0, mean=value)
