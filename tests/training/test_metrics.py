import numpy as np
import pytest
import torch

from difficulty.errors import InputError
from training.metrics import DISTANCES, METRICS, SampleJudge, check_metrics

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2000, 6))
PLAIN = [f"{distance}-{features}" for distance in DISTANCES for features in ("pixels", "pca")]


def test_the_name_of_a_metric_says_the_distance_and_the_features():
    assert set(METRICS) == {
        f"{distance}-{features}"
        for distance in ("fd", "kid", "sw", "precision", "recall")
        for features in ("pixels", "pca", "digits-cnn", "inception")
    }
    with pytest.raises(InputError, match="unknown metric 'fid'"):
        SampleJudge(torch.from_numpy(X), ("fid",))


@pytest.mark.parametrize("name", PLAIN)
def test_samples_of_the_data_are_as_near_as_the_data_and_shifted_ones_are_not(name):
    data = torch.from_numpy(X).float()
    judge = SampleJudge(data[:600], [name])
    found = judge.evaluate(data[600:1200])[name]
    shifted = judge.evaluate(data[600:1200] + 2)[name]
    assert abs(found.value - found.of_data) < 5 * found.se + abs(found.of_data)
    assert (shifted.ci_high < found.ci_low) if found.better == "higher" else (shifted.ci_low > found.ci_high)
    assert found.value == judge(data[600:1200])[name]
    assert judge.of_data(600)[name] == judge.of_data(300)[name] == found.of_data  # there are but 600 data
    assert (judge.compared(600), judge.compared(200)) == (300, 200)


def test_bias_of_few_samples_is_stated_as_that_of_as_few():
    data = torch.from_numpy(X).float()
    judge = SampleJudge(data[:1600], ("fd-pixels", "sw-pixels"))
    # Perfect samplers of 50: the mean over eight is theirs alone, and the data in their place show the same.
    perfect = [judge(data[1600 + 50 * part : 1650 + 50 * part]) for part in range(8)]
    for name, stated in judge.of_data(50).items():
        assert 0.6 < stated / np.mean([found[name] for found in perfect]) < 1.6
        assert stated > 2 * judge.of_data(800)[name]


@pytest.mark.parametrize("name", ["fd-pixels", "kid-pixels", "sw-pixels", "precision-pixels", "recall-pixels"])
def test_standard_error_is_the_deviation_over_repetitions(name):
    rng = np.random.default_rng(3)
    found, errors = [], []
    for _ in range(50):
        data, samples = rng.normal(size=(300, 2)), 0.6 * rng.normal(size=(200, 2)) + 0.5
        judged = SampleJudge(torch.from_numpy(data), [name]).evaluate(torch.from_numpy(samples))[name]
        found.append(judged.value)
        errors.append(judged.se)
    # The deviation over 50 repetitions is known to 10 %. Shares inside balls leap, and their errors come out too wide.
    widest = 2.0 if name.startswith(("precision", "recall")) else 1.3
    assert 0.75 < np.sqrt(np.mean(np.square(errors))) / np.std(found) < widest


def test_bounds_of_a_metric_hold_for_its_interval():
    judged = SampleJudge(torch.from_numpy(X), ("precision-pixels", "fd-pixels")).evaluate(torch.from_numpy(X[:1000]))
    assert judged["precision-pixels"].ci_high <= 1
    assert judged["fd-pixels"].ci_low >= 0


def test_pca_features_do_not_depend_on_a_rotation_of_the_data():
    rotation, _ = np.linalg.qr(RNG.normal(size=(6, 6)))
    other = RNG.normal(size=(2000, 6)) * 1.3
    plain = SampleJudge(torch.from_numpy(X), ("fd-pca",))(torch.from_numpy(other))["fd-pca"]
    turned = SampleJudge(torch.from_numpy(X @ rotation), ("fd-pca",))(torch.from_numpy(other @ rotation))["fd-pca"]
    assert plain == pytest.approx(turned, rel=1e-6)


def test_only_positive_metrics_that_are_better_when_smaller_have_ratios():
    check_metrics(["fd-pca", "sw-pixels"], ratios=True)
    for name in ("kid-pca", "precision-pixels", "recall-inception"):
        check_metrics([name])
        with pytest.raises(InputError, match="no ratio"):
            check_metrics([name], ratios=True)


def test_too_few_samples_are_refused():
    with pytest.raises(InputError, match="at least 40 data, got 39"):
        SampleJudge(torch.zeros(39, 2))
    with pytest.raises(InputError, match="at least 40 samples, got 3"):
        SampleJudge(torch.from_numpy(X))(torch.zeros(3, 6))
