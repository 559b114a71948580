"""Difficulty does not depend on what the network predicts: the committed study, and the same live at a small scale."""

import importlib.util
import sys
from pathlib import Path

import pandas as pd
import pytest

from difficulty.agreement import agreement_table
from difficulty.convergence import DEFINITIONS
from difficulty.expert_plan import ExpertPlan
from difficulty.measurement import measure
from difficulty.records import read_run, read_table

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "results" / "convergence-study"


@pytest.fixture(scope="module")
def script():
    path = ROOT / "benchmarks" / "convergence_study.py"
    spec = importlib.util.spec_from_file_location("convergence_study", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("question", ["predictions", "seeds"])
def test_on_the_exact_law_predictions_and_seeds_order_the_tasks_alike_at_the_default_budget(question):
    table, cells = read_table(STUDY / "agreement.csv"), read_table(STUDY / "cells.csv").set_index("cell")
    names = [f"digits-mixture_vp-linear_{prediction}_t" for prediction in ("eps", "x0", "v")]
    assert (cells.loc[names, "iterations"] == ExpertPlan().budget).all()
    assert (cells.loc[names, "seeds"] == len(ExpertPlan().seeds)).all()
    of_these = table["first"].str.split(" ").str[0].isin(names) & table["second"].str.split(" ").str[0].isin(names)
    rows = table[of_these & (table["measure"] == "excess_nats") & (table["question"] == question)]
    assert len(rows) == {"predictions": 3, "seeds": 9}[question]
    assert (rows["points"] == 20).all()
    assert (rows["spearman"] >= 0.95).all()


def test_predictions_and_seeds_order_the_tasks_alike_on_fresh_experts(tmp_path):
    folders = []
    for prediction in ("eps", "x0", "v"):
        plan = ExpertPlan(prediction=prediction, seeds=(0, 1), budget=100, batch=64, heldout_draws=100)
        folders.append(tmp_path / prediction)
        measure("digits-mixture:n=2000", out=folders[-1], tasks=6, measures=["convergence"], plan=plan)
    table = agreement_table(folders)
    assert len(table) == 6
    assert (table["spearman"] >= 0.95).all()


def test_the_study_runs_at_a_small_scale_and_a_second_run_measures_nothing_again(script, tmp_path, monkeypatch):
    monkeypatch.setattr("difficulty.expert_samples.SAMPLES", 64)
    monkeypatch.setattr("difficulty.expert_samples.STEPS", 8)
    scale = script.Scale(
        data=("digits",), log_snr_data=("digits",), exact="digits", processes=("vp-linear", "edm"),
        predictions=("eps", "x0"), budget=20,
        exact_budget=20, log_snr_budget=20, tasks=3, log_snr_tasks=3, seeds=2, draws=32, steps=20, long_steps=40,
        quality_data=("digits",), quality_predictions=("eps",), quality_tasks=2,
    )  # fmt: skip
    arguments = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    script.main(arguments, scale)
    assert read_run(tmp_path / "out", "convergence-study")["config"]["scale"]["seeds"] == 2
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.csv")}
    agreement = pd.read_csv(tmp_path / "out" / "agreement.csv")
    assert set(agreement["question"]) >= {"predictions", "seeds", "processes", "grids", "networks"}
    assert set(agreement["measure"]) == set(DEFINITIONS)
    # One floor for all that were judged on the same tasks.
    losses = [pd.read_csv(tmp_path / "runs" / f"digits_vp-linear_{p}_t" / "losses.csv") for p in ("eps", "x0")]
    pd.testing.assert_series_equal(losses[0]["floor"], losses[1]["floor"], rtol=1e-6)
    untouched = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/run.json")}
    script.main(arguments, scale)
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.csv")} == written


def test_the_committed_study_is_small_and_covers_what_it_says(script):
    assert sum(path.stat().st_size for path in STUDY.rglob("*") if path.is_file()) < 3_000_000
    scale = read_run(STUDY, "convergence-study")["config"]["scale"]
    cells = read_table(STUDY / "cells.csv")
    assert set(cells["data"]) == set(scale["data"]) == set(script.DATA)
    assert set(cells["process"]) == set(scale["processes"]) == set(script.PROCESSES)
    assert set(cells["prediction"]) == set(scale["predictions"]) == set(script.PREDICTIONS)
    crossed = cells[cells["grid"] == "log-snr"].groupby("data").size()
    assert crossed.to_dict() == dict.fromkeys(scale["log_snr_data"], 12)
    assert (cells.loc[cells["kind"] == "experts", "seeds"] >= 3).all()
    pd.testing.assert_frame_equal(
        read_table(STUDY / "summary.csv"), script.summarise(read_table(STUDY / "agreement.csv")), rtol=1e-3
    )
