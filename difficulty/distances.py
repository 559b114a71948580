"""Distances between samples and data, and the features that need nothing but the data.

    frechet             of Gaussians fitted to both:  |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)
    sliced_wasserstein  mean over random directions of the Wasserstein-1 distance of the projections

Both are biased upwards for finite samples. ``pixels`` are the raw values; ``pca`` their first components on the data.
"""

__all__ = ["Features", "frechet", "pca", "pixels", "sliced_wasserstein"]

from collections.abc import Callable

import numpy as np

from difficulty.process import Array
from difficulty.randomness import stream

PCA_COMPONENTS = 16
PROJECTIONS = 128
QUANTILES = 512
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
    levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
    quantiles_a, quantiles_b = (np.quantile(x @ directions, levels, axis=0) for x in (a, b))
    return float(np.abs(quantiles_a - quantiles_b).mean())


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
