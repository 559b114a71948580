"""Laws whose relative entropy is known without the estimators under test, given to them as samples only.

A product of one-dimensional laws has a relative entropy that is the sum over its factors, each an integral of a smooth
function (quadrature), whatever rotation is applied; a mixture and a ring are exact laws (Monte Carlo, 40 000 draws); a
sphere depends on the radius only; a singular law in D dimensions adds the codimension times the Gaussian term.
"""

__all__ = ["DECEIVING", "JUDGING", "LAWS", "KnownLaw"]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy import special, stats

from difficulty.laws import GaussianMixture, Law, Ring
from difficulty.relative_entropy.estimate import Settings
from difficulty.relative_entropy.exact import kl_of_law, law_draws
from difficulty.relative_entropy.gaussian import gaussian_kl
from difficulty.relative_entropy.montecarlo import kl_from_log_ratio
from difficulty.relative_entropy.pairs import Pairs

SILENT = Settings(1, 1, 0, lambda done, total: None)


class KnownLaw(ABC):
    """Samples, and the relative entropies behind them."""

    dim: int

    @abstractmethod
    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Shape (n, dim)."""

    @abstractmethod
    def kl(self, pairs: Pairs) -> np.ndarray:
        """KL(p_from || p_t) in nats, shape (m,)."""


class Exact(KnownLaw):
    """A law of the package, by Monte Carlo with all draws that are affordable: 0.4 % of error, 1 % for the dearest."""

    def __init__(self, law: Law):
        size = len(law.means) * law.dim if isinstance(law, GaussianMixture) else 1
        self.law, self.dim, self.draws = law, law.dim, int(np.clip(5e7 / size, 40_000, 320_000))

    def sample(self, n, rng):
        return self.law.sample(n, torch.Generator().manual_seed(int(rng.integers(2**31)))).numpy()

    def kl(self, pairs):
        if isinstance(self.law, GaussianMixture) and len(self.law.means) == 1:
            return gaussian_kl(pairs, self.law.eigenvalues[0].numpy(), self.law.rotated_means[0].numpy())
        return kl_of_law(self.law, pairs, law_draws(self.law, self.draws, 1), SILENT)[0]


class Uniform:
    """Uniform on [-a, a]."""

    def __init__(self, a=1.0):
        self.a, self.reach = a, a

    def draw(self, n, rng):
        return rng.uniform(-self.a, self.a, n)

    def log_prob(self, x, alpha, sigma):
        upper, lower = (-np.abs(x) + alpha * self.a) / sigma, (-np.abs(x) - alpha * self.a) / sigma
        log_upper = special.log_ndtr(upper)
        return log_upper + np.log(-np.expm1(special.log_ndtr(lower) - log_upper)) - math.log(2 * alpha * self.a)


class Laplace:
    """Laplace of scale b."""

    def __init__(self, b=0.5**0.5):
        self.b, self.reach = b, 14 * b

    def draw(self, n, rng):
        return rng.laplace(0, self.b, n)

    def log_prob(self, x, alpha, sigma):
        b, x = alpha * self.b, np.abs(x)
        r = sigma / b
        sides = np.logaddexp(-x / b + special.log_ndtr(x / sigma - r), x / b + special.log_ndtr(-x / sigma - r))
        return sides + r * r / 2 - math.log(2 * b)


class Mixture1:
    """Mixture of one-dimensional Gaussians."""

    def __init__(self, weights, means, variances):
        self.w, self.m, self.v = (np.asarray(a, dtype=np.float64) for a in (weights, means, variances))
        self.w = self.w / self.w.sum()
        self.reach = float(np.max(np.abs(self.m) + 9 * np.sqrt(self.v)))

    def draw(self, n, rng):
        k = rng.choice(len(self.w), n, p=self.w)
        return self.m[k] + np.sqrt(self.v[k]) * rng.standard_normal(n)

    def log_prob(self, x, alpha, sigma):
        v = alpha**2 * self.v + sigma**2
        joint = np.log(self.w) - 0.5 * ((x[:, None] - alpha * self.m) ** 2 / v + np.log(2 * np.pi * v))
        return special.logsumexp(joint, axis=1)


def student_scales(df, levels=300):
    """Student's t as a mixture of Gaussians: weights and variances."""
    precision = np.exp(np.linspace(np.log(1e-4), np.log(60.0), levels))
    return stats.gamma.pdf(precision, df / 2, scale=2 / df) * precision, 1 / precision


