"""Relative entropy and rates of a mixture by draws, with Gaussians beside it whose moments are known without any.

Under much noise a mixture is nearly the Gaussian of its own first two moments, under little a point knows its own
component only. Log-ratio, F and q (F1, F3) of either are quadratic along its axes in the residual z = x - alpha m,

    sum [h z^2 + b z] + c.

With v_i = alpha_i^2 lam + sigma_i^2, shrink = (v_1 - v_2)/v_2 and shift = (alpha_2 - alpha_1) m,

    log-ratio   h = shrink/(2 v_1),  b = -shift/v_2,  c = sum (shift^2/v_2 - log(1 + shrink))/2,
    F           h = s^2/v^2,         b = 0,           c = -sum s^2/v,
    q           h = -1/v,            b = -m/v,        c = D,

and in a component where z has the mean d and the covariance V two of them have the means and the covariance

    E = sum [h (V_ii + d^2) + b d] + c,   Cov = 2 sum_ij h_i V_ij^2 h'_j + g.V g'   with   g = 2 h d + b.

So the deviations of these forms and of their products from their means have a mean of 0 over the mixture, and what is
asked for is regressed on them (``montecarlo``).
"""

__all__ = ["Draws", "mixture_kl", "mixture_rates"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.laws import GaussianMixture
from difficulty.relative_entropy.kernel import MixtureKernel, blocks_of, isotropic, slices
from difficulty.relative_entropy.montecarlo import kl_from_log_ratio, mean_beside
from difficulty.relative_entropy.rates import beta_of

Array = npt.NDArray[np.float64]

# Levels whose draws are held at once: of 16 000 draws a level takes 128 KiB for each of some 30 terms.
LEVELS_AT_ONCE = 128


@dataclass(frozen=True, eq=False)
class Draws:
    """Points x = alpha x0 + sigma eps.

    Args:
        x0, eps: clean samples and noise, each (n, D).
        component: of the mixture that each sample was drawn from, (n,); None for other laws.
        weight: (n,), if they were drawn from another law than the mixture: the ratio of densities.
    """

    x0: Tensor
    eps: Tensor
    component: Tensor | None = None
    weight: Tensor | None = None

    @property
    def own(self) -> Tensor | None:
        """Components whose moments hold over the points drawn from them: weights would spoil these."""
        return self.component if self.weight is None else None


class _Forms(NamedTuple):
    """f quadratic forms: h and b of shape (f, ..., D), c of shape (f, ...)."""

    h: Tensor
    b: Tensor
    c: Tensor


def mixture_kl(
    law: GaussianMixture,
    steps: Sequence[tuple[Array, Array]],
    draws: Draws,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[Array, Array]]:
    """KL(p_1 || p_2) in nats and its standard error, each (m,), for every step.

    Args:
        law: the mixture.
        steps: (alpha, sigma) of p_1 and of p_2, each (m, 2).
        draws: the same for all steps.
        progress: called with pairs (done, total).
    """
    m, gaussians = len(steps[0][0]), _Gaussians(law)
    found = []
    for rows in slices(m, LEVELS_AT_ONCE):
        found.append(_kl(gaussians, [(first[rows], second[rows]) for first, second in steps], draws))
        progress(rows.stop, m)
    out = []
    for step in zip(*found, strict=True):
        kl, error = zip(*step, strict=True)
        out.append((np.concatenate(kl), np.concatenate(error)))
    return out


def _kl(gaussians: "_Gaussians", steps: Sequence[tuple[Array, Array]], draws: Draws) -> list[tuple[Array, Array]]:
    """``mixture_kl`` with all points of all pairs in memory."""
    law = gaussians.law
    parts: list[list[Tensor]] = [[] for _ in steps]
    for rows in blocks_of(law, len(draws.x0)):
        x0, eps = draws.x0[rows], draws.eps[rows]
        kernel, whole = MixtureKernel(law, x0, eps), MixtureKernel(gaussians.whole, x0, eps)
        for part, step in zip(parts, steps, strict=True):
            ratios = [kernel.log_ratio(*step), whole.log_ratio(*step)]
            if draws.own is not None:
                ratios.append(kernel.log_ratio_of(draws.own[rows], *step))
            part.append(torch.stack(ratios))
    out = []
    for part, (first, second) in zip(parts, steps, strict=True):
        own, *others = torch.cat(part, 2)
        forms = [gaussians.log_ratio_forms(a, b) for a, b in zip(first, second, strict=True)]
        beside = _deviations([other[None] for other in others], gaussians.moments(first, forms), draws.weight)
        kl, error = kl_from_log_ratio(own, draws.weight, beside)
        out.append((kl.numpy(), error.numpy()))
    return out


def mixture_rates(law: GaussianMixture, tau: Array, draws: Draws) -> tuple[Array, Array]:
    """A, B, C, I_min (F5) and 1 + B/C at tau = log s, and their standard errors, each (m, 5)."""
    gaussians = _Gaussians(law)
    found = [_rates(gaussians, tau[rows], draws) for rows in slices(len(tau), LEVELS_AT_ONCE)]
    rates, errors = zip(*found, strict=True)
    return np.concatenate(rates), np.concatenate(errors)


def _rates(gaussians: "_Gaussians", tau: Array, draws: Draws) -> tuple[Array, Array]:
    """``mixture_rates`` with all points of all levels in memory."""
    n, law = len(draws.x0), gaussians.law
    parts = []
    for rows in blocks_of(law, n):
        x0, eps = draws.x0[rows], draws.eps[rows]
        kernel = MixtureKernel(law, x0, eps)
        scores = [kernel.time_score(tau), MixtureKernel(gaussians.whole, x0, eps).time_score(tau)]
        if draws.own is not None:
            scores.append(kernel.time_score_of(draws.own[rows], tau))
        parts.append(torch.stack([torch.stack(score) for score in scores]))
    (flow, dilation), *others = torch.cat(parts, 3)
    weight = torch.ones(n, dtype=torch.float64) if draws.weight is None else draws.weight
    sums = [(part * weight).sum(1).numpy() for part in (flow * dilation, dilation.square())]
    # Of the draws themselves: its error is of the order of F - beta q, which is small where F and q nearly cancel.
    beta = beta_of(*sums)
    slope = torch.from_numpy(beta)[:, None]
    scales = np.stack([np.ones_like(tau), np.exp(tau)], 1)
    forms = [gaussians.score_forms(s, b) for s, b in zip(scales[:, 1].tolist(), beta.tolist(), strict=True)]
    values = [torch.stack([other[0] - slope * other[1], other[1]]) for other in others]
    beside = _deviations(values, gaussians.moments(scales, forms), draws.weight)

    def mean(terms: Tensor) -> tuple[Tensor, Tensor]:
        return mean_beside(terms * weight, beside)

    least = flow - slope * dilation
    a, b, c = (mean(part) for part in (flow.square(), flow * dilation, dilation.square()))
    rest, rest_error = mean(least.square())
    # The best beta is another one by E[(F - beta q) q]/C.
    i_min = rest - mean(least * dilation)[0] ** 2 / c[0]
    lag, lag_error = mean((flow + dilation) * dilation)
    found = [a, b, c, (i_min, rest_error), (lag / c[0], lag_error / c[0])]
    rates, errors = (torch.stack(column, 1).numpy() for column in zip(*found, strict=True))
    return rates, errors


def _deviations(others: list[Tensor], moments: list[tuple[Tensor, Tensor]], weight: Tensor | None) -> Tensor:
    """What has a mean of 0: forms and their products minus their means, (c, m, n).

    Args:
        others: values of f forms at the points, each (f, m, n).
        moments: their means, (f, m), and those of their products, (f, f, m).
        weight: of the points.
    """
    out = []
    for values, (mean, product) in zip(others, moments, strict=False):
        out.append(values - mean[..., None])
        i, j = torch.triu_indices(len(values), len(values)).tolist()
        out.append(values[i] * values[j] - product[i, j][..., None])
    beside = torch.cat(out)
    if weight is None:
        return beside
    return torch.cat([beside * weight, (weight - 1).expand_as(beside[:1])])


class _Gaussians:
    """The Gaussian of a mixture's moments, and the components themselves, each for the points drawn from it.

    Args:
        law: the mixture, of K components in D dimensions.
    """

    def __init__(self, law: GaussianMixture) -> None:
        self.law, self.weights = law, law.log_weights.exp()
        mean = self.weights @ law.means
        offset = law.means - mean
        between = (offset * self.weights[:, None]).T @ offset
        # Thousands of components without axes of their own need no matrix each.
        self.within = None if isotropic(law) else (law.basis * law.eigenvalues[:, None]) @ law.basis.transpose(1, 2)
        if self.within is None:
            covariance = between + torch.diag(self.weights @ law.eigenvalues)
        else:
            covariance = between + torch.tensordot(self.weights, self.within, 1)
        self.whole = GaussianMixture([1.0], mean[None].numpy(), covariance[None].numpy())
        axes = self.whole.basis[0]
        self.offset, self.variances = offset @ axes, law.eigenvalues
        if self.within is not None:
            self.within = axes.T @ self.within @ axes
            self.variances = self.within.diagonal(dim1=1, dim2=2)

    def log_ratio_forms(self, first: Array, second: Array) -> list[_Forms]:
        """The log-ratio of the whole and of the components, from (alpha, sigma)."""
        (a1, s1), (a2, s2) = first.tolist(), second.tolist()
        out = []
        for lam, mean in self._along_axes():
            v1, v2 = a1**2 * lam + s1**2, a2**2 * lam + s2**2
            # The difference of variances is formed from differences of scales, which agree in their leading digits.
            shrink = ((a1 - a2) * (a1 + a2) * lam + (s1 - s2) * (s1 + s2)) / v2
            shift = (a2 - a1) * mean
            c = 0.5 * (shift.square() / v2 - torch.log1p(shrink)).sum(-1)
            out.append(_Forms((0.5 * shrink / v1)[None], (-shift / v2)[None], c[None]))
        return out

    def score_forms(self, s: float, beta: float) -> list[_Forms]:
        """F - beta q and q of the whole and of the components."""
        out = []
        for lam, mean in self._along_axes():
            v = lam + s**2
            flow = _Forms(s**2 / v**2, torch.zeros_like(v), -(s**2 / v).sum(-1))
            dilation = _Forms(-1 / v, -mean / v, torch.full_like(flow.c, self.law.dim))
            least = (one - beta * other for one, other in zip(flow, dilation, strict=True))
            out.append(_Forms(*(torch.stack(pair) for pair in zip(least, dilation, strict=True))))
        return out

    def moments(self, scales: Array, forms: list[list[_Forms]]) -> list[tuple[Tensor, Tensor]]:
        """Of the whole and of the components: means (f, m) over the mixture of the forms, (f, f, m) of their products.

        Args:
            scales: (alpha, sigma) of the points, (m, 2).
            forms: at each of them.
        """
        found = [
            (self._of_whole(whole, alpha, sigma), self._of_components(own, alpha, sigma))
            for (whole, own), (alpha, sigma) in zip(forms, scales.tolist(), strict=True)
        ]
        kinds = []
        for kind in zip(*found, strict=True):
            mean, product = (torch.stack(column, -1) for column in zip(*kind, strict=True))
            kinds.append((mean, product))
        return kinds

    def _of_whole(self, forms: _Forms, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        (h, b, c), a2, s2 = forms, alpha**2, sigma**2
        d = alpha * self.offset
        mean = h @ (self.variances * a2 + s2 + d.square()).T + b @ d.T + c[:, None]
        g = 2 * h[:, None] * d + b[:, None]
        if self.within is None:
            v = a2 * self.variances + s2
            square, linear = torch.einsum("fi,ki,gi->fgk", h, v**2, h), torch.einsum("fki,ki,gki->fgk", g, v, g)
        else:
            # V = a2 within + s2 I, whose elements are squared one by one.
            square = a2**2 * torch.einsum("fi,kij,gj->fgk", h, self.within.square(), h)
            square = square + torch.einsum("fi,ki,gi->fgk", h, 2 * a2 * s2 * self.variances + s2**2, h)
            linear = a2 * torch.einsum("fki,kij,gkj->fgk", g, self.within, g) + s2 * torch.einsum("fki,gki->fgk", g, g)
        return self._over_components(mean, 2 * square + linear)

    def _of_components(self, forms: _Forms, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        h, b, c = forms
        v = alpha**2 * self.law.eigenvalues + sigma**2
        covariance = 2 * torch.einsum("fki,gki,ki->fgk", h, h, v.square()) + torch.einsum("fki,gki,ki->fgk", b, b, v)
        return self._over_components((h * v).sum(2) + c, covariance)

    def _over_components(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the forms (f,) and of their products (f, f) from those in the components, (f, K) and (f, f, K)."""
        return mean @ self.weights, (covariance + mean[:, None] * mean) @ self.weights

    def _along_axes(self) -> list[tuple[Tensor, Tensor]]:
        """Variances and means of the whole, (D,), and of the components, (K, D), along their own axes."""
        whole = self.whole
        return [
            (whole.eigenvalues[0], whole.rotated_means[0]),
            (self.law.eigenvalues, self.law.rotated_means),
        ]
