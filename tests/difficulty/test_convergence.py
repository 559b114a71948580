"""Definitions of convergence on learning curves whose answers are known."""

from dataclasses import replace

import numpy as np
import pytest
from learning_curves import BUDGET, FLOOR, ITERATIONS, exponential, losses_of
from scipy.stats import t as student_t

from difficulty.convergence import SeedValues, _seed_variance, convergence_table, summary_over_seeds
from difficulty.errors import InputError
from difficulty.expert_plan import log_spaced_iterations
from difficulty.experts import ExpertCurves
from difficulty.heldout import standard_error
from difficulty.losses import LearningCurves, loss_table


def value(table, definition, task=0, column="value"):
    return table[(table["definition"] == definition) & (table["task"] == task)][column].item()


def test_excess_is_half_the_loss_above_the_floor_at_the_budget_not_after_it():
    table = convergence_table(losses_of([exponential(500)]), BUDGET)
    np.testing.assert_allclose(value(table, "excess_nats"), np.exp(-BUDGET / 500), rtol=1e-6)


def test_log_regret_is_the_mean_log_excess_over_log_spaced_iterations():
    table = convergence_table(losses_of([exponential(500)]), BUDGET)
    expected = -np.mean(log_spaced_iterations(BUDGET, 60)) / 500
    np.testing.assert_allclose(value(table, "log_regret"), expected, rtol=1e-6)


@pytest.mark.parametrize("rate", [20, 60, 150])
def test_paper_style_iterations_of_an_exponential_are_its_time_constant_times_log_ten(rate):
    table = convergence_table(losses_of([exponential(rate)]), BUDGET)
    np.testing.assert_allclose(value(table, "paper_style"), rate * np.log(10), rtol=0.03)
    assert not value(table, "paper_style", column="censored")


def test_a_task_learned_twice_as_slowly_is_harder_by_every_definition():
    table = convergence_table(losses_of([exponential(200), exponential(100)]), BUDGET)
    for definition in ("excess_nats", "log_regret", "paper_style"):
        assert value(table, definition, 0) > value(table, definition, 1)


def test_scaling_the_loss_leaves_the_paper_style_rate_alone():
    table = convergence_table(losses_of([exponential(100), exponential(100, 50.0)]), BUDGET)
    np.testing.assert_allclose(value(table, "paper_style", 0), value(table, "paper_style", 1), rtol=1e-9)


def test_a_diverged_expert_has_no_value_and_is_censored():
    losses = losses_of([exponential(100), exponential(100)])
    rows = (losses["task"] == 1) & (losses["seed"] == 2) & (losses["iteration"] > 100)
    losses.loc[rows, ["heldout_loss", "excess_nats", "excess_se"]] = np.nan
    table = convergence_table(losses, BUDGET)
    for definition in ("excess_nats", "log_regret", "paper_style"):
        assert np.isnan(value(table, definition, 1))
        assert value(table, definition, 1, "censored")
        assert not np.isnan(value(table, definition, 0))


def test_an_expert_that_is_itself_the_best_known_is_not_taken_for_infinitely_good():
    losses = losses_of([lambda i: 0.01 + np.exp(-i / 100)])
    losses["excess_se"] = 0.002
    rows = (losses["seed"] == 1) & (losses["iteration"] == BUDGET)
    losses.loc[rows, ["excess_nats", "excess_se"]] = 0.0  # paired with itself
    table = convergence_table(losses, BUDGET)
    np.testing.assert_allclose(value(table, "excess_nats"), (0.01 * 0.01 * 0.002) ** (1 / 3), rtol=0.01)
    assert value(table, "excess_nats", column="censored")
    assert value(table, "log_regret") > np.log(0.005)


def test_a_stuck_expert_never_looks_fast():
    stuck = lambda i: 1.0 - 0.005 * (i > 15)  # noqa: E731 - falls by half a percent at once and stays
    table = convergence_table(losses_of([exponential(300), stuck]), BUDGET)
    assert np.isnan(value(table, "paper_style", 1))
    for definition in ("excess_nats", "log_regret", "paper_style"):
        assert value(table, definition, 1, "censored")
    assert value(table, "excess_nats", 1) > value(table, "excess_nats", 0)


def test_more_seeds_narrow_the_interval():
    def width(seeds):
        table = convergence_table(losses_of([exponential(500)] * 200, range(seeds), noise=0.2), BUDGET)
        part = table[table["definition"] == "excess_nats"]
        return np.log(part["ci_high"] / part["ci_low"]).mean()

    assert width(8) < 0.8 * width(4)
    assert width(4) < 0.8 * width(2)


