"""Which rankings survive another budget or seed."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from learning_curves import BUDGET, ITERATIONS, exponential, losses_of

from difficulty.convergence import convergence_table
from difficulty.measurement_folder import convergence_estimates
from difficulty.process import get_process
from difficulty.ranking import rank_tasks
from difficulty.stability import stability_sentences, stability_table
from difficulty.tasks import make_tasks


def sentence_of(losses, definition, tasks):
    estimates = convergence_estimates(convergence_table(losses, BUDGET), tasks)
    process = get_process("vp-linear")
    ranking = rank_tasks(
        estimates, make_tasks(process, tasks), process, dataset={}, grid="t", provenance={}
    )
    sentences = stability_sentences(stability_table(losses, BUDGET), ranking.measures)
    return next(s for s in sentences if s.startswith(definition + " "))


def test_curves_that_never_cross_keep_their_ranks_at_every_budget():
    losses = losses_of([exponential(rate) for rate in (100, 150, 200, 300, 500)])
    sentence = sentence_of(losses, "excess_nats", 5)
    half = max(i for i in ITERATIONS if i <= BUDGET // 2)
    assert f"half the budget ({half} of {BUDGET} iterations) tau +1.00" in sentence
    assert "twice the budget tau +1.00" in sentence
    assert "5 of 5 ranks survive both" in sentence
    assert "between seeds tau at least +1.00" in sentence


def test_curves_that_cross_after_the_budget_lose_their_ranks():
    # Low at first but flat, against high at first but falling: the order turns round between budget and twice it.
    losses = losses_of([exponential(1e6, 0.02 * (k + 1)) for k in range(3)] + [exponential(250, 5.0)])
    sentence = sentence_of(losses, "excess_nats", 4)
    assert "twice the budget tau +1.00" not in sentence
    assert "4 of 4" not in sentence


@pytest.mark.parametrize(
    ("half", "double", "survivors"),
    [([1, 2, 3, 4], [1, 2, 3, 4], 4), ([1, 2, 4, 3], [1, 2, 3, 4], 2), ([1, 2, 3, 4], [2, 1, 3, 4], 2)],
)
def test_a_rank_survives_that_lies_in_its_interval_at_both_budgets(half, double, survivors):
    ranks = {"budget": [1, 2, 3, 4], "half budget": half, "double budget": double}
    table = pd.concat(
        pd.DataFrame({"definition": "m", "variant": name, "task": range(4), "rank": own, "value": 0.0, "iterations": 9})
        for name, own in ranks.items()
    )
    measure = SimpleNamespace(rank_low=[1, 2, 3, 4], rank_high=[1, 2, 3, 4], flagged=[False] * 4)
    (sentence,) = stability_sentences(table, {"m": measure})
    assert f"{survivors} of 4 ranks survive both" in sentence


def test_ranks_stand_in_the_table_for_every_variant():
    losses = losses_of([exponential(rate) for rate in (100, 200, 400)])
    table = stability_table(losses, BUDGET)
    assert set(table["variant"]) == {"budget", "half budget", "double budget", "seed 0", "seed 1", "seed 2"}
    assert (table.groupby(["definition", "variant"])["rank"].sum() == 6).all()
    half = table[(table["definition"] == "excess_nats") & (table["variant"] == "half budget")]
    # The checkpoint at or before half the budget.
    nearest = losses.loc[losses["iteration"] <= BUDGET // 2, "iteration"].max()
    np.testing.assert_allclose(half["value"], [np.exp(-nearest / rate) for rate in (100, 200, 400)], rtol=1e-5)


@pytest.mark.parametrize("definition", ["excess_nats", "log_regret"])
def test_noise_between_seeds_shows_in_the_agreement(definition):
    losses = losses_of([exponential(500 * 1.02**k) for k in range(6)], noise=0.3)
    assert "between seeds tau at least +1.00" not in sentence_of(losses, definition, 6)


def test_of_one_seed_whose_ranks_may_be_any_none_is_said_to_survive():
    losses = losses_of([exponential(rate) for rate in (100, 150, 200, 300, 500)], seeds=(0,))
    assert "survive" not in sentence_of(losses, "excess_nats", 5)


def test_nothing_survives_where_nothing_was_learned():
    losses = losses_of([lambda i: 5.0] * 4)
    process = get_process("vp-linear")
    estimates = convergence_estimates(convergence_table(losses, BUDGET), 4)
    ranking = rank_tasks(estimates, make_tasks(process, 4), process, dataset={}, grid="t", provenance={})
    assert stability_sentences(stability_table(losses, BUDGET), ranking.measures) == []