def student(df):
    weights, variances = student_scales(df)
    return Mixture1(weights, np.zeros(len(weights)), variances)


class Product(KnownLaw):
    """Independent factors, each times a scale, then axes without variance, then a rotation."""

    def __init__(self, factors, scales=None, null=0, rotation=None):
        self.factors, self.null, self.rotation = factors, null, rotation
        self.scales = np.ones(len(factors)) if scales is None else np.asarray(scales)
        self.dim = len(factors) + null

    def sample(self, n, rng):
        x = np.stack([f.draw(n, rng) for f in self.factors], 1) * self.scales
        return rotated(np.concatenate([x, np.zeros((n, self.null))], 1), self.rotation)

    def kl(self, pairs):
        known: dict = {}
        for factor, scale in zip(self.factors, self.scales, strict=True):
            key = (id(factor), float(scale))
            known[key] = known[key] if key in known else kl_in_one_dimension(factor, scale, pairs)
        total = sum(known[id(f), float(s)] for f, s in zip(self.factors, self.scales, strict=True))
        return total + gaussian_kl(pairs, np.zeros(self.null), np.zeros(self.null))


def kl_in_one_dimension(factor, scale, pairs: Pairs) -> np.ndarray:
    out = []
    for (a1, s1), (a2, s2) in zip(pairs.first, pairs.second, strict=True):
        a1, a2 = a1 * scale, a2 * scale
        reach = a1 * factor.reach + 10 * s1
        if factor.reach > 50:  # heavy tails: a grid that grows outwards
            u = np.linspace(-np.arcsinh(reach / 0.05), np.arcsinh(reach / 0.05), 6001)
            x, width = 0.05 * np.sinh(u), 0.05 * np.cosh(u) * (u[1] - u[0])
        else:
            x = np.linspace(-reach, reach, int(np.clip(24 * reach / s1, 6001, 60001)))
            width = np.full(len(x), x[1] - x[0])
        log_p = factor.log_prob(x, a1, s1)
        ratio = log_p - factor.log_prob(x, a2, s2)
        series = ratio**2 * (0.5 - ratio / 6 + ratio**2 / 24)
        terms = np.where(np.abs(ratio) < 1e-4, series, ratio + np.expm1(-np.clip(ratio, -600, None)))
        p = np.exp(log_p)
        out.append((p * terms * width)[p > 1e-300].sum())
    return np.array(out)


class Embedded(KnownLaw):
    """A law on a subspace of more dimensions."""

    def __init__(self, law, null, rotation=None):
        self.law, self.null, self.rotation, self.dim = law, null, rotation, law.dim + null

    def sample(self, n, rng):
        return rotated(np.concatenate([self.law.sample(n, rng), np.zeros((n, self.null))], 1), self.rotation)

    def kl(self, pairs):
        return self.law.kl(pairs) + gaussian_kl(pairs, np.zeros(self.null), np.zeros(self.null))


def kl_from_draws(noisy, log_prob, pairs: Pairs) -> np.ndarray:
    """Monte Carlo from ``noisy(alpha, sigma)``, draws of x_t or of what decides its density, and their log density."""
    out = []
    for first, second in zip(pairs.first, pairs.second, strict=True):
        x = noisy(*first)
        out.append(torch.from_numpy(log_prob(x, *first) - log_prob(x, *second)))
    return kl_from_log_ratio(torch.stack(out))[0].numpy()


class Sphere(KnownLaw):
    """Uniform on the sphere of a radius in ``dim`` dimensions."""

    def __init__(self, dim, radius=1.0):
        self.dim, self.radius = dim, radius

    def sample(self, n, rng):
        z = rng.standard_normal((n, self.dim))
        return self.radius * z / np.linalg.norm(z, axis=1, keepdims=True)

    def log_prob(self, rho, alpha, sigma):
        order, kappa = self.dim / 2 - 1, alpha * self.radius * rho / sigma**2
        bessel = np.log(special.ive(order, kappa)) + kappa - order * np.log(kappa / 2)
        return bessel - 0.5 * (rho**2 + (alpha * self.radius) ** 2) / sigma**2 - self.dim * np.log(sigma)

    def kl(self, pairs):
        rng = np.random.default_rng(0)
        z, rest = rng.standard_normal(200_000), rng.chisquare(self.dim - 1, 200_000)
        return kl_from_draws(
            lambda alpha, sigma: np.sqrt((alpha * self.radius + sigma * z) ** 2 + sigma**2 * rest), self.log_prob, pairs
        )


