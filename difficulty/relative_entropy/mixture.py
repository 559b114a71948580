"""Fitting a Gaussian mixture with full covariances by expectation-maximisation.

Unlike a library fit this one takes counts, shrinks the covariance of a small component towards the pooled one,

    C_k = (n_k S_k + strength S_pooled) / (n_k + strength) + floor     (all C_k = S_pooled + floor for infinity),

and is the same in every rotated coordinate system: k-means with distances only, no axis is special.
"""

__all__ = ["MixtureOptions", "fit_mixture", "fit_scale_mixture", "fit_student", "responsibilities", "student_scales"]

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from scipy.special import gammaln
from scipy.stats import gamma
from torch import Tensor

from difficulty.laws import GaussianMixture

Array = npt.NDArray[np.float64]

# Steps with more components before they are joined, and steps after which two starts are compared.
FEW_STEPS = 5
# Clusters of a second start, for fewer than half as many components.
SECOND_START = 12
# Degrees of freedom of Student's t that are tried: below the first there is hardly a variance, above the second it is a
# Gaussian to most samples.
FEWEST_FREEDOM, MOST_FREEDOM = 2.5, 100.0
# Scales that stand for its mixing law: their largest distance in log variance, their number, and the mass that is left
# out at either end.
SCALE_STEP, MOST_SCALES, TAIL_MASS = 0.4, 64, 1e-7
# Log odds of the first and last quantile of a start: one row in 400 lies beyond either.
LOG_ODDS = 6.0


@dataclass(frozen=True)
class MixtureOptions:
    """How rich a mixture is.

    Args:
        components: K.
        strength: weight of the pooled covariance, in samples; infinity gives all components the same covariance.
    """

    components: int
    strength: float


def fit_mixture(
    rows: Array,
    counts: Array,
    options: MixtureOptions,
    floor: float,
    seed: int,
    start: Tensor | None = None,
    iterations: int = 50,
) -> GaussianMixture:
    """Fit to rows (n, d) with counts (n,).

    Args:
        rows, counts: the data.
        options: K and the strength of the shrinkage.
        floor: smallest variance of a component, in squared units of the data.
        seed: of the k-means start.
        start: responsibilities (K, n) to start from instead.
        iterations: at most so many EM steps; it stops when the log-likelihood gains less than 3e-4 nat per sample.
    """
    x, w = torch.from_numpy(rows), torch.from_numpy(counts)
    responsibility = _start(x, w, options, floor, seed) if start is None else start
    _, (weights, means, covariances), _ = _ascend(x, w, responsibility, options.strength, floor, iterations)
    return GaussianMixture(weights.numpy(), means.numpy(), covariances.expand(len(means), -1, -1).numpy())


def _ascend(
    x: Tensor, w: Tensor, responsibility: Tensor, strength: float, floor: float, iterations: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], float]:
    """Steps of expectation-maximisation: responsibilities (K, n); weights, means and covariances; nats per sample."""
    previous = value = -math.inf
    for _ in range(iterations):
        law = _maximise(x, w, responsibility, strength, floor)
        log_joint = _log_joint(x, *law)
        total = torch.logsumexp(log_joint, 0)
        value = float((w * total).sum() / w.sum())
        if value - previous < 3e-4:
            break
        previous = value
        responsibility = (log_joint - total).exp()
    return responsibility, law, value


def fit_scale_mixture(
    rows: Array, counts: Array, components: int, floor: float, iterations: int = 100
) -> GaussianMixture:
    """Gaussians of one mean and one shape that differ in scale only: the heavy-tailed elliptical laws.

    Args:
        rows, counts, floor: as in ``fit_mixture``.
        components: number of scales.
        iterations: of expectation-maximisation.
    """
    x, w = torch.from_numpy(rows), torch.from_numpy(counts)
    # Even quantiles find scales that are about as frequent, even log odds also those of few rows far out.
    even = torch.linspace(0.1, 0.98, components, dtype=x.dtype)
    odds = torch.linspace(-LOG_ODDS, LOG_ODDS, components, dtype=x.dtype).sigmoid()
    fits = [_scales_from(x, w, quantiles, floor, iterations) for quantiles in (even, odds)]
    return max(fits, key=lambda fit: fit[0])[1]


