import numpy as np
import pandas as pd
import pytest
from scipy import stats

from difficulty.errors import InputError
from training.effects import detectable, effects, holm, iterations_to_baseline, paired_intervals


def _results(values, schedule="cosine"):
    """values: arm -> metric -> list over seeds."""
    return pd.DataFrame(
        [(arm, schedule, seed, metric, value) for arm, metrics in values.items() for metric, list_ in metrics.items()
         for seed, value in enumerate(list_)],
        columns=["arm", "lr_schedule", "seed", "metric", "value"],
    )  # fmt: skip


def test_swapping_the_names_of_two_arms_flips_the_sign_and_nothing_else():
    rng = np.random.default_rng(0)
    a, b = np.exp(rng.normal(0, 0.02, 8)), np.exp(rng.normal(0.02, 0.02, 8))
    forward = effects(_results({"a": {"loss": a}, "b": {"loss": b}}), "a").iloc[0]
    backward = effects(_results({"a": {"loss": b}, "b": {"loss": a}}), "a").iloc[0]
    assert forward["log_ratio"] == -backward["log_ratio"]
    assert (forward["ci_low"], forward["ci_high"]) == (-backward["ci_high"], -backward["ci_low"])
    assert (forward["p"], forward["p_holm"], forward["mde"]) == (backward["p"], backward["p_holm"], backward["mde"])


def _many(arms):
    """arms: name -> (comparisons, seeds); every comparison is a metric of its own."""
    return _results({name: {f"m{i}": list(row) for i, row in enumerate(values)} for name, values in arms.items()})


def test_two_equal_arms_are_called_different_at_the_nominal_rate():
    rng = np.random.default_rng(1)
    shared = rng.normal(size=(2000, 5))  # what the seeds have in common
    a, b = (np.exp(shared + 0.01 * rng.normal(size=(2000, 5))) for _ in range(2))
    table = effects(_many({"a": a, "b": b}), "a")
    tolerance = 3 * np.sqrt(0.05 * 0.95 / 2000)
    assert (table["p"] < 0.05).mean() == pytest.approx(0.05, abs=tolerance)
    assert ((table["ci_low"] <= 0) & (table["ci_high"] >= 0)).mean() == pytest.approx(0.95, abs=tolerance)


def test_holm_keeps_the_rate_of_any_false_claim_over_many_arms():
    rng = np.random.default_rng(2)
    claims = [
        effects(_results({f"arm{i}": {"loss": np.exp(0.01 * rng.normal(size=6))} for i in range(6)}), "arm0")["verdict"]
        for _ in range(200)
    ]
    # the arms share their baseline, so the tests are dependent and Holm is conservative
    any_claim = np.mean([(verdicts != "no difference shown").any() for verdicts in claims])
    assert any_claim <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_the_detectable_effect_is_found_four_times_in_five_however_few_seeds_there_are(n):
    drawn = detectable(n) / np.sqrt(n) + np.random.default_rng(n).standard_normal((100_000, n))
    found = stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.005)


def test_effect_of_the_minimal_detectable_size_is_found_four_times_in_five():
    rng = np.random.default_rng(3)
    sd, n = 0.02, 8
    one = np.ones((2000, n))
    noise = effects(_many({"a": one, "b": np.exp(sd * rng.normal(size=(2000, n)))}), "a")
    size = float(np.sqrt(np.mean(np.square(noise["mde"]))))
    shifted = effects(_many({"a": one, "b": np.exp(size + sd * rng.normal(size=(2000, n)))}), "a")
    # the formula takes the quantiles of t at both ends, which errs by a few percent at eight seeds
    assert (shifted["p"] < 0.05).mean() == pytest.approx(0.80, abs=0.05)


def test_holm_against_its_published_arithmetic():
    # p = .01, .02, .03, .005 with m = 4: sorted .005*4, .01*3, .02*2, .03*1, made monotone
    assert np.allclose(holm([0.01, 0.02, 0.03, 0.005]), [0.03, 0.04, 0.04, 0.02])


def test_log_ratio_and_interval_are_those_of_the_paired_t_test():
    rng = np.random.default_rng(4)
    a, b = np.exp(rng.normal(size=7)), np.exp(rng.normal(size=7))
    row = effects(_results({"a": {"m": a}, "b": {"m": b}}), "a").iloc[0]
    test = stats.ttest_rel(np.log(b), np.log(a))
    interval = test.confidence_interval(0.95)
    assert row["p"] == pytest.approx(test.pvalue)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((interval.low, interval.high))


def test_arms_that_are_identical_show_no_difference():
    row = effects(_results({"a": {"m": [1.0, 2.0]}, "b": {"m": [1.0, 2.0]}}), "a").iloc[0]
    assert (row["log_ratio"], row["ci_low"], row["ci_high"], row["p"]) == (0, 0, 0, 1)
    assert row["verdict"] == "no difference shown"


