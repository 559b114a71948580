"""The probe during a run is the probe of its checkpoints, and goes on where an interrupted run goes on."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from difficulty.datasets import load_dataset
from difficulty.errors import InputError
from difficulty.probe import PROBE_COLUMNS, probe
from difficulty.process import get_process
from training.plots import probe_curves
from training.probing import ProbeLog
from training.run import Cadence, train
from training.trainer import TrainPlan

DATA = load_dataset("gaussian:dim=3,var=0.25,n=100")
PROCESS = get_process("vp-linear")
PLAN = TrainPlan(steps=8, batch=8, network="mlp:width=8")
CADENCE = Cadence(evaluate=0, checkpoint=2, sample=0)


class Stop(Exception):
    pass


def run(out, stop_at=None):
    log = ProbeLog(DATA, PROCESS, PLAN, out, 3)

    def watch(trainer, loss):
        if trainer.done == stop_at:
            raise Stop
        log(trainer)

    return train(DATA, PROCESS, PLAN, out, cadence=CADENCE, watch=watch)


def test_the_last_probe_of_a_run_is_the_probe_of_the_finished_run(tmp_path):
    run(tmp_path / "run")
    logged = pd.read_csv(tmp_path / "run" / "probe.csv")
    assert list(logged.columns) == ["step", "samples", *PROBE_COLUMNS]
    assert logged.groupby("step").size().to_dict() == {3: 20, 6: 20, 8: 20}
    assert (logged["samples"] == 8 * logged["step"]).all()
    found = probe(tmp_path / "run", DATA, out=tmp_path / "probe").table
    for column in ("heldout_loss", "floor", "excess_nats", "excess_se"):
        np.testing.assert_allclose(logged.loc[logged["step"] == 8, column], found[column], rtol=1e-5)
    assert (logged["floor_kind"] == "exact").all()
    axes = probe_curves(tmp_path / "run").axes[0]
    assert len(axes.lines) == 20
    assert "Bayes loss" in axes.get_ylabel()


def test_an_interrupted_run_continues_its_probe(tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "parts", stop_at=7)
    run(tmp_path / "parts")
    whole, parts = (pd.read_csv(tmp_path / name / "probe.csv") for name in ("whole", "parts"))
    pd.testing.assert_frame_equal(whole, parts)


def test_a_process_of_few_timesteps_has_a_task_for_each(tmp_path):
    process = get_process("edm:T=12")
    log = ProbeLog(DATA, process, PLAN, tmp_path, 8)
    train(DATA, process, PLAN, tmp_path, cadence=CADENCE, watch=lambda trainer, loss: log(trainer))
    assert len(pd.read_csv(tmp_path / "probe.csv")) == 12


def test_what_cannot_be_probed_is_refused(tmp_path):
    with pytest.raises(InputError, match="unconditional"):
        ProbeLog(DATA, PROCESS, dataclasses.replace(PLAN, condition="class"), tmp_path, 3)
    with pytest.raises(InputError, match="at least 1"):
        ProbeLog(DATA, PROCESS, PLAN, tmp_path, 0)
    with pytest.raises(InputError, match="known exactly"):
        ProbeLog(DATA, PROCESS, PLAN, tmp_path, 3, tmp_path)
