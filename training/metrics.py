"""Distances between samples and data, each named by the features it is measured on: ``fd-pca`` is no FID.

    fd   Frechet distance of Gaussians fitted to features
    sw   sliced Wasserstein-1 distance of features

Formulas and features that need nothing but the data stand in `difficulty/distances.py`. Both distances are biased
upwards for finite samples; ``split_half`` states the same distance between two halves of the data, which is the floor.
"""

__all__ = ["FEATURES", "METRICS", "SampleJudge", "check_metrics"]

from collections.abc import Callable, Mapping, Sequence

import torch

from difficulty.distances import Features, frechet, pca, pixels, sliced_wasserstein
from difficulty.errors import choose
from difficulty.process import Array
from difficulty.randomness import stream
from training.streams import BOOTSTRAP

FEATURES: Mapping[str, Callable[[Array], Features]] = {"pixels": pixels, "pca": pca}
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
