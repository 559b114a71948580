from itertools import pairwise

import numpy as np
import pytest
import torch

from difficulty.errors import InputError
from difficulty.process import PROCESSES, get_process
from training.sampling import SAMPLERS, draw_samples, sampling_grid

VARIANCE = 0.25


class ExactGaussian:
    """The posterior mean of data N(0, VARIANCE I) under any process."""

    prediction = "v"

    def __init__(self, process):
        self.process = process

    def x0(self, x_t, t):
        alpha, sigma = (torch.as_tensor(table[t.numpy()], dtype=torch.float32)[:, None]
                        for table in (self.process.alpha, self.process.sigma))  # fmt: skip
        return alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * x_t


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("method", SAMPLERS)
def test_exact_denoiser_yields_samples_of_the_right_variance_on_every_process(name, method):
    samples = draw_samples(
        ExactGaussian(get_process(name)), 4000, (2,), seed=0, method=method, steps=1000 if method != "heun" else 500
    )
    assert float(samples.var()) == pytest.approx(VARIANCE, rel=0.08)
    assert abs(float(samples.mean())) < 0.03


def test_heun_is_more_accurate_than_euler_at_the_same_steps():
    denoiser = ExactGaussian(get_process("edm"))
    error = {
        method: abs(float(draw_samples(denoiser, 4000, (2,), seed=0, method=method, steps=20).var()) - VARIANCE)
        for method in ("ddim", "heun")
    }
    reference = abs(float(draw_samples(denoiser, 4000, (2,), seed=0, method="heun", steps=500).var()) - VARIANCE)
    assert error["heun"] - reference < error["ddim"] - reference


def test_ddim_is_eulers_step_of_edm():
    process = get_process("edm")
    denoiser = ExactGaussian(process)
    found = draw_samples(denoiser, 10, (3,), seed=4, method="ddim", steps=8)
    grid = sampling_grid(process, 8, "v")
    from difficulty.randomness import normal
    from training.streams import PRIOR

    x = normal((10, 3), 4, PRIOR, 0, 0) * process.sigma[grid[0]]
    for t, s in pairwise(grid):
        slope = (x - denoiser.x0(x, torch.full((10,), t))) / process.sigma[t]  # Karras et al. 2022, algorithm 1
        x = x + (process.sigma[s] - process.sigma[t]) * slope
    assert torch.allclose(found, x.float(), atol=1e-4)


@pytest.mark.parametrize("method", SAMPLERS)
def test_samples_depend_on_the_seed_alone(method):
    denoiser = ExactGaussian(get_process("vp-linear"))
    first = draw_samples(denoiser, 5, (2,), seed=1, method=method, steps=10)
    torch.rand(3)
    assert torch.equal(first, draw_samples(denoiser, 5, (2,), seed=1, method=method, steps=10))
    assert not torch.equal(first, draw_samples(denoiser, 5, (2,), seed=2, method=method, steps=10))


def test_prediction_of_eps_starts_below_the_timestep_without_signal():
    process = get_process("flow-matching")
    assert sampling_grid(process, 10, "velocity")[0] == 1000
    assert sampling_grid(process, 10, "eps")[0] == 999
    assert np.all(np.diff(sampling_grid(process, 10, "eps")) < 0)


@pytest.mark.parametrize(("method", "steps"), [("dpm", 10), ("ddim", 0), ("ddim", 1001)])
def test_unknown_samplers_and_impossible_numbers_of_steps_are_refused(method, steps):
    with pytest.raises(InputError):
        draw_samples(ExactGaussian(get_process("vp-linear")), 5, (2,), seed=1, method=method, steps=steps)
