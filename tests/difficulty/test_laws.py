"""The exact laws against numerical integration and automatic differentiation."""

import numpy as np
import pytest
import torch

from difficulty.laws import GaussianMixture, Ring

MIXTURE = GaussianMixture([1, 2, 1], [[-1.5], [0.2], [1.0]], [[[0.04]], [[0.3]], [[0.0]]])
PLANE = GaussianMixture([1, 3], [[0.0, 1.0], [1.0, -0.5]], [np.diag([0.2, 0.05]), [[0.5, 0.2], [0.2, 0.3]]])
LAWS = {"mixture-1d": MIXTURE, "mixture-2d": PLANE, "ring-3d": Ring(3, 1.3)}
SCALES = [(0.9, 0.3), (0.5, 0.8), (1.0, 2.0)]


def _points(law, alpha, sigma, n=40):
    return law.noisy_sample(n, alpha, sigma, torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("alpha", "sigma"), SCALES)
def test_posterior_mean_and_bayes_loss_of_a_mixture_are_those_of_numerical_integration(alpha, sigma):
    continuous = GaussianMixture([1, 2], [[-1.5], [0.2]], [[[0.04]], [[0.3]]])
    x0 = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    prior = continuous.log_prob(x0[:, None], 1.0, 0.0).exp()
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)[:, None]
    joint = prior * torch.exp(-0.5 * ((x - alpha * x0) / sigma) ** 2)
    mean = (joint * x0).sum(1) / joint.sum(1)
    variance = (joint * x0**2).sum(1) / joint.sum(1) - mean**2
    torch.testing.assert_close(continuous.posterior_mean(x, alpha, sigma)[:, 0], mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(continuous.posterior_trace(x, alpha, sigma), variance, rtol=1e-6, atol=1e-8)
    wide = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    density = continuous.log_prob(wide, alpha, sigma).exp()
    trace = continuous.posterior_trace(wide, alpha, sigma)
    exact = float((alpha / sigma) ** 2 * (density * trace).sum() / density.sum())
    loss, error = continuous.bayes_loss(alpha, sigma, 20_000, torch.Generator().manual_seed(0))
    assert abs(loss - exact) < 4 * error


@pytest.mark.parametrize(("alpha", "sigma"), SCALES)
def test_density_integrates_to_one(alpha, sigma):
    x = torch.linspace(-14, 14, 20001, dtype=torch.float64)
    assert float(MIXTURE.log_prob(x[:, None], alpha, sigma).exp().sum() * (x[1] - x[0])) == pytest.approx(1, abs=1e-9)
    side = torch.linspace(-12, 12, 801, dtype=torch.float64)
    square = torch.cartesian_prod(side, side)
    for law in (PLANE, Ring(2, 1.3)):
        assert float(law.log_prob(square, alpha, sigma).exp().sum() * (side[1] - side[0]) ** 2) == pytest.approx(1)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("alpha", "sigma"), SCALES)
def test_score_and_laplacian_are_the_derivatives_of_the_log_density(name, alpha, sigma):
    law = LAWS[name]
    x = _points(law, alpha, sigma).requires_grad_(True)
    score = torch.autograd.grad(law.log_prob(x, alpha, sigma).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(law.score(x, alpha, sigma), score, rtol=1e-8, atol=1e-9)
    trace = sum(torch.autograd.grad(score[:, k].sum(), x, retain_graph=True)[0][:, k] for k in range(law.dim))
    torch.testing.assert_close(law.laplacian_ratio(x, alpha, sigma), score.square().sum(1) + trace)


@pytest.mark.parametrize("name", LAWS)
def test_time_score_is_the_derivative_of_the_log_density_in_time(name):
    law, step = LAWS[name], 1e-5
    x = _points(law, 0.8, 0.6)
    flow, dilation = law.time_score_parts(x, 0.8, 0.6)
    up, down = (law.log_prob(x, 0.8, 0.6 * np.exp(h)) for h in (step, -step))
    torch.testing.assert_close(flow, (up - down) / (2 * step), rtol=1e-6, atol=1e-7)
    up, down = (law.log_prob(x, 0.8 * np.exp(h), 0.6 * np.exp(h)) for h in (step, -step))
    torch.testing.assert_close(-dilation, (up - down) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LAWS)
def test_log_ratio_is_the_difference_of_log_densities(name):
    law = LAWS[name]
    x = _points(law, 0.8, 0.6)
    difference = law.log_prob(x, 0.8, 0.6) - law.log_prob(x, 0.7, 0.7)
    torch.testing.assert_close(law.log_ratio(x, (0.8, 0.6), (0.7, 0.7)), difference, rtol=1e-8, atol=1e-10)
