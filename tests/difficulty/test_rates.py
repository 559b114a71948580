"""The rates of a profile: those of parts together, and the least squared error that a mixture leaves."""

import numpy as np
import pytest
import torch

from difficulty.laws import GaussianMixture
from difficulty.relative_entropy.gaussian import gaussian_profile
from difficulty.relative_entropy.kernel import MixtureKernel
from difficulty.relative_entropy.rates import add_rates, rates_of_scores

TAU = np.linspace(-6, 6, 25)


def test_rates_of_independent_parts_add_up_to_those_of_the_whole_without_cancellation():
    rng = np.random.default_rng(0)
    values, mean = np.exp(rng.uniform(-4, 0, 9)), rng.standard_normal(9)
    cuts = [slice(0, 2), slice(2, 7), slice(7, 9), slice(9, 9)]  # the last part has no axes
    parts = [gaussian_profile(TAU, values[cut], mean[cut]) for cut in cuts]
    np.testing.assert_allclose(add_rates(parts), gaussian_profile(TAU, values, mean), rtol=1e-11)


def test_rates_of_draws_are_exact_moments_of_them():
    generator = torch.Generator().manual_seed(0)
    flow, dilation = torch.randn(2, 3, 500, dtype=torch.float64, generator=generator)
    weight = torch.rand(500, dtype=torch.float64, generator=generator)
    weight /= weight.sum()
    a, b, c, least = rates_of_scores(flow, dilation, weight).T
    expected = [(part * weight).sum(1).numpy() for part in (flow**2, flow * dilation, dilation**2)]
    np.testing.assert_allclose([a, b, c], expected, rtol=1e-12)
    np.testing.assert_allclose(least, a - b**2 / c, rtol=1e-9)


@pytest.mark.parametrize("kind", ["own axes", "one covariance", "isotropic", "points"])
def test_posterior_trace_of_a_kernel_is_that_of_its_law(kind):
    rng = np.random.default_rng(1)
    root = 0.3 * rng.standard_normal((4, 5, 5))
    covariances = {
        "own axes": root @ root.transpose(0, 2, 1),
        "one covariance": np.tile(root[0] @ root[0].T, (4, 1, 1)),
        "isotropic": np.array([0.1, 0.2, 0.3, 0.4])[:, None, None] * np.eye(5),
        "points": np.zeros((4, 5, 5)),
    }[kind]
    law = GaussianMixture([1.0, 2.0, 3.0, 4.0], rng.standard_normal((4, 5)), covariances)
    x0 = law.sample(300, torch.Generator().manual_seed(0))
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = MixtureKernel(law, x0, eps).posterior_trace(TAU)
    expected = torch.stack([law.posterior_trace(x0 + s * eps, 1.0, float(s)) for s in np.exp(TAU)])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-13)
    torch.testing.assert_close(found.mean(1), expected.mean(1), rtol=1e-9, atol=1e-13)
