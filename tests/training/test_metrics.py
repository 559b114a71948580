import numpy as np
import pytest
import torch

from difficulty.errors import InputError
from training.metrics import METRICS, SampleJudge, frechet, sliced_wasserstein

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2000, 6))


def test_frechet_distance_of_a_shift_is_its_squared_length():
    shift = np.arange(6.0)
    assert frechet(X, X) == pytest.approx(0, abs=1e-9)
    assert frechet(X, X + shift) == pytest.approx(float(shift @ shift), rel=1e-9)


def test_frechet_distance_of_a_scale_is_that_of_the_standard_deviations():
    # C_b = 4 C_a: tr(C + 4C - 2 * 2C) = tr C
    centred = X - X.mean(0)
    assert frechet(centred, 2 * centred) == pytest.approx(float(np.trace(np.cov(centred, rowvar=False))), rel=1e-6)


def test_frechet_distance_is_defined_for_singular_covariances():
    flat = np.c_[X[:, :1], np.zeros((2000, 2))]
    assert frechet(flat, flat + 1.0) == pytest.approx(3.0, rel=1e-6)


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    assert sliced_wasserstein(X, X) == 0
    one = np.zeros(6)
    one[0] = 2.0
    # mean |u_1| of a random direction in 6 dimensions is Gamma(3)/(sqrt(pi) Gamma(3.5)) = 0.3395
    assert sliced_wasserstein(X, X + one) == pytest.approx(2 * 0.3395, rel=0.15)


def test_the_name_of_a_metric_says_the_distance_and_the_features():
    assert set(METRICS) == {"fd-pixels", "fd-pca", "sw-pixels", "sw-pca"}
    with pytest.raises(InputError):
        SampleJudge(torch.from_numpy(X), ("fid",))


def test_samples_of_the_data_are_as_far_as_two_halves_of_it():
    data = torch.from_numpy(X).float()
    judge = SampleJudge(data[:1000], METRICS)
    fresh, shifted = judge(data[1000:]), judge(data[1000:] + 1)
    floor = judge.split_half()
    for name in METRICS:
        assert fresh[name] < 3 * floor[name]
        assert shifted[name] > 5 * floor[name]


def test_pca_features_do_not_depend_on_a_rotation_of_the_data():
    rotation, _ = np.linalg.qr(RNG.normal(size=(6, 6)))
    other = RNG.normal(size=(2000, 6)) * 1.3
    plain = SampleJudge(torch.from_numpy(X), ("fd-pca",))(torch.from_numpy(other))["fd-pca"]
    turned = SampleJudge(torch.from_numpy(X @ rotation), ("fd-pca",))(torch.from_numpy(other @ rotation))["fd-pca"]
    assert plain == pytest.approx(turned, rel=1e-6)