def test_intervals_cover_the_truth_at_their_nominal_rate():
    truth = np.exp(-BUDGET / 500)
    table = convergence_table(losses_of([exponential(500)] * 300, range(3), noise=0.2), BUDGET)
    part = table[table["definition"] == "excess_nats"]
    covered = ((part["ci_low"] <= truth) & (truth <= part["ci_high"])).mean()
    assert 0.85 < covered < 0.96


def test_tasks_that_every_seed_was_cut_off_at_do_not_narrow_the_intervals_of_others():
    rng, cut = np.random.default_rng(0), np.arange(20) < 11
    curves = LearningCurves(np.arange(2.0), *np.ones((3, 3, 20, 2)), np.full(20, 9.0))
    covered = []
    for _ in range(300):
        values = np.where(cut, 5.0, rng.standard_normal((3, 20)))
        seeds = SeedValues(values, np.zeros(20), cut, np.zeros(20, bool), False, "iterations")
        table = summary_over_seeds("m", seeds, curves, seeds)
        covered += ((table["ci_low"] < 0) & (table["ci_high"] > 0))[~cut].tolist()
    assert 0.87 < np.mean(covered) < 0.96


def test_intervals_hold_the_error_of_the_held_out_draws_besides_that_of_the_seeds():
    curves = LearningCurves(np.arange(2.0), *np.ones((3, 3, 4, 2)), np.full(4, 9.0))
    none, no = np.zeros(4), np.zeros(4, bool)
    values = 0.1 * np.random.default_rng(0).standard_normal((3, 4))
    widths = []
    for draw_sd in (none, none + 2.0):
        seeds = SeedValues(values, draw_sd, no, no, False, "nats")
        table = summary_over_seeds("m", seeds, curves, seeds)
        widths.append((table["ci_high"] - table["ci_low"]) / 2 / student_t.ppf(0.95, table["degrees"]))
    np.testing.assert_allclose(widths[1], np.hypot(widths[0], 2.0))


def curves_of(losses, floor, excess=None):
    iterations = list(range(losses.shape[2]))
    zero = losses[0, :, 0].astype(np.float32)
    return ExpertCurves(iterations, losses.astype(np.float32), excess, floor, zero, excess is not None)