class Orthants(KnownLaw):
    """N(0, v I) on those orthants whose signs multiply to +1: all but one of the coordinates are exactly Gaussian."""

    def __init__(self, dim, v):
        self.dim, self.v = dim, v

    def sample(self, n, rng):
        z = math.sqrt(self.v) * rng.standard_normal((n, self.dim))
        z[:, 0] = np.abs(z[:, 0]) * np.sign(z[:, 1:].prod(1))
        return z

    def log_prob(self, x, alpha, sigma):
        variance = alpha**2 * self.v + sigma**2
        # Mean over standard deviation of x0 given x, times sqrt(1/2).
        ratio = alpha * x * math.sqrt(self.v / (2 * variance)) / sigma
        return np.log1p(special.erf(ratio).prod(1)) - 0.5 * (x**2 / variance + np.log(2 * np.pi * variance)).sum(1)

    def kl(self, pairs):
        rng = np.random.default_rng(0)
        x0, eps = self.sample(200_000, rng), rng.standard_normal((200_000, self.dim))
        return kl_from_draws(lambda alpha, sigma: alpha * x0 + sigma * eps, self.log_prob, pairs)


class Copies(KnownLaw):
    """Independent copies of a law, rotated together."""

    def __init__(self, law, count, rotation):
        self.law, self.count, self.rotation, self.dim = law, count, rotation, count * law.dim

    def sample(self, n, rng):
        return rotated(np.concatenate([self.law.sample(n, rng) for _ in range(self.count)], 1), self.rotation)

    def kl(self, pairs):
        return self.count * self.law.kl(pairs)


def rotated(x, seed):
    return x if seed is None or x.shape[1] < 2 else x @ stats.ortho_group.rvs(x.shape[1], random_state=seed).T


def gauss(eigenvalues: Sequence[float], mean=0.0):
    lam = np.asarray(eigenvalues, dtype=np.float64)
    return Exact(GaussianMixture([1.0], np.full((1, len(lam)), mean), np.diag(lam)[None]))


def isotropic_modes(k, dim, spread, std, seed):
    rng = np.random.default_rng(seed)
    means, weights = rng.standard_normal((k, dim)) * spread, rng.uniform(0.5, 1.5, k)
    return Exact(GaussianMixture(weights, means, np.broadcast_to(std**2 * np.eye(dim), (k, dim, dim))))


def random_modes(k, dim, spread, seed, condition=10.0):
    rng = np.random.default_rng(seed)
    means, covariances = rng.standard_normal((k, dim)) * spread, []
    for i in range(k):
        axes = stats.ortho_group.rvs(dim, random_state=seed * 100 + i) if dim > 1 else np.eye(1)
        covariances.append((axes * np.exp(rng.uniform(-np.log(condition), 0, dim))) @ axes.T)
    return Exact(GaussianMixture(rng.uniform(0.5, 1.5, k), means, np.stack(covariances)))


def multivariate_student(dim, df):
    weights, variances = student_scales(df, 200)
    covariances = variances[:, None, None] * np.eye(dim)
    return Exact(GaussianMixture(np.maximum(weights, 1e-300), np.zeros((len(weights), dim)), covariances))


def curve(points, std):
    k, dim = points.shape
    return Exact(GaussianMixture(np.ones(k), points, np.broadcast_to(std**2 * np.eye(dim), (k, dim, dim))))


def spiral(std, turns=3, n=3000):
    angle = turns * np.pi * np.sqrt((np.arange(n) + 0.5) / n)
    return curve(np.stack([angle * np.cos(angle), angle * np.sin(angle)], 1) / 8, std)


