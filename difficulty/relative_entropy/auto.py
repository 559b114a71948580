"""The estimators that work from samples: which families each may use; ``judge`` chooses and checks them."""

__all__ = ["estimate_auto", "estimate_gaussian", "estimate_mixture"]

from dataclasses import replace

import numpy as np

from difficulty.datasets import Dataset
from difficulty.relative_entropy.choice import PLAUSIBLE
from difficulty.relative_entropy.estimate import Estimate, Settings
from difficulty.relative_entropy.exact import estimate_exact
from difficulty.relative_entropy.families import Candidate, leading_axes
from difficulty.relative_entropy.judge import Judge
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.sample import Sample, make_sample

INFINITE = float("inf")
RIVALS = (2, 4, 8)  # components of what a Gaussian is compared with
# Every fit turns the rows into its own principal axes, which takes 10 s of D = 3072 and a mixture takes dozens of fits.
MOST_FOR_MIXTURES = 1024
# Multiplications of one step of expectation-maximisation that are still affordable: 0.3 s.
LARGEST_FIT = 400_000_000
# Rows per axis of a component whose covariance is not shrunk.
ROWS_UNSHRUNK = 8


def estimate_auto(dataset: Dataset, pairs: Pairs, settings: Settings) -> Estimate:
    """The exact law where it is known, otherwise the best of all families."""
    if dataset.law:
        return estimate_exact(dataset, pairs, settings)
    sample = make_sample(dataset)
    return Judge(sample, pairs, settings, candidates(sample)).estimate()


def estimate_gaussian(dataset: Dataset, pairs: Pairs, settings: Settings) -> Estimate:
    """F2 with the moments of the sample; not valid where held-out data tell the law from a Gaussian.

    At high noise every law looks Gaussian, at low noise few do; the mixtures that are tried for comparison say where.
    """
    sample = make_sample(dataset)
    others = [c for c in candidates(sample) if c.components in RIVALS]
    text = "held-out data tell the law from a Gaussian at this noise"
    return _of_one_kind(sample, pairs, settings, [Candidate("gaussian")], others, text)


def estimate_mixture(dataset: Dataset, pairs: Pairs, settings: Settings) -> Estimate:
    """F1 with a full-covariance mixture, the number of components by held-out likelihood.

    Not valid where held-out data prefer another family, with independent axes or tails of its own, to every mixture.
    """
    sample = make_sample(dataset)
    pool = [c for c in candidates(sample) if c.of_gaussians]
    others = [c for c in candidates(sample) if not c.of_gaussians]
    text = "held-out data prefer another family to every mixture at this noise"
    return _of_one_kind(sample, pairs, settings, pool, others, text)


def _of_one_kind(
    sample: Sample, pairs: Pairs, settings: Settings, pool: list[Candidate], others: list[Candidate], text: str
) -> Estimate:
    """The best of the pool; not valid, with ``text`` for a reason, where one of the others is far more likely."""
    found = Judge(sample, pairs, settings, pool).estimate()
    if sample.rank == 0 or not others:
        return found
    doubter = Judge(sample, pairs, settings, pool + others)
    choice = doubter.choose()
    # At this level alone: less noise may well refute what is right here.
    likeliest = choice.plausibility[[name in pool for name in choice.names]].max(0)
    tau = np.minimum(pairs.tau, 1e3)
    wrong = np.interp(tau, tau[doubter.net.at], (likeliest <= PLAUSIBLE).astype(float)) > 0
    reason = np.where(wrong & found.valid, text, found.reason)
    return replace(found, valid=found.valid & ~wrong, reason=reason.astype(object))


def candidates(sample: Sample) -> list[Candidate]:
    """What is worth fitting to so many rows of so many axes, simplest first within a family."""
    if sample.discrete:
        return [Candidate("atoms")]
    n, d = sample.n, leading_axes(sample.rank, sample.n)
    found = [Candidate("gaussian")]
    if sample.rank > MOST_FOR_MIXTURES:
        return found
    most = LARGEST_FIT // max(n * d**2, 1)
    kinds = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
    # Components of a few directions each are seen only without shrinkage, which takes many rows per axis.
    for strength, rows in ((float(d + 1), max(30, d)), (0.0, max(30, ROWS_UNSHRUNK * d))):
        found += [Candidate("mixture", k, strength) for k in kinds if n / k >= rows and k <= max(most, 2)]
    if d > 1:
        # With one covariance a component costs its mean alone.
        shared = LARGEST_FIT // max(n * d, 1) - d
        found += [Candidate("mixture", k, INFINITE) for k in (4, 8, 16, 32, 64) if n / k >= 20 and k <= max(shared, 4)]
    # In many dimensions a few scales are a few shells; a heavy tail needs more of them to be smooth.
    found += [Candidate("scale", k) for k in (2, 4, 8, 16) if k <= max(most, 4)]
    found += [Candidate("product", k) for k in (2, 4, 8, 16)]
    found += [Candidate("student")] if most >= 1 else []
    found.append(Candidate("student-product"))
    return found
