"""Means over a mixture by draws regressed on Gaussians: exact where these say all, unbiased and honest elsewhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from difficulty.laws import GaussianMixture
from difficulty.process import get_process
from difficulty.relative_entropy.estimate import Settings
from difficulty.relative_entropy.exact import kl_of_law, law_draws
from difficulty.relative_entropy.gaussian import gaussian_kl, gaussian_profile
from difficulty.relative_entropy.kernel import MixtureKernel
from difficulty.relative_entropy.mixture_means import _Gaussians, mixture_kl, mixture_rates
from difficulty.relative_entropy.montecarlo import kl_from_log_ratio, regressed
from difficulty.relative_entropy.pairs import make_pairs
from difficulty.relative_entropy.rates import rates_of_scores

TIMES = [3, 30, 120, 300, 600, 950]


def mixture(k=3, d=4, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    axes = ortho_group.rvs(d, size=k, random_state=seed) if k > 1 else np.eye(d)[None]
    covariances = (axes * rng.uniform(0.02, 0.5, (k, 1, d))) @ axes.transpose(0, 2, 1)
    return GaussianMixture(rng.uniform(0.5, 1.5, k), spread * rng.standard_normal((k, d)), covariances)


def test_of_a_single_gaussian_hardly_an_error_is_left():
    law, pairs = mixture(k=1), make_pairs(get_process("vp-linear"), TIMES)
    draws = law_draws(law, 500, 0)
    lam, mean = law.eigenvalues[0].numpy(), law.rotated_means[0].numpy()
    [(kl, _)] = mixture_kl(law, [(pairs.first, pairs.second)], draws)
    # Only terms of third order in the log-ratio; plain draws are off by 6 %.
    np.testing.assert_allclose(kl, gaussian_kl(pairs, lam, mean), rtol=6e-3)
    rates, _ = mixture_rates(law, pairs.tau, draws)
    np.testing.assert_allclose(rates[:, :3], gaussian_profile(pairs.tau, lam, mean)[:, :3], rtol=1e-8)
    np.testing.assert_allclose(rates[:, 3], gaussian_profile(pairs.tau, lam, mean)[:, 3], rtol=1e-6)


@pytest.mark.parametrize("isotropic", [False, True])
def test_the_moments_of_the_forms_are_those_of_many_draws(isotropic):
    law = mixture()
    if isotropic:
        law = GaussianMixture([1, 2, 1], law.means.numpy(), np.array([0.0, 0.1, 0.4])[:, None, None] * np.eye(4))
    pairs, gaussians = make_pairs(get_process("vp-linear"), TIMES), _Gaussians(law)
    draws = law_draws(law, 100_000, 1)
    kernel, whole = (MixtureKernel(each, draws.x0, draws.eps) for each in (law, gaussians.whole))
    ratios = [whole.log_ratio(pairs.first, pairs.second)]
    ratios.append(kernel.log_ratio_of(draws.component, pairs.first, pairs.second))
    forms = [gaussians.log_ratio_forms(*step) for step in zip(pairs.first, pairs.second, strict=True)]
    found = [(gaussians.moments(pairs.first, forms), [ratio[None] for ratio in ratios])]
    scales = np.stack([np.ones(len(pairs)), np.exp(pairs.tau)], 1)
    scores = [torch.stack(whole.time_score(pairs.tau)), torch.stack(kernel.time_score_of(draws.component, pairs.tau))]
    scores = [torch.stack([flow - 0.3 * dilation, dilation]) for flow, dilation in scores]
    forms = [gaussians.score_forms(s, 0.3) for s in scales[:, 1].tolist()]
    found.append((gaussians.moments(scales, forms), scores))
    for moments, kinds in found:
        for (mean, product), values in zip(moments, kinds, strict=True):
            for i, value in enumerate(values):
                assert ((value.mean(1) - mean[i]).abs() < 4.5 * value.std(1) / len(draws.x0) ** 0.5).all()
                for j, other in enumerate(values):
                    terms = value * other
                    assert ((terms.mean(1) - product[i, j]).abs() < 4.5 * terms.std(1) / len(draws.x0) ** 0.5).all()


@pytest.mark.parametrize(("spread", "least"), [(0.5, [0.9, 0.9, 0.9, 1, 4, 19]), (3.0, [19, 19, 8, 0.9, 0.9, 19])])
def test_the_relative_entropy_is_unbiased_and_its_error_honest_and_smaller(spread, least):
    law, pairs = mixture(spread=spread), make_pairs(get_process("vp-linear"), TIMES)
    # 400 000 plain draws against the mean of sixty estimates from four thousand.
    draws = law_draws(law, 400_000, 0)
    ratio = MixtureKernel(law, draws.x0, draws.eps).log_ratio(pairs.first, pairs.second)
    truth, error = (part.numpy() for part in kl_from_log_ratio(ratio))
    found = [mixture_kl(law, [(pairs.first, pairs.second)], law_draws(law, 4000, seed))[0] for seed in range(1, 61)]
    kl, errors = (np.stack(column) for column in zip(*found, strict=True))
    assert (np.abs(kl.mean(0) - truth) < 4 * np.hypot(error, kl.std(0) / 60**0.5)).all()
    assert (errors.mean(0) / kl.std(0) > 0.7).all()
    # Where components merge Gaussians say hardly anything; at both ends the error falls to the least that is stated.
    assert (error * 10 / errors.mean(0) > least).all()


def test_the_rates_are_unbiased_and_their_errors_honest():
    law, tau = mixture(), np.array([-3.0, -1.0, 0.0, 2.0, 5.0])
    draws = law_draws(law, 400_000, 0)
    truth = rates_of_scores(*MixtureKernel(law, draws.x0, draws.eps).time_score(tau), 1 / len(draws.x0))
    found = [mixture_rates(law, tau, law_draws(law, 2000, seed)) for seed in range(1, 41)]
    rates, errors = (np.stack(column) for column in zip(*found, strict=True))
    plain = [rates_of_scores(*MixtureKernel(law, part.x0, part.eps).time_score(tau), 1 / 2000)
             for part in (law_draws(law, 2000, seed) for seed in range(1, 41))]  # fmt: skip
    spread = np.std(plain, axis=0)
    mean, own = rates[..., :4].mean(0), rates[..., :4].std(0)
    assert (np.abs(mean - truth) < 4.5 * np.hypot(spread / 200**0.5, own / 40**0.5)).all()
    assert (own < 1.2 * spread).all()
    assert (own[-1] < 0.02 * spread[-1]).all()
    assert (errors[..., :4].mean(0) / own > 0.6).all()


def test_points_of_another_law_keep_what_their_weights_allow():
    law, pairs = mixture(), make_pairs(get_process("vp-linear"), TIMES)
    even = GaussianMixture(np.ones(3), law.means.numpy(), covariances_of(law))
    draws = law_draws(even, 40_000, 0)
    weight = (law.log_prob(draws.x0, 1.0, 0.0) - even.log_prob(draws.x0, 1.0, 0.0)).exp()
    [(kl, error)] = mixture_kl(law, [(pairs.first, pairs.second)], replace(draws, weight=weight))
    truth, truth_error, _, _ = kl_of_law(law, pairs, law_draws(law, 200_000, 1), Settings(1, 1, 0, lambda *_: None))
    assert (np.abs(kl - truth) < 4 * np.hypot(error, truth_error)).all()
    assert (error < np.array([9, 9, 9, 9, 5e-3, 1e-3]) * kl).all()


def covariances_of(law):
    return ((law.basis * law.eigenvalues[:, None]) @ law.basis.transpose(1, 2)).numpy()


def test_what_does_not_vary_or_says_the_same_twice_changes_nothing():
    rng = torch.Generator().manual_seed(0)
    terms = torch.randn(2, 1000, generator=rng, dtype=torch.float64)
    beside = torch.randn(1, 2, 1000, generator=rng, dtype=torch.float64) + terms
    once = regressed(terms, beside)
    twice = regressed(terms, torch.cat([beside, 3 * beside, torch.zeros_like(beside)]))
    torch.testing.assert_close(twice, once)
    assert (once.std(1) < 0.8 * terms.std(1)).all()
