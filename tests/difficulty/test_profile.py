"""The profile serves every process, and the advice that follows from it."""

import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from difficulty.datasets import split_samples
from difficulty.entropy_folder import run_kl, run_profile
from difficulty.errors import InputError
from difficulty.process import PROCESSES, from_arrays, get_process
from difficulty.profile import PROFILE_COLUMNS, Profile, measure_profile
from difficulty.recommend import burden_of_profile, equal_burden, fit_density
from difficulty.records import read_run, write_table
from difficulty.relative_entropy import kl

TIMES = [30, 100, 200, 400, 600, 800, 950, 990]


@pytest.fixture(scope="module")
def grid_profile():
    return measure_profile("grid-2d")


def silent(stage, done, total):
    return None


@pytest.mark.parametrize("process", PROCESSES)
def test_one_profile_predicts_the_kl_of_every_process(grid_profile, process):
    derived = grid_profile.kl(process).set_index("t").loc[TIMES]
    direct = kl("grid-2d", process, pairs=TIMES).set_index("t")
    error = np.abs(derived.kl / direct.kl - 1)
    assert error.median() < 0.024
    assert error.max() < 0.10
    assert spearmanr(derived.kl, direct.kl).statistic >= 0.99


def test_profile_of_an_isotropic_gaussian_is_the_closed_form():
    profile = measure_profile("gaussian:dim=3,var=0.25", points=20).table
    s2 = np.exp(-profile.log_snr)
    b = s2 / (0.25 + s2)
    np.testing.assert_allclose(profile.A, 6 * b**2, rtol=1e-9)
    np.testing.assert_allclose(profile.B, -6 * b, rtol=1e-9)
    np.testing.assert_allclose(profile.C, 6, rtol=1e-9)
    np.testing.assert_allclose(profile.i_min, 0, atol=1e-12)
    np.testing.assert_allclose(profile.mmse, 3 * 0.25 * b, rtol=1e-9)


@pytest.mark.parametrize("process", ["vp-linear", "vp-cosine", "flow-matching"])
def test_intervals_of_a_profile_allow_for_long_steps(process):
    # The first steps are the longest. A point mass has the largest third order.
    derived = measure_profile("gaussian:dim=3,var=1e-9").kl(process).set_index("t").loc[2:30]
    direct = kl("gaussian:dim=3,var=1e-9", process, pairs=list(range(2, 31))).set_index("t").kl
    assert not derived.valid[2]
    assert "too large" in derived.reason[2] or "outside" in derived.reason[2]
    valid = derived[derived.valid]
    assert len(valid) > 20
    direct = direct[valid.index]
    assert ((valid.ci_low < direct) & (direct < valid.ci_high)).all()


def test_profile_of_samples_agrees_with_that_of_their_law():
    law = measure_profile("gaussian:dim=3,var=0.25", points=12, log_snr=(2, -4)).table
    rows = np.random.default_rng(0).standard_normal((3000, 3)).astype(np.float32) * 0.5
    found = measure_profile(split_samples("rows", rows), points=12, log_snr=(2, -4)).table
    for name in ("A", "C", "mmse"):
        np.testing.assert_allclose(found[name], law[name], rtol=0.15)


def test_a_process_of_the_user_is_served_too(grid_profile):
    sigma = np.geomspace(0.05, 5, 200)
    process = from_arrays(np.ones(200), sigma, "mine")
    derived = grid_profile.kl(process).set_index("t").loc[[20, 100, 180]]
    direct = kl("grid-2d", process, pairs=[20, 100, 180]).set_index("t")
    np.testing.assert_allclose(derived.kl, direct.kl, rtol=0.1)


def test_pairs_outside_the_profile_say_so():
    profile = measure_profile("gaussian:dim=2", points=10, log_snr=(3, -3))
    table = profile.kl("edm")
    outside = (table.log_snr > 3) | (table.log_snr < -3)
    assert not table.valid[outside].any()
    assert table.reason[outside].str.contains("outside").all()


