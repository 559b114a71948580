import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from difficulty.denoiser import Denoiser
from difficulty.errors import InputError
from difficulty.laws import GaussianMixture
from difficulty.process import PROCESSES, get_process
from difficulty.randomness import normal
from training.sampling import SAMPLERS, draw_samples, sampling_grid
from training.streams import PRIOR

VARIANCE = 0.25
# W2 of 2000 samples to the law of ExactMixture: the largest of 300 sets drawn from the law itself. A Gaussian of the
# same mean and variance is at 0.118.
WASSERSTEIN_FLOOR = 0.047
DIFFUSERS = ("dpm-solver++",)  # samplers that need diffusers


class ExactGaussian:
    """The posterior mean of data N(0, VARIANCE I) under any process."""

    prediction = "v"

    def __init__(self, process):
        self.process = process

    def x0(self, x_t, t):
        return self.gain(int(t[0])) * x_t

    def gain(self, t):
        alpha, sigma = self.process.alpha[t], self.process.sigma[t]
        return float(alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2))

    def flow(self, start, x):
        """Where the probability flow takes x from ``start`` to t = 1, and the last step from there to the mean."""
        variance = self.process.alpha**2 * VARIANCE + self.process.sigma**2
        return self.gain(1) * np.sqrt(variance[1] / variance[start]) * x


class ExactMixture:
    """The posterior mean of two overlapping modes of unequal weight on a line, skewed and not Gaussian."""

    prediction = "v"
    law = GaussianMixture([0.3, 0.7], [[-0.5], [0.5]], [[[0.04]], [[0.09]]])

    def __init__(self, process):
        self.process = process

    def x0(self, x_t, t):
        alpha, sigma = self.process.alpha[int(t[0])], self.process.sigma[int(t[0])]
        return self.law.posterior_mean(x_t.double(), alpha, sigma).float()


@pytest.fixture(params=SAMPLERS)
def method(request):
    if request.param in DIFFUSERS:
        pytest.importorskip("diffusers")
    return request.param


@pytest.mark.parametrize("name", PROCESSES)
def test_exact_denoiser_yields_samples_of_the_right_variance_on_every_process(name, method):
    steps = 500 if method.endswith("heun") else 1000
    samples = draw_samples(ExactGaussian(get_process(name)), 4000, (2,), seed=0, method=method, steps=steps)
    assert float(samples.var()) == pytest.approx(VARIANCE, rel=0.08)
    assert abs(float(samples.mean())) < 0.03


ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "edm-heun": 2, "dpm-solver++": 2}


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("solver", ORDERS)
def test_error_against_the_exact_probability_flow_falls_with_the_order_of_the_sampler(solver, name):
    if solver in DIFFUSERS:
        pytest.importorskip("diffusers")
    process = get_process(f"{name}:T=961")  # 960 = 32 * 30 = 64 * 15, so that equal steps need no rounding
    denoiser, errors = ExactGaussian(process), []
    for steps in (33, 65):
        start = sampling_grid(process, steps, "v", solver)[0]
        noise = process.sigma[start] * normal((200, 2), 0, PRIOR, 0, 0).double()
        found = draw_samples(denoiser, 200, (2,), seed=0, method=solver, steps=steps).double()
        errors.append(float((found - denoiser.flow(start, noise)).square().mean().sqrt()))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[solver], abs=0.25)


def test_every_sampler_has_an_order_that_is_tested_or_is_stochastic():
    assert set(SAMPLERS) - set(ORDERS) == {"ancestral"}


@pytest.mark.parametrize("name", ["vp-cosine", "edm", "flow-matching"])
def test_samples_of_a_mixture_with_its_exact_denoiser_are_near_the_law_in_wasserstein_distance(method, name):
    n = 2000
    samples = draw_samples(ExactMixture(get_process(name)), n, (1,), seed=1, method=method, steps=100)
    law = ExactMixture.law.sample(20 * n, torch.Generator().manual_seed(0)).flatten().sort().values[10::20]
    distance = float((samples.double().flatten().sort().values - law).square().mean().sqrt())
    assert distance < WASSERSTEIN_FLOOR


def test_ddim_is_eulers_step_of_edm():
    process = get_process("edm")
    denoiser = ExactGaussian(process)
    found = draw_samples(denoiser, 10, (3,), seed=4, method="ddim", steps=8)
    grid = sampling_grid(process, 8, "v")
    x = normal((10, 3), 4, PRIOR, 0, 0) * process.sigma[grid[0]]
    for t, s in pairwise(grid):
        slope = (x - denoiser.x0(x, torch.full((10,), t))) / process.sigma[t]  # Karras et al. 2022, algorithm 1
        x = x + (process.sigma[s] - process.sigma[t]) * slope
    assert torch.allclose(found, x.float(), atol=1e-4)


