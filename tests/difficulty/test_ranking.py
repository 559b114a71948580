"""Rankings of estimates whose order is known."""

import json

import numpy as np
import pytest

from difficulty.errors import InputError
from difficulty.process import get_process
from difficulty.ranking import Estimate, Ranking, rank_tasks
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
