"""Rankings of estimates whose order is known."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student_t

from difficulty.convergence import SeedValues, summary_over_seeds
from difficulty.errors import InputError
from difficulty.estimate import Estimate
from difficulty.losses import LearningCurves
from difficulty.measurement_folder import convergence_estimates, relative_entropy_estimates
from difficulty.process import get_process
from difficulty.ranking import Ranking, rank_tasks
from difficulty.tasks import make_tasks

PROCESS = get_process("flow-matching")
TASKS = make_tasks(PROCESS, 10)


def estimate(value, relative_error=0.01, **changes):
    value = np.asarray(value, dtype=float)
    facts = {"flagged": np.isnan(value), "hardest_if_missing": True} | changes
    return Estimate("nats", value, value * np.exp(-relative_error), value * np.exp(relative_error), True, **facts)


def ranking_of(**estimates):
    return rank_tasks(estimates, TASKS, PROCESS, dataset={"name": "test"}, grid="t", provenance={})


def test_well_separated_tasks_are_ranked_without_doubt():
    measure = ranking_of(m=estimate(2.0 ** -np.arange(10))).measures["m"]
    assert measure.order == list(range(9, -1, -1))
    assert measure.rank == measure.rank_low == measure.rank_high == list(range(10, 0, -1))


def test_equal_tasks_have_rank_intervals_over_everything_and_no_verdict():
    ranking = ranking_of(m=estimate(np.ones(10), 0.1))
    measure = ranking.measures["m"]
    assert max(measure.rank_low) <= 2
    assert min(measure.rank_high) >= 9
    assert "is not decided" in ranking.verdict[0]
    assert "0 of 9 neighbours" in ranking.verdict[0]


def test_wider_intervals_of_the_values_give_wider_intervals_of_the_ranks():
    def width(error):
        measure = ranking_of(m=estimate(1.1 ** np.arange(10), error)).measures["m"]
        return np.mean(np.subtract(measure.rank_high, measure.rank_low))

    assert width(0.02) < width(0.2) < width(1.0)


def test_a_task_that_could_not_be_learned_is_ranked_hardest():
    value = np.arange(1.0, 11.0)
    value[3] = np.nan
    measure = ranking_of(m=estimate(value)).measures["m"]
    assert measure.order[-1] == 3
    assert measure.rank[3] == measure.rank_low[3] == 10
    assert measure.flagged[3]


def test_a_task_that_a_measure_says_nothing_about_is_not_ranked():
    value = np.arange(1.0, 11.0)
    value[3] = np.nan
    ranking = ranking_of(m=estimate(value, hardest_if_missing=False))
    measure = ranking.measures["m"]
    without = f"{TASKS[3].first}..{TASKS[3].last}"
    assert f"of those with a value (t {without} have none);" in ranking.verdict[0]
    assert 3 not in measure.order
    assert measure.rank[3] is None
    assert sorted(r for r in measure.rank if r) == list(range(1, 10))


def test_kendall_tau_is_one_for_equal_and_minus_one_for_reversed_orders():
    k = np.arange(10)
    ranking = ranking_of(a=estimate(2.0**k), b=estimate(3.0**k), c=estimate(0.5**k))
    assert [tau.tau for tau in ranking.kendall_tau] == [1, -1, -1]
    text = " ".join(ranking.verdict)
    assert "a and b agree" in text
    assert "a and c contradict each other" in text


def test_kendall_tau_agrees_with_scipy():
    from scipy.stats import kendalltau

    rng = np.random.default_rng(0)
    a, b = np.exp(rng.standard_normal((2, 10)))
    tau = ranking_of(a=estimate(a), b=estimate(b)).kendall_tau[0]
    np.testing.assert_allclose(tau.tau, kendalltau(a, b).statistic)


def test_lower_t_is_harder_holds_and_fails_where_it_should():
    assert "'lower t is harder' holds (" in ranking_of(m=estimate(0.5 ** np.arange(10))).verdict[0]
    assert "'lower t is harder' fails" in ranking_of(m=estimate(2.0 ** np.arange(10))).verdict[0]
    peak = 0.5 ** np.abs(np.arange(10) - 2.2)
    assert "'lower t is harder' holds in tendency" in ranking_of(m=estimate(peak)).verdict[0]


def test_the_file_is_read_back_as_it_was_written(tmp_path):
    ranking = ranking_of(m=estimate(2.0 ** np.arange(10)))
    ranking.save(tmp_path / "ranking.json")
    assert Ranking.load(tmp_path) == ranking
    last = ranking.tasks[-1]
    assert last.t_last == 1000
    assert last.log_snr_low is None  # flow matching ends in pure noise


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:100], "not valid JSON"),
        (lambda text: text.replace("ranking/1", "ranking/9"), "this version reads"),
        (lambda text: "[1, 2]", "this version reads"),
        (lambda text: text.replace('"order"', '"ordre"'), "not a valid ranking: measures.m.order"),
        (lambda text: text.replace('"t_first": 101', '"t_first": 102'), "without gap or overlap"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path, damage, message):
    ranking = ranking_of(m=estimate(2.0 ** np.arange(10)))
    (tmp_path / "ranking.json").write_text(damage(json.dumps(ranking.model_dump())))
    with pytest.raises(InputError, match=message):
        Ranking.load(tmp_path)


def test_tasks_that_could_not_be_learned_share_the_hardest_places():
    value = np.arange(1.0, 11.0)
    value[[2, 5, 7]] = np.nan
    measure = ranking_of(m=estimate(value)).measures["m"]
    assert [(measure.rank_low[k], measure.rank_high[k]) for k in (2, 5, 7)] == [(8, 10)] * 3
    assert measure.rank_high[9] == 7


def test_nothing_is_said_of_lower_t_where_only_flagged_tasks_say_it():
    value = np.ones(10)
    value[:4] = np.nan
    hidden = ranking_of(m=estimate(value, 0.1)).verdict[0]
    assert "is not decided without the tasks that are flagged" in hidden
    falling = 2.0 ** -np.arange(10)
    assert "'lower t is harder' holds (" in ranking_of(m=estimate(falling)).verdict[0]


def test_a_file_without_measures_or_with_short_intervals_is_refused(tmp_path):
    ranking_of(m=estimate(np.arange(1.0, 11.0))).save(tmp_path / "ranking.json")
    content = json.loads((tmp_path / "ranking.json").read_text())
    short = content["measures"]["m"] | {"ci_low": [1.0]}
    for measures, message in (({}, "there must be a measure"), ({"m": short}, "one entry per task")):
        (tmp_path / "ranking.json").write_text(json.dumps(content | {"measures": measures}))
        with pytest.raises(InputError, match=message):
            Ranking.load(tmp_path)


def test_one_seed_of_unknown_error_decides_nothing():
    value = 2.0 ** -np.arange(10)
    unknown = Estimate(
        "nats", value, np.full(10, np.nan), np.full(10, np.nan), True, np.zeros(10, bool), hardest_if_missing=True
    )
    ranking = ranking_of(m=unknown)
    measure = ranking.measures["m"]
    assert measure.order == list(range(9, -1, -1))
    assert set(measure.rank_low) == {1}
    assert set(measure.rank_high) == {10}
    assert "0 of 9 neighbours" in ranking.verdict[0]
    assert "is not decided" in ranking.verdict[0]


@pytest.mark.parametrize("peak", [3, 4])
def test_one_task_that_is_harder_than_a_cleaner_one_is_named(peak):
    verdict = ranking_of(m=estimate(0.5 ** np.abs(np.arange(10) - peak - 0.2))).verdict[0]
    assert f"'lower t is harder' fails: t {100 * peak + 1}..{100 * peak + 100} is harder than t 1..100" in verdict


def test_where_the_cleanest_tasks_have_no_value_the_claim_is_about_the_others():
    value = 2.0 ** -np.arange(10.0)
    value[:2] = np.nan
    ranking = ranking_of(m=estimate(value, hardest_if_missing=False))
    assert "'lower t is harder' holds for t of 201 and above" in ranking.verdict[0]


def test_a_task_whose_value_is_a_bound_is_neither_the_easiest_nor_told_apart():
    value, flagged = 2.0 ** -np.arange(10.0), np.arange(10) >= 8
    ranking = ranking_of(m=estimate(value, flagged=flagged))
    assert "hardest t 1..100, easiest t 701..800 (of those that are not flagged); 7 of 9 neigh" in ranking.verdict[0]
    assert "* a bound): 901..1000* ~ 801..900* ~ 701..800 < 601..700" in ranking.verdict[1]


def test_tasks_whose_end_was_not_seen_share_the_hardest_places():
    value = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 8.0, 8.0])
    tables = estimate(value, flagged=value == 8)
    open_above = Estimate(
        "iterations", value, tables.ci_low, np.where(value == 8, np.nan, tables.ci_high), True, value == 8,
        hardest_if_missing=True,
    )  # fmt: skip
    ranking = ranking_of(m=open_above)
    measure = ranking.measures["m"]
    assert "hardest t 701..1000 alike, easiest t 1..100; 7 of 9 neigh" in ranking.verdict[0]
    assert [(measure.rank_low[k], measure.rank_high[k]) for k in (7, 8, 9)] == [(8, 10)] * 3


def test_a_lower_bound_below_values_that_were_seen_may_take_any_place_from_its_own_on():
    value = np.arange(1.0, 11.0)
    tables = estimate(value, flagged=value == 4)
    bound = Estimate(
        "iterations", value, tables.ci_low, np.where(value == 4, np.nan, tables.ci_high), True, value == 4,
        hardest_if_missing=True,
    )  # fmt: skip
    measure = ranking_of(m=bound).measures["m"]
    assert (measure.rank_low[3], measure.rank_high[3]) == (4, 10)
    assert (measure.rank_low[4], measure.rank_high[4]) == (4, 5)


def test_of_equal_neighbours_few_rankings_tell_any_apart():
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        # Ten pairs of equal tasks, far from each other; the errors are known.
        truth = np.repeat(np.arange(5), 2) * 5.0
        value = np.exp(truth + 0.1 * rng.standard_normal(10))
        measure = ranking_of(m=estimate(value, 1.645 * 0.1)).verdict[0]
        wrong += "4 of 9 neighbours" not in measure
    assert wrong <= 20  # 5 % of 200 and two standard deviations more


def test_of_equally_hard_tasks_few_are_said_to_be_harder_than_a_cleaner_one():
    rng, claims = np.random.default_rng(0), {1: 0, 2: 0}
    for _ in range(200):
        value = np.exp(0.1 * rng.standard_normal(10))
        claims[1] += "fails" in ranking_of(m=estimate(value, 1.645 * 0.1)).verdict[0]
        # The same from the curves of three seeds, whose variances differ from task to task.
        factor = np.exp(np.exp(0.5 * rng.standard_normal(10)) * 0.1 * rng.standard_normal((3, 10)))
        values = SeedValues(np.log(factor), np.zeros(10), *np.zeros((2, 10), bool), True, "nats")
        curves = LearningCurves(np.arange(2.0), *np.ones((3, 3, 10, 2)), np.full(10, 9.0))
        found = convergence_estimates(summary_over_seeds("m", values, curves, values), 10)["m"]
        claims[2] += "fails" in ranking_of(m=found).verdict[0]
    assert max(claims.values()) <= 200 * 0.05 + 2 * np.sqrt(200 * 0.05 * 0.95)  # "fails" has two ways at 2.5 % each


@pytest.mark.parametrize(("errors", "apart"), [((0.1, 0.1), 1), ((1e-9, np.sqrt(0.02)), 0)])
def test_the_test_of_a_difference_has_the_degrees_of_welch(errors, apart):
    # 3.5 standard errors apart: beyond the two-sided 5 % of Student's t with four degrees (2.8), not with two (4.3).
    halves = np.array(errors) * student_t.ppf(0.95, 2)
    two = estimate(np.exp([3.5 * np.sqrt(0.02), 0.0]), halves, degrees=2.0)
    tasks = make_tasks(PROCESS, 2)
    found = rank_tasks({"m": two}, tasks, PROCESS, dataset={"name": "test"}, grid="t", provenance={})
    assert f"{apart} of 1 neighbours" in found.verdict[0]


def test_tasks_that_differ_beyond_doubt_are_told_apart_however_many_there_are():
    tasks = make_tasks(PROCESS, 300)
    found = rank_tasks(
        {"m": estimate(2.0 ** -np.arange(300))}, tasks, PROCESS, dataset={"name": "test"}, grid="t", provenance={}
    )
    assert "299 of 299 neighbours in rank can be told apart" in found.verdict[0]


def test_a_task_without_a_value_is_never_the_easiest_where_all_others_are_flagged():
    value, flagged = 2.0 ** -np.arange(10.0), np.ones(10, bool)
    value[[3, 6]] = np.nan
    verdict = ranking_of(m=estimate(value, flagged=flagged)).verdict[0]
    assert "hardest t 301..400, 601..700 alike, easiest t 901..1000" in verdict
    value[:9] = np.nan
    verdict = ranking_of(m=estimate(value, flagged=np.arange(10) < 9)).verdict[0]
    assert "hardest t 1..900 alike, easiest t 901..1000" in verdict
    lonely = estimate(2.0 ** -np.arange(10.0), flagged=np.arange(10) > 0)
    assert "hardest t 1..100, the easiest cannot be named, since all others" in ranking_of(m=lonely).verdict[0]


def test_a_task_that_was_not_learned_may_be_the_hardest_and_not_the_easiest():
    value = 2.0 ** -np.arange(10.0)
    unlearned = np.isin(np.arange(10), (0, 9))
    ranking = ranking_of(m=estimate(value, flagged=unlearned, unlearned=unlearned))
    assert "hardest t 1..100, easiest t 801..900 (of those that are not flagged); 8 of 9 nei" in ranking.verdict[0]
    assert "* a bound or not learned): 901..1000* ~ 801..900 <" in ranking.verdict[1]
    assert (ranking.measures["m"].rank[9], ranking.measures["m"].rank_high[9]) == (1, 10)
    (doubt,) = ranking.doubts("m")
    assert "m is a bound, not valid, or of a task that was not learned at t 1..100, 901..1000:" in doubt


def test_nothing_is_decided_by_the_few_tasks_that_are_not_flagged():
    value = 2.0 ** -np.arange(10.0)
    verdict = ranking_of(m=estimate(value, flagged=np.arange(10) >= 4)).verdict[0]
    assert "'lower t is harder' is not decided, since half of the tasks or more are flagged" in verdict


def test_two_tasks_are_ranked_and_one_is_not():
    for count, said in ((2, "hardest t 1..500, easiest t 501..1000; 1 of 1 neighbours"), (1, "fewer than two tasks")):
        value = 2.0 ** -np.arange(count)
        tasks = make_tasks(PROCESS, count)
        found = rank_tasks({"m": estimate(value)}, tasks, PROCESS, dataset={"name": "test"}, grid="t", provenance={})
        assert said in found.verdict[0]


def test_measures_that_cannot_be_compared_are_named_in_one_sentence():
    value = np.arange(1.0, 11.0)
    few = estimate(np.where(np.arange(10) < 2, value, np.nan), hardest_if_missing=False)
    ranking = ranking_of(m=estimate(value), other=estimate(value), few=few, none=few)
    assert ranking.verdict[-1] == (
        "m is not compared with few, none: fewer than 3 tasks have a value in both, or one ties them all."
    )
    assert "m and other agree" in ranking.verdict[-2]


def test_where_the_budget_ended_first_for_all_nothing_is_told_apart():
    value = np.full(10, 100.0)
    bounds = Estimate(
        "iterations", value, value - 1, np.full(10, np.nan), True, np.ones(10, bool), hardest_if_missing=True
    )
    assert "or none was learned, or the budget ended first for all" in ranking_of(m=bounds).verdict[0]


def test_of_one_seed_nothing_is_told_apart_from_a_lower_bound():
    value, unknown = np.arange(1.0, 11.0), np.full(10, np.nan)
    bound = np.arange(10) >= 8
    alone = Estimate(
        "iterations", value, np.where(bound, value, np.nan), unknown, True, bound, hardest_if_missing=True
    )
    ranking = ranking_of(m=alone)
    assert "0 of 9 neighbours" in ranking.verdict[0]
    assert max(ranking.measures["m"].rank_low[:8]) == 1
    assert min(ranking.measures["m"].rank_high[:8]) == 10


def test_relative_entropies_that_are_rounding_are_zero_and_tie():
    t = np.arange(2, 1001)
    kl = 1e-33 * np.random.default_rng(0).random(999)
    table = pd.DataFrame({"t": t, "kl": kl, "ci_low": kl, "ci_high": kl, "per_dlogsnr2": kl * 100, "valid": True})
    for name, found in relative_entropy_estimates(table, TASKS).items():
        assert (found.value == 0).all()
        assert "no task can be told from another: all values are equal" in ranking_of(**{name: found}).verdict[0]


def test_relative_entropy_of_a_task_is_the_mean_of_its_valid_pairs_in_the_units_of_the_measure():
    t = np.arange(2, 1001)
    step = 0.5 + t / 1000  # d log-SNR squared
    kl = 1e-3 * t
    table = pd.DataFrame(
        {"t": t, "kl": kl, "ci_low": 0.9 * kl, "ci_high": 1.2 * kl, "per_dlogsnr2": kl / step, "valid": True}
    )
    # Of the second task 40 pairs are valid, of the third 60.
    table.loc[(t > 140) & (t <= 200) | (t > 260) & (t <= 300), "valid"] = False
    found = relative_entropy_estimates(table, TASKS)
    inside = (t > 300) & (t <= 400)
    for name, per_pair in (("relative_entropy", kl), ("relative_entropy_per_dlogsnr2", kl / step)):
        mean = per_pair[inside].mean()
        ends = [found[name].value[3], found[name].ci_low[3], found[name].ci_high[3]]
        np.testing.assert_allclose(ends, [mean, 0.9 * mean, 1.2 * mean])
        assert np.flatnonzero(found[name].flagged).tolist() == [1]


def test_a_task_without_a_value_is_a_doubt_for_whoever_orders_them():
    value = np.arange(1.0, 11.0)
    value[0] = np.nan
    (doubt,) = ranking_of(m=estimate(value)).doubts("m")
    assert doubt == "m has no value at t 1..100: the place of these tasks is not sure."
    assert ranking_of(m=estimate(np.arange(1.0, 11.0))).doubts("m") == []