def test_samples_depend_on_the_seed_alone(method):
    denoiser = ExactGaussian(get_process("vp-linear"))
    first = draw_samples(denoiser, 5, (2,), seed=1, method=method, steps=10)
    torch.rand(3)
    assert torch.equal(first, draw_samples(denoiser, 5, (2,), seed=1, method=method, steps=10))
    assert not torch.equal(first, draw_samples(denoiser, 5, (2,), seed=2, method=method, steps=10))


def test_edm_heun_on_edm_is_algorithm_1_of_karras_on_their_grid():
    process, steps = get_process("edm"), 28  # 27 divides 999
    denoiser = ExactGaussian(process)
    i = np.arange(steps)
    sigma = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # eq. 5
    grid = sampling_grid(process, steps, "edm", "edm-heun")
    assert np.allclose(process.sigma[grid[:-1]], sigma, rtol=1e-9)
    x = sigma[0] * normal((10, 3), 4, PRIOR, 0, 0).double()
    gain = VARIANCE / (VARIANCE + sigma**2)
    for n in range(steps):
        after = sigma[n + 1] if n + 1 < steps else 0.0
        d = (x - gain[n] * x) / sigma[n]
        euler = x + (after - sigma[n]) * d
        x = x + (after - sigma[n]) * 0.5 * (d + (euler - gain[n + 1] * euler) / after) if after else euler
    found = draw_samples(denoiser, 10, (3,), seed=4, method="edm-heun", steps=steps)
    assert torch.allclose(found, x.float(), atol=1e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_karras_grid_has_rho_seven_between_the_ends_of_every_process(name):
    process = get_process(name)
    grid = sampling_grid(process, 12, "v", "edm-heun")[:-1]
    scale = process.sigma / np.maximum(process.alpha, 1e-300)
    even = np.linspace(scale[grid[0]] ** (1 / 7), scale[1] ** (1 / 7), 12) ** 7
    start = grid[0]
    low, high = (scale[np.clip(np.array(grid) + shift, 1, start)] for shift in (-1, 1))
    inside = (even[:, None] >= low * (1 - 1e-9)) & (even[:, None] <= high * (1 + 1e-9))
    assert inside.any(1).all()  # every point of the ideal grid is less than a timestep from one of ours
    assert inside.any(0).all()


def test_euler_of_the_velocity_of_a_flow():
    process = get_process("flow-matching")
    denoiser = ExactGaussian(process)
    found = draw_samples(denoiser, 10, (3,), seed=4, method="euler", steps=10)
    x = normal((10, 3), 4, PRIOR, 0, 0).double()
    grid = sampling_grid(process, 10, "velocity")
    for t, s in pairwise(grid):
        x0 = denoiser.gain(t) * x
        velocity = (x - process.alpha[t] * x0) / process.sigma[t] - x0
        x = x + (s - t) / process.T * velocity
    assert torch.allclose(found, x.float(), atol=1e-5)


def test_dpm_solver_without_diffusers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"install denoising-difficulty\[diffusers\]"):
        draw_samples(ExactGaussian(get_process("edm")), 5, (2,), seed=1, method="dpm-solver++", steps=4)


@pytest.mark.parametrize("solver", ["edm-heun", "dpm-solver++"])
def test_what_divides_by_alpha_starts_below_the_timestep_without_signal(solver):
    assert sampling_grid(get_process("flow-matching"), 10, "velocity", solver)[0] == 999
    assert sampling_grid(get_process("edm"), 10, "velocity", solver)[0] == 1000


def test_prediction_of_eps_starts_below_the_timestep_without_signal():
    process = get_process("flow-matching")
    assert sampling_grid(process, 10, "velocity")[0] == 1000
    assert sampling_grid(process, 10, "eps")[0] == 999
    assert np.all(np.diff(sampling_grid(process, 10, "eps")) < 0)


def test_the_output_of_edm_is_read_at_the_timestep_without_signal():
    process = get_process("flow-matching")
    assert sampling_grid(process, 10, "edm")[0] == 1000
    # Where alpha = 0 x0 is data_std times the output, here 1, whatever x is.
    denoiser = Denoiser(lambda x, log_snr: torch.ones_like(x), process, "edm", 0.5, baseline=False)
    x = normal((10, 3), 4, PRIOR, 0, 0)
    assert torch.allclose(denoiser.x0(x, torch.full((10,), 1000)), torch.full((10, 3), 0.5))


@pytest.mark.parametrize(("method", "steps"), [("dpm", 10), ("ddim", 0), ("ddim", 1001)])
def test_unknown_samplers_and_impossible_numbers_of_steps_are_refused(method, steps):
    with pytest.raises(InputError):
        draw_samples(ExactGaussian(get_process("vp-linear")), 5, (2,), seed=1, method=method, steps=steps)
