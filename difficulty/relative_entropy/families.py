"""Families of laws that can be fitted to rows, each one function with the same arguments."""

__all__ = ["MOST_AXES", "Candidate", "Plan", "fit_candidate", "leading_axes"]

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
from difficulty.relative_entropy.unmixing import LOCAL, LOGCOSH, independent_axes, look_gaussian, principal

Array = npt.NDArray[np.float64]

# A mixture models all of so many axes if there are so many rows per axis; otherwise at most MOST_AXES, and the others
# are Gaussian.
ALL_AXES, ROWS_PER_AXIS = 192, 15
MOST_AXES = 96
BINS = 256
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
    def kind(self) -> tuple[str, float]:
        """What candidates share that differ in the number of components only."""
        return self.family, self.strength

    @property
    def one_covariance(self) -> bool:
        """Whether all that is fitted beside a few means is one covariance."""
        return self.family == "gaussian" or (self.family == "mixture" and np.isinf(self.strength))

    @property
    def of_gaussians(self) -> bool:
        """Whether it is a Gaussian or a mixture of Gaussians with means of their own."""
        return self.family in ("gaussian", "mixture")

    @property
    def independent_axes(self) -> bool:
        """Whether the axes are modelled one by one."""
        return self.family in ("product", "student-product")

    @property
    def one_radius(self) -> bool:
        """Whether one scale is drawn for all axes of a Gaussian."""
        return self.family in ("scale", "student")

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
        contrast: of that search (``unmixing``).
    """

    leading: int
    floor: float
    seed: int
    contrast: str = LOGCOSH

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
        axes = independent_axes(rows, counts, plan.seed, plan.contrast)
        if candidate.family == "product":
            plain = plan.contrast != LOCAL
            weights, means, variances = fit_axes(rows @ axes, counts, candidate.components, plan.floor, plain=plain)
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
        rotation = principal(rows, counts)[1]
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
    block = MixtureBlock(law, heavy_tailed=candidate.one_radius)
    blocks: list[tuple[slice, Block]] = [(slice(0, leading), block)]
    if leading < d:
        rest = rows[:, leading:]
        mean = np.average(rest, axis=0, weights=counts)
        variance = np.average((rest - mean) ** 2, axis=0, weights=counts)
        blocks.append((slice(leading, d), GaussianBlock(variance, mean)))
    return Fit(blocks, None if rotation is None else torch.from_numpy(rotation))


def _gaussian(rows: Array, counts: Array) -> GaussianBlock:
    values, axes = principal(rows, counts)
    return GaussianBlock(values, np.average(rows, axis=0, weights=counts) @ axes, axes)


def fit_axes(
    x: Array, counts: Array, components: int, floor: float, *, plain: bool = True
) -> tuple[Array, Array, Array]:
    """One-dimensional mixtures along every column: weights, means, variances, each (d, K).

    With ``plain`` a column that looks Gaussian has one component, and weight 0 on the others.
    """
    gaussian = look_gaussian((x - x.mean(0)) / x.std(0)) & plain
    weights, means, variances = np.empty((3, x.shape[1], components))
    others = _fit_columns(x[:, ~gaussian], counts, components, floor)
    weights[~gaussian], means[~gaussian], variances[~gaussian] = others
    weights[gaussian] = np.eye(components)[0]
    centre = counts @ x[:, gaussian] / counts.sum()
    means[gaussian] = centre[:, None]
    variances[gaussian] = (counts @ (x[:, gaussian] - centre) ** 2 / counts.sum() + floor)[:, None]
    return weights, means, variances


def _fit_columns(
    x: Array, counts: Array, components: int, floor: float, iterations: int = 200
) -> tuple[Array, Array, Array]:
    """Mixtures of K components along every column at once.

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
