"""Distances between samples and data, each named by the features it is measured on: ``fd-pca`` is no FID.

    fd         Frechet distance of Gaussians fitted to the features
    kid        unbiased kernel distance (squared MMD, polynomial of degree 3)
    sw         sliced Wasserstein-1 distance
    precision  share of the samples near the data: what is drawn looks right
    recall     share of the data near the samples: what exists is drawn

Formulas stand in `difficulty/distances.py`, features in `features.py`. What a finite sample does to a metric is stated
by ``of_data``: the same metric of as many data in place of the samples, which is what a perfect sampler would show.

Intervals come from a grouped jackknife over samples and data: with theta_g the metric without the g-th of G groups,
se^2 = (G - 1)/G sum_g (theta_g - mean theta)^2, one term for the samples and one for the data (Efron & Tibshirani 1993,
section 11). Not from a bootstrap: points drawn twice are each other's nearest neighbours at distance 0, and bias the
kernel distance. The interval is that of the metric at these numbers of samples; it does not hold the bias. Shares
inside balls leap as points come and go, and the intervals of precision and recall are up to twice too wide.
"""

__all__ = ["DISTANCES", "METRICS", "Distance", "MetricValue", "SampleJudge", "check_enough", "check_metrics"]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor

from difficulty.distances import frechet, kernel, precision, recall, sliced_wasserstein
from difficulty.errors import InputError, choose
from difficulty.process import Array
from difficulty.randomness import stream
from training.effects import LEVEL
from training.features import FEATURES
from training.streams import BOOTSTRAP

GROUPS = 20
LEAST = 2 * GROUPS  # samples; every group then leaves enough for three neighbours
DRAWS = 5  # of data in place of the samples


@dataclass(frozen=True)
class Distance:
    """One way to compare features.

    Args:
        compute: (samples (n, d), data (m, d)) -> value.
        better: lower or higher.
        bounds: least and greatest possible value.
    """

    compute: Callable[[Array, Array], float]
    better: str = "lower"
    bounds: tuple[float, float] = (0.0, math.inf)

    @property
    def has_ratios(self) -> bool:
        """Whether it is positive and better when smaller, so that a log-ratio of two values says which is better."""
        return self.better == "lower" and self.bounds == (0.0, math.inf)


DISTANCES: Mapping[str, Distance] = {
    "fd": Distance(frechet),
    "kid": Distance(kernel, bounds=(-math.inf, math.inf)),
    "sw": Distance(sliced_wasserstein),
    "precision": Distance(precision, "higher", (0.0, 1.0)),
    "recall": Distance(recall, "higher", (0.0, 1.0)),
}
METRICS: Mapping[str, tuple[Distance, str]] = {
    f"{name}-{features}": (distance, features) for name, distance in DISTANCES.items() for features in FEATURES
}


@dataclass(frozen=True)
class MetricValue:
    """A metric of samples with its standard error, its interval, and its value with data in place of the samples."""

    value: float
    se: float
    ci_low: float
    ci_high: float
    of_data: float
    better: str


def check_metrics(names: Sequence[str], *, ratios: bool = False) -> None:
    """Raise InputError if a metric is unknown, or has no ratios where ratios are wanted."""
    for name in names:
        distance, _ = choose("metric", name, METRICS)
        if ratios and not distance.has_ratios:
            raise InputError(
                f"metric {name!r} can be negative or is better when larger, so that arms have no ratio; choose fd or sw"
            )


def check_enough(what: str, count: int) -> None:
    """Raise InputError if there are too few samples or data for a metric."""
    if count < LEAST:
        raise InputError(f"metrics of samples need at least {LEAST} {what}, got {count}")


class SampleJudge:
    """Metrics of samples against one set of data, features fitted once.

    Args:
        data: reference samples (n, *), n >= 40.
        names: among ``METRICS``.
        value_range: (low, high) of image values, if known.

    Raises:
        InputError: if a metric is unknown, the data are too few, or the features cannot be had.
    """

    def __init__(
        self,
        data: Tensor,
        names: Sequence[str] = ("fd-pca", "sw-pixels"),
        value_range: tuple[float, float] | None = None,
    ) -> None:
        check_metrics(names)
        if names:
            check_enough("data", len(data))
        self.metrics = {name: METRICS[name] for name in names}
        used = dict.fromkeys(features for _, features in self.metrics.values())
        self.features = {name: FEATURES[name](data, value_range) for name in used}
        self.reference = {name: extract(data) for name, extract in self.features.items()}

    def __call__(self, samples: Tensor) -> dict[str, float]:
        """Every metric of samples (n, *), n >= 40.

        Raises:
            InputError: if there are fewer, or one holds NaN or infinity.
        """
        found = self._features_of(samples)
        return {
            name: distance.compute(found[features], self.reference[features])
            for name, (distance, features) in self.metrics.items()
        }

    def _features_of(self, samples: Tensor) -> dict[str, Array]:
        check_enough("samples", len(samples))
        if not samples.isfinite().all():
            raise InputError("the samples hold NaN or infinity and cannot be judged; train longer or at a lower rate")
        return {name: extract(samples) for name, extract in self.features.items()}

    def compared(self, count: int) -> int:
        """How many of the data stand in the place of ``count`` samples: at most half of them."""
        return min([count, *(len(points) // 2 for points in self.reference.values())])

    def of_data(self, count: int) -> dict[str, float]:
        """Every metric of ``compared(count)`` of the data against the others, a mean over ``DRAWS`` draws.

        What a perfect sampler would show at this number of samples, as the bias falls with it; somewhat less where half
        of the data are fewer.
        """
        result, count = {}, self.compared(count)
        for name, (distance, features) in self.metrics.items():
            reference = self.reference[features]
            orders = [stream(1, BOOTSTRAP, draw, 0).permutation(len(reference)) for draw in range(DRAWS)]
            found = [distance.compute(reference[order[:count]], reference[order[count:]]) for order in orders]
            result[name] = float(np.mean(found))
        return result

    def evaluate(self, samples: Tensor, level: float = LEVEL) -> dict[str, MetricValue]:
        """Every metric of samples (n, *), n >= 40, with its interval; about 40 times the work of the call."""
        found = self._features_of(samples)
        of_data, result = self.of_data(len(samples)), {}
        for name, (distance, features) in self.metrics.items():
            a, b = found[features], self.reference[features]
            value, se = distance.compute(a, b), _jackknife_error(distance.compute, a, b)
            reach = float(stats.t.ppf(0.5 + level / 2, GROUPS - 1)) * se
            low, high = (float(np.clip(end, *distance.bounds)) for end in (value - reach, value + reach))
            result[name] = MetricValue(value, se, low, high, of_data[name], distance.better)
        return result


def _jackknife_error(compute: Callable[[Array, Array], float], a: Array, b: Array) -> float:
    """Standard error of ``compute(a, b)`` over both sets of points."""
    without_a = [compute(rest, b) for rest in _all_but_one_group(a)]
    without_b = [compute(a, rest) for rest in _all_but_one_group(b)]
    return math.sqrt((GROUPS - 1) * (np.var(without_a) + np.var(without_b)))


def _all_but_one_group(points: Array) -> list[Array]:
    group = stream(2, BOOTSTRAP, 0, 0).permutation(len(points)) % GROUPS
    return [points[group != left_out] for left_out in range(GROUPS)]
