"""Laws fitted to a sample, in one form: independent blocks on orthogonal groups of principal axes.

A fit is a product of blocks, so its relative entropies, time scores and log-densities are sums over blocks:
    GaussianBlock   everything in closed form (F2)
    MixtureBlock    full-covariance mixture, F1 with draws of the fit (``mixture_means``)
    ProductBlock    independent one-dimensional mixtures along rotated axes, quadrature
``families`` says how a block is fitted to rows.
"""

__all__ = ["Block", "Fit", "GaussianBlock", "Measured", "MixtureBlock", "ProductBlock", "null_block"]

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.laws import GaussianMixture
from difficulty.randomness import torch_generator
from difficulty.relative_entropy.gaussian import gaussian_kl, gaussian_profile
from difficulty.relative_entropy.kernel import MixtureKernel, blocks_of
from difficulty.relative_entropy.mixture_means import Draws, mixture_kl, mixture_rates
from difficulty.relative_entropy.montecarlo import nonnegative_terms
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.rates import add_rates, rates_of_scores
from difficulty.relative_entropy.sample import Sample

Array = npt.NDArray[np.float64]

FIT_STREAM = 29
HERMITE_NODES = 24
SMALL = 2**20
# Numbers (axis, component, point) held at once by a product: 32 MiB.
ELEMENTS = 2**22
# Components of the marginal of a product along a direction that is not one of its axes.
COMBINED = 128


@dataclass(frozen=True, eq=False)
class Measured:
    """Relative entropies of a law: kl, kl_reverse (nats) and the Monte Carlo error of kl, each (m,)."""

    kl: Array
    kl_reverse: Array
    error: Array

    def __add__(self, other: "Measured") -> "Measured":
        error = np.hypot(self.error, other.error)
        return Measured(self.kl + other.kl, self.kl_reverse + other.kl_reverse, error)