def test_intervals_of_a_profile_hold_the_truth():
    law = measure_profile("gaussian:dim=3,var=0.25", points=10, log_snr=(2, -4)).table
    rows = np.random.default_rng(3).standard_normal((2000, 3)) * 0.5
    found = measure_profile(split_samples("rows", rows), points=10, log_snr=(2, -4)).table
    for name in ("A", "B", "C", "mmse"):
        assert (found[f"{name}_ci_low"] <= found[name]).all()
        assert ((found[f"{name}_ci_low"] <= law[name]) & (law[name] <= found[f"{name}_ci_high"])).mean() >= 0.8


def test_profile_survives_its_file(grid_profile, tmp_path):
    write_table(tmp_path / "profile.csv", grid_profile.table)
    again = Profile.load(tmp_path)
    assert tuple(again.table.columns) == PROFILE_COLUMNS
    valid = grid_profile.kl("vp-linear").valid
    np.testing.assert_allclose(again.kl("vp-linear").kl[valid], grid_profile.kl("vp-linear").kl[valid], rtol=1e-4)


@pytest.mark.parametrize("arguments", [{"points": 3}, {"log_snr": (-3.0, 3.0)}, {"log_snr": (np.inf, 0.0)}])
def test_an_impossible_grid_is_refused(arguments):
    with pytest.raises(InputError, match="falling log-SNR range"):
        measure_profile("gaussian:dim=2", **arguments)


def test_experts_of_equal_burden_share_it_equally(grid_profile):
    tau, rate = burden_of_profile(grid_profile)
    process = get_process("edm")
    table = equal_burden(tau, rate, process, 4).table
    edges = np.log(table.sigma.to_numpy())
    fine = [np.linspace(a, b, 2000) for a, b in pairwise(edges)]
    shares = np.array([np.trapezoid(np.interp(x, tau, rate), x) for x in fine])
    np.testing.assert_allclose(shares, shares.mean(), rtol=0.01)
    np.testing.assert_allclose(process.log_snr(table.t), table.log_snr, atol=1e-6)
    np.testing.assert_allclose(table.u, table.t / 1000)


def test_density_of_a_normal_burden_is_recovered():
    tau = np.linspace(-8, 6, 300)
    density = fit_density(tau, np.exp(-0.5 * ((tau + 1.2) / 1.1) ** 2))
    assert (density.mean, density.std) == (pytest.approx(-1.2, abs=1e-3), pytest.approx(1.1, abs=1e-3))
    assert density.distance < 0.01
    assert fit_density(tau, np.where(np.abs(tau) > 4, 1.0, 0.01)).distance > 0.2


def test_kl_command_writes_a_finished_folder(tmp_path):
    table = run_kl("gaussian:dim=2,var=0.25", "vp-linear:T=50", tmp_path / "out", "auto", None, None, 0, silent)
    read_run(tmp_path / "out", "kl")
    written = pd.read_csv(tmp_path / "out" / "relative_entropy.csv")
    np.testing.assert_allclose(written.kl, table.kl, rtol=1e-9)
    assert (tmp_path / "out" / "figures" / "relative_entropy.png").exists()


def test_profile_command_writes_advice_and_the_kl_of_each_process(tmp_path):
    advice = run_profile("grid-2d", tmp_path / "out", ["vp-linear", "edm"], 3, 0, silent)
    read_run(tmp_path / "out", "profile")
    assert (tmp_path / "out" / "kl-edm.csv").exists()
    assert len(advice["boundaries"]["edm"]["t"]) == 4
    assert json.loads((tmp_path / "out" / "recommendation.json").read_text())["density"]["P_std"] > 0


def test_processes_that_differ_in_their_options_alone_are_told_apart(tmp_path):
    advice = run_profile("ring-16d:dim=3,n=40", tmp_path / "out", ["vp-linear", "vp-linear:T=500"], 3, 0, silent)
    rows = {name: len(pd.read_csv(tmp_path / "out" / f"kl-{name}.csv")) for name in advice["boundaries"]}
    assert rows == {"vp-linear": 999, "vp-linear-T=500": 499}


def test_data_without_a_schedule_free_part_give_no_advice_but_a_profile(tmp_path):
    advice = run_profile("gaussian:dim=3,var=0.3,n=40", tmp_path / "out", ["edm"], 3, 0, silent)
    assert advice["sentences"] == [
        "No recommendation: the profile has no schedule-free part, as data of one variance in all directions have "
        "none; there is no burden to share."
    ]
    read_run(tmp_path / "out", "profile")
