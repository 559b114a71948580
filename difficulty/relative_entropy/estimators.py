"""The estimators by name."""

__all__ = ["ESTIMATORS"]

from collections.abc import Callable, Mapping

from difficulty.datasets import Dataset
from difficulty.relative_entropy.auto import estimate_auto, estimate_gaussian, estimate_mixture
from difficulty.relative_entropy.empirical import estimate_empirical
from difficulty.relative_entropy.estimate import Estimate, Settings
from difficulty.relative_entropy.exact import estimate_exact
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.score_estimator import estimate_score

ESTIMATORS: Mapping[str, Callable[[Dataset, Pairs, Settings], Estimate]] = {
    "auto": estimate_auto,
    "empirical": estimate_empirical,
    "exact": estimate_exact,
    "gaussian": estimate_gaussian,
    "mixture": estimate_mixture,
    "score": estimate_score,
}