def _scales_from(
    x: Tensor, w: Tensor, quantiles: Tensor, floor: float, iterations: int
) -> tuple[float, GaussianMixture]:
    """Log-likelihood and fit from scales at these quantiles of the distance."""
    d = x.shape[1]
    eye = torch.eye(d, dtype=x.dtype)
    mean = (w @ x) / w.sum()
    centred = x - mean
    shape = (centred * w[:, None]).T @ centred / w.sum() + floor * eye
    distance = _mahalanobis(centred, shape)
    scales = (torch.quantile(distance, quantiles) / d).clamp(min=1e-3)
    weights = torch.full_like(scales, 1 / len(scales))

    def log_joint() -> Tensor:
        return weights.log()[:, None] - 0.5 * (distance / scales[:, None] + d * scales.log()[:, None])

    for _ in range(iterations):
        r = torch.softmax(log_joint(), 0) * w
        mass = r.sum(1)
        keep = mass > 1e-6 * w.sum()
        r, scales, mass = r[keep], scales[keep], mass[keep]
        precision = (r / scales[:, None]).sum(0)
        mean = precision @ x / precision.sum()
        centred = x - mean
        shape = (centred * precision[:, None]).T @ centred / w.sum() + floor * eye
        distance = _mahalanobis(centred, shape)
        scales = ((r @ distance) / (d * mass)).clamp(min=1e-12)
        weights = mass / mass.sum()
    likelihood = float(w @ torch.logsumexp(log_joint(), 0) - 0.5 * w.sum() * torch.logdet(shape))
    covariances = (scales[:, None, None] * shape).numpy()
    return likelihood, GaussianMixture(weights.numpy(), mean.expand(len(scales), d).numpy(), covariances)


def fit_student(rows: Array, counts: Array, floor: float, iterations: int = 60) -> tuple[Array, Array, float]:
    """Multivariate Student's t by maximum likelihood: location (d,), shape (d, d) and degrees of freedom nu.

    Expectation-maximisation with the weights (nu + d)/(nu + distance) of the rows; nu maximises the likelihood itself
    after every step (Liu and Rubin's ECME).

    Args:
        rows, counts, floor: as in ``fit_mixture``.
        iterations: at most; it stops when location and shape predict the distances to 1e-4.
    """
    d, total = rows.shape[1], counts.sum()
    location = counts @ rows / total
    centred = rows - location
    shape = (centred * counts[:, None]).T @ centred / total + floor * np.eye(d)
    nu, distance = 8.0, _distance(centred, shape)
    for _ in range(iterations):
        weight = counts * (nu + d) / (nu + distance)
        location = weight @ rows / weight.sum()
        centred = rows - location
        shape = (centred * weight[:, None]).T @ centred / total + floor * np.eye(d)
        previous, distance = distance, _distance(centred, shape)
        nu = _freedom(distance, counts, d)
        if np.abs(np.log((distance + d) / (previous + d))).max() < 1e-4:
            break
    return location, shape, nu


def student_scales(nu: float, d: int) -> tuple[Array, Array]:
    """Student's t in d dimensions as a mixture of Gaussians: weights and factors of the shape, (K,) each.

    The factor v is the inverse of u ~ Gamma(nu/2, rate nu/2). The trapezoidal rule in log v, where the density of x
    given v is as wide as log |x|^2 scatters, sqrt(2/d): at steps no longer than that its error does not matter.
    """
    mixing = gamma(nu / 2, scale=2 / nu)
    low, high = -np.log(mixing.ppf([1 - TAIL_MASS, TAIL_MASS]))
    number = math.ceil((high - low) / min(SCALE_STEP, math.sqrt(2 / d)))
    nodes = np.linspace(low, high, min(max(number, 8), MOST_SCALES))
    weights = mixing.pdf(np.exp(-nodes)) * np.exp(-nodes)
    return weights / weights.sum(), np.exp(nodes)


