"""Relative entropy of the empirical mixture: every row a point mass, the noise its kernel (F1 with draws of it).

Right where the noise blurs the rows into each other and wrong by any factor where it does not: a pair is valid only
where the posterior of the row given x_t is spread over at least 100 rows in the median (its effective number of rows,
1/sum r^2).
"""

__all__ = ["LEAST_ROWS", "estimate_empirical"]

import numpy as np
import torch

from difficulty.datasets import Dataset
from difficulty.errors import InputError
from difficulty.laws import GaussianMixture
from difficulty.randomness import torch_generator
from difficulty.relative_entropy.estimate import Estimate, Settings, log_interval
from difficulty.relative_entropy.kernel import MixtureKernel
from difficulty.relative_entropy.montecarlo import kl_from_log_ratio
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.sample import make_sample

LEAST_ROWS = 100
LARGEST = 10**8
EMPIRICAL_STREAM = 41


def estimate_empirical(dataset: Dataset, pairs: Pairs, settings: Settings) -> Estimate:
    """F1 under the empirical law.

    Raises:
        InputError: if rows times squared dimensions are too many to hold.
    """
    sample = make_sample(dataset)
    d = max(sample.rank, 1)
    if sample.n * d**2 > LARGEST:
        raise InputError(f"the empirical estimator holds {sample.n} x {d}^2 numbers, too many; use estimator 'auto'")
    law = GaussianMixture(sample.counts, sample.rows + sample.mean, np.zeros((sample.n, d, d)))
    generator = torch_generator(EMPIRICAL_STREAM, settings.seed)
    x0 = law.sample(min(settings.samples, 1000), generator)
    kernel = MixtureKernel(law, x0, torch.randn(x0.shape, dtype=torch.float64, generator=generator))
    rows = [kernel.log_ratio(pairs.first[[i]], pairs.second[[i]]) for i in range(len(pairs))]
    kl, se = (value.numpy() for value in kl_from_log_ratio(torch.cat(rows)))
    back = [kernel.log_ratio(pairs.second[[i]], pairs.first[[i]]) for i in range(len(pairs))]
    kl_reverse = kl_from_log_ratio(torch.cat(back))[0].numpy()
    tau = np.minimum(pairs.tau, 30.0)
    effective = np.array([float(kernel.effective_components(tau[[i]]).median()) for i in range(len(pairs))])
    error = np.hypot(se / np.maximum(kl, 1e-300), sample.n**-0.5)
    low, high = log_interval(kl, error)
    valid = effective >= LEAST_ROWS
    reason = np.where(valid, "", f"fewer than {LEAST_ROWS} rows are blurred into each other at this noise")
    name, unknown = np.full(len(pairs), "empirical", dtype=object), np.full(len(pairs), np.nan)
    return Estimate(kl, kl_reverse, kl * error, low, high, unknown, name, valid, reason.astype(object))