def spikes(k, dim, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((k, dim)) * spread
    return Exact(GaussianMixture(rng.uniform(0.3, 1.7, k), means, np.zeros((k, dim, dim))))


def grid(std, side=5):
    means = np.stack(np.meshgrid(*[np.linspace(-1, 1, side)] * 2), -1).reshape(-1, 2)
    return Exact(GaussianMixture(np.ones(len(means)), means, np.broadcast_to(std**2 * np.eye(2), (len(means), 2, 2))))


def hermite(points, noise, scale):
    """Gaussians of width noise about the nodes of a quadrature: its first 2 points - 1 moments are a Gaussian's."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return Mixture1(weights, scale * nodes, np.full(points, (scale * noise) ** 2))


def along(step, mean, slope, variance):
    """(u, y), u standard normal, y | u of a mean and a variance: Gaussians a step of u apart, drawn out along it."""
    u = np.arange(-4, 4 + step / 2, step)
    direction = np.stack([np.ones_like(u), *slope(u)], 1)
    covariances = step**2 * direction[:, :, None] * direction[:, None]
    inner = np.arange(1, direction.shape[1])
    covariances[:, inner, inner] += np.stack(variance(u), 1)
    return Exact(GaussianMixture(np.exp(-(u**2) / 2), np.stack([u, *mean(u)], 1), covariances))


def banana():
    return along(0.05, lambda u: [0.7 * (u**2 - 1)], lambda u: [1.4 * u], lambda u: [np.full_like(u, 0.01)])


def funnel(dim, widening):
    """Neal's funnel: the logarithm of the standard deviation of the other coordinates is widening times the first."""
    flat = lambda u: [np.zeros_like(u)] * (dim - 1)  # noqa: E731
    return along(0.1, flat, flat, lambda u: [np.exp(2 * widening * u)] * (dim - 1))


def rare_clusters():
    covariances = np.array([1.0, 0.01, 4e-4])[:, None, None] * np.eye(10)
    return Exact(GaussianMixture([0.89, 0.1, 0.01], np.array([0.0, 1.5, -1.0])[:, None] * np.ones(10), covariances))


TWO = ([1, 1], [-1, 1])
# Laws that the estimators were developed on.
LAWS: Mapping[str, Callable[[], KnownLaw]] = {
    "gauss-1": lambda: gauss([0.5], 0.3),
    "gauss-16": lambda: gauss(np.linspace(0.1, 2, 16)),
    "gauss-64": lambda: gauss(4.0 / np.arange(1, 65) ** 1.5),
    "gauss-192": lambda: gauss(8.0 / np.arange(1, 193)),
    "white-16": lambda: gauss(np.ones(16)),
    "white-64": lambda: gauss(np.ones(64)),
    "rank-8-of-64": lambda: Embedded(gauss(np.linspace(0.3, 2, 8)), 56, 3),
    "modes5-2": lambda: isotropic_modes(5, 2, 1.0, 0.15, 0),
    "grid-2": lambda: grid(0.05),
    "modes6-8": lambda: random_modes(6, 8, 1.5, 1),
    "modes4-16": lambda: random_modes(4, 16, 1.0, 2),
    "modes8-32": lambda: random_modes(8, 32, 1.0, 3),
    "modes5-64": lambda: random_modes(5, 64, 0.8, 4, 5.0),
    "modes3-128": lambda: random_modes(3, 128, 0.6, 5, 5.0),
    "modes30-64": lambda: isotropic_modes(30, 64, 1.0, 0.2, 6),
    "bimodal-1": lambda: Product([Mixture1(*TWO, [0.01, 0.01])]),
    "points2-1": lambda: Product([Mixture1(*TWO, [0, 0])]),
    "uniform-1": lambda: Product([Uniform()]),
    "uniform-2": lambda: Product([Uniform()] * 2, rotation=1),
    "uniform-8": lambda: Product([Uniform()] * 8),
    "uniform-16": lambda: Product([Uniform()] * 16, rotation=2),
    "uniform-64": lambda: Product([Uniform()] * 64),
    "uniform-small-4": lambda: Product([Uniform(0.5)] * 4),
    "corners-8": lambda: Product([Mixture1(*TWO, [0, 0])] * 8),
    "bimodal-16": lambda: Product([Mixture1(*TWO, [0.04, 0.04])] * 16, rotation=5),
    "laplace-1": lambda: Product([Laplace()]),
    "laplace-4": lambda: Product([Laplace()] * 4),
    "laplace-16": lambda: Product([Laplace()] * 16, rotation=3),
    "laplace-64": lambda: Product([Laplace()] * 64),
    "student3-1": lambda: Product([student(3)]),
    "student3-8": lambda: Product([student(3)] * 8),
    "student4-32": lambda: Product([student(4)] * 32),
    "radial-student3-2": lambda: multivariate_student(2, 3),
    "radial-student4-16": lambda: multivariate_student(16, 4),
    "radial-student5-64": lambda: multivariate_student(64, 5),
    "ring-2": lambda: Exact(Ring(2)),
    "ring-16": lambda: Exact(Ring(16)),
    "sphere-3": lambda: Sphere(3),
    "sphere-8": lambda: Sphere(8, 2.0),
    "sphere-4-of-32": lambda: Embedded(Sphere(4), 28, 2),
    "spiral-2": lambda: spiral(0.03),
    "spiral-sharp-2": lambda: spiral(0.003),
    "spikes10-2": lambda: spikes(10, 2, 1),
    "spikes50-16": lambda: spikes(50, 16, 2),
    "spikes1000-8": lambda: spikes(1000, 8, 3),
    "spikes300-64": lambda: spikes(300, 64, 4),
}

# Laws that were looked at once, after everything else was fixed.
JUDGING: Mapping[str, Callable[[], KnownLaw]] = {
    "gauss-3": lambda: gauss([0.2, 1.5, 4.0], -0.5),
    "gauss-48": lambda: gauss(np.geomspace(0.02, 3, 48), 0.2),
    "gauss-150": lambda: gauss(0.5 + 3 * np.exp(-np.arange(150) / 20.0)),
    "rank-5-of-100": lambda: Embedded(gauss([0.3, 0.5, 1, 2, 3]), 95, 8),
    "modes3-1": lambda: Product([Mixture1([1, 2, 1], [-1.5, 0, 1], [0.02, 0.05, 0.01])]),
    "modes4-5": lambda: random_modes(4, 5, 1.2, 11),
    "modes7-24": lambda: random_modes(7, 24, 1.0, 12, 6.0),
    "modes12-6": lambda: isotropic_modes(12, 6, 1.0, 0.25, 13),
    "modes6-96": lambda: isotropic_modes(6, 96, 0.7, 0.5, 14),
    "modes2-192": lambda: isotropic_modes(2, 192, 0.5, 0.6, 15),
    "modes10-64": lambda: isotropic_modes(10, 64, 0.8, 0.4, 29),
    "uniform-3": lambda: Product([Uniform()] * 3, rotation=21),
    "uniform-32": lambda: Product([Uniform(1.2)] * 32),
    "uniform-112": lambda: Product([Uniform(1.5)] * 112, rotation=30),
    "bimodal-72": lambda: Product([Mixture1([1, 1], [-0.8, 0.8], [0.05, 0.05])] * 72, rotation=31),
    "uniform-unequal-6": lambda: Product([Uniform()] * 6, scales=[0.3, 0.5, 0.8, 1, 1.5, 2], rotation=22),
    "uniform-5-of-20": lambda: Product([Uniform()] * 5, null=15, rotation=23),
    "laplace-2": lambda: Product([Laplace(0.5)] * 2, rotation=24),
    "laplace-10": lambda: Product([Laplace(0.6)] * 10),
    "bimodal-4": lambda: Product([Mixture1([1, 2], [-1, 0.8], [0.02, 0.04])] * 4, rotation=25),
    "student5-3": lambda: Product([student(5)] * 3),
    "student6-20": lambda: Product([student(6)] * 20, rotation=26),
    "radial-student4-5": lambda: multivariate_student(5, 4),
    "radial-student6-40": lambda: multivariate_student(40, 6),
    "ring-6": lambda: Exact(Ring(6, 1.5)),
    "sphere-5": lambda: Sphere(5, 1.2),
    "sphere-16": lambda: Sphere(16, 3.0),
    "sphere-3-of-12": lambda: Embedded(Sphere(3, 1.5), 9, 27),
    "spiral-loose-2": lambda: spiral(0.08, turns=2),
    "spikes30-5": lambda: spikes(30, 5, 28),
    "spikes200-24": lambda: spikes(200, 24, 29),
    "corners-4": lambda: Product([Mixture1(*TWO, [0, 0])] * 4, rotation=30),
}

# Laws made to deceive: right in their low moments or in all marginals, or with a small part that few samples show.
DECEIVING: Mapping[str, Callable[[], KnownLaw]] = {
    "moments5-10": lambda: Product([hermite(3, 0.3, 0.5)] * 10, rotation=21),
    "moments7-20": lambda: Product([hermite(4, 0.2, 1.5)] * 20, rotation=25),
    "moments5-unequal-24": lambda: Product([hermite(3, 0.2, 1)] * 24, scales=np.geomspace(0.2, 3, 24), rotation=26),
    "moments5-4-of-40": lambda: Product([hermite(3, 0.2, 0.7)] * 4 + [Mixture1([1], [0], [3.0])] * 36, rotation=33),
    "orthants-5": lambda: Copies(Orthants(5, 0.3), 1, 27),
    "orthants-5x4": lambda: Copies(Orthants(5, 0.3), 4, 29),
    "bananas-10": lambda: Copies(banana(), 5, 4),
    "funnel-mild-5": lambda: funnel(5, 0.6),
    "funnel-5": lambda: funnel(5, 1.2),
    "rare-clusters-10": rare_clusters,
}
