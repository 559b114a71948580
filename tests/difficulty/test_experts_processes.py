"""Experts shared among processes and over rounds: the numbers are those of one process."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from difficulty import engines, ranks
from difficulty.convergence import convergence_table
from difficulty.datasets import load_dataset
from difficulty.errors import InputError
from difficulty.expert_plan import ExpertPlan
from difficulty.experts import train_experts
from difficulty.losses import loss_table
from difficulty.measurement import measure
from difficulty.process import get_process
from difficulty.records import read_json
from difficulty.tasks import Task, make_tasks

PROCESS = get_process("vp-linear:T=50")
TASKS = make_tasks(PROCESS, 3)
PLAN = ExpertPlan(network="mlp:width=16", seeds=(0, 1), budget=20, batch=16, heldout_draws=40)
GRID = load_dataset("grid-2d:n=200")
WIDE = """
import torch

class Wide(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.layer = torch.nn.Linear(shape[0], 7)

    def forward(self, x, log_snr):
        return self.layer(x)
"""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="gloo rendezvous on the loopback")


def close(first, second):
    np.testing.assert_allclose(first.losses, second.losses, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(first.excess, second.excess, rtol=2e-3, atol=1e-5)
    np.testing.assert_array_equal(first.floor, second.floor)
    np.testing.assert_array_equal(first.zero, second.zero)


class Stop(Exception):
    pass


def stop_at(step):
    def progress(done, total):
        if done == step:
            raise Stop

    return progress


@LINUX
def test_two_processes_give_the_numbers_of_one_which_can_finish_what_they_began(tmp_path):
    whole = train_experts(GRID, PROCESS, TASKS, PLAN)
    state = tmp_path / "state.safetensors"
    with pytest.raises(Stop):
        train_experts(GRID, PROCESS, TASKS, PLAN, processes=2, resume_from=state, progress=stop_at(17))
    assert state.exists()
    close(train_experts(GRID, PROCESS, TASKS, PLAN, processes=1, resume_from=state), whole)
    both = train_experts(GRID, PROCESS, TASKS, PLAN, processes=2)
    close(both, whole)
    assert both.engine.processes == 2


@LINUX
@pytest.mark.parametrize("broken", ["raise SystemExit(1)", ranks.HELPER])
def test_a_helper_that_ends_before_its_time_ends_the_run(monkeypatch, broken):
    monkeypatch.setattr(ranks, "HELPER", broken)
    # The helper cannot do this job: Ranks have no length.
    with pytest.raises(RuntimeError), ranks.helpers(2, len) as team:
        team.gather(0)


@LINUX
def test_torchrun_writes_the_measurement_of_one_process(tmp_path):
    plan = dataclasses.replace(PLAN, seeds=(0,), start="neighbour", heldout_draws=1024)
    measure("grid-2d:n=200", PROCESS, out=tmp_path / "one", tasks=3, measures=["convergence"], plan=plan)
    # Without -- torchrun takes --start for an option of its own.
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "difficulty", "measure"]
    command += ["grid-2d:n=200", "--process", "vp-linear:T=50", "--tasks", "3", "--budget", "20", "--batch", "16"]
    command += ["--seeds", "1", "--network", "mlp:width=16", "--measures", "convergence", "--start", "neighbour"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--out", str(tmp_path / "two"), "--json"],
        capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measures"]  # one ranking, of rank 0 alone
    one, two = (pd.read_csv(tmp_path / name / "losses.csv") for name in ("one", "two"))
    np.testing.assert_allclose(one["heldout_loss"], two["heldout_loss"], rtol=1e-5)
    assert read_json(tmp_path / "two" / "run.json")["engine"]["processes"] == 2
    assert not list((tmp_path / "two").glob("*.partial*"))


def room_for(experts, monkeypatch):
    state, activations = 16 * 1426, 41984
    free = int(((experts + 0.5) * state + activations) / engines.MEMORY_SHARE)
    monkeypatch.setattr(engines, "free_bytes", lambda device: free)


@pytest.mark.parametrize(("start", "later"), [("cold", 3), ("cold", 6), ("shared", 4), ("neighbour", 6)])
def test_rounds_of_few_experts_give_the_numbers_of_all_at_once_and_resume(tmp_path, monkeypatch, start, later):
    plan = dataclasses.replace(PLAN, start=start)
    whole = train_experts(GRID, PROCESS, TASKS, plan)
    assert whole.engine.at_once == 6
    room_for(3, monkeypatch)  # of two seeds: a task at a time
    path = tmp_path / "state.safetensors"
    with pytest.raises(Stop):
        train_experts(GRID, PROCESS, TASKS, plan, resume_from=path, progress=stop_at(60))
    assert len(list(tmp_path.iterdir())) == 2
    room_for(1, monkeypatch)
    with pytest.raises(InputError, match="begun with 2 experts at a time, and only 1 fit in memory now"):
        train_experts(GRID, PROCESS, TASKS, plan, resume_from=path)
    room_for(later, monkeypatch)  # of which a run that goes on makes no use, or its rounds would be others
    seen = []
    parts = train_experts(GRID, PROCESS, TASKS, plan, resume_from=path, progress=lambda done, total: seen.append(done))
    assert seen[0] > 40  # the first round is not trained again
    assert parts.engine.at_once == later
    close(parts, whole)
    assert len(list(tmp_path.iterdir())) == len(TASKS)  # one for each round, left to the caller


@pytest.mark.parametrize(
    ("tasks", "message"),
    [([], "no task"), ([Task(0, 5, 4, 1.0, 1.0)], "task 0 holds no timesteps"), ([Task(0, 5, 90, 1.0, 1.0)], "1..50")],
)
@pytest.mark.parametrize("engine", ["auto", *engines.ENGINES])
def test_empty_tasks_are_refused(tasks, message, engine):
    with pytest.raises(InputError, match=message):
        train_experts(GRID, PROCESS, tasks, dataclasses.replace(PLAN, engine=engine))


@pytest.mark.parametrize("engine", ["auto", *engines.ENGINES])
def test_a_network_of_the_wrong_output_shape_is_refused(tmp_path, engine):
    (tmp_path / "own.py").write_text(WIDE)
    plan = dataclasses.replace(PLAN, engine=engine, network=f"{tmp_path / 'own.py'}:Wide")
    with pytest.raises(InputError, match=r"maps x of shape \(2, 2\) to \(2, 7\)"):
        train_experts(GRID, PROCESS, TASKS, plan)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_experts_that_diverge_have_no_finite_loss_and_are_reported(engine):
    plan = dataclasses.replace(PLAN, engine=engine, learning_rate=1e18, seeds=(0,))
    curves = train_experts(GRID, PROCESS, TASKS, plan)
    assert not np.isfinite(curves.losses[:, :, -1]).all()
    table = convergence_table(loss_table(curves, plan.seeds, plan.batch), plan.budget)
    assert table.loc[table["definition"] == "paper_style", "censored"].all()


def test_experts_are_watched_in_one_process_only():
    with pytest.raises(InputError, match="judged in one process"):
        train_experts(GRID, PROCESS, TASKS, PLAN, processes=2, watch=lambda *seen: None)


def test_an_interrupted_measurement_is_refused_with_other_settings_before_anything_changes(tmp_path):
    def progress(stage, done, total):
        if done == 20:
            raise Stop

    settings = {"out": tmp_path, "tasks": 3, "measures": ["convergence"], "progress": progress}
    with pytest.raises(Stop):
        measure(GRID, PROCESS, plan=PLAN, **settings)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="interrupted run with other settings"):
        measure(GRID, PROCESS, plan=dataclasses.replace(PLAN, learning_rate=0.1), **settings)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@LINUX
def test_a_process_with_a_closed_form_can_be_handed_to_helpers():
    process = get_process("flow-matching:T=50")
    assert process.closed_form is not None
    tasks = make_tasks(process, 2)
    close(train_experts(GRID, process, tasks, PLAN, processes=2), train_experts(GRID, process, tasks, PLAN))