def _freedom(distance: Array, counts: Array, d: int) -> float:
    """The degrees of freedom that make the distances likeliest."""

    def loss(log_nu: float) -> float:
        nu = math.exp(log_nu)
        constant = float(gammaln((nu + d) / 2) - gammaln(nu / 2) - d / 2 * math.log(nu))
        return float((nu + d) / 2 * (counts @ np.log1p(distance / nu)) - constant * counts.sum())

    bounds = (math.log(FEWEST_FREEDOM), math.log(MOST_FREEDOM))
    return math.exp(float(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x))


def _distance(centred: Array, shape: Array) -> Array:
    return _mahalanobis(torch.from_numpy(centred), torch.from_numpy(shape)).numpy()


def responsibilities(law: GaussianMixture, rows: Array) -> Tensor:
    """Posterior of the components at the rows, shape (K, n)."""
    return torch.softmax(law._log_joint(*law._residual(torch.from_numpy(rows), 1.0, 0.0)), 0)


def _mahalanobis(centred: Tensor, shape: Tensor) -> Tensor:
    # Relative jitter for rows on fewer axes than columns.
    jitter = 1e-11 * shape.diagonal().max() * torch.eye(len(shape), dtype=shape.dtype)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(shape + jitter), centred.T, upper=False)
    return z.square().sum(0)


def _start(x: Tensor, w: Tensor, options: MixtureOptions, floor: float, seed: int) -> Tensor:
    """Responsibilities (K, n).

    K clusters of k-means often divide one mode and join two others, and expectation-maximisation then ends in a maximum
    of its own. So covariances are first fitted to twice as many clusters, which are then joined two by two. If K is
    small all of these may lie in one wide mode and none between the narrow ones: then a start from more of them is
    tried too, which is worse where modes overlap, and the likelier of the two is taken.
    """
    k = options.components
    if k == 1:
        return torch.ones(1, len(x), dtype=x.dtype)
    if math.isinf(options.strength):
        return _clusters(x, w, k, seed, tries=4)  # k-means has the same loss, up to the metric
    found = []
    for finer in sorted({2 * k, max(2 * k, SECOND_START)}):
        responsibility, _, _ = _ascend(x, w, _clusters(x, w, finer, seed), options.strength, floor, FEW_STEPS)
        found.append(_joined(x, w, responsibility, options, floor))
    if len(found) == 1:
        return found[0]
    ascended = [_ascend(x, w, start, options.strength, floor, FEW_STEPS) for start in found]
    return max(ascended, key=lambda result: result[2])[0]


def _clusters(x: Tensor, w: Tensor, k: int, seed: int, tries: int = 1) -> Tensor:
    from sklearn.cluster import KMeans

    fit = KMeans(k, n_init=tries, max_iter=30, random_state=seed).fit(x.numpy(), sample_weight=w.numpy())
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(fit.labels_.astype(np.int64)), k).T.to(x.dtype)
    return one_hot[one_hot.sum(1) > 0]


