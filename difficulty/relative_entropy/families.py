"""Families of laws that can be fitted to rows, each one function with the same arguments."""

__all__ = [
    "MOST_AXES", "Candidate", "Plan", "fit_candidate", "has_independent_axes", "leading_axes", "quiet_unmixing",
]  # fmt: skip

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.laws import GaussianMixture
from difficulty.relative_entropy.fits import Block, Fit, GaussianBlock, MixtureBlock, ProductBlock
from difficulty.relative_entropy.mixture import (
    MixtureOptions,
    fit_mixture,
    fit_scale_mixture,
    fit_student,
    responsibilities,
    student_scales,
)
from difficulty.relative_entropy.pairs import Pairs

Array = npt.NDArray[np.float64]

# A mixture models all of so many axes if there are so many rows per axis; otherwise at most MOST_AXES, and the others
# are Gaussian.
ALL_AXES, ROWS_PER_AXIS = 192, 15
MOST_AXES = 96
BINS = 256
LARGEST_COVARIANCE = 3.5  # in standard errors
# A fit to a part of the rows starts from the fit to all of them and is soon there.
WARM_ITERATIONS, COLD_ITERATIONS = 15, 50


@dataclass(frozen=True)
class Candidate:
    """A family with its options.

    Args:
        family: gaussian, mixture, scale, student (one radius for all axes), product, student-product (a Student's t
            along each of independent axes) or atoms.
        components: K.
        strength: weight of the pooled covariance of a mixture, in samples.
    """

    family: str
    components: int = 1
    strength: float = 0.0

    @property
    def one_covariance(self) -> bool:
        """Whether all that is fitted beside a few means is one covariance."""
        return self.family == "gaussian" or (self.family == "mixture" and np.isinf(self.strength))

    @property
    def independent_axes(self) -> bool:
        """Whether the axes are modelled one by one."""
        return self.family in ("product", "student-product")

    @property
    def heavy_tailed(self) -> bool:
        """Whether the law has power-law tails by itself, so that rows far out have little weight in its fit."""
        return self.family in ("student", "student-product")

    def parameters(self, d: int) -> int:
        """Number of free parameters on d axes."""
        shape = d * (d + 1) // 2
        if self.family == "mixture":
            return self.components * d + (shape if np.isinf(self.strength) else self.components * shape)
        others = {
            "gaussian": shape,
            "scale": shape + self.components,
            "student": shape + 1,
            "product": 3 * self.components * d,
            "student-product": 2 * d,
            "atoms": 0,
        }
        return d + others[self.family]


@dataclass(frozen=True, eq=False)
class Plan:
    """What is the same for every fit to one sample.

    Args:
        leading: number of leading principal axes that a mixture models; the others are Gaussian.
        floor: smallest variance of a component.
        seed: of k-means and of the search for independent axes.
    """

    leading: int
    floor: float
    seed: int

    @classmethod
    def of(cls, rank: int, n: int, variance: float, pairs: Pairs, seed: int) -> "Plan":
        """For n rows of ``rank`` axes, the longest of that variance, under the noise of the pairs."""
        finest = float(pairs.noise_from.min())
        return cls(leading_axes(rank, n), max(1e-2 * finest**2, 1e-10 * variance), seed)


