from itertools import pairwise

import numpy as np
import pytest

from difficulty.errors import InputError
from difficulty.process import PROCESSES, get_process
from difficulty.ranking import RankingTask
from difficulty.tasks import make_tasks
from training.density import DENSITIES, density, from_task_masses, log_snr_widths, proportional_to, task_masses


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", DENSITIES)
def test_every_density_is_a_probability_that_trains_every_timestep_of_every_process(name, process):
    p = density(name, get_process(process))
    assert p[0] == 0
    assert p[1:].min() > 0
    assert p.sum() == pytest.approx(1, abs=1e-12)


def test_log_snr_density_gives_equal_probability_to_equal_ranges_of_log_snr():
    process = get_process("vp-linear")
    p = density("log-snr", process)
    log_snr = process.log_snr(np.arange(1, 1001))
    edges = np.linspace(log_snr[0], log_snr[-1], 6)
    mass = [p[1:][(log_snr <= high) & (log_snr > low)].sum() for high, low in pairwise(edges)]
    assert np.allclose(mass, 0.2, atol=0.02)


def test_log_snr_widths_add_up_to_the_range_of_log_snr():
    process = get_process("ve")
    assert log_snr_widths(process).sum() == pytest.approx(float(process.log_snr(1) - process.log_snr(1000)))


def test_log_normal_density_on_the_log_spaced_process_is_the_normal_density_of_log_sigma():
    process = get_process("ve")
    p = density("log-normal:mean=-1.2,std=1.2", process)[2:-1]  # the end cells are half as wide
    z = (np.log(process.sigma[2:-1]) + 1.2) / 1.2
    assert np.allclose(p / p.max(), np.exp(-0.5 * z**2) / np.exp(-0.5 * z**2).max(), rtol=1e-9)


def test_logit_normal_density_has_the_median_and_symmetry_of_its_formula():
    p = density("logit-normal:mean=0,std=1", get_process("flow-matching"))[1:]
    assert np.allclose(p, p[::-1], rtol=1e-9)
    shifted = density("logit-normal:mean=1,std=1", get_process("flow-matching"))
    # the median of u is the logistic function of the mean
    assert np.searchsorted(np.cumsum(shifted), 0.5) / 1000 == pytest.approx(1 / (1 + np.exp(-1)), abs=2e-3)


def test_cosine_map_density_integrates_to_one_as_its_paper_states():
    u = (np.arange(1, 1001) - 0.5) / 1000
    formula = 2 / (np.pi - 2 * np.pi * u + 2 * np.pi * u**2)
    assert formula.mean() == pytest.approx(1, abs=1e-6)
    assert np.allclose(density("cosine-map", get_process("flow-matching"))[1:], formula / 1000, rtol=1e-5)


def test_density_proportional_to_difficulty_keeps_its_uniform_share_everywhere():
    process = get_process("vp-linear:T=80")
    tasks = [RankingTask.of(task, process) for task in make_tasks(process, 4)]
    masses = proportional_to([0.0, 1.0, 3.0, None], tasks, uniform_share=0.5)
    assert sum(masses) == pytest.approx(1)
    assert masses[0] == pytest.approx(0.125)  # nothing but its uniform share
    assert masses[2] - masses[0] == pytest.approx(3 * (masses[1] - masses[0]))
    assert masses[3] == pytest.approx(masses[1])  # no value: the median of the others
    assert np.allclose(task_masses(from_task_masses(masses, tasks), tasks), masses)


@pytest.mark.parametrize("spec", ["gauss", "log-normal:mu=1", "log-normal:std=0", "uniform:x=1"])
def test_unknown_densities_and_options_are_refused(spec):
    with pytest.raises(InputError):
        density(spec, get_process("edm"))
