"""The data as the estimators see them: one form for every order of rows, rotation and number of copies.

All rows, train and held-out, are pooled, since the estimators make folds of their own. Rows are put in the order of
their distance from the mean and dealt by a fixed permutation, so that neither the order of the file nor a rotation of
the space changes a fold. Equal rows become one row with a count: two copies of a row must not be on both sides of a
split. Counts that scatter less than draws of atoms would are the work of who made the file, and count as one.
Coordinates are those of the principal axes; axes without variance are kept apart and treated in closed form.
"""

__all__ = ["DiscreteColumn", "Sample", "make_sample"]

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import chi2

from difficulty.datasets import Dataset

Array = npt.NDArray[np.float64]

ORDER_SEED = 5
# Variance below this share of the largest is rounding of float32 input (2^-24 squared is 4e-15), not data.
NULL_SHARE = 1e-12
# A law is taken for discrete if fewer than this share of the draws are without a copy.
DISCRETE_SHARE = 0.3
# How seldom draws of equally likely atoms may have counts so even that the rows are taken for copied ones.
COPIED_LEVEL = 1e-4
# Most values of a coordinate that counts as quantised: those of a byte.
MOST_VALUES = 256
# Squared length of a coordinate's unit vector on the axes with variance below which it is not one of them.
LEAST_SHARE = 1e-6


@dataclass(frozen=True, eq=False)
class DiscreteColumn:
    """A column that takes few values, projected onto the axes with variance.

    Args:
        direction: unit vector along these axes, shape (r,).
        values, weights: what it takes along that direction, rising, and how often, shape (v,); the weights sum to 1.
        share: squared length of the column's own unit vector on these axes, 1 unless others determine it.
    """

    direction: Array
    values: Array
    weights: Array
    share: float

    @property
    def step(self) -> float:
        """Smallest step between the values."""
        return float(np.diff(self.values).min())


@dataclass(frozen=True, eq=False)
class Sample:
    """Centred rows along principal axes.

    Args:
        rows: distinct rows, shape (n, r), r the number of axes with variance, largest first.
        counts: how often each row occurs, shape (n,).
        eigenvalues: variance along each axis (unbiased), shape (r,).
        mean: the mean along the same axes, shape (r,).
        null_mean: the mean along the axes without variance, as one length (their direction does not matter).
        dim: D, of which D - r axes have no variance.
        discrete: whether the law consists of atoms that the sample repeats.
        missing: share of the draws that occurred only once; of a discrete law about the share that was not seen (Good).
        step: smallest step between the values of a coordinate if all of them are quantised, otherwise 0.
        columns: coordinates of few values; none if the law is discrete as a whole.
    """

    rows: Array
    counts: Array
    eigenvalues: Array
    mean: Array
    null_mean: float
    dim: int
    discrete: bool
    missing: float
    step: float
    columns: tuple[DiscreteColumn, ...] = ()

    @property
    def n(self) -> int:
        """Number of distinct rows: the sample size that counts."""
        return len(self.rows)

    @property
    def rank(self) -> int:
        """Number of axes with variance."""
        return self.rows.shape[1]

    @property
    def second_moment(self) -> float:
        """E|x0|^2 of the sample."""
        spread = float((self.counts[:, None] * self.rows**2).sum() / self.counts.sum())
        return spread + float((self.mean**2).sum()) + self.null_mean**2


def make_sample(dataset: Dataset) -> Sample:
    """Pool, order and rotate the rows of a data set."""
    parts = [part.reshape(len(part), -1) for part in (dataset.train, dataset.heldout)]
    pooled = torch.cat(parts).numpy()
    rows, counts = np.unique(pooled, axis=0, return_counts=True)
    steps = _steps(rows)
    if _copied(counts):
        counts = np.ones_like(counts)
    missing = float((counts == 1).sum() / counts.sum())
    discrete = bool(missing < DISCRETE_SHARE)
    return _arranged(rows.astype(np.float64), counts.astype(np.float64), discrete, missing, steps)


