"""Experts: together or alone, at once or resumed, the numbers are the same."""

import dataclasses

import numpy as np
import pytest

from difficulty import heldout
from difficulty.datasets import load_dataset
from difficulty.errors import InputError
from difficulty.expert_plan import ExpertPlan, log_spaced_iterations
from difficulty.experts import train_experts
from difficulty.heldout import heldout_draws
from difficulty.process import get_process
from difficulty.tasks import make_tasks

PROCESS = get_process("vp-linear")
TASKS = make_tasks(PROCESS, 4)
PLAN = ExpertPlan(network="mlp:width=16", seeds=(0, 1), budget=20, batch=16, heldout_draws=40)
GRID = load_dataset("grid-2d:n=200")


def close(first, second):
    np.testing.assert_allclose(first.losses, second.losses, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "network", "engines"),
    [
        ("grid-2d:n=200", "mlp:width=16", ("batched", "vmap")),
        ("digits", "mlp:width=16", ("batched",)),
        ("digits", "unet:width=8", ("vmap",)),
        ("digits", "dit:width=16,depth=2", ("batched",)),
    ],
)
def test_experts_trained_together_equal_experts_trained_one_by_one(data, network, engines):
    plan = dataclasses.replace(PLAN, network=network, seeds=(0,))
    loop, *others = (
        train_experts(load_dataset(data), PROCESS, TASKS[:2], dataclasses.replace(plan, engine=engine))
        for engine in ("loop", *engines)
    )
    for other in others:
        close(loop, other)


def test_an_expert_does_not_depend_on_its_company():
    together = train_experts(GRID, PROCESS, TASKS, PLAN)
    for k, task in enumerate(TASKS):
        for s, seed in enumerate(PLAN.seeds):
            alone = train_experts(GRID, PROCESS, [task], dataclasses.replace(PLAN, seeds=(seed,)))
            np.testing.assert_allclose(alone.losses[0, 0], together.losses[s, k], rtol=2e-4, atol=1e-5)


def test_the_same_plan_gives_the_same_numbers():
    first, second = (train_experts(GRID, PROCESS, TASKS, PLAN) for _ in range(2))
    np.testing.assert_array_equal(first.losses, second.losses)


class Stop(Exception):
    pass


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path):
    whole = train_experts(GRID, PROCESS, TASKS, PLAN)

    def stop_at(step):
        def progress(done, total):
            if done == step:
                raise Stop

        return progress

    state = tmp_path / "state.safetensors"
    for step in (7, 23):
        with pytest.raises(Stop):
            train_experts(GRID, PROCESS, TASKS, PLAN, resume_from=state, progress=stop_at(step))
    resumed = train_experts(GRID, PROCESS, TASKS, PLAN, resume_from=state)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    np.testing.assert_array_equal(resumed.excess, whole.excess)


def test_a_state_of_another_run_or_a_truncated_one_is_refused(tmp_path):
    state = tmp_path / "state.safetensors"
    train_experts(GRID, PROCESS, TASKS, PLAN, resume_from=state)
    with pytest.raises(InputError, match="other settings"):
        train_experts(GRID, PROCESS, TASKS, dataclasses.replace(PLAN, learning_rate=0.1), resume_from=state)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match="not readable"):
        train_experts(GRID, PROCESS, TASKS, PLAN, resume_from=state)


def test_experts_of_gaussian_data_reach_the_bayes_loss():
    # The best denoiser of isotropic Gaussian data is a multiple of the input, which the baseline already is.
    data = load_dataset("gaussian:dim=3,var=0.25,n=4000")
    curves = train_experts(data, PROCESS, TASKS, PLAN)
    assert curves.excess is not None
    assert curves.floor_is_exact
    assert (curves.excess[:, :, 0].mean(-1) < 1e-3).all()


def test_without_an_exact_law_the_floor_is_a_gaussian_denoiser():
    curves = train_experts(load_dataset("digits"), PROCESS, TASKS[:1], dataclasses.replace(PLAN, seeds=(0,)))
    assert curves.excess is None
    assert not curves.floor_is_exact
    assert curves.floor.mean() < curves.losses[0, 0, 0].mean()


def test_heldout_draws_cover_a_task_evenly_and_do_not_depend_on_other_tasks():
    draws = heldout_draws(GRID, TASKS, 250)
    alone = heldout_draws(GRID, TASKS[2:3], 250)
    assert (draws.t[2] == alone.t[0]).all()
    assert (draws.eps[2] == alone.eps[0]).all()
    for k, task in enumerate(TASKS):
        # As many draws as timesteps: each timestep once.
        assert sorted(draws.t[k].tolist()) == list(range(task.first, task.last + 1))


