"""Relative entropy of the empirical mixture: every row a point mass, the noise its kernel (F1 with draws of it).

Right where the noise blurs the rows into each other and wrong by any factor where it does not: a pair is valid only
where the posterior of the row given x_t is spread over at least 100 rows in the median (its effective number of rows,
1/sum r^2), and where the same from halves of the rows does not disagree.
"""

__all__ = ["LEAST_ROWS", "estimate_empirical"]

import numpy as np
import torch
from scipy import stats

from difficulty.datasets import Dataset
from difficulty.errors import InputError
from difficulty.laws import GaussianMixture
from difficulty.randomness import stream, torch_generator
from difficulty.relative_entropy.estimate import Array, Estimate, Settings, log_interval
from difficulty.relative_entropy.fits import null_block
from difficulty.relative_entropy.kernel import MixtureKernel
from difficulty.relative_entropy.montecarlo import kl_from_log_ratio
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.refits import beside_rest, gaussian_log_error
from difficulty.relative_entropy.sample import make_sample
from difficulty.relative_entropy.verdict import LIMITS

LEAST_ROWS = 100
SPLITS = 3
# Of log KL. Three halvings know their own spread less well than the refits behind ``LIMITS``.
LARGEST_ERROR = 0.12
DRAWS = 2000
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
    rows, counts = sample.rows + sample.mean, sample.counts
    kl, se, kl_reverse, effective = _measure(rows, counts, pairs, settings)
    # Half the rows have twice the bias of all, and their differences are the spread (as in `refits.py`).
    rng = stream(EMPIRICAL_STREAM, settings.seed)
    orders = [rng.permutation(sample.n) for _ in range(SPLITS)]
    halves = np.stack(
        [
            [_log(_measure(rows[half], counts[half], pairs, settings)[0]) for half in np.array_split(order, 2)]
            for order in orders
        ]
    )
    bias = halves.mean((0, 1)) - _log(kl)
    spread = np.sqrt(((halves[:, 0] - halves[:, 1]) ** 2).mean(0) / 4)
    # Halves may agree by chance where the noise leaves little but the error of the mean.
    spread = beside_rest(np.maximum(spread, gaussian_log_error(sample, pairs, _log(kl))), bias)
    null = null_block(sample).measure(pairs, 0, 0)
    raw, kl = kl, kl * np.exp(-bias)
    total = kl + null.kl
    error = kl / total * np.sqrt((se / np.maximum(raw, 1e-300)) ** 2 + spread**2 + bias**2)
    # Few refits know their own spread only roughly.
    low, high = log_interval(total, error, float(stats.t.ppf(0.95, SPLITS)))
    sharp, unsure = effective < LEAST_ROWS, error > LARGEST_ERROR
    reason = np.where(unsure, "too few samples: refits to halves of them disagree", "")
    reason = np.where(np.abs(bias) > LIMITS.bias, "too few samples: half of them give a much different value", reason)
    reason = np.where(sharp, f"fewer than {LEAST_ROWS} rows are blurred into each other at this noise", reason)
    name, unknown = np.full(len(pairs), "empirical", dtype=object), np.full(len(pairs), np.nan)
    reverse = kl_reverse * np.exp(-bias) + null.kl_reverse
    return Estimate(total, reverse, total * error, low, high, unknown, name, reason == "", reason.astype(object))


def _measure(rows: Array, counts: Array, pairs: Pairs, settings: Settings) -> tuple[Array, Array, Array, Array]:
    """KL, its Monte Carlo error, the reverse KL, and the median effective number of rows, each (m,)."""
    n, d = rows.shape
    law = GaussianMixture(counts, rows, np.zeros((n, d, d)))
    generator = torch_generator(EMPIRICAL_STREAM, settings.seed)
    x0 = law.sample(min(settings.samples, DRAWS), generator)
    kernel = MixtureKernel(law, x0, torch.randn(x0.shape, dtype=torch.float64, generator=generator))
    forward = [kernel.log_ratio(pairs.first[[i]], pairs.second[[i]]) for i in range(len(pairs))]
    back = [kernel.log_ratio(pairs.second[[i]], pairs.first[[i]]) for i in range(len(pairs))]
    kl, se = (value.numpy() for value in kl_from_log_ratio(torch.cat(forward)))
    tau = np.minimum(pairs.tau, 30.0)
    effective = np.array([float(kernel.effective_components(tau[[i]]).median()) for i in range(len(pairs))])
    return kl, se, kl_from_log_ratio(torch.cat(back))[0].numpy(), effective


def _log(values: Array) -> Array:
    return np.log(np.maximum(values, 1e-300))
