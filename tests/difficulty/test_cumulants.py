"""Cumulants of the data against those of a fit: exact norms, and laws of many parts that no direction gives away."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from difficulty.datasets import load_dataset, split_samples
from difficulty.intervals import Z90
from difficulty.process import get_process
from difficulty.relative_entropy.auto import candidates
from difficulty.relative_entropy.cumulants import DRAWS, _kernel, _norm_squared, _side, lacking
from difficulty.relative_entropy.estimate import Settings
from difficulty.relative_entropy.families import Candidate
from difficulty.relative_entropy.judge import CALIBRATED, Judge
from difficulty.relative_entropy.mixture import MixtureOptions, _log_joint, fit_mixture
from difficulty.relative_entropy.pairs import make_pairs
from difficulty.relative_entropy.sample import Sample, make_sample

PAIRS = make_pairs(get_process("vp-linear"), [65, 150])


def hermite(k, x, c):
    """The Hermite tensor of order k of one row x for a diagonal covariance c, by its definition."""
    delta = np.diag(c)
    if k == 3:
        out = np.einsum("i,j,k->ijk", x, x, x)
        for pattern in ("ij,k->ijk", "ik,j->ijk", "jk,i->ijk"):
            out -= np.einsum(pattern, delta, x)
        return out
    out = np.einsum("i,j,k,l->ijkl", x, x, x, x)
    for a, b in itertools.combinations("ijkl", 2):
        rest = "".join(sorted(set("ijkl") - {a, b}))
        out -= np.einsum(f"{a}{b},{rest[0]},{rest[1]}->ijkl", delta, x, x)
    for pattern in ("ij,kl->ijkl", "ik,jl->ijkl", "il,jk->ijkl"):
        out += np.einsum(pattern, delta, delta)
    return out


@pytest.mark.parametrize("k", [3, 4])
def test_inner_products_of_hermite_tensors_need_no_tensor(k):
    rng = np.random.default_rng(k)
    x, c = rng.standard_normal((5, 3)), np.array([0.3, 1.0, 0.7])
    side = _side(torch.from_numpy(x), torch.from_numpy(c))
    tensors = np.stack([hermite(k, row, c).ravel() for row in x])
    np.testing.assert_allclose(_kernel(k, side, side, torch.from_numpy(c)), tensors @ tensors.T, rtol=1e-6, atol=1e-6)


def test_the_norm_of_the_fourth_cumulants_of_a_cube_is_the_exact_one():
    # Uniform with variance 1: the fourth cumulant is -6/5 along each axis, and there are no others.
    x = math.sqrt(3) * (2 * np.random.default_rng(0).random((4000, 12)) - 1)
    norm, error = _norm_squared(4, [x], np.ones(12))
    assert abs(norm - 12 * 1.2**2) < 4 * error + 0.3
    assert abs(_norm_squared(3, [x], np.ones(12))[0]) < 4 * _norm_squared(3, [x], np.ones(12))[1]


def gaussian_draws(shape):
    return [np.random.default_rng([7, number]).standard_normal(shape) for number in range(DRAWS)]


def test_a_gaussian_is_not_refuted_and_a_rotated_cube_lacks_what_it_does():
    rng, shape = np.random.default_rng(1), (3000, 24)
    assert (lacking(rng.standard_normal(shape), gaussian_draws(shape), np.ones(24), PAIRS, gaussian=True) == 0).all()
    cube = math.sqrt(3) * (2 * rng.random(shape) - 1) @ ortho_group.rvs(24, random_state=0)
    found = lacking(cube, gaussian_draws(shape), np.ones(24), PAIRS, gaussian=True)
    b = 1 / (1 + np.exp(-2 * PAIRS.tau))
    exact = 0.5 * 16 / 24 * (2 * b * PAIRS.dtau + PAIRS.dlog_alpha) ** 2 * (1 - b) ** 4 * 24 * 1.2**2
    np.testing.assert_allclose(found[:, 0], exact, rtol=0.25)
    # Against itself nothing is lacking, whatever its cumulants.
    again = [math.sqrt(3) * (2 * np.random.default_rng([2, k]).random(shape) - 1) for k in range(DRAWS)]
    assert (lacking(cube, again, np.ones(24), PAIRS, gaussian=False) == 0).all()


def test_a_law_of_one_radius_is_refuted_by_independent_parts_of_the_same_radius():
    rng, d, n = np.random.default_rng(3), 24, 3000
    parts = rng.logistic(0, math.sqrt(3) / math.pi, (n, d)) @ ortho_group.rvs(d, random_state=0)
    # The radius varies as that of the parts, whose fourth cumulants are 6/5.
    wide = math.sqrt(1.2 * d / (d * (d + 2)))

    def radial(seed):
        rng = np.random.default_rng([4, seed])
        return rng.standard_normal((n, d)) * np.sqrt(1 + wide * rng.choice([-1, 1], (n, 1)))

    drawn = [radial(number) for number in range(DRAWS)]
    assert (lacking(parts, drawn, np.ones(d), PAIRS, gaussian=False) == 0).all()
    assert (lacking(radial(DRAWS), drawn, np.ones(d), PAIRS, gaussian=False, one_radius=True) == 0).all()
    found = lacking(parts, drawn, np.ones(d), PAIRS, gaussian=False, one_radius=True)
    b = 1 / (1 + np.exp(-2 * PAIRS.tau))
    step = 0.5 * 16 / 24 * (2 * b * PAIRS.dtau + PAIRS.dlog_alpha) ** 2 * (1 - b) ** 4
    # The cumulants of a radius lie across the parts' but for what is common to all directions.
    exact = step * (d * 1.2**2 - 3 * wide**4 * d * (d + 2))
    np.testing.assert_allclose(found[:, 0], exact, rtol=0.25)


def test_a_gaussian_fit_to_independent_parts_in_many_dimensions_is_refused(tmp_path):
    rows = (2 * np.random.default_rng(2).random((3000, 64)) - 1) @ ortho_group.rvs(64, random_state=1)
    np.save(tmp_path / "cube.npy", rows)
    sample = make_sample(load_dataset(str(tmp_path / "cube.npy")))
    found = Judge(sample, PAIRS, Settings(2000, 2, 0, lambda done, total: None), [Candidate("gaussian")]).estimate()
    assert not found.valid.any()
    assert "third and fourth moments" in found.reason[0]


def test_how_roughly_cumulants_tell_what_a_refuted_fit_lacks_is_an_error_of_it(monkeypatch):
    sample = make_sample(split_samples("gauss", np.random.default_rng(1).standard_normal((2000, 8)) * 0.7))
    judge = Judge(sample, PAIRS, Settings(2000, 4, 0, lambda done, total: None), [Candidate("gaussian")])
    before = judge.estimate()
    # Nothing is lacking as far as is known, to a tenth of the relative entropy.
    found = np.stack([np.zeros(len(PAIRS)), 0.1 * before.kl], 1)
    monkeypatch.setattr(judge, "_lacking", lambda: found)
    after = judge.estimate()
    added = np.log(after.ci_high / after.kl) ** 2 - np.log(before.ci_high / before.kl) ** 2
    np.testing.assert_allclose(added, (CALIBRATED * 0.1 * Z90) ** 2, rtol=1e-6)


def test_mixtures_of_one_covariance_are_offered_with_many_components_in_many_dimensions():
    rows = np.random.default_rng(0).standard_normal((5000, 96))
    sample = Sample(rows, np.ones(5000), rows.var(0), np.zeros(96), 0.0, 96, False, 1.0, 0.0)
    assert Candidate("mixture", 64, math.inf) in candidates(sample)


def test_one_covariance_for_all_components_is_the_limit_of_shrinking_towards_it():
    rng = np.random.default_rng(3)
    rows = np.concatenate([rng.standard_normal((300, 4)) + centre for centre in (-3.0, 0.0, 4.0)])
    start = torch.eye(3, dtype=torch.float64).repeat_interleave(300, 1)
    one, limit = (
        fit_mixture(rows, np.ones(900), MixtureOptions(3, strength), 1e-6, 0, start) for strength in (math.inf, 1e12)
    )
    torch.testing.assert_close(one.means, limit.means, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.eigenvalues, limit.eigenvalues, rtol=1e-6, atol=1e-6)
    x, weights, covariance = torch.from_numpy(rows), torch.full((3,), 1 / 3, dtype=torch.float64), torch.eye(4)[None]
    shared, own = (
        _log_joint(x, weights, one.means, 2 * covariance.double().expand(count, -1, -1)) for count in (1, 3)
    )
    torch.testing.assert_close(shared, own)


def test_a_mixture_of_the_digits_is_refused_where_a_denoiser_finds_more():
    # results/relative-entropy-digits: the denoiser finds a fifth more at t = 150, and the same from t = 250 on.
    pairs, sample = make_pairs(get_process("vp-linear"), [100, 150, 250, 350]), make_sample(load_dataset("digits"))
    judge = Judge(sample, pairs, Settings(2000, 4, 0, lambda done, total: None), [Candidate("mixture", 16, 62.0)])
    found = judge.estimate()
    share = judge._lacking()[:, 0] / found.kl
    assert (share > [0.3, 0.1, 0.0, 0.0]).all()
    assert (share < [2.0, 0.5, 0.1, 0.05]).all()
    assert ["third and fourth moments" in reason for reason in found.reason] == [True, True, False, False]
