"""Recommendations from a ranking whose answer is known (those from a profile are in test_profile)."""

import json

import numpy as np
import pytest
import torch

from difficulty.cli import SUBCOMMANDS
from difficulty.commandline import run_cli
from difficulty.errors import InputError
from difficulty.estimate import Estimate
from difficulty.process import get_process
from difficulty.process_file import read_process, write_process
from difficulty.ranking import rank_tasks
from difficulty.recommend import (
    Density,
    advise,
    burden_of_ranking,
    equal_burden,
    fit_density,
    flags,
    wide_tasks,
)
from difficulty.tasks import make_tasks

UNIT = "nats per unit log-SNR"


def ranking_of(value, unit=UNIT, process=None):
    process = process or get_process("vp-linear")
    value = np.asarray(value, dtype=float)
    estimate = Estimate(unit, value, value, value, True, np.zeros(len(value), bool), True)
    tasks = make_tasks(process, len(value), "log-snr")
    return rank_tasks({"excess_nats": estimate}, tasks, process, dataset={}, grid="log-snr", provenance={})


def test_equal_difficulty_everywhere_splits_log_snr_evenly():
    process = get_process("ve")
    table = equal_burden(*burden_of_ranking(ranking_of(np.ones(8), process=process)), process, 4).table
    np.testing.assert_allclose(np.diff(table["log_snr"]), np.diff(table["log_snr"]).mean(), rtol=0.02)


def test_all_difficulty_in_one_task_puts_every_inner_boundary_there():
    ranking = ranking_of([1e-9] * 4 + [1.0] + [1e-9] * 5)
    inner = equal_burden(*burden_of_ranking(ranking), get_process("vp-linear"), 4).table["t"].iloc[1:-1]
    hard = ranking.tasks[4]
    assert ((inner >= hard.t_first - 1) & (inner <= hard.t_last + 1)).all()


def test_a_normal_difficulty_gives_its_mean_and_standard_deviation():
    process = get_process("edm")
    tasks = make_tasks(process, 60, "log-snr")
    middle = np.array([-(task.log_snr_high + task.log_snr_low) / 4 for task in tasks])
    density = fit_density(*burden_of_ranking(ranking_of(np.exp(-(((middle + 0.5) / 0.8) ** 2) / 2), process=process)))
    np.testing.assert_allclose([density.mean, density.std], [-0.5, 0.8], atol=0.03)
    assert density.distance < 0.1


def test_flags_give_each_trainer_the_noise_levels_that_are_asked_for():
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_density_for_timestep_sampling

    said = flags(Density(-0.8, 0.6, 0.0))
    assert said["EDM (loss_kwargs)"] == "P_mean=-0.800 P_std=0.600"
    (given,) = (text for name, text in said.items() if name.startswith("diffusers"))
    mean, std = (float(part.split("=")[1]) for part in given.split()[1:])
    torch.manual_seed(0)
    for shift in (1.0, 3.0):
        # As the training scripts of diffusers draw noise levels.
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        u = compute_density_for_timestep_sampling("logit_normal", 20000, mean + np.log(shift), std)
        sigmas = scheduler.sigmas[(u * 1000).long()].double()
        log_s = torch.log(sigmas / (1 - sigmas)).clamp(max=5)
        np.testing.assert_allclose([log_s.mean(), log_s.std()], [-0.8, 0.6], atol=0.03)


def test_the_density_that_is_printed_is_one_over_log_snr():
    process = get_process("ve")
    advice = advise("x", *burden_of_ranking(ranking_of(np.arange(1.0, 9.0), process=process)), {"ve": process}, 3)
    assert advice["piecewise_density_over_log_snr"]["rate"] == np.repeat(np.arange(1.0, 9.0), 2).tolist()


def test_tasks_that_are_wide_in_log_snr_are_named():
    process = get_process("vp-linear")
    value = np.ones(20)
    estimate = Estimate(UNIT, value, value, value, True, np.zeros(20, bool), True)
    tasks = make_tasks(process, 20)
    ranking = rank_tasks({"excess_nats": estimate}, tasks, process, dataset={}, grid="t", provenance={})
    (sentence,) = wide_tasks(ranking)
    assert "t 1..50 spans 5.7 units of log-SNR" in sentence
    assert wide_tasks(ranking_of(value)) == []


def test_flow_matching_that_ends_in_pure_noise_is_served():
    process = get_process("flow-matching")
    table = equal_burden(*burden_of_ranking(ranking_of(np.ones(8), process=process)), process, 3).table
    assert np.isfinite(table).all(axis=None)


@pytest.mark.parametrize(
    ("ranking", "measure", "message"),
    [
        (lambda: ranking_of(np.ones(5), "iterations"), "excess_nats", "density per unit log-SNR"),
        (lambda: ranking_of(np.ones(5)), "magic", "known are excess_nats"),
        (lambda: ranking_of([1, 1, np.nan, 1, 1]), "excess_nats", "no value at t 140..493, where"),
        (lambda: ranking_of(np.zeros(5)), "excess_nats", "nowhere positive"),
    ],
)
def test_rankings_that_state_no_burden_cost_one_sentence(ranking, measure, message):
    with np.errstate(divide="ignore", invalid="ignore"), pytest.raises(InputError, match=message):
        burden_of_ranking(ranking(), measure)


def test_the_command_prints_flags_and_json(tmp_path, capsys):
    process = get_process("vp-linear")
    ranking_of(0.5 ** np.arange(8)).save(tmp_path / "ranking.json")
    write_process(tmp_path, process)
    assert run_cli(SUBCOMMANDS, "difficulty", "", ["recommend", str(tmp_path), "--experts", "3"]) == 0
    assert "P_mean=" in capsys.readouterr().out
    assert run_cli(SUBCOMMANDS, "difficulty", "", ["recommend", str(tmp_path), "--experts", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["boundaries"]["vp-linear"]["t"]) == 4
    assert run_cli(SUBCOMMANDS, "difficulty", "", ["recommend", str(tmp_path / "absent")]) == 2


def test_a_process_is_read_back_and_another_is_refused(tmp_path):
    process = get_process("vp-cosine:T=50")
    write_process(tmp_path, process)
    np.testing.assert_allclose(read_process(tmp_path, process.fingerprint).sigma, process.sigma, rtol=1e-9)
    with pytest.raises(InputError, match="noise levels differ"):
        read_process(tmp_path, get_process("vp-linear:T=50").fingerprint)