def test_checkpoints_are_log_spaced_up_to_the_budget():
    iterations = np.array(log_spaced_iterations(2000))
    assert iterations[-1] == 2000
    steps = np.diff(np.log(iterations))
    assert steps.max() < 1.3 * np.median(steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 10}, "ends before"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (1, 1)}, "different"),
        ({"batch": 0}, "batch must be positive"),
        ({"engine": "magic"}, "known are batched, vmap, loop"),
    ],
)
def test_plans_that_cannot_be_carried_out_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PLAN, **change)


@pytest.mark.parametrize(
    ("network", "message"),
    [("unet", "needs images"), ("cnn", "known are mlp, unet, dit"), ("mlp:size=3", "width, depth")],
)
def test_networks_that_do_not_fit_are_refused(network, message):
    with pytest.raises(InputError, match=message):
        train_experts(GRID, PROCESS, TASKS, dataclasses.replace(PLAN, network=network))


@pytest.mark.parametrize("start", ["shared", "neighbour"])
def test_warm_experts_start_better_than_cold_ones(start):
    data = load_dataset("digits-mixture:n=500")
    plan = dataclasses.replace(PLAN, network="mlp:width=64", budget=60, batch=32, learning_rate=3e-3)
    cold, warm = (train_experts(data, PROCESS, TASKS, dataclasses.replace(plan, start=s)) for s in ("cold", start))
    # The noisiest task has no neighbour to start from.
    first = slice(0, 3) if start == "neighbour" else slice(0, 4)
    assert (warm.losses[:, first, 0].mean((0, -1)) < cold.losses[:, first, 0].mean((0, -1))).all()
    np.testing.assert_array_equal(warm.zero, cold.zero)
    np.testing.assert_allclose(cold.losses[0, :, 0], cold.zero, rtol=1e-5)


@pytest.mark.parametrize("start", ["shared", "neighbour"])
def test_an_interrupted_warm_run_resumes_bit_for_bit(tmp_path, start):
    plan = dataclasses.replace(PLAN, start=start)
    whole = train_experts(GRID, PROCESS, TASKS, plan)

    def stop(done, total):
        if done == 0.6 * total:
            raise Stop

    with pytest.raises(Stop):
        train_experts(GRID, PROCESS, TASKS, plan, resume_from=tmp_path / "state.safetensors", progress=stop)
    resumed = train_experts(GRID, PROCESS, TASKS, plan, resume_from=tmp_path / "state.safetensors")
    np.testing.assert_array_equal(resumed.losses, whole.losses)


@pytest.mark.parametrize("start", ["cold", "neighbour"])
def test_every_checkpoint_is_shown_with_its_tasks(start):
    seen = []
    plan = dataclasses.replace(PLAN, start=start)
    train_experts(
        GRID, PROCESS, TASKS, plan, watch=lambda done, tasks, bank: seen.append((done, [t.index for t in tasks]))
    )
    company = [[3], [2], [1], [0]] if start == "neighbour" else [[0, 1, 2, 3]]
    assert seen == [(iteration, tasks) for tasks in company for iteration in plan.iterations]


def test_networks_whose_buffers_differ_between_seeds_are_refused(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "import torch\n"
        "class Features(torch.nn.Linear):\n"
        "    def __init__(self, shape):\n"
        "        super().__init__(shape[0], shape[0])\n"
        "        self.register_buffer('scale', torch.randn(shape[0]))\n"
        "    def forward(self, x, log_snr):\n"
        "        return super().forward(self.scale * x)\n"
    )
    plan = dataclasses.replace(PLAN, network=f"{file}:Features", seeds=(0, 1))
    with pytest.raises(InputError, match=r"buffer 'network.scale' .* differs between seeds"):
        train_experts(GRID, PROCESS, TASKS, plan)
    train_experts(GRID, PROCESS, TASKS, dataclasses.replace(plan, seeds=(1,)))


def test_of_an_exact_law_the_zero_networks_excess_is_as_free_of_noise_as_the_experts():
    curves = train_experts(GRID, PROCESS, TASKS, PLAN)
    # The mlp starts by giving zero.
    np.testing.assert_allclose(curves.excess[0, :, 0], curves.zero_excess, rtol=1e-3, atol=1e-9)
    assert train_experts(load_dataset("digits"), PROCESS, TASKS[:1], PLAN).zero_excess is None


def test_one_draw_has_no_standard_error():
    with pytest.raises(InputError, match="at least 2"):
        dataclasses.replace(PLAN, heldout_draws=1)


def test_draws_that_do_not_fit_in_memory_are_refused(monkeypatch):
    # Data, noise and posterior mean of 40 draws in 2 dimensions, for each of four tasks.
    needed = 3 * 40 * 2 * 4 * len(TASKS)
    monkeypatch.setattr(heldout, "free_bytes", lambda device: int(needed / heldout.DRAWS_SHARE) - 2)
    with pytest.raises(InputError, match=r"40 held-out draws for each of 4 tasks in 2 dimensions need .* GiB"):
        train_experts(GRID, PROCESS, TASKS, PLAN)
    train_experts(GRID, PROCESS, TASKS, dataclasses.replace(PLAN, heldout_draws=39))
