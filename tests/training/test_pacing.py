import json
import math

import numpy as np
import pytest

from difficulty.errors import InputError
from difficulty.records import as_json
from training.pacing import PACINGS, make_pacing


def _stage_lengths(pacing, losses, stages):
    """Lengths of the stages that a stream of batch losses gives."""
    lengths, start, stage = [], 0, 0
    for step, loss in enumerate(losses):
        if stage < stages - 1 and pacing.due(stage, start, step):
            lengths.append(step - start)
            start, stage = step, stage + 1
            pacing.begin_stage(stage)
        pacing.observe(loss)
    return lengths


def test_patience_waits_as_long_as_the_loss_keeps_falling():
    assert _stage_lengths(make_pacing("patience", {"tau": 3}, 2, 1000), np.linspace(1, 0, 500), 2) == []


def test_patience_ends_a_stage_exactly_tau_iterations_after_the_last_minimum():
    losses = [3.0, 2.0, 1.0] + [1.5] * 20  # the minimum is iteration 2; 3..7 bring none
    assert _stage_lengths(make_pacing("patience", {"tau": 5}, 2, 1000), losses, 2) == [8]


def test_patience_is_a_clock_on_stationary_noise():
    # nothing is learned, yet stages end after 1.79 tau: the exact mean for tau = 100, from the law of records
    noise = np.random.default_rng(0).normal(size=200_000)
    lengths = _stage_lengths(make_pacing("patience", {"tau": 100}, 1001, 10**6), noise, 1001)
    assert len(lengths) == 1000
    assert np.mean(lengths) == pytest.approx(179.0, abs=4 * np.std(lengths) / np.sqrt(1000))


def test_published_patience_forgets_the_minimum_at_each_stage_and_patience_kept_does_not():
    # the second stage has higher losses, all falling
    losses = [0.0] * 6 + list(np.linspace(2, 1, 100))
    assert _stage_lengths(make_pacing("patience", {"tau": 5}, 3, 1000), losses, 3) == [6]
    assert _stage_lengths(make_pacing("patience-kept", {"tau": 5}, 3, 1000), losses, 3) == [6, 5]


def test_smoothed_patience_does_not_mistake_noise_for_convergence():
    # a slow fall under heavy noise: raw patience stops early, smoothed patience goes on
    noise = np.random.default_rng(1).normal(size=3000)
    losses = np.linspace(10, 0, 3000) + noise
    raw = _stage_lengths(make_pacing("patience", {"tau": 100}, 2, 10**6), losses, 2)
    smooth = _stage_lengths(make_pacing("patience-smoothed", {"tau": 100}, 2, 10**6), losses, 2)
    assert raw
    assert not smooth


def test_fraction_shares_a_tenth_of_the_budget_equally():
    pacing = make_pacing("fraction", {}, 5, 1000)
    ends = [next(step for step in range(1001) if pacing.due(stage, 0, step)) for stage in range(4)]
    assert ends == [25, 50, 75, 100]


def _run_heldout(pacing, improvement, budget, seed=0, draws=200):
    """Length of the first stage when every check multiplies the expected loss by (1 - improvement)."""
    rng = np.random.default_rng(seed)
    base = rng.exponential(size=draws)
    for step in range(1, budget):
        if step % pacing.check_every == 0:
            checks = step // pacing.check_every
            losses = base * (1 - improvement) ** checks * np.exp(0.05 * rng.normal(size=draws))
            pacing.observe_heldout(losses.tolist())
        reason = pacing.due(0, 0, step)
        if reason:
            return step, reason
    return budget, ""


def test_heldout_stage_goes_on_while_improvement_is_significant_and_ends_when_it_is_not():
    step, reason = _run_heldout(make_pacing("held-out", {"check_every": 10, "cap": 1.0}, 2, 2000), 0.05, 2000)
    assert step >= 1990
    step, reason = _run_heldout(make_pacing("held-out", {"check_every": 10, "least": 0}, 2, 2000), 0.0, 2000)
    assert step <= 100
    assert "not significant" in reason


