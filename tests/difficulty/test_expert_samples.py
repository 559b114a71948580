"""Samples with one expert each: against exact denoisers, and whatever the company of an expert."""

import dataclasses
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from difficulty.datasets import load_dataset
from difficulty.engines import Bank
from difficulty.errors import InputError
from difficulty.expert_plan import ExpertPlan
from difficulty.expert_samples import QUALITY_COLUMNS, SampleQuality, _steps_in, quality_estimates
from difficulty.experts import build_expert, train_experts
from difficulty.measurement import measure
from difficulty.plots import sample_quality_figure
from difficulty.process import PROCESSES, get_process
from difficulty.records import read_json, read_table
from difficulty.tasks import GRIDS, make_tasks

PROCESS = get_process("vp-linear:T=100")
TASKS = make_tasks(PROCESS, 4)
PLAN = ExpertPlan(network="mlp:width=16", prediction="v", seeds=(0, 1), budget=20, batch=16, heldout_draws=40)
DATA = load_dataset("grid-2d:n=1200")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", PROCESSES)
def test_steps_lead_from_noise_through_every_task_to_clean_data(name, grid):
    process = get_process(name)
    chain = [_steps_in(task, process, 5) for task in reversed(make_tasks(process, 20, grid))]
    for earlier, later in pairwise(chain):
        assert earlier[-1] == later[0]
    joined = np.concatenate(chain)
    assert (np.diff(joined) <= 0).all()
    assert joined[0] == (process.T if process.alpha[-1] > 0 else process.T - 1)
    assert (joined == 0).sum() == 1
    assert joined[-1] == 0


def bank_of(weights, tasks):
    """Experts of given weights, one list of weights per seed."""
    experts = []
    for own, seed in zip(weights, PLAN.seeds, strict=True):
        for _ in range(tasks):
            experts.append(build_expert(DATA, PROCESS, PLAN, seed))
            experts[-1].load_state_dict(own, strict=False)
    return Bank(experts, "loop")


def test_an_expert_that_equals_the_shared_network_changes_no_sample():
    judge = SampleQuality(DATA, PROCESS, TASKS, PLAN)
    judge(0, TASKS, bank_of([judge.shared.weights(seed) for seed in (0, 1)], len(TASKS)))
    assert list(judge.table.columns) == list(QUALITY_COLUMNS)
    assert len(judge.table) == 2 * 2 * len(TASKS)
    np.testing.assert_allclose(judge.table["value"], judge.table["shared"], rtol=1e-3)
    assert judge.table.groupby("metric")["shared"].nunique().tolist() == [2, 2]  # seeds start from other noise


def test_experts_of_gaussian_data_sample_as_well_as_can_be_from_the_start():
    # The best denoiser of isotropic Gaussian data is a multiple of the input, which every expert starts as.
    data = load_dataset("gaussian:dim=3,var=0.25,n=4000")
    process = get_process("vp-linear")
    tasks = make_tasks(process, 4)
    judge = SampleQuality(data, process, tasks, PLAN)
    train_experts(data, process, tasks, PLAN, watch=judge)
    assert set(judge.table["iteration"]) >= {0, PLAN.budget, 2 * PLAN.budget}
    wasserstein = judge.table[judge.table["metric"] == "sw-pixels"]
    assert (wasserstein["value"] < 3 * wasserstein["perfect"]).all()
    assert (wasserstein["perfect"] < 0.05 * 0.5).all()  # a twentieth of the standard deviation


def test_a_task_is_judged_the_same_alone_and_in_company():
    together, alone = (SampleQuality(DATA, PROCESS, TASKS, PLAN) for _ in range(2))
    fresh = [build_expert(DATA, PROCESS, PLAN, seed).state_dict() for seed in PLAN.seeds]
    together(0, TASKS, bank_of(fresh, len(TASKS)))
    for task in reversed(TASKS):
        alone(0, [task], bank_of(fresh, 1))
    pd.testing.assert_frame_equal(together.table, alone.table, rtol=1e-4, check_dtype=False)
    # An untrained expert leaves its mark on the samples.
    assert (together.table["value"] != together.table["shared"]).any()


