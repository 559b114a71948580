"""The linear denoiser against the posterior mean of the Gaussian that it stands for."""

import numpy as np
import pytest
import torch
from sklearn.covariance import shrunk_covariance

from difficulty import heldout
from difficulty.datasets import load_dataset
from difficulty.heldout import Floors, task_draws
from difficulty.laws import GaussianMixture
from difficulty.process import get_process
from difficulty.tasks import make_tasks
from difficulty.wiener import Wiener

# Noise levels from hardly any to nothing but noise.
LEVELS = [(1.0, 1e-3), (0.9, 0.4), (0.3, 0.95), (0.0, 1.0)]


def rows_of(n, dim):
    rng = np.random.default_rng(n)
    return rng.standard_normal((n, dim)) * np.linspace(0.2, 2.0, dim) + 1.0


def gaussian_losses(mean, covariance, x0, eps, alpha, sigma):
    law = GaussianMixture([1.0], mean[None], covariance[None])
    return (law.posterior_eps(alpha * x0 + sigma * eps, alpha, sigma) - eps).square().sum(1)


@pytest.mark.parametrize(("n", "dim"), [(60, 5), (8, 12)])
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_losses_are_those_of_the_gaussian_with_that_covariance(n, dim, alpha, sigma):
    rows = rows_of(n, dim)
    wiener = Wiener(rows, np.ones(n))
    x0, eps = torch.from_numpy(rows_of(20, dim)), torch.from_numpy(np.random.default_rng(5).standard_normal((20, dim)))
    scales = (torch.full((20,), value, dtype=torch.float64) for value in (alpha, sigma))
    found = wiener.losses(x0, eps, *scales, (0.0, 0.2))
    for share, losses in zip((0.0, 0.2), found, strict=True):
        covariance = shrunk_covariance(np.cov(rows, rowvar=False, ddof=0), share)
        expected = gaussian_losses(rows.mean(0), covariance, x0, eps, alpha, sigma)
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-9)


def test_repeated_rows_are_rows_with_counts():
    rows, counts = rows_of(10, 4), np.arange(1, 11)
    whole, counted = Wiener(np.repeat(rows, counts, axis=0), np.ones(counts.sum())), Wiener(rows, counts)
    np.testing.assert_allclose(counted.eigenvalues, whole.eigenvalues, rtol=1e-9)


def test_few_samples_of_many_dimensions_do_not_make_a_floor_that_is_worse_than_none(tmp_path):
    rng = np.random.default_rng(0)
    spectrum = np.linspace(0.2, 1.0, 128)
    np.save(tmp_path / "few.npy", (rng.standard_normal((125, 128)) * spectrum).astype(np.float32))
    data, process = load_dataset(tmp_path / "few.npy"), get_process("vp-linear")
    floors, (task, *_) = Floors(data, process), make_tasks(process, 20)
    draws = task_draws(data, task, 64)
    alpha, sigma = (torch.from_numpy(a)[draws.t] for a in (process.alpha, process.sigma))
    (plain,) = floors.linear.losses(draws.x0, draws.eps, alpha, sigma)
    zero = data.dim
    assert float(plain.mean()) > zero > floors.linear_losses(draws).mean()


def test_many_samples_are_decomposed_in_part(tmp_path, monkeypatch):
    data = load_dataset("digits")
    monkeypatch.setattr(heldout, "DECOMPOSED", 100 * data.dim**2)
    monkeypatch.setattr(heldout, "LEAST_DECOMPOSED", 10)
    few = Floors(data, get_process("vp-linear")).linear
    rows = data.train.flatten(1).double().numpy()
    spread = np.linspace(0, len(rows) - 1, 100).astype(int)
    np.testing.assert_allclose(few.eigenvalues, Wiener(rows[spread], np.ones(100)).eigenvalues, rtol=0.02, atol=1e-6)


def test_few_white_samples_are_no_reason_to_be_worse_than_a_multiple_of_the_input(tmp_path):
    np.save(tmp_path / "few.npy", np.random.default_rng(1).standard_normal((60, 256)).astype(np.float32))
    data, process = load_dataset(tmp_path / "few.npy"), get_process("vp-linear")
    for task in make_tasks(process, 4):
        draws = task_draws(data, task, 64)
        sigma = torch.from_numpy(process.sigma)[draws.t][:, None]
        alpha = torch.from_numpy(process.alpha)[draws.t][:, None]
        multiple = (sigma * (alpha * draws.x0 + sigma * draws.eps) - draws.eps).square().sum(1).mean()
        assert Floors(data, process).linear_losses(draws).mean() < 1.05 * float(multiple)