def test_certain_but_tiny_effect_is_called_less_than_one_percent():
    rng = np.random.default_rng(5)
    b = np.exp(-0.003 + 1e-4 * rng.normal(size=6))
    row = effects(_results({"a": {"m": np.ones(6)}, "b": {"m": b}}), "a").iloc[0]
    assert row["verdict"] == "helps, by less than 1 %"


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_value_without_a_logarithm_is_refused(value):
    with pytest.raises(InputError, match="missing for a seed, infinite or not positive"):
        effects(_results({"a": {"m": [1.0, 1.1, 0.9]}, "b": {"m": [1.0, value, 1.2]}}), "a")


def test_one_seed_gives_a_number_but_no_interval_and_no_verdict():
    row = effects(_results({"a": {"m": [1.0]}, "b": {"m": [0.5]}}), "a").iloc[0]
    assert row["log_ratio"] == pytest.approx(np.log(0.5))
    assert np.isnan(row["ci_low"])
    assert row["verdict"] == "one seed, no interval"


def test_repeat_of_the_baseline_is_the_noise_floor_and_not_among_the_tested():
    rng = np.random.default_rng(6)
    arms = {name: {"m": np.exp(0.1 * rng.normal(size=6))} for name in ("a", "again", "b")}
    table = effects(_results(arms), "a", again=["again"]).set_index("arm")
    assert table.loc["again", "verdict"] == "noise floor (A/A)"
    assert np.isnan(table.loc["again", "p_holm"])
    half = 0.5 * (table.loc["again", "ci_high"] - table.loc["again", "ci_low"])
    assert table.loc["b", "noise_floor"] == pytest.approx(half)
    assert table.loc["b", "p_holm"] == table.loc["b", "p"]


def test_missing_seeds_and_values_that_are_not_positive_are_refused():
    table = _results({"a": {"m": [1.0, 2.0]}, "b": {"m": [1.0, 2.0]}})
    with pytest.raises(InputError, match="every seed"):
        effects(table.iloc[:-1], "a")
    with pytest.raises(InputError, match="positive"):
        effects(table.assign(value=0.0), "a")
    with pytest.raises(InputError, match="baseline"):
        effects(table, "c")


def test_iterations_to_the_baseline_are_interpolated_and_censored():
    rows = [("a", "cosine", 0, s, "nats", v) for s, v in ((100, 4.0), (200, 3.0), (300, 2.0))]
    rows += [("fast", "cosine", 0, s, "nats", v) for s, v in ((100, 3.0), (200, 1.0), (300, 0.5))]
    rows += [("slow", "cosine", 0, s, "nats", v) for s, v in ((100, 9.0), (200, 8.0), (300, 7.0))]
    columns = ["arm", "lr_schedule", "seed", "step", "metric", "value"]
    table = iterations_to_baseline(pd.DataFrame(rows, columns=columns), "a", "nats").set_index("arm")
    assert table.loc["a", "share"] == 1
    assert table.loc["fast", "iterations"] == 150
    assert not table.loc["fast", "censored"]
    assert table.loc["slow", "censored"]


def test_effects_are_those_within_a_learning_rate_schedule_and_are_corrected_together():
    rng = np.random.default_rng(7)
    one, other = (
        _results({arm: {"m": np.exp(shift + 0.1 * rng.normal(size=6))} for arm in "abc"}, name)
        for name, shift in (("constant", 0.0), ("cosine", 3.0))
    )
    both = effects(pd.concat([one, other]), "a")
    for name, alone in (("constant", effects(one, "a")), ("cosine", effects(other, "a"))):
        within = both[both["lr_schedule"] == name].reset_index(drop=True)
        same = ["arm", "metric", "log_ratio", "ci_low", "ci_high", "p", "mde"]
        pd.testing.assert_frame_equal(within[same], alone[same])
    assert np.allclose(both["p_holm"], holm(both["p"].tolist()))


def test_iterations_are_counted_to_the_baseline_of_the_same_schedule():
    final = {"constant": 5.0, "cosine": 1.0}
    rows = [
        (arm, schedule, 0, step, "nats", final[schedule] * (301 - step) * scale)
        for schedule in final
        for arm, scale in (("a", 1.0), ("half", 0.5))
        for step in (100, 200, 300)
    ]
    columns = ["arm", "lr_schedule", "seed", "step", "metric", "value"]
    table = iterations_to_baseline(pd.DataFrame(rows, columns=columns), "a", "nats")
    assert len(table) == 4
    assert table.groupby("arm")["iterations"].nunique().eq(1).all()


def test_interval_over_seeds_is_that_of_the_t_test():
    rng = np.random.default_rng(8)
    differences = pd.DataFrame(rng.normal(size=(3, 5)))
    found = paired_intervals(differences)
    for row, (middle, low, high) in zip(differences.to_numpy(), found.to_numpy(), strict=True):
        interval = stats.ttest_1samp(row, 0).confidence_interval(0.95)
        assert (middle, low, high) == pytest.approx((row.mean(), interval.low, interval.high))
