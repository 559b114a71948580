"""Relative entropy from samples by a fitted law: a Gaussian (F2) or a Gaussian mixture (F1, drawn from the fit)."""

__all__ = ["estimate_auto", "estimate_gaussian", "estimate_mixture"]

import numpy as np
import numpy.typing as npt
import torch

from difficulty.datasets import Dataset
from difficulty.laws import GaussianMixture
from difficulty.randomness import torch_generator
from difficulty.relative_entropy.estimate import Estimate, Settings, log_interval
from difficulty.relative_entropy.exact import estimate_exact, kl_of_law
from difficulty.relative_entropy.gaussian import gaussian_kl, gaussian_profile
from difficulty.relative_entropy.mixture import MixtureOptions, fit_mixture
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.sample import Sample, make_sample

Array = npt.NDArray[np.float64]

COMPONENTS = (1, 2, 3, 5, 8, 12, 20, 32)
# An interval wider than this factor in either direction is not a measurement.
WIDEST = 1.3
MOST_AXES = 96


def estimate_auto(dataset: Dataset, pairs: Pairs, settings: Settings) -> Estimate:
    """The exact law where it is known, otherwise the mixture."""
    return estimate_exact(dataset, pairs, settings) if dataset.law else estimate_mixture(dataset, pairs, settings)


def estimate_gaussian(dataset: Dataset, pairs: Pairs, settings: Settings) -> Estimate:
    """F2 with the moments of the sample."""
    return _estimate(make_sample(dataset), pairs, settings, "gaussian", (1,))


def estimate_mixture(dataset: Dataset, pairs: Pairs, settings: Settings) -> Estimate:
    """F1 with a full-covariance mixture, the number of components by held-out likelihood."""
    return _estimate(make_sample(dataset), pairs, settings, "mixture", COMPONENTS)


def _estimate(sample: Sample, pairs: Pairs, settings: Settings, name: str, components: tuple[int, ...]) -> Estimate:
    m = len(pairs)
    axes = min(sample.rank, MOST_AXES, max(1, sample.n // 20))
    floor = 1e-2 * float((pairs.sigma_from / pairs.alpha_from).min()) ** 2
    halves = _halves(sample.n, settings)
    best = _choose(sample, axes, halves[:2], components, floor, settings)
    kl, kl_reverse, monte_carlo, i_min = _fit_and_measure(
        sample, np.arange(sample.n), axes, best, floor, pairs, settings
    )
    anchors = np.unique(np.linspace(0, m - 1, min(m, 60)).round().astype(int))
    refits = []
    for i, half in enumerate(halves):
        value = _fit_and_measure(sample, half, axes, best, floor, pairs.take(anchors), settings)[0]
        refits.append(np.log(value.clip(min=1e-300)))
        settings.progress(i + 1, len(halves))
    shift = np.stack(refits) - np.log(kl[anchors].clip(min=1e-300))
    bias, spread = shift.mean(0), shift.std(0, ddof=1)
    error = np.interp(np.arange(m), anchors, np.hypot(spread, bias))
    total = np.hypot(error, np.divide(monte_carlo, kl, out=np.zeros(m), where=kl > 0))
    low, high = log_interval(kl, total)
    valid = total < np.log(WIDEST)
    reason = np.where(valid, "", "refits to halves of the data disagree: the sample is too small for this pair")
    return Estimate(
        kl, kl_reverse, kl * total, low, high, i_min, np.full(m, name, dtype=object), valid, reason.astype(object)
    )


def _halves(n: int, settings: Settings) -> list[npt.NDArray[np.int64]]:
    rng = np.random.default_rng([settings.seed, 23])
    halves = []
    for _ in range((settings.bootstrap + 1) // 2):
        order = rng.permutation(n)
        halves += [order[: n // 2], order[n // 2 :]]
    return halves[: settings.bootstrap]


def _choose(
    sample: Sample, axes: int, halves: list, components: tuple[int, ...], floor: float, settings: Settings
) -> MixtureOptions:
    scores: dict[MixtureOptions, float] = {}
    for k in components:
        if k > 1 and k * max(10, axes // 2) > sample.n // 2:
            break
        options = MixtureOptions(k, float(axes + 1) if k > 1 else 0.0)
        total = 0.0
        for inside, outside in (halves, halves[::-1]):
            law = fit_mixture(sample.rows[inside, :axes], sample.counts[inside], options, floor, settings.seed)
            value = law.log_prob(torch.from_numpy(sample.rows[outside, :axes]), 1.0, floor**0.5)
            total += float((value * torch.from_numpy(sample.counts[outside])).sum())
        scores[options] = total
        if total < max(scores.values()) and k > 8:
            break
    return max(scores, key=lambda options: scores[options])


def _fit_and_measure(
    sample: Sample,
    rows: npt.NDArray[np.int64],
    axes: int,
    options: MixtureOptions,
    floor: float,
    pairs: Pairs,
    settings: Settings,
) -> tuple[Array, Array, Array, Array]:
    """kl, kl_reverse, Monte Carlo error, I_min of a fit to some rows."""
    x, w = sample.rows[rows], sample.counts[rows]
    mean = np.average(x, axis=0, weights=w)
    rest = np.average((x[:, axes:] - mean[axes:]) ** 2, axis=0, weights=w)
    rest = np.concatenate([rest, np.zeros(sample.dim - sample.rank)])
    rest_mean = np.concatenate([(sample.mean + mean)[axes:], np.zeros(sample.dim - sample.rank)])
    if sample.dim > sample.rank:
        rest_mean[-1] = sample.null_mean
    law = fit_mixture(x[:, :axes], w, options, floor, settings.seed)
    law = GaussianMixture(
        law.log_weights.exp().numpy(),
        law.means.numpy() + sample.mean[:axes],
        (law.basis @ torch.diag_embed(law.eigenvalues) @ law.basis.transpose(1, 2)).numpy(),
    )
    kl = gaussian_kl(pairs, rest, rest_mean)
    kl_reverse = gaussian_kl(pairs, rest, rest_mean, reverse=True)
    profile = gaussian_profile(pairs.tau, rest, rest_mean)
    error = np.zeros(len(pairs))
    if len(law.means) == 1:
        values, centre = law.eigenvalues[0].numpy(), law._rotated_means[0].numpy()
        kl += gaussian_kl(pairs, values, centre)
        kl_reverse += gaussian_kl(pairs, values, centre, reverse=True)
        profile += gaussian_profile(pairs.tau, values, centre)
        i_min = profile[:, 0] - profile[:, 1] ** 2 / profile[:, 2]
    else:
        generator = torch_generator(29, settings.seed)
        x0 = law.sample(settings.samples, generator)
        eps = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
        part, error, part_reverse, i_min = kl_of_law(law, pairs, x0, eps, Settings(1, 1, 0, lambda a, b: None))
        kl += part
        kl_reverse += part_reverse
    return kl, kl_reverse, error, i_min