class Block(ABC):
    """A law on some axes."""

    @abstractmethod
    def measure(self, pairs: Pairs, samples: int, seed: int) -> Measured:
        """Relative entropies of the block."""

    @abstractmethod
    def forward(self, pairs: Pairs, samples: int, seed: int) -> Array:
        """KL(p_from || p_t) only, nats, (m,)."""

    @abstractmethod
    def profile(self, tau: Array, samples: int, seed: int) -> Array:
        """A, B, C, I_min of F5 at tau = log s, shape (m, 4)."""

    @abstractmethod
    def mmse(self, tau: Array, samples: int, seed: int) -> Array:
        """Least possible E|x0 - x0_hat(y)|^2 at y = x0 + exp(tau) eps, shape (m,)."""

    @abstractmethod
    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Samples of x0, shape (samples, d)."""

    @abstractmethod
    def marginal(self, direction: Array) -> tuple[Array, Array, Array]:
        """The law of x0 @ direction as a mixture of Gaussians: weights, means, variances, each (k,)."""

    @abstractmethod
    def evaluate(self, x0: Tensor, eps: Tensor, tau: Array) -> tuple[Tensor, Tensor, Tensor]:
        """F, q and the log density at y = x0 + exp(tau) eps, each (m, n)."""

    def log_density(self, x0: Tensor, eps: Tensor, tau: Array) -> Tensor:
        """Log density at y = x0 + exp(tau) eps, (m, n)."""
        return self.evaluate(x0, eps, tau)[2]


class GaussianBlock(Block):
    """A Gaussian.

    Args:
        eigenvalues, mean: variances and mean along the axes, shape (d,).
        axes: orthonormal, shape (d, d), the coordinates are x @ axes; None for the axes that x is given in.
    """

    def __init__(self, eigenvalues: Array, mean: Array, axes: Array | None = None) -> None:
        self.eigenvalues, self.mean = eigenvalues, mean
        self.axes = None if axes is None else torch.from_numpy(axes)

    def measure(self, pairs: Pairs, samples: int, seed: int) -> Measured:
        kl = self.forward(pairs, samples, seed)
        return Measured(kl, gaussian_kl(pairs, self.eigenvalues, self.mean, reverse=True), np.zeros_like(kl))

    def forward(self, pairs: Pairs, samples: int, seed: int) -> Array:
        return gaussian_kl(pairs, self.eigenvalues, self.mean)

    def profile(self, tau: Array, samples: int, seed: int) -> Array:
        return gaussian_profile(tau, self.eigenvalues, self.mean)

    def mmse(self, tau: Array, samples: int, seed: int) -> Array:
        s2 = np.exp(2 * tau)[:, None]
        return (self.eigenvalues * s2 / (self.eigenvalues + s2)).sum(1)

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(samples, len(self.mean), dtype=torch.float64, generator=generator)
        x = torch.from_numpy(self.mean) + noise * torch.from_numpy(self.eigenvalues).sqrt()
        return x if self.axes is None else x @ self.axes.T

    def marginal(self, direction: Array) -> tuple[Array, Array, Array]:
        along = direction if self.axes is None else direction @ self.axes.numpy()
        return np.ones(1), np.array([along @ self.mean]), np.array([along**2 @ self.eigenvalues])

    def evaluate(self, x0: Tensor, eps: Tensor, tau: Array) -> tuple[Tensor, Tensor, Tensor]:
        if self.axes is not None:
            x0, eps = x0 @ self.axes, eps @ self.axes
        v = torch.from_numpy(self.eigenvalues + np.exp(2 * tau)[:, None])
        s = torch.from_numpy(np.exp(tau))[:, None]
        mean = torch.from_numpy(self.mean)
        z, m = x0 - mean, mean
        parts = (z.square().T, 2 * (z * eps).T, eps.square().T)
        w = 1 / v
        quadratic = w @ parts[0] + s * (w @ parts[1]) + s**2 * (w @ parts[2])
        w2 = s**2 / v**2
        flow = w2 @ parts[0] + s * (w2 @ parts[1]) + s**2 * (w2 @ parts[2]) - (s**2 / v).sum(1, keepdim=True)
        linear = w @ (m * z).T + s * (w @ (m * eps).T)
        log_density = -0.5 * quadratic - 0.5 * (2 * torch.pi * v).log().sum(1, keepdim=True)
        return flow, len(self.mean) - quadratic - linear, log_density


def null_block(sample: Sample) -> GaussianBlock:
    """The directions in which the data do not vary at all: a point mass, known exactly."""
    mean = np.zeros(sample.dim - sample.rank)
    mean[:1] = sample.null_mean
    return GaussianBlock(np.zeros_like(mean), mean)


class MixtureBlock(Block):
    """A Gaussian mixture with full covariances.

    Args:
        law: the mixture.
        heavy_tailed: draw half of the points evenly from all components, and weigh them: the rare ones far out decide.
    """

    def __init__(self, law: GaussianMixture, *, heavy_tailed: bool = False) -> None:
        self.law = self.proposal = law
        if heavy_tailed:
            weights = law.log_weights.exp().numpy()
            self.proposal = copy(law)
            self.proposal.log_weights = torch.from_numpy(0.5 * (weights + 1 / len(weights))).log()

    def measure(self, pairs: Pairs, samples: int, seed: int) -> Measured:
        steps = [(pairs.first, pairs.second), (pairs.second, pairs.first)]
        (kl, error), (kl_reverse, _) = mixture_kl(self.law, steps, self._draw(samples, seed))
        return Measured(kl, kl_reverse, error)

    def forward(self, pairs: Pairs, samples: int, seed: int) -> Array:
        return mixture_kl(self.law, [(pairs.first, pairs.second)], self._draw(samples, seed))[0][0]

    def profile(self, tau: Array, samples: int, seed: int) -> Array:
        return mixture_rates(self.law, tau, self._draw(samples, seed))[0][:, :4]

    def mmse(self, tau: Array, samples: int, seed: int) -> Array:
        draws = self._draw(samples, seed)
        traces = torch.cat([kernel.posterior_trace(tau) for kernel in self._kernels(draws.x0, draws.eps)], 1)
        return (traces if draws.weight is None else traces * draws.weight).mean(1).numpy()

    def marginal(self, direction: Array) -> tuple[Array, Array, Array]:
        law, along = self.law, torch.from_numpy(direction)
        variances = (torch.einsum("kde,d->ke", law.basis, along).square() * law.eigenvalues).sum(1)
        return law.log_weights.exp().numpy(), (law.means @ along).numpy(), variances.numpy()

    def evaluate(self, x0: Tensor, eps: Tensor, tau: Array) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for kernel in self._kernels(x0, eps):
            parts.append((*kernel.time_score(tau), kernel.log_prob(tau)))
        flow, dilation, log_density = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        return flow, dilation, log_density

    def log_density(self, x0: Tensor, eps: Tensor, tau: Array) -> Tensor:
        return torch.cat([kernel.log_prob(tau) for kernel in self._kernels(x0, eps)], 1)

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        return self.law.sample(samples, generator)

    def _draw(self, samples: int, seed: int) -> Draws:
        # A small mixture is cheap: more draws make up for the spread of the terms, which is wide in few dimensions.
        size = samples * self.law.dim * len(self.law.means)
        generator = torch_generator(FIT_STREAM, seed)
        component = self.proposal.components(samples * int(np.clip(SMALL / size, 1, 4)), generator)
        x0 = self.proposal.sample_of(component, generator)
        weight = None
        if self.proposal is not self.law:
            weight = (self.law.log_prob(x0, 1.0, 0.0) - self.proposal.log_prob(x0, 1.0, 0.0)).exp()
        return Draws(x0, torch.randn(x0.shape, dtype=torch.float64, generator=generator), component, weight)

    def _kernels(self, x0: Tensor, eps: Tensor) -> Iterator[MixtureKernel]:
        """Kernels of so many points at a time, to be used up one by one."""
        for rows in blocks_of(self.law, len(x0)):
            yield MixtureKernel(self.law, x0[rows], eps[rows])


class ProductBlock(Block):
    """Independent one-dimensional mixtures along rotated axes.

    Args:
        axes: orthonormal, shape (d, d); the coordinates are x @ axes.
        weights, means, variances: shape (d, K); a weight may be zero.
    """

    def __init__(self, axes: Array, weights: Array, means: Array, variances: Array) -> None:
        self.axes = torch.from_numpy(axes)
        self.weights, self.means, self.variances = (torch.from_numpy(a) for a in (weights, means, variances))

    def measure(self, pairs: Pairs, samples: int, seed: int) -> Measured:
        return Measured(self._kl(pairs.first, pairs.second), self._kl(pairs.second, pairs.first), np.zeros(len(pairs)))

    def forward(self, pairs: Pairs, samples: int, seed: int) -> Array:
        return self._kl(pairs.first, pairs.second)

    def profile(self, tau: Array, samples: int, seed: int) -> Array:
        return add_rates([part._rates(tau) for part in self._parts()])

    def mmse(self, tau: Array, samples: int, seed: int) -> Array:
        return np.sum([part._squared_error(tau) for part in self._parts()], axis=0)

    def _kl(self, first: Array, second: Array) -> Array:
        return np.sum([part._quadrature(first, second) for part in self._parts()], axis=0)

    def _parts(self) -> list["ProductBlock"]:
        """Blocks of so few axes that what is held at once for the quadrature, nodes times components, is no more."""
        d, k = self.weights.shape
        size = max(1, ELEMENTS // (HERMITE_NODES * k * k))
        tables = [each.numpy() for each in (self.weights, self.means, self.variances)]
        cuts = [slice(start, start + size) for start in range(0, d, size)]
        return [ProductBlock(self.axes.numpy(), *(table[cut] for table in tables)) for cut in cuts]

    def _rates(self, tau: Array) -> Array:
        nodes, node_weights = self._hermite()
        w = (self.weights[..., None] * node_weights).flatten(1)
        out = []
        for s in np.exp(tau):
            y = self.means[..., None] + (self.variances + s**2).sqrt()[..., None] * nodes
            flow, dilation, _ = self._time_score(y.flatten(1), float(s))
            out.append(add_rates(list(rates_of_scores(flow, dilation, w)[:, None]))[0])
        return np.array(out)

    def _squared_error(self, tau: Array) -> Array:
        nodes, node_weights = self._hermite()
        w = (self.weights[..., None] * node_weights).flatten(1)
        out = []
        for s in np.exp(tau):
            v = (self.variances + s**2)[..., None]
            y = (self.means[..., None] + v.sqrt() * nodes).flatten(1)
            z = y[:, None] - self.means[..., None]
            posterior = torch.softmax(self.weights.log()[..., None] - 0.5 * (z**2 / v + v.log()), 1)
            centre = self.means[..., None] + self.variances[..., None] / v * z
            mean = (posterior * centre).sum(1, keepdim=True)
            within = self.variances[..., None] * float(s) ** 2 / v
            out.append(float((w * (posterior * (within + (centre - mean) ** 2)).sum(1)).sum()))
        return np.array(out)

    def marginal(self, direction: Array) -> tuple[Array, Array, Array]:
        # All choices of one component per axis are too many: some of them, drawn.
        along = torch.from_numpy(direction) @ self.axes
        drawn = torch.multinomial(self.weights, COMBINED, replacement=True, generator=torch_generator(FIT_STREAM, 2))
        means = along @ self.means.gather(1, drawn)
        variances = along.square() @ self.variances.gather(1, drawn)
        return np.full(COMBINED, 1 / COMBINED), means.numpy(), variances.numpy()

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights, samples, replacement=True, generator=generator)
        noise = torch.randn(k.shape, dtype=torch.float64, generator=generator)
        return (self.means.gather(1, k) + self.variances.gather(1, k).sqrt() * noise).T @ self.axes.T

    def evaluate(self, x0: Tensor, eps: Tensor, tau: Array) -> tuple[Tensor, Tensor, Tensor]:
        x0, eps = x0 @ self.axes, eps @ self.axes
        columns = []
        for s in np.exp(tau):
            flow, dilation, log_density = self._time_score((x0 + s * eps).T, float(s))
            columns.append((flow.sum(0), dilation.sum(0), log_density.sum(0)))
        flows, dilations, log_densities = (torch.stack(c) for c in zip(*columns, strict=True))
        return flows, dilations, log_densities

    def _time_score(self, y: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor]:
        """F, q, log density per axis at y (d, n), so many points at a time."""
        points = y.split(max(1, ELEMENTS // self.weights.numel()), 1)
        columns = zip(*(self._time_score_at(each, s) for each in points), strict=True)
        flow, dilation, log_density = (torch.cat(column, 1) for column in columns)
        return flow, dilation, log_density

    def _time_score_at(self, y: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor]:
        v = (self.variances + s**2)[..., None]
        z = y[:, None] - self.means[..., None]
        log_joint = self.weights.log()[..., None] - 0.5 * (z**2 / v + (2 * torch.pi * v).log())
        log_density = torch.logsumexp(log_joint, 1)
        posterior = (log_joint - log_density[:, None]).exp()
        flow = (posterior * (s**2 * (z**2 / v - 1) / v)).sum(1)
        dilation = 1 - y * (posterior * z / v).sum(1)
        return flow, dilation, log_density

    def _hermite(self) -> tuple[Tensor, Tensor]:
        nodes, weights = np.polynomial.hermite_e.hermegauss(HERMITE_NODES)
        return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())

    def _quadrature(self, first: Array, second: Array) -> Array:
        """Sum over axes of the one-dimensional KL, Gauss-Hermite within each component."""
        nodes, node_weights = self._hermite()
        w = (self.weights[..., None] * node_weights).flatten(1)
        out = []
        for (a1, s1), (a2, s2) in zip(first, second, strict=True):
            v1, v2 = a1**2 * self.variances + s1**2, a2**2 * self.variances + s2**2
            x = (a1 * self.means[..., None] + v1.sqrt()[..., None] * nodes).flatten(1)
            shrink = (((a1 - a2) * (a1 + a2) * self.variances + (s1 - s2) * (s1 + s2)) / v2)[..., None]
            z = x[:, None] - a1 * self.means[..., None]
            shift = ((a2 - a1) * self.means)[..., None]
            square = z**2 / v1[..., None]
            d = 0.5 * (square * shrink - (2 * z - shift) * shift / v2[..., None] - torch.log1p(shrink))
            log_joint = self.weights.log()[..., None] - 0.5 * (square + v1.log()[..., None])
            posterior = torch.softmax(log_joint, 1)
            near = -torch.log1p((posterior * torch.expm1(-d.clamp(min=-1.0))).sum(1))
            far = -torch.logsumexp(posterior.log() - d, 1)
            relevant = torch.where(posterior > 1e-17, d.abs(), 0.0).amax(1)
            ratio = torch.where(relevant < 0.5, near, far)
            small = (w * nonnegative_terms(ratio)).sum()
            # For large steps exp(-l) is too steep for the quadrature, the plain mean is not.
            out.append(float(small if float(ratio.abs().amax()) < 20 else (w * ratio).sum()))
        return np.array(out)


@dataclass(frozen=True, eq=False)
class Fit:
    """Blocks on consecutive groups of columns.

    Args:
        blocks: columns and the law on them.
        axes: rotation (d, d) into the columns, x @ axes; None if there is none.
    """

    blocks: Sequence[tuple[slice, Block]]
    axes: Tensor | None = None

    def measure(self, pairs: Pairs, samples: int, seed: int) -> Measured:
        """Relative entropies, the sum over blocks."""
        zero = np.zeros(len(pairs))
        total = Measured(zero, zero, zero)
        for _, block in self.blocks:
            total = total + block.measure(pairs, samples, seed)
        return total

    def forward(self, pairs: Pairs, samples: int, seed: int) -> Array:
        """KL(p_from || p_t) only, the sum over blocks."""
        return np.sum([block.forward(pairs, samples, seed) for _, block in self.blocks], axis=0)

    def profile(self, tau: Array, samples: int, seed: int) -> Array:
        """A, B, C, I_min of all blocks together, shape (m, 4)."""
        return add_rates([block.profile(tau, samples, seed) for _, block in self.blocks])

    def mmse(self, tau: Array, samples: int, seed: int) -> Array:
        """Least possible E|x0 - x0_hat|^2, the sum over blocks, shape (m,)."""
        return np.sum([block.mmse(tau, samples, seed) for _, block in self.blocks], axis=0)

    def marginal(self, direction: Array) -> tuple[Array, Array, Array]:
        """The law of x0 @ direction, (d,), as a mixture of Gaussians: weights, means, variances, each (k,)."""
        along = direction if self.axes is None else direction @ self.axes.numpy()
        weights, means, variances = np.ones(1), np.zeros(1), np.zeros(1)
        for columns, block in self.blocks:
            w, m, v = block.marginal(along[columns])
            weights = np.multiply.outer(weights, w).ravel()
            means, variances = np.add.outer(means, m).ravel(), np.add.outer(variances, v).ravel()
        return weights, means, variances

    def draw(self, samples: int, seed: int) -> tuple[Tensor, Tensor]:
        """x0 of the fit and noise, each (samples, d)."""
        generator = torch_generator(FIT_STREAM, 1, seed)
        x0 = torch.cat([block.draw(samples, generator) for _, block in self.blocks], 1)
        if self.axes is not None:
            x0 = x0 @ self.axes.T
        return x0, torch.randn(x0.shape, dtype=torch.float64, generator=generator)

    def evaluate(self, x0: Tensor, eps: Tensor, tau: Array) -> tuple[Tensor, Tensor, Tensor]:
        """F, q and log density at y = x0 + exp(tau) eps, each (m, n)."""
        x0, eps = self._rotate(x0, eps)
        parts = [block.evaluate(x0[:, columns], eps[:, columns], tau) for columns, block in self.blocks]
        flow, dilation, log_density = (torch.stack(column).sum(0) for column in zip(*parts, strict=True))
        return flow, dilation, log_density

    def log_density(self, x0: Tensor, eps: Tensor, tau: Array) -> Tensor:
        """Log density at y = x0 + exp(tau) eps, (m, n)."""
        x0, eps = self._rotate(x0, eps)
        parts = [block.log_density(x0[:, columns], eps[:, columns], tau) for columns, block in self.blocks]
        return torch.stack(parts).sum(0)

    def _rotate(self, x0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        return (x0, eps) if self.axes is None else (x0 @ self.axes, eps @ self.axes)