def test_a_checkpoint_seen_twice_counts_once():
    judge = SampleQuality(DATA, PROCESS, TASKS, PLAN)
    bank = bank_of([judge.shared.weights(seed) for seed in (0, 1)], len(TASKS))
    for iteration in (0, 20, 20, 40):
        judge(iteration, TASKS, bank)
    assert not judge.table.duplicated(["task", "seed", "iteration", "metric"]).any()
    assert sorted(judge.table["iteration"].unique()) == [0, 20, 40]
    judge(20, TASKS, bank)  # gone back to after an interruption: what came later will come again
    assert sorted(judge.table["iteration"].unique()) == [0, 20]
    judge(1, TASKS, bank)
    assert 1 not in judge.iterations or 1 in set(judge.table["iteration"])


class Stop(Exception):
    pass


def test_an_interrupted_measurement_of_samples_resumes_to_the_same_table(tmp_path, monkeypatch):
    monkeypatch.setattr("difficulty.expert_samples.SAMPLES", 100)
    monkeypatch.setattr("difficulty.expert_samples.STEPS", 9)

    def stop(stage, done, total):
        if stage == "experts" and done == 23:
            raise Stop

    common = {"tasks": 3, "measures": ["sample-quality"], "plan": PLAN}
    with pytest.raises(Stop):
        measure(DATA, PROCESS, out=tmp_path / "a", progress=stop, **common)
    assert read_json(tmp_path / "a" / "run.json")["status"] == "running"
    measure(DATA, PROCESS, out=tmp_path / "a", **common)
    found = measure(DATA, PROCESS, out=tmp_path / "b", **common)
    a, b = (read_table(tmp_path / name / "sample_quality.csv", QUALITY_COLUMNS) for name in "ab")
    pd.testing.assert_frame_equal(a, b)
    assert {"sample_quality", "excess_nats"} <= set(found.ranking.measures)
    assert found.ranking.measures["sample_quality"].unit == "iterations"
    panels = sample_quality_figure(tmp_path / "b").axes[:2]
    assert [len(panel.lines) for panel in panels] == [3 + 2, 3 + 2]  # tasks, shared network, perfect sampler


def quality_of(curves):
    iterations = np.unique(np.geomspace(1, 1000, 60).round())
    return pd.DataFrame(
        {
            "task": task, "seed": seed, "iteration": iteration, "samples": 1, "metric": "fd-pca",
            "value": 1.0 + curve(iteration), "shared": 1.2, "perfect": 1.0,
        }
        for task, curve in enumerate(curves)
        for seed in (0, 1, 2)
        for iteration in [0.0, *iterations]
    )  # fmt: skip


def test_the_measure_is_when_ninety_percent_of_the_fall_has_happened_and_silent_where_nothing_falls():
    curves = [lambda i: np.exp(-i / 100), lambda i: np.exp(-i / 30), lambda i: 1.0 - 0.001 * (i > 2)]
    found = quality_estimates(quality_of(curves), 1000, 3)["sample_quality"]
    np.testing.assert_allclose(found.value[:2], np.array([100, 30]) * np.log(10), rtol=0.03)
    assert np.isnan(found.centre[2])
    assert found.flagged.tolist() == [False, False, True]
    with pytest.raises(InputError, match="every task"):
        quality_estimates(quality_of(curves), 1000, 4)


def test_a_diverged_expert_is_flagged_and_has_no_place_among_the_quick_ones():
    judge = SampleQuality(DATA, PROCESS, TASKS, dataclasses.replace(PLAN, seeds=(0, 1)))
    weights = [judge.shared.weights(seed) for seed in (0, 1)]
    judge(0, TASKS, bank_of(weights, len(TASKS)))
    broken = {name: value * np.nan for name, value in weights[0].items()}
    judge(20, TASKS, bank_of([broken, weights[1]], len(TASKS)))
    assert np.isinf(judge.table[(judge.table["seed"] == 0) & (judge.table["iteration"] == 20)]["value"]).all()
    found = quality_estimates(judge.table, 20, len(TASKS))["sample_quality"]
    assert found.flagged.all()
    assert not found.learned.any()
    curves = [lambda i: np.exp(-i / 100), lambda i: np.exp(-i / 30) if i < 30 else np.inf, lambda i: np.exp(-i / 30)]
    assert quality_estimates(quality_of(curves), 1000, 3)["sample_quality"].order.tolist() == [2, 0, 1]
