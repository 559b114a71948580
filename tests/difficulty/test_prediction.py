"""Conversions between predictions."""

import pytest
import torch

from difficulty.errors import InputError
from difficulty.prediction import EDM_SIGMA_DATA, PREDICTIONS, coefficients, eps_loss_factor, from_x0_eps, to_eps, to_x0
from difficulty.process import PROCESSES, get_process

GENERATOR = torch.Generator().manual_seed(0)
X0, EPS = (torch.randn(7, 3, dtype=torch.float64, generator=GENERATOR) for _ in range(2))


def scales(name, t):
    alpha, sigma = get_process(name).alpha_sigma(t)
    return torch.tensor(alpha)[:, None], torch.tensor(sigma)[:, None]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_gives_back_x0_and_eps(process, prediction):
    alpha, sigma = scales(process, [1, 10, 100, 500, 800, 990, 999])
    x_t = alpha * X0 + sigma * EPS
    output = from_x0_eps(prediction, X0, EPS, alpha, sigma)
    # Recovering the weaker of signal and noise loses as many digits as their ratio has, however it is done.
    torch.testing.assert_close(alpha * to_x0(prediction, output, x_t, alpha, sigma), alpha * X0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sigma * to_eps(prediction, output, x_t, alpha, sigma), sigma * EPS, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("first", PREDICTIONS)
@pytest.mark.parametrize("second", PREDICTIONS)
def test_any_prediction_converts_into_any_other_and_back(first, second):
    alpha, sigma = scales("vp-cosine", [50, 100, 200, 400, 600, 800, 900])
    x_t = alpha * X0 + sigma * EPS
    output = torch.randn(7, 3, dtype=torch.float64, generator=GENERATOR)

    def convert(values, source, target):
        estimate = (to_x0(source, values, x_t, alpha, sigma), to_eps(source, values, x_t, alpha, sigma))
        return from_x0_eps(target, *estimate, alpha, sigma)

    there = convert(output, first, second)
    torch.testing.assert_close(convert(there, second, first), output, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_eps_loss_factor_is_the_ratio_of_squared_errors(prediction):
    alpha, sigma = scales("flow-matching", [50, 100, 200, 400, 600, 800, 900])
    x_t = alpha * X0 + sigma * EPS
    target = from_x0_eps(prediction, X0, EPS, alpha, sigma)
    error = 0.1 * torch.randn(7, 3, dtype=torch.float64, generator=GENERATOR)
    eps_error = to_eps(prediction, target + error, x_t, alpha, sigma) - EPS
    factor = eps_loss_factor(prediction, alpha, sigma)
    torch.testing.assert_close(eps_error.square(), factor * error.square(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("prediction", "sd"), [("edm", EDM_SIGMA_DATA), ("edm:sigma_data=1.5", 1.5)])
def test_edm_output_has_unit_variance_for_data_of_its_standard_deviation(prediction, sd):
    alpha, sigma = scales("edm", [1, 250, 500, 1000])
    a, b = coefficients(prediction, alpha, sigma)
    torch.testing.assert_close((a * sd) ** 2 + b**2, torch.ones_like(a))


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        ("epsilon", "unknown prediction 'epsilon'"),
        ("eps:sigma_data=1", "prediction 'eps' has no option 'sigma_data'; its options are: none"),
        ("edm:sigma_data=0", "sigma_data must be positive"),
        ("edm:sigma_data=one", "must be a finite number"),
    ],
)
def test_a_prediction_that_is_none_costs_one_sentence(prediction, message):
    with pytest.raises(InputError, match=message):
        coefficients(prediction, *scales("edm", [1]))


def test_edm_agrees_with_the_formulas_of_its_paper():
    alpha, s = torch.ones(3, 1, dtype=torch.float64), torch.tensor([[0.01], [0.5], [20.0]], dtype=torch.float64)
    c_skip = EDM_SIGMA_DATA**2 / (s**2 + EDM_SIGMA_DATA**2)
    c_out = s * EDM_SIGMA_DATA / (s**2 + EDM_SIGMA_DATA**2).sqrt()
    x0, eps = X0[:3], EPS[:3]
    expected = (x0 - c_skip * (x0 + s * eps)) / c_out
    torch.testing.assert_close(from_x0_eps("edm", x0, eps, alpha, s), expected)


def test_eps_survives_where_no_signal_is_left_and_x0_where_no_noise_is():
    none, one = torch.zeros(7, 1, dtype=torch.float64), torch.ones(7, 1, dtype=torch.float64)
    torch.testing.assert_close(to_eps("eps", EPS, EPS, none, one), EPS)
    torch.testing.assert_close(to_x0("x0", X0, X0, one, none), X0)
    for prediction in ("v", "velocity", "edm"):
        output = from_x0_eps(prediction, X0, EPS, none, one)
        torch.testing.assert_close(to_x0(prediction, output, EPS, none, one), X0)


def test_an_unknown_prediction_lists_the_known_ones():
    with pytest.raises(InputError, match="eps, x0, v, score, velocity, edm"):
        from_x0_eps("noise", X0, EPS, X0, X0)
