"""Log-ratios and time scores of a Gaussian mixture at many noise levels at once.

For x = alpha x0 + sigma eps the residual in the eigenbasis of component k, z = alpha zx + sigma ze, is linear in two
vectors that do not depend on the noise level, and a log-density needs no more than sum z_d^2 w_d and sum m_d z_d w_d.
So five feature arrays, made once, and one matrix product serve every pair of noise levels:

    sum z^2 w = alpha^2 (zx^2).w + alpha sigma (2 zx ze).w + sigma^2 (ze^2).w.

Per component, with shift = (alpha_2 - alpha_1) m and shrink = (v_1 - v_2)/v_2,
    d = log N_1/N_2 = 1/2 [z_1^2 shrink/v_1 - (2 z_1 - shift) shift/v_2 - log(1 + shrink)],
and log p_1/p_2 = -log sum_k r_k exp(-d_k) with r_k the posterior of k under p_1: no difference of large logarithms.
"""

__all__ = ["MixtureKernel", "blocks_of", "isotropic", "slices"]

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.laws import GaussianMixture

# Elements (component, point, noise level) held at once: 2^22 doubles are 32 MiB, about a last-level cache.
CHUNK = 2**22
BLOCK_BYTES = 2**27


class MixtureKernel:
    """A mixture evaluated at x = alpha x0 + sigma eps for fixed (x0, eps).

    Args:
        law: the mixture.
        x0, eps: float64, shape (n, D).
    """

    def __init__(self, law: GaussianMixture, x0: Tensor, eps: Tensor) -> None:
        self.law, self.x0, self.eps = law, x0, eps
        self.dim = law.dim
        self.log_weights = law.log_weights
        means = law.rotated_means[:, None]
        if isotropic(law):
            # One variance per component: the features are sums over dimensions, and thousands of components are cheap.
            zx2 = torch.cdist(law.means, x0, compute_mode="donot_use_mm_for_euclid_dist").square()
            ze2 = eps.square().sum(1).expand_as(zx2)
            m_eps, m_x0 = law.means @ eps.T, law.means @ x0.T
            cross = (x0 * eps).sum(1) - m_eps
            m2 = law.means.square().sum(1)[:, None]
            self.features = torch.stack([zx2, 2 * cross, ze2, m_x0 - m2, m_eps], 2)
            self.eigenvalues = law.eigenvalues[:, :1]
            self.means_squared = m2
            self.multiplicity = float(law.dim)
        else:
            zx = torch.matmul(x0, law.basis) - means
            ze = torch.matmul(eps, law.basis)
            self.features = torch.cat([zx.square(), 2 * zx * ze, ze.square(), means * zx, means * ze], 2)
            self.eigenvalues = law.eigenvalues
            self.means_squared = law.rotated_means.square()
            self.multiplicity = 1.0

    def log_ratio(self, first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> Tensor:
        """log p_1(x) - log p_2(x) at x = alpha_1 x0 + sigma_1 eps, shape (m, n).

        Args:
            first, second: (alpha, sigma), shape (m, 2).
        """
        out = []
        for rows in self._chunks(len(first)):
            a1, s1 = (torch.from_numpy(c)[None, None, :] for c in first[rows].T)
            weights, constant = self._ratio_weights(first[rows], second[rows])
            log_posterior = torch.log_softmax(self._log_joint(a1, s1, a1**2 * self.eigenvalues[:, :, None] + s1**2), 0)
            d = 0.5 * (torch.bmm(self.features, weights) + constant[:, None])
            near = -torch.log1p((log_posterior.exp() * torch.expm1(-d.clamp(min=-1.0))).sum(0))
            far = -torch.logsumexp(log_posterior - d, 0)
            # Components without weight at a point may have any ratio there; they do not decide which form is used.
            relevant = torch.where(log_posterior > -40.0, d.abs(), 0.0).amax(0)
            out.append(torch.where(relevant < 0.5, near, far).T)
        return torch.cat(out)

    def log_ratio_of(
        self, component: Tensor, first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]
    ) -> Tensor:
        """log N_1/N_2 of one component for each point, (n,), at x = alpha_1 x0 + sigma_1 eps; shape (m, n)."""
        weights, constant = self._ratio_weights(first, second)
        out = torch.empty(len(first), len(component), dtype=torch.float64)
        for k in range(len(self.features)):
            rows = torch.nonzero(component == k)[:, 0]
            out[:, rows] = 0.5 * (self.features[k, rows] @ weights[k] + constant[k]).T
        return out

    def time_score(self, tau: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """F = d log p/d tau and the dilation score q (`score`, F3) at y = x0 + exp(tau) eps, each (m, n)."""
        flows, dilations = [], []
        for rows in self._chunks(len(tau)):
            s = torch.from_numpy(np.exp(tau[rows]))[None, None, :]
            one = torch.ones_like(s)
            lam = self.eigenvalues[:, :, None]
            v = lam + s**2
            posterior = torch.softmax(self._log_joint(one, s, v), 0)
            flow = torch.bmm(self.features, _stack(one, s, (s / v) ** 2, torch.zeros_like(v)))
            flow = flow - (self.multiplicity * s**2 / v).sum(1)[:, None]
            dilation = self.dim - torch.bmm(self.features, _stack(one, s, 1 / v, 1 / v))
            flows.append((posterior * flow).sum(0).T)
            dilations.append((posterior * dilation).sum(0).T)
        return torch.cat(flows), torch.cat(dilations)

    def time_score_of(self, component: Tensor, tau: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """F and q of one component for each point, (n,), at y = x0 + exp(tau) eps, each (m, n)."""
        s = torch.from_numpy(np.exp(tau))[None, None, :]
        one = torch.ones_like(s)
        v = self.eigenvalues[:, :, None] + s**2
        sides = [_stack(one, s, (s / v) ** 2, torch.zeros_like(v)), _stack(one, s, 1 / v, 1 / v)]
        flow, dilation = torch.empty(2, len(tau), len(component), dtype=torch.float64)
        for k in range(len(self.features)):
            rows = torch.nonzero(component == k)[:, 0]
            own = self.features[k, rows]
            flow[:, rows] = (own @ sides[0][k] - (self.multiplicity * s[0] ** 2 / v[k]).sum(0)).T
            dilation[:, rows] = self.dim - (own @ sides[1][k]).T
        return flow, dilation

    def log_prob(self, tau: npt.NDArray[np.float64]) -> Tensor:
        """log density of y = x0 + exp(tau) eps, shape (m, n)."""
        out = []
        for rows in self._chunks(len(tau)):
            s = torch.from_numpy(np.exp(tau[rows]))[None, None, :]
            joint = self._log_joint(torch.ones_like(s), s, self.eigenvalues[:, :, None] + s**2)
            out.append(torch.logsumexp(joint, 0).T)
        return torch.cat(out) - 0.5 * self.dim * math.log(2 * math.pi)

    def posterior_trace(self, tau: npt.NDArray[np.float64]) -> Tensor:
        """tr Cov[x0 | y] at y = x0 + exp(tau) eps, shape (m, n).

        With z_k the residual in the eigenbasis of component k and r_k its posterior, the means of the components lie
        -s^2 z_k/v_k away from y, so that

            tr = sum_k r_k (sum_d lam s^2/v)_k + s^4 (sum_k r_k |z_k/v_k|^2 - |score|^2),
            score = -sum_k r_k C_k^-1 (y - m_k),   C_k the covariance of y in component k.
        """
        out = []
        for rows in self._chunks(len(tau)):
            s = torch.from_numpy(np.exp(tau[rows]))[None, None, :]
            one, lam = torch.ones_like(s), self.eigenvalues[:, :, None]
            v = lam + s**2
            posterior = torch.softmax(self._log_joint(one, s, v), 0)
            within = (self.multiplicity * lam * s**2 / v).sum(1)[:, None]
            square = torch.bmm(self.features, _stack(one, s, s**4 / v**2, torch.zeros_like(v)))
            spread = (posterior * (within + square)).sum(0)
            for i, scale in enumerate(s.flatten()):
                # (y - y_hat)^2 is taken off what was added for its components: both of the order of s^2 D.
                step = scale**2 * self._score(posterior[:, :, i], v[:, :, i], float(scale))
                out.append((spread[:, i] - step.square().sum(1)).clamp(min=0.0))
        return torch.stack(out)

    def _score(self, posterior: Tensor, v: Tensor, s: float) -> Tensor:
        """Score at y = x0 + s eps, (n, D), from posteriors (K, n) and variances of the components, (K, D) or (K, 1)."""
        y, means, posterior = self.x0 + s * self.eps, self.law.means, posterior.T.contiguous()
        if self.eigenvalues.shape[1] < self.dim:  # one variance per component
            share = posterior / v[:, 0]
            return share @ means - share.sum(1, keepdim=True) * y
        inverse = (self.law.basis / v[:, None]) @ self.law.basis.transpose(1, 2)
        shares = (posterior[..., None] * y[:, None]).flatten(1)
        return posterior @ torch.bmm(inverse, means[..., None])[..., 0] - shares @ inverse.flatten(0, 1)

    def effective_components(self, tau: npt.NDArray[np.float64]) -> Tensor:
        """Effective number of components at y = x0 + exp(tau) eps, 1/sum of squared posteriors, shape (m, n)."""
        out = []
        for rows in self._chunks(len(tau)):
            s = torch.from_numpy(np.exp(tau[rows]))[None, None, :]
            joint = self._log_joint(torch.ones_like(s), s, self.eigenvalues[:, :, None] + s**2)
            out.append(1 / torch.softmax(joint, 0).square().sum(0).T)
        return torch.cat(out)

    def _ratio_weights(
        self, first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]
    ) -> tuple[Tensor, Tensor]:
        """Weights of the features, (K, 5 D, m), and the constant, (K, m), of twice d."""
        a1, s1, a2, s2 = (torch.from_numpy(c)[None, None, :] for c in (*first.T, *second.T))
        lam = self.eigenvalues[:, :, None]
        v1, v2 = a1**2 * lam + s1**2, a2**2 * lam + s2**2
        shrink = ((a1 - a2) * (a1 + a2) * lam + (s1 - s2) * (s1 + s2)) / v2
        da = a2 - a1
        constant = (da**2 * self.means_squared[:, :, None] / v2).sum(1)
        return _stack(a1, s1, shrink / v1, -2 * da / v2), constant - self.multiplicity * torch.log1p(shrink).sum(1)

    def _log_joint(self, alpha: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
        """log w_k + log N(x; k) without the 2 pi, shape (K, n, m)."""
        w = 1 / v
        weights = torch.cat([alpha**2 * w, alpha * sigma * w, sigma**2 * w], 1)
        quadratic = torch.bmm(self.features[:, :, : weights.shape[1]], weights)
        log_det = self.multiplicity * v.log().sum(1)
        return self.log_weights[:, None, None] - 0.5 * quadratic - 0.5 * log_det[:, None]

    def _chunks(self, m: int) -> list[slice]:
        components, n, _ = self.features.shape
        return slices(m, CHUNK // (components * n))


def blocks_of(law: GaussianMixture, n: int) -> list[slice]:
    """n points in parts whose features take 128 MiB each."""
    bytes_each = 40 * len(law.means) * (1 if isotropic(law) else law.dim)
    return slices(n, BLOCK_BYTES // bytes_each)


def slices(n: int, size: int) -> list[slice]:
    """n items in parts of ``size``, of one at least; no items are one empty part."""
    size = max(1, size)
    return [slice(start, min(start + size, n)) for start in range(0, max(n, 1), size)]


def isotropic(law: GaussianMixture) -> bool:
    """Whether every component has one variance along all axes."""
    return bool((law.eigenvalues == law.eigenvalues[:, :1]).all())


def _stack(alpha: Tensor, sigma: Tensor, quadratic: Tensor, linear: Tensor) -> Tensor:
    """Weights of the five features, shape (K, 5 D, m), from those of z^2 and m z, each (K, D, m)."""
    return torch.cat(
        [alpha**2 * quadratic, alpha * sigma * quadratic, sigma**2 * quadratic, alpha * linear, sigma * linear], 1
    )