def test_heldout_respects_its_shortest_and_longest_stage_and_its_cap():
    still = {"check_every": 10, "least": 300}
    assert _run_heldout(make_pacing("held-out", still, 2, 4000), 0.0, 4000)[0] >= 300
    improving = {"check_every": 10, "most": 200}
    step, reason = _run_heldout(make_pacing("held-out", improving, 2, 4000), 0.05, 4000)
    assert step == 200
    assert "longest" in reason
    step, reason = _run_heldout(make_pacing("held-out", {"check_every": 10, "cap": 0.1}, 2, 4000), 0.05, 4000)
    assert step == 400
    assert "cap" in reason


def test_heldout_gives_every_stage_an_equal_share_of_what_is_left_of_its_cap():
    pacing = make_pacing("held-out", {"cap": 0.5}, 4, 60)  # nothing is reported, so that the cap alone ends a stage
    assert _stage_lengths(pacing, [1.0] * 60, 4) == [10, 10, 10]
    ended_early = make_pacing("held-out", {"cap": 0.5}, 4, 60)
    assert ended_early.due(1, 4, 16) is None
    assert "share" in ended_early.due(1, 4, 17)


def test_heldout_with_nothing_to_learn_mostly_stops_at_its_first_test():
    first = [
        _run_heldout(make_pacing("held-out", {"check_every": 10, "least": 0}, 2, 4000), 0.0, 4000, seed)[0] == 20
        for seed in range(100)
    ]
    # one-sided test at 5 %: about 95 of 100 stop at the second check, the first that can compare
    assert sum(first) >= 88


@pytest.mark.parametrize("draws", [2, 5, 64])
def test_heldout_takes_noise_for_improvement_at_its_level_however_few_the_draws(draws):
    rng = np.random.default_rng(0)
    taken = []
    for _ in range(2000):
        pacing = make_pacing("held-out", {"least": 0}, 2, 1000)
        for _ in range(2):
            pacing.observe_heldout(np.exp(rng.normal(size=draws)).tolist())
        reason = pacing.due(0, 0, 100)
        taken.append(reason is None)
        assert reason is None or f"{draws} draws" in reason
    # z_least = 1.64 is 5.05 %; the share of 2000 has a standard error of 0.5 %
    assert 0.035 < np.mean(taken) < 0.067


@pytest.mark.parametrize("rule", PACINGS)
def test_every_rule_resumes_from_its_state(rule):
    rng = np.random.default_rng(0)
    first, second = make_pacing(rule, {}, 4, 1000), make_pacing(rule, {}, 4, 1000)
    for _ in range(150):
        first.observe(float(rng.normal()))
    first.observe_heldout([math.inf, math.nan, *rng.exponential(size=20).tolist()])
    second.load_state_dict(json.loads(json.dumps(as_json(first.state_dict()), allow_nan=False)))
    later, heldout = rng.normal(size=200), [*rng.exponential(size=21).tolist(), math.inf]
    for pacing in (first, second):
        for loss in later:
            pacing.observe(float(loss))
        pacing.observe_heldout(heldout)
    assert first.state_dict() == second.state_dict()
    assert [first.due(1, 0, step) for step in range(400)] == [second.due(1, 0, step) for step in range(400)]


@pytest.mark.parametrize(
    ("rule", "options"),
    [("patience", {"tau": 0}), ("fraction", {"share": 1.5}), ("held-out", {"cap": 0.0}), ("fraction", {"tau": 3}),
     ("pace", {})],
)  # fmt: skip
def test_bad_options_are_refused(rule, options):
    with pytest.raises(InputError):
        make_pacing(rule, options, 3, 100)


def test_fresh_patience_has_no_minimum():
    assert math.isinf(make_pacing("patience", {}, 2, 10).best)


@pytest.mark.parametrize(
    ("rule", "options", "kind"),
    [
        ("patience", {"tau": math.nan}, "whole"),
        ("patience", {"tau": 1.5}, "whole"),
        ("patience-kept", {"tau": True}, "whole"),
        ("held-out", {"check_every": 2.5}, "whole"),
        ("held-out", {"least": math.inf}, "whole"),
        ("held-out", {"z_least": math.nan}, "finite"),
        ("fraction", {"share": math.nan}, "finite"),
        ("patience", {"keep_best": 3}, "true or false"),
    ],
)
def test_options_that_are_no_numbers_of_their_kind_are_refused(rule, options, kind):
    with pytest.raises(InputError, match=f"of pacing '{rule}' must be .*{kind}"):
        make_pacing(rule, options, 2, 100)
