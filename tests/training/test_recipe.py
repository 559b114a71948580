import numpy as np
import pytest

from difficulty.errors import InputError
from difficulty.process import get_process
from training.density import density, log_snr_widths, task_masses
from training.recipe import DESIGNS, measured_recipe
from training.timesteps import TimestepSampler


@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_keeps_all_t_in_training_and_ends_under_the_target_density(ranking, process, design):
    recipe = measured_recipe(ranking, process, design)
    densities = recipe.base_densities(process)
    target = density("uniform", process)
    start, last = densities[-1]
    assert 0.5 <= start <= 0.9
    tasks = ranking.tasks
    assert np.allclose(task_masses(last, tasks), task_masses(target, tasks), atol=0.01)
    for _, p in densities:
        # the guard: no task loses more than three quarters of its samples
        assert (task_masses(p, tasks) >= 0.2499 * task_masses(target, tasks)).all()
    sampler = TimestepSampler(process, recipe, budget=100)
    for step in range(100):
        sampler.sample(4, step=step)
    assert [record.start for record in sampler.log() if "density" in record.reason] or len(densities) == 1
    assert sampler.stage == sampler.stages - 1
    assert (sampler.stages > 1) == (design == "ordered")


def test_half_is_the_mixture_of_uniform_and_measured_nats_by_hand(ranking, process):
    cells = np.concatenate([[0.0], log_snr_widths(process)])
    widths = np.array([cells[task.t_first : task.t_last + 1].sum() for task in ranking.tasks])
    nats = np.array(ranking.measures["excess_nats"].value) * widths
    expected = 0.5 / 8 + 0.5 * nats / nats.sum()
    (_, early), (start, late) = measured_recipe(ranking, process, "half").base_densities(process)
    assert start == 0.5
    assert np.allclose(task_masses(early, ranking.tasks), expected)
    assert np.allclose(late, density("uniform", process))


def test_guarded_leaves_the_noisy_tasks_three_quarters_of_their_samples(ranking, process):
    _, early = measured_recipe(ranking, process, "guarded").base_densities(process)[0]
    noisy = np.array([False] * 4 + [True] * 4)
    masses = task_masses(early, ranking.tasks)
    assert (masses[noisy] >= 0.7499 / 8).all()
    assert masses.sum() == pytest.approx(1)


def test_a_task_that_was_not_learned_counts_as_the_hardest(ranking, process):
    measure = ranking.measures["excess_nats"]
    unknown = measure.model_copy(update={"value": [None, *measure.value[1:]]})
    highest = measure.model_copy(update={"value": [max(measure.value[1:]), *measure.value[1:]]})
    recipes = [
        measured_recipe(ranking.model_copy(update={"measures": {"excess_nats": own}}), process, "half").density
        for own in (unknown, highest)
    ]
    assert recipes[0] == recipes[1]


def test_recipe_refuses_what_it_cannot_use(ranking, process):
    with pytest.raises(InputError, match="unknown design"):
        measured_recipe(ranking, process, "best")
    with pytest.raises(InputError, match="unknown measure"):
        measured_recipe(ranking.model_copy(update={"measures": {}}), process)
    with pytest.raises(InputError):
        measured_recipe(ranking, get_process("vp-cosine:T=80"))
