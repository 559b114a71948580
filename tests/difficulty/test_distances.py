"""Distances between samples and data whose answers are known."""

import numpy as np
import pytest

from difficulty.distances import _quantiles, frechet, kernel, precision, recall, sliced_wasserstein

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


@pytest.mark.parametrize("n", [3, 512, 1000])
def test_quantiles_are_those_of_numpy(n):
    x = X[:n]
    levels = (np.arange(512) + 0.5) / 512
    assert np.allclose(_quantiles(x), np.quantile(x, levels, axis=0), atol=1e-12)


def polynomial(x, y):
    return (x @ y / len(x) + 1) ** 3


def test_kernel_distance_is_the_mean_over_pairs_of_different_points():
    a, b = X[:4, :3], X[4:9, :3] + 0.5
    same_a = np.mean([polynomial(a[i], a[j]) for i in range(4) for j in range(4) if i != j])
    same_b = np.mean([polynomial(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    across = np.mean([polynomial(x, y) for x in a for y in b])
    assert kernel(a, b) == pytest.approx(same_a + same_b - 2 * across, rel=1e-12)


def test_kernel_distance_of_gaussians_is_that_of_their_moments_on_average():
    # (x.y/d + 1)^3 expands into <m, m'>, <S, S'> and <T, T'> of the first three raw moments.
    def moments(mean, var):
        one = np.eye(2)
        second = np.outer(mean, mean) + var * one
        third = np.einsum("i,j,k->ijk", mean, mean, mean) + var * (
            np.einsum("i,jk->ijk", mean, one) + np.einsum("j,ik->ijk", mean, one) + np.einsum("k,ij->ijk", mean, one)
        )
        return mean, second, third

    def expected(p, q):
        inner = [float((a * b).sum()) / 2 ** (order + 1) for order, (a, b) in enumerate(zip(p, q, strict=True))]
        return 1 + 3 * inner[0] + 3 * inner[1] + inner[2]

    p, q = moments(np.array([0.5, -0.2]), 0.6), moments(np.array([-0.3, 0.4]), 1.1)
    truth = expected(p, p) + expected(q, q) - 2 * expected(p, q)
    rng = np.random.default_rng(1)
    found = [
        kernel(p[0] + 0.6**0.5 * rng.normal(size=(30, 2)), q[0] + 1.1**0.5 * rng.normal(size=(40, 2)))
        for _ in range(4000)
    ]
    error = np.std(found) / np.sqrt(len(found))
    assert error < 0.02 * truth * 2
    assert np.mean(found) == pytest.approx(truth, abs=4 * error)


def test_kernel_distance_of_one_law_is_zero_on_average_and_not_positive():
    found = [kernel(a, b) for a, b in X.reshape(50, 2, 20, 6)]
    assert np.mean(found) == pytest.approx(0, abs=4 * np.std(found) / np.sqrt(len(found)))
    assert min(found) < 0


def test_precision_and_recall_of_points_on_a_line_are_counted_by_hand():
    data = np.array([[0.0], [1.0], [2.0], [3.0], [10.0]])
    # Distances to the third neighbour are 3, 2, 2, 3 and 9: the balls are [-3, 3], [-1, 3], [0, 4], [0, 6], [1, 19].
    samples = np.array([[-3.0], [-3.1], [6.5], [19.0], [19.1]])
    assert precision(samples, data) == pytest.approx(3 / 5)
    # Third neighbours of the samples: 22, 22.1, 12.6, 22, 22.2; the ball around 19.1 begins at -3.1 and holds all data.
    assert recall(samples, data) == 1.0


def test_precision_counts_what_is_drawn_and_recall_what_exists():
    left, right = X[:500], X[500:1000] + 20.0
    both = np.concatenate([left, right])
    one_mode = X[1000:1500]
    assert precision(one_mode, both) > 0.9
    assert recall(one_mode, both) == pytest.approx(0.5, abs=0.05)
    assert precision(both, left) == pytest.approx(0.5, abs=0.05)


def test_large_matrices_of_pairs_are_cut_without_changing_the_result(monkeypatch):
    a, b = X[:300], X[300:700]
    whole = kernel(a, b), precision(a, b), recall(a, b)
    monkeypatch.setattr("difficulty.distances.ROWS", 37)
    assert (kernel(a, b), precision(a, b), recall(a, b)) == pytest.approx(whole, rel=1e-12)