def leading_axes(rank: int, n: int) -> int:
    """Number of axes that a mixture of n rows models."""
    if MOST_AXES < rank <= ALL_AXES and n >= ROWS_PER_AXIS * rank:
        return rank
    return min(rank, MOST_AXES, max(1, n // 20))


def fit_candidate(rows: Array, counts: Array, candidate: Candidate, plan: Plan, like: Fit | None = None) -> Fit:
    """Fit a candidate to rows (n, r), counts (n,); ``like`` is an earlier fit to start from."""
    d, original = rows.shape[1], rows
    if candidate.family == "gaussian":
        return Fit([(slice(0, d), _gaussian(rows, counts))])
    if candidate.independent_axes:
        # The axes are searched in the same rows: axes found in all of them would hide the error of finding them.
        axes = independent_axes(rows, counts, plan.seed)
        if candidate.family == "product":
            weights, means, variances = fit_axes(rows @ axes, counts, candidate.components, plan.floor)
        else:
            weights, means, variances = fit_student_axes(rows @ axes, counts, plan.floor)
        return Fit([(slice(0, d), ProductBlock(axes, weights, means, variances))])
    if candidate.family == "atoms":
        law = GaussianMixture(counts, rows, np.zeros((len(rows), 1, 1)) * np.eye(d))
        return Fit([(slice(0, d), MixtureBlock(law))])
    leading = min(plan.leading, d)
    rotation = None
    if leading < d:
        # Principal axes of these rows, for the same reason.
        rotation = _principal(rows, counts)[1]
        rows = rows @ rotation
    inner = rows[:, :leading]
    if candidate.family == "scale":
        law = fit_scale_mixture(inner, counts, candidate.components, plan.floor)
    elif candidate.family == "student":
        location, shape, nu = fit_student(inner, counts, plan.floor)
        mass, scales = student_scales(nu, leading)
        law = GaussianMixture(mass, np.tile(location, (len(mass), 1)), scales[:, None, None] * shape)
    else:
        start: Tensor | None = None
        if like is not None:
            fitted = like.blocks[0][1]
            assert isinstance(fitted, MixtureBlock)
            earlier = original if like.axes is None else original @ like.axes.numpy()
            start = responsibilities(fitted.law, earlier[:, :leading])
        options = MixtureOptions(candidate.components, candidate.strength)
        iterations = COLD_ITERATIONS if start is None else WARM_ITERATIONS
        law = fit_mixture(inner, counts, options, plan.floor, plan.seed, start, iterations)
    block = MixtureBlock(law, heavy_tailed=candidate.family in ("scale", "student"))
    blocks: list[tuple[slice, Block]] = [(slice(0, leading), block)]
    if leading < d:
        rest = rows[:, leading:]
        mean = np.average(rest, axis=0, weights=counts)
        variance = np.average((rest - mean) ** 2, axis=0, weights=counts)
        blocks.append((slice(leading, d), GaussianBlock(variance, mean)))
    return Fit(blocks, None if rotation is None else torch.from_numpy(rotation))


def _principal(rows: Array, counts: Array) -> tuple[Array, Array]:
    """Variances and principal axes (d, d), largest first."""
    centred = (rows - np.average(rows, axis=0, weights=counts)) * np.sqrt(counts / counts.sum())[:, None]
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1].copy()
    # The product squares the condition number; the variances are read off the rotated rows instead.
    return ((centred @ axes) ** 2).sum(0), axes


def _gaussian(rows: Array, counts: Array) -> GaussianBlock:
    values, axes = _principal(rows, counts)
    return GaussianBlock(values, np.average(rows, axis=0, weights=counts) @ axes, axes)


def fit_axes(
    x: Array, counts: Array, components: int, floor: float, iterations: int = 200
) -> tuple[Array, Array, Array]:
    """One-dimensional mixtures along every column at once: weights, means, variances, each (d, K).

    The sorted column is cut into at most 256 bins of equal mass, each kept with its mean and variance, which leaves the
    likelihood of a component wider than a bin unchanged.
    """
    n = len(x)
    order = np.argsort(x, axis=0, kind="stable")
    ordered, mass = np.take_along_axis(x, order, 0), counts[order]
    edges = np.unique(np.linspace(0, n, min(BINS, n) + 1).astype(int))[:-1]
    w = np.add.reduceat(mass, edges, axis=0).T
    mean = np.add.reduceat(mass * ordered, edges, axis=0).T / w
    spread = (np.add.reduceat(mass * ordered**2, edges, axis=0).T / w - mean**2).clip(min=0.0)
    total = w.sum(1, keepdims=True)
    quantiles = np.cumsum(w, 1) / total
    cells = np.minimum((quantiles * components * (1 - 1e-12)).astype(int), components - 1)
    r = (cells[:, None] == np.arange(components)[None, :, None]).astype(np.float64)
    weights = means = variances = np.zeros(0)
    for _ in range(iterations if components > 1 else 1):
        rw = r * w[:, None]
        share = rw.sum(2).clip(min=1e-12)
        means = (rw * mean[:, None]).sum(2) / share
        variances = (rw * (spread[:, None] + (mean[:, None] - means[..., None]) ** 2)).sum(2) / share + floor
        weights = share / share.sum(1, keepdims=True)
        z = spread[:, None] + (mean[:, None] - means[..., None]) ** 2
        log_joint = np.log(weights)[..., None] - 0.5 * (z / variances[..., None] + np.log(variances)[..., None])
        r = np.exp(log_joint - log_joint.max(1, keepdims=True))
        r /= r.sum(1, keepdims=True)
    return weights, means, variances


def fit_student_axes(x: Array, counts: Array, floor: float) -> tuple[Array, Array, Array]:
    """Student's t along every column, as mixtures: weights, means, variances, each (d, K), weight 0 where K is less."""
    fits = [fit_student(column[:, None], counts, floor) for column in x.T]
    scales = [student_scales(nu, 1) for _, _, nu in fits]
    most = max(len(mass) for mass, _ in scales)
    weights, means, variances = np.zeros((3, len(fits), most))
    variances += 1.0
    for i, ((location, shape, _), (mass, factors)) in enumerate(zip(fits, scales, strict=True)):
        weights[i, : len(mass)], means[i] = mass, location
        variances[i, : len(mass)] = factors * shape[0, 0]
    return weights, means, variances


def has_independent_axes(rows: Array, counts: Array, seed: int) -> bool:
    """Whether orthogonal axes stand out along which the rows are independent and not Gaussian."""
    n, d = rows.shape
    if d == 1:
        return True
    unit, sources = _unmix(rows, counts, seed)
    # Distance of the axes from orthogonality, against what the error of an estimated axis explains.
    orthogonal = np.abs(unit.T @ unit - np.eye(d)).max() < max(0.25, 4 * np.sqrt(d / n))
    square = sources**2 / (sources**2).mean(0)
    kurtosis = (square**2).mean(0) - 3
    # Squares of independent components do not covary. On a sphere, and under radial heavy tails, they do, whatever
    # axes.
    spread = square.var(0)
    covariance = square.sum(1).var() - spread.sum()
    error = 2 * np.sqrt((spread.sum() ** 2 - (spread**2).sum()) / 2 / n)
    independent = np.abs(covariance) < LARGEST_COVARIANCE * error
    return bool(orthogonal and independent and np.abs(kurtosis).max() > 3 * np.sqrt(24 / n))


def independent_axes(rows: Array, counts: Array, seed: int) -> Array:
    """Orthonormal axes, shape (d, d), along which the rows are as independent as can be.

    Independent components are found after whitening; the noise is independent only along orthogonal axes, and the
    nearest such ones are returned.
    """
    if rows.shape[1] == 1:
        return np.eye(1)
    left, _, right = np.linalg.svd(_unmix(rows, counts, seed)[0])
    return left @ right


@contextmanager
def quiet_unmixing() -> Iterator[None]:
    """Without the warning of a search for independent axes that found none; ``has_independent_axes`` judges them.

    Around all fits and not in each: the filters of warnings belong to the process, and fits run in several threads.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FastICA did not converge")
        yield


def _unmix(rows: Array, counts: Array, seed: int) -> tuple[Array, Array]:
    """Directions of the independent components as unit columns (d, d), and the components (n, d)."""
    from sklearn.decomposition import FastICA

    values, axes = _principal(rows, counts)
    scale = np.sqrt(values)
    white = (rows - np.average(rows, axis=0, weights=counts)) @ axes / scale
    fit = FastICA(whiten=False, max_iter=100, tol=1e-3, random_state=seed)
    sources = fit.fit_transform(white)
    mixing = (axes * scale) @ fit.components_.T
    return mixing / np.linalg.norm(mixing, axis=0), sources
