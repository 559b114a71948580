"""Distances between samples and data, each named by the features it is measured on: ``fd-pca`` is no FID.

    fd   Frechet distance of Gaussians fitted to features:  |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)
    sw   sliced Wasserstein-1 distance: mean over random directions of the distance of the projected quantiles

Features: ``pixels`` are the raw values; ``pca`` their first components on the data. Both distances are biased upwards
for finite samples; ``split_half`` states the same distance between two halves of the data, which is the floor.
"""

__all__ = ["FEATURES", "METRICS", "SampleJudge", "check_metrics", "frechet", "sliced_wasserstein"]

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from difficulty.errors import choose
from difficulty.process import Array
from difficulty.randomness import stream
from training.streams import BOOTSTRAP

PCA_COMPONENTS = 16
PROJECTIONS = 128
QUANTILES = 512

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
    directions = stream(0, BOOTSTRAP, 0, 0).standard_normal((a.shape[1], PROJECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
    quantiles_a, quantiles_b = (np.quantile(x @ directions, levels, axis=0) for x in (a, b))
    return float(np.abs(quantiles_a - quantiles_b).mean())


def _pixels(reference: Array) -> Features:
    return lambda x: x


def _pca(reference: Array) -> Features:
    mean = reference.mean(0)
    _, _, rows = np.linalg.svd(reference - mean, full_matrices=False)
    # A right singular vector has no sign of its own; distances do not depend on it.
    basis = rows[:PCA_COMPONENTS].T
    return lambda x: (x - mean) @ basis


FEATURES: Mapping[str, Callable[[Array], Features]] = {"pixels": _pixels, "pca": _pca}
DISTANCES: Mapping[str, Callable[[Array, Array], float]] = {"fd": frechet, "sw": sliced_wasserstein}
METRICS: tuple[str, ...] = tuple(f"{distance}-{features}" for distance in DISTANCES for features in FEATURES)


def check_metrics(names: Sequence[str]) -> None:
    """Raise InputError if a metric is unknown."""
    for name in names:
        choose("metric", name, dict.fromkeys(METRICS))


class SampleJudge:
    """Metrics of samples against one set of data, features fitted once.

    Args:
        data: reference samples (n, *).
        names: among ``METRICS``.

    Raises:
        InputError: if a metric is unknown.
    """

    def __init__(self, data: torch.Tensor, names: tuple[str, ...] = ("fd-pca", "sw-pixels")) -> None:
        self.names = names
        flat = _flat(data)
        check_metrics(names)
        self.features = {name: FEATURES[name.partition("-")[2]](flat) for name in names}
        self.reference = {name: self.features[name](flat) for name in names}

    def __call__(self, samples: torch.Tensor) -> dict[str, float]:
        """Every metric of samples (n, *); smaller is better."""
        flat = _flat(samples)
        return {
            name: DISTANCES[name.partition("-")[0]](self.features[name](flat), self.reference[name])
            for name in self.names
        }

    def split_half(self) -> dict[str, float]:
        """Every metric between two halves of the data: what a perfect sampler of that size would show."""
        result = {}
        for name in self.names:
            order = stream(1, BOOTSTRAP, 0, 0).permutation(len(self.reference[name]))
            half = len(order) // 2
            a, b = self.reference[name][order[:half]], self.reference[name][order[half:]]
            result[name] = DISTANCES[name.partition("-")[0]](a, b)
        return result


def _flat(x: torch.Tensor) -> Array:
    return x.flatten(1).double().numpy()