def _joined(x: Tensor, w: Tensor, responsibility: Tensor, options: MixtureOptions, floor: float) -> Tensor:
    """Responsibilities with components joined, each time the two that cost the least likelihood, until K are left."""
    r = responsibility[(responsibility * w).sum(1) > 0]
    mass, means, scatter = _moments(x, r * w)
    prior = options.strength * scatter.sum(0) / w.sum()

    def loss(mass: Tensor, scatter: Tensor) -> Tensor:
        """Nats that rows cost in a component of their own, (components,)."""
        factor, _ = torch.linalg.cholesky_ex(_shrunk(mass, scatter, prior, options.strength, floor))
        log_det = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
        inside = torch.cholesky_solve(scatter, factor).diagonal(dim1=1, dim2=2).sum(1)
        return 0.5 * (mass * log_det + inside) - mass * (mass / w.sum()).log()

    def joint(i: int) -> tuple[Tensor, Tensor]:
        """Mass and scatter of component i with each other one."""
        both, between = mass[i] + mass, means[i] - means
        added = (mass[i] * mass / both)[:, None, None] * between[:, :, None] * between[:, None, :]
        return both, scatter[i] + scatter + added

    alone = loss(mass, scatter)
    price = torch.stack([loss(*joint(i)) - alone[i] - alone for i in range(len(mass))])
    price.fill_diagonal_(math.inf)
    while len(mass) > options.components:
        i, j = divmod(int(price.nan_to_num(math.inf).argmin()), len(mass))
        both = [part[j] for part in joint(i)]
        means[i] = (mass[i] * means[i] + mass[j] * means[j]) / both[0]
        mass[i], scatter[i] = both
        r[i] += r[j]
        kept = torch.arange(len(mass)) != j
        r, mass, means, scatter, alone = (part[kept] for part in (r, mass, means, scatter, alone))
        price = price[kept][:, kept]
        i -= int(j < i)
        alone[i] = loss(mass[i : i + 1], scatter[i : i + 1])[0]
        price[i] = price[:, i] = loss(*joint(i)) - alone[i] - alone
        price[i, i] = math.inf
    return r


def _moments(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masses (K,), means (K, d) and scatters (K, d, d) of rows (n, d) with weights (K, n)."""
    mass = r.sum(1)
    means = r @ x / mass[:, None]
    centred = x - means[:, None]
    return mass, means, torch.bmm((centred * r[..., None]).transpose(1, 2), centred)


def _shrunk(mass: Tensor, scatter: Tensor, prior: Tensor, strength: float, floor: float) -> Tensor:
    """The covariances at the head of this module, for a finite strength; ``prior`` is that times the pooled one."""
    least = floor * torch.eye(scatter.shape[-1], dtype=scatter.dtype)
    return (scatter + prior) / (mass + strength)[:, None, None] + least


def _maximise(
    x: Tensor, w: Tensor, responsibility: Tensor, strength: float, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    r = responsibility * w
    r = r[r.sum(1) > 1e-6 * w.sum()]
    if math.isinf(strength):
        mass = r.sum(1)
        means = r @ x / mass[:, None]
        between = (means * mass[:, None]).T @ means
        pooled = ((x * r.sum(0)[:, None]).T @ x - between)[None] / w.sum()
        covariances = pooled + floor * torch.eye(x.shape[1], dtype=x.dtype)
    else:
        mass, means, scatter = _moments(x, r)
        covariances = _shrunk(mass, scatter, strength * scatter.sum(0) / w.sum(), strength, floor)
    return mass / mass.sum(), means, 0.5 * (covariances + covariances.transpose(1, 2))


def _log_joint(x: Tensor, weights: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariances)
    if bool(failed.any()):
        # Rounding took a covariance of extreme condition below zero; its own diagonal mends it at no visible cost.
        scale = covariances.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
        factor = torch.linalg.cholesky(covariances + 1e-11 * scale * torch.eye(x.shape[1], dtype=x.dtype))
    if len(factor) == 1:  # one covariance: the rows are turned once for all components
        z, centres = (torch.linalg.solve_triangular(factor[0], part.T, upper=False) for part in (x, means))
        square = z.square().sum(0) - 2 * centres.T @ z + centres.square().sum(0)[:, None]
    else:
        z = torch.linalg.solve_triangular(factor, (x - means[:, None]).transpose(1, 2), upper=False)
        square = z.square().sum(1)
    log_det = factor.diagonal(dim1=1, dim2=2).log().sum(1)
    log_norm = 0.5 * x.shape[1] * math.log(2 * math.pi)
    return weights.log()[:, None] - 0.5 * square - log_det[:, None] - log_norm