def _copied(counts: npt.NDArray[np.int64]) -> bool:
    """Whether the rows were copied, to balance classes or by concatenating a file with itself, and none occurs once.

    Counts of draws scatter like Poisson counts if the atoms are equally likely, and more if they are not: the sum of
    (count - mean)^2/mean is at least chi-squared with n - 1 degrees of freedom. Counts of copies are far more even.
    """
    if counts.min() == 1:
        return False
    mean = counts.mean()
    return bool(chi2.cdf(((counts - mean) ** 2).sum() / mean, max(len(counts) - 1, 1)) < COPIED_LEVEL)


def _arranged(rows: Array, counts: Array, discrete: bool, missing: float, steps: Array) -> Sample:
    mean = np.average(rows, axis=0, weights=counts)
    rows = rows - mean
    order = np.argsort((rows**2).sum(1), kind="stable")
    order = order[np.random.default_rng(ORDER_SEED).permutation(len(rows))]
    rows, counts = rows[order], counts[order]
    values, axes = _principal_axes(rows, counts)
    null_mean = float(np.sqrt(max((mean**2).sum() - ((mean @ axes) ** 2).sum(), 0.0)))
    quantised = steps > 0
    varies = np.ptp(rows, axis=0) > 0
    step = 0.0
    columns: tuple[DiscreteColumn, ...] = ()
    if not discrete:
        if varies.any() and quantised[varies].all():
            step = float(steps[varies].min())
        # What is left of a column whose variance is rounding is no direction.
        kept = np.flatnonzero(quantised & ((axes**2).sum(1) > LEAST_SHARE))
        columns = tuple(_discrete_column(rows[:, j], counts, mean @ axes, axes[j]) for j in kept)
    return Sample(rows @ axes, counts, values, mean @ axes, null_mean, rows.shape[1], discrete, missing, step, columns)


def _steps(rows: npt.NDArray[np.float32]) -> Array:
    """Smallest step between the values of each coordinate that takes few enough to be quantised; 0 for others, (D,)."""
    steps = np.zeros(rows.shape[1])
    for j, column in enumerate(rows.T):
        values = np.unique(column)
        if 1 < len(values) <= min(MOST_VALUES, len(rows) // 4):
            steps[j] = np.diff(values).min()
    return steps


def _discrete_column(column: Array, counts: Array, mean: Array, unit: Array) -> DiscreteColumn:
    """A centred column, (n,), whose unit vector has the coordinates ``unit`` on the axes, as the mean has ``mean``."""
    share = float((unit**2).sum())
    direction = unit / np.sqrt(share)
    along, index = np.unique(column, return_inverse=True)
    values = along / np.sqrt(share) + mean @ direction
    weights = np.bincount(index, counts) / counts.sum()
    return DiscreteColumn(direction, values, weights, share)


def _principal_axes(rows: Array, counts: Array) -> tuple[Array, Array]:
    """Variances, largest first, and axes (D, r), of centred rows; axes of rounding size are dropped."""
    n, dim = rows.shape
    weighted = rows * np.sqrt(counts / max(counts.sum() * (1 - 1 / n), 1.0))[:, None]
    if n >= dim:
        values, axes = np.linalg.eigh(weighted.T @ weighted)
        # The product squares the condition number; the variances are read off the rotated rows instead.
        axes = axes[:, ::-1]
        values = ((weighted @ axes) ** 2).sum(0)
    else:
        values, left = np.linalg.eigh(weighted @ weighted.T)
        values, left = values[::-1].clip(min=0.0), left[:, ::-1]
        axes = weighted.T @ left / np.sqrt(np.maximum(values, 1e-300))
    keep = values > NULL_SHARE * max(float(values.max(initial=0.0)), 1e-300)
    return values[keep], axes[:, keep]