def test_draws_of_one_held_out_sample_do_not_count_as_independent():
    rng = np.random.default_rng(0)
    rows = np.tile(np.arange(40), 5)[:190]  # 190 draws of 40 samples
    found, means = [], []
    for _ in range(2000):
        values = 3.0 + rng.standard_normal(40)[rows] + 0.1 * rng.standard_normal(190)
        found.append(standard_error(values, rows))
        means.append(values.mean())
    np.testing.assert_allclose(np.median(found), np.std(means), rtol=0.06)
    values = rng.standard_normal((3, 50))
    usual = values.std(-1, ddof=1) / np.sqrt(50)
    np.testing.assert_allclose(standard_error(values, rng.permutation(50)), usual)
    tied = replace(curves_of(5 + rng.random((2, 1, 3, 50)), np.full((1, 50), 4.0)), rows=np.arange(50)[None] // 10)
    apart = replace(tied, rows=None)
    errors = [loss_table(one, seeds=(0, 1), batch=4)["excess_se"].to_numpy() for one in (tied, apart)]
    assert not np.allclose(*errors)


def test_the_best_known_floor_is_the_least_mean_loss_of_anyone_on_the_same_draws():
    rng = np.random.default_rng(0)
    losses = 5 + rng.random((2, 1, 3, 50))
    losses[1, 0, 2] -= 2
    table = loss_table(curves_of(losses, np.full((1, 50), 9.0)), seeds=(0, 1), batch=4)
    np.testing.assert_allclose(table["floor"], losses[1, 0, 2].mean(), rtol=1e-6)
    assert (table["floor_kind"] == "upper_bound").all()
    assert table["excess_nats"].min() == 0
    beaten = loss_table(curves_of(losses, np.full((1, 50), 1.0)), seeds=(0, 1), batch=4)
    np.testing.assert_allclose(beaten["floor"], 1.0)


def test_a_diverged_expert_is_no_floor():
    losses = np.full((1, 1, 2, 10), 4.0)
    losses[0, 0, 1] = np.nan
    table = loss_table(curves_of(losses, np.full((1, 10), 9.0)), seeds=(0,), batch=4)
    np.testing.assert_allclose(table["floor"], 4.0)


def test_a_foreign_table_is_refused():
    with pytest.raises(InputError, match=r"losses\.csv lacks the column\(s\) excess_nats, excess_se"):
        convergence_table(losses_of([exponential(9)]).drop(columns=["excess_nats", "excess_se"]), BUDGET)


def test_paper_style_with_the_floor_as_limit_is_censored_where_the_budget_ends_before():
    table = convergence_table(losses_of([exponential(100), exponential(5000)]), BUDGET)
    np.testing.assert_allclose(value(table, "paper_style_floor", 0), 100 * np.log(10), rtol=0.03)
    assert not value(table, "paper_style_floor", 0, "censored")
    assert value(table, "paper_style_floor", 1, "censored")
    np.testing.assert_allclose(value(table, "paper_style_floor", 1), BUDGET)


@pytest.mark.parametrize("rate", [30, 100, 300])
def test_the_exponential_fit_finds_the_time_constant(rate):
    table = convergence_table(losses_of([exponential(rate)]), BUDGET)
    np.testing.assert_allclose(value(table, "exponential"), rate, rtol=1e-3)


def sum_of_squares(curve, time):
    """Of the best c + a exp(-i/time) at the checkpoints up to the budget, by linear least squares."""
    i = np.array([i for i in ITERATIONS if i <= BUDGET])
    columns = np.stack([np.ones(len(i)), np.exp(-i / time)], 1)
    return float(np.linalg.lstsq(columns, FLOOR + 2 * np.vectorize(curve)(i))[1][0])


# With the fast fall before the first checkpoint the sum of squares has two minima over the time constant: the best one
# is at its end for the lower slow falls, and in the middle for the higher.
@pytest.mark.parametrize(("fast", "slow"), [(3, 0.4), (3, 0.6), (3, 0.8), (3, 1.0), (12, 0.6), (12, 2.0)])
def test_the_exponential_fit_is_the_best_of_all_where_a_fast_and_a_slow_fall_compete(fast, slow):
    def curve(i):
        return np.exp(-i / fast) + slow * np.exp(-i / 800)

    found = value(convergence_table(losses_of([curve]), BUDGET), "exponential")
    times = np.geomspace(10, BUDGET, 4000)
    best = times[np.argmin([sum_of_squares(curve, time) for time in times])]
    np.testing.assert_allclose(found, best, rtol=2e-3)
    assert sum_of_squares(curve, found) <= sum_of_squares(curve, best) * (1 + 1e-9)


def test_a_loss_that_only_rises_has_the_budget_as_a_lower_bound_of_its_time_constant():
    losses = losses_of([lambda i: 0.1 + 0.1 * i / BUDGET, exponential(50)])
    losses["zero_excess_nats"] = 5.0  # better than nothing to begin with, or it would count as stuck
    table = convergence_table(losses, BUDGET)
    np.testing.assert_allclose(value(table, "exponential", 0), BUDGET)
    assert value(table, "exponential", 0, "censored")
    assert not value(table, "exponential", 1, "censored")


@pytest.mark.parametrize("exponent", [0.3, 1.0, 2.0])
def test_the_power_law_fit_finds_the_exponent(exponent):
    table = convergence_table(losses_of([lambda i: max(i, 1) ** -exponent]), BUDGET)
    np.testing.assert_allclose(value(table, "power_law"), -exponent, rtol=1e-6)


def test_the_normalised_area_does_not_change_with_the_scale_of_the_loss():
    table = convergence_table(losses_of([exponential(100), exponential(100, 50.0), exponential(300)]), BUDGET)
    np.testing.assert_allclose(value(table, "normalised_area", 0), value(table, "normalised_area", 1))
    assert value(table, "normalised_area", 2) > value(table, "normalised_area", 0)


def test_an_expert_that_gives_what_the_zero_network_gives_is_stuck_whatever_the_noise_of_the_floor():
    losses = losses_of([exponential(100), lambda i: 0.2])
    rows = losses["task"] == 1
    losses.loc[rows, "zero_loss"] += 0.1  # by chance the floor is lower on these draws
    assert not value(convergence_table(losses, BUDGET), "excess_nats", 1, "censored")
    losses["zero_excess_nats"] = np.where(rows, 0.2, 1.0)
    table = convergence_table(losses, BUDGET)
    assert value(table, "excess_nats", 1, "censored")
    assert np.isnan(value(table, "paper_style", 1))
    assert not value(table, "excess_nats", 0, "censored")


def test_one_seed_has_values_and_no_intervals_unless_others_say_how_seeds_differ():
    losses = losses_of([exponential(rate) for rate in (100, 200, 300)], range(3), noise=0.2)
    one = losses[losses["seed"] == 1]
    alone, among = convergence_table(one, BUDGET), convergence_table(one, BUDGET, losses)
    assert alone["value"].notna().all()
    assert alone[["ci_low", "ci_high"]].isna().all(axis=None)
    of_all = convergence_table(losses, BUDGET)
    for table in (among, of_all):
        table["width"] = np.log(table["ci_high"] / table["ci_low"])
    excess = [table.loc[table["definition"] == "excess_nats", "width"].to_numpy() for table in (among, of_all)]
    np.testing.assert_allclose(excess[0], np.sqrt(3) * excess[1], rtol=1e-6)


def test_where_seeds_of_some_tasks_differ_more_the_intervals_of_these_hold_the_truth():
    rng, K = np.random.default_rng(0), 20
    sd = np.exp(np.linspace(np.log(0.02), np.log(0.5), K))
    covered = []
    for _ in range(200):
        values = sd * rng.standard_normal((3, K))
        variance, degrees = _seed_variance(values)
        covered.append(np.abs(values.mean(0)) <= student_t.ppf(0.95, degrees) * np.sqrt(variance / 3))
    # A prior of four degrees of freedom, whatever the tasks say, holds the truth of the last one in two of three cases.
    assert np.mean(covered) > 0.87
    assert np.mean(covered, 0).min() > 0.72


def test_a_bound_has_an_interval_that_is_open_on_its_side():
    table = convergence_table(losses_of([exponential(100), exponential(5000)], range(3), noise=0.05), BUDGET)
    late = table[(table["definition"] == "paper_style_floor") & (table["task"] == 1)].iloc[0]
    assert late["censored"]
    assert np.isnan(late["ci_high"])
    assert late["ci_low"] <= late["value"]


@pytest.mark.parametrize("definition", ["paper_style", "paper_style_floor", "exponential"])
def test_of_a_fall_that_was_over_at_the_first_checkpoint_only_an_upper_bound_is_known(definition):
    losses = losses_of([exponential(1), exponential(100)], range(3), noise=0.05)
    table = convergence_table(losses, BUDGET)
    early = table[(table["definition"] == definition) & (table["task"] == 0)].iloc[0]
    assert early["censored"]
    assert np.isnan(early["ci_low"])
    assert early["value"] <= early["ci_high"] <= 1.5 * ITERATIONS[1]
    assert not value(table, definition, 1, "censored")


def test_the_first_checkpoint_is_the_bound_of_a_fall_that_was_over_before():
    table = convergence_table(losses_of([exponential(1), exponential(3)]), BUDGET)
    np.testing.assert_allclose(table.loc[table["definition"] == "paper_style", "value"], ITERATIONS[1])


def test_the_area_of_a_fall_that_goes_on_at_the_budget_is_a_lower_bound():
    curves = [exponential(100), lambda i: 0.3 + 0.7 * np.exp(-i / 100)]  # the second one is still on its way
    table = convergence_table(losses_of(curves, range(3), noise=0.05), BUDGET)
    rows = table[table["definition"] == "normalised_area"]
    assert rows["censored"].tolist() == [False, True]
    assert rows["ci_high"].isna().tolist() == [False, True]
    assert rows["ci_low"].notna().all()


def test_the_area_of_a_fall_that_is_lost_again_is_a_lower_bound():
    def lost(i):
        return np.exp(-i / 30) + 0.5 * (i == BUDGET)

    table = convergence_table(losses_of([exponential(100), lost], range(3), noise=0.05), BUDGET)
    rows = table[table["definition"] == "normalised_area"]
    assert rows["censored"].tolist() == [False, True]
    assert np.isnan(rows["ci_high"].iloc[1])


def test_the_power_law_of_an_excess_that_falls_below_its_error_is_an_upper_bound():
    losses = losses_of([lambda i: max(i, 1) ** -1.0] * 2, range(3), noise=0.05)
    losses.loc[losses["task"] == 1, "excess_se"] = 1 / 400  # reached after 400 of 1000 iterations
    table = convergence_table(losses, BUDGET)
    rows = table[table["definition"] == "power_law"]
    assert rows["censored"].tolist() == [False, True]
    assert rows["ci_low"].isna().tolist() == [False, True]
    assert rows["value"].iloc[1] > rows["value"].iloc[0] + 0.2
