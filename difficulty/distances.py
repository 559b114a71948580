"""Distances between samples and data, and the features that need nothing but the data.

    frechet             of Gaussians fitted to both:  |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2);
                        on Inception's features it is the FID of Heusel et al. 2017, arXiv 1706.08500
    kernel              unbiased squared MMD with k(x, y) = (x.y/d + 1)^3; on Inception's features it is the KID of
                        Binkowski et al. 2018, arXiv 1801.01401, eq. 4
    sliced_wasserstein  mean over random directions of the Wasserstein-1 distance of the projections
    precision, recall   share of the samples inside the k-nearest-neighbour balls of the data, and of the data inside
                        those of the samples, k = 3; Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1

Frechet and Wasserstein distances are biased upwards for finite samples; the kernel distance is not and can be negative.
The balls shrink as samples grow dense, so that precision and recall compare at equal numbers only.
``pixels`` are the raw values; ``pca`` their first components on the data.
"""

__all__ = ["Features", "frechet", "kernel", "pca", "pixels", "precision", "recall", "sliced_wasserstein"]

from collections.abc import Callable

import numpy as np

from difficulty.process import Array
from difficulty.randomness import stream

PCA_COMPONENTS = 16
PROJECTIONS = 128
QUANTILES = 512
NEIGHBOURS = 3  # Kynkaanniemi et al. 2019, section 3
ROWS = 2048  # of a matrix of all pairs that are held at once
DIRECTIONS = (0, 8, 0, 0)  # counters of the stream of directions: the same in every comparison

Features = Callable[[Array], Array]


def frechet(a: Array, b: Array) -> float:
    """Frechet distance between Gaussians fitted to (n, d) and (m, d) features."""
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    value, vector = np.linalg.eigh(cov_a)
    root = (vector * np.sqrt(np.maximum(value, 0))) @ vector.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    shift = a.mean(0) - b.mean(0)
    return float(max(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross, 0.0))


def sliced_wasserstein(a: Array, b: Array) -> float:
    """Mean Wasserstein-1 distance of (n, d) and (m, d) features along fixed random directions."""
    directions = stream(*DIRECTIONS).standard_normal((a.shape[1], PROJECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    return float(np.abs(_quantiles(a @ directions) - _quantiles(b @ directions)).mean())


def _quantiles(x: Array) -> Array:
    """Evenly spaced quantiles of every column; np.quantile gives the same and takes ten times as long."""
    ordered = np.sort(x, axis=0)
    place = (np.arange(QUANTILES) + 0.5) / QUANTILES * (len(x) - 1)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, len(x) - 1)
    return ordered[below] + (place - below)[:, None] * (ordered[above] - ordered[below])


def kernel(a: Array, b: Array) -> float:
    """Unbiased squared maximum mean discrepancy of (n, d) and (m, d) features, n and m at least 2."""

    dim = a.shape[1]

    def total(x: Array, y: Array) -> float:
        return sum(_cubes(x[i : i + ROWS] @ y.T / dim + 1) for i in range(0, len(x), ROWS))

    def others(x: Array) -> float:
        itself = _cubes((x * x).sum(1) / dim + 1)
        return (total(x, x) - itself) / (len(x) * (len(x) - 1))

    return others(a) + others(b) - 2 * total(a, b) / (len(a) * len(b))


def _cubes(x: Array) -> float:
    return float(np.vdot(x * x, x))  # numpy's power is an order of magnitude slower


def precision(a: Array, b: Array) -> float:
    """Share of a (n, d) that lies in a ball around a point of b (m, d), m > 3, to its third neighbour in b."""
    radius = np.concatenate([
        # The nearest of all is the point itself.
        np.partition(_squared_distances(b[i : i + ROWS], b), NEIGHBOURS, axis=1)[:, NEIGHBOURS]
        for i in range(0, len(b), ROWS)
    ])  # fmt: skip
    inside = [(_squared_distances(a[i : i + ROWS], b) <= radius).any(1) for i in range(0, len(a), ROWS)]
    return float(np.concatenate(inside).mean())


def recall(a: Array, b: Array) -> float:
    """Share of b (m, d) that lies in a ball around a point of a (n, d), n > 3, to its third neighbour in a."""
    return precision(b, a)


def _squared_distances(a: Array, b: Array) -> Array:
    from scipy.spatial.distance import cdist

    # Not |a|^2 + |b|^2 - 2 a.b: it loses the digits of small distances, and two equal points would not be at 0.
    return cdist(a, b, "sqeuclidean")


def pixels(reference: Array) -> Features:
    """The values themselves."""
    return lambda x: x


def pca(reference: Array) -> Features:
    """The first principal components of the reference data (n, d)."""
    mean = reference.mean(0)
    _, _, rows = np.linalg.svd(reference - mean, full_matrices=False)
    # A right singular vector has no sign of its own; distances do not depend on it.
    basis = rows[:PCA_COMPONENTS].T
    return lambda x: (x - mean) @ basis
