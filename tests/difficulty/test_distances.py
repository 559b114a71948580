"""Distances between samples and data whose answers are known."""

import numpy as np
import pytest

from difficulty.distances import frechet, sliced_wasserstein

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
