"""Columns of few values among continuous ones: what a smooth fit lacks on them."""

import numpy as np
import pytest
import torch
from scipy.stats import norm, ortho_group, poisson

from difficulty.datasets import Dataset, split_samples
from difficulty.laws import GaussianMixture
from difficulty.process import get_process
from difficulty.relative_entropy import kl
from difficulty.relative_entropy.discrete_columns import (
    lacking_in_columns,
    mmse_lacking_in_columns,
    rates_lacking_in_columns,
)
from difficulty.relative_entropy.fits import Fit, GaussianBlock, MixtureBlock, ProductBlock
from difficulty.relative_entropy.gaussian import gaussian_kl
from difficulty.relative_entropy.pairs import make_pairs
from difficulty.relative_entropy.sample import DiscreteColumn, make_sample

LEVELS = [2, 8, 32, 100, 220, 430]
COUNTS = np.arange(20)
COUNT_WEIGHTS = poisson(2.5).pmf(COUNTS)


def atoms_law(values, weights):
    return GaussianMixture(weights, np.asarray(values, float)[:, None], np.zeros((len(values), 1, 1)))


def exact_kl(law, pairs):
    draws = law.sample(100, torch.Generator().manual_seed(0)).float()
    return kl(Dataset("exact", draws[20:], draws[:20], law=law), "vp-linear", pairs=pairs, samples=40_000).kl


def table_rows(n, seed):
    """A count, a flag on which two Gaussians depend, and one more."""
    rng = np.random.default_rng(seed)
    flag = rng.random(n) < 0.3
    clusters = rng.standard_normal((n, 2)) * 0.5 + np.where(flag[:, None], 1.5, -0.5)
    return np.column_stack([rng.poisson(2.5, n), flag, clusters, rng.standard_normal(n)]).astype(np.float32)


@pytest.fixture
def fits():
    """One fit of each kind on three axes."""
    rng = np.random.default_rng(0)
    axes = ortho_group.rvs(3, random_state=1)
    covariances = np.stack([axes * variances @ axes.T for variances in rng.uniform(0.1, 2, (4, 3))])
    mixture = MixtureBlock(GaussianMixture(rng.uniform(1, 2, 4), rng.standard_normal((4, 3)), covariances))
    product = ProductBlock(axes, np.full((3, 2), 0.5), rng.standard_normal((3, 2)), rng.uniform(0.1, 1, (3, 2)))
    gaussian = GaussianBlock(rng.uniform(0.1, 2, 3), rng.standard_normal(3), axes)
    rest = GaussianBlock(rng.uniform(0.1, 2, 2), rng.standard_normal(2))
    five = torch.from_numpy(ortho_group.rvs(5, random_state=2))
    whole = slice(0, 3)
    return [Fit([(whole, block)]) for block in (mixture, product, gaussian)] + [
        Fit([(whole, mixture), (slice(3, 5), rest)], five)
    ]


def test_marginals_of_every_kind_of_fit_are_those_of_its_draws(fits):
    for fit in fits:
        x0, _ = fit.draw(200_000, 0)
        direction = np.linspace(-1, 2, x0.shape[1])
        direction /= np.linalg.norm(direction)
        along = (x0 @ torch.from_numpy(direction)).numpy()
        weights, means, variances = fit.marginal(direction)
        np.testing.assert_allclose(weights.sum(), 1.0)
        shares = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
        found = weights @ norm.cdf((np.quantile(along, shares) - means[:, None]) / np.sqrt(variances[:, None]))
        # Five standard errors of the draws; a product's marginal is made of few of its combinations.
        of_product = any(isinstance(block, ProductBlock) for _, block in fit.blocks)
        np.testing.assert_allclose(found, shares, atol=0.06 if of_product else 0.006)


def test_columns_of_few_values_are_found():
    rows = table_rows(2000, 0)
    found = make_sample(split_samples("table", rows)).columns
    assert [len(column.values) for column in found] == [len(np.unique(rows[:, 0])), 2]
    assert [column.step for column in found] == pytest.approx([1.0, 1.0])
    np.testing.assert_allclose([column.share for column in found], 1.0)
    assert not make_sample(split_samples("continuous", rows[:, 2:])).columns
    quantised = make_sample(split_samples("quantised", np.round(4 * rows)))
    assert len(quantised.columns) == 5
    assert quantised.step == 1.0


def test_columns_that_determine_each_other_count_as_the_directions_that_they_span():
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 5, 2000)
    one_hot = np.eye(5)[classes]
    columns = np.column_stack([one_hot, 2 * one_hot[:, 0], rng.standard_normal((2000, 2))])
    found = make_sample(split_samples("classes", columns.astype(np.float32))).columns
    assert len(found) == 6
    np.testing.assert_allclose(sum(column.share for column in found), 4.0)


def column(values, weights):
    return DiscreteColumn(np.array([1.0, 0.0]), np.asarray(values, float), np.asarray(weights), 1.0)


def test_a_gaussian_lacks_all_of_a_separated_column_and_a_fit_of_its_atoms_nothing():
    pairs = make_pairs(get_process("vp-linear"), LEVELS)
    weights = COUNT_WEIGHTS / COUNT_WEIGHTS.sum()
    mean, variance = weights @ COUNTS, weights @ (COUNTS - weights @ COUNTS) ** 2
    smooth = Fit([(slice(0, 2), GaussianBlock(np.array([variance, 1.0]), np.array([mean, 0.0])))])
    covariances = np.tile(np.diag([0.0, 1.0]), (len(COUNTS), 1, 1))
    law = GaussianMixture(weights, np.column_stack([COUNTS, np.zeros(len(COUNTS))]), covariances)
    columns = (column(COUNTS, weights),)
    lacking = lacking_in_columns(smooth, columns, pairs)
    known = gaussian_kl(pairs, np.array([variance, 1.0]), np.array([mean, 0.0])) + lacking.kl
    truth = exact_kl(atoms_law(COUNTS, weights), LEVELS) + gaussian_kl(pairs, np.ones(1), np.zeros(1))
    np.testing.assert_allclose(known[:-1], truth[:-1], rtol=0.03)
    assert (lacking.error[:2] < 0.11 * lacking.kl[:2]).all()
    resolved = lacking_in_columns(Fit([(slice(0, 2), MixtureBlock(law))]), columns, pairs)
    np.testing.assert_allclose(resolved.kl / truth, 0.0, atol=1e-9)
    # The rates and the mmse of the whole, as those of the two independent columns.
    tau = pairs.tau[:3]
    rates = rates_lacking_in_columns(smooth, columns, tau)
    mmse = mmse_lacking_in_columns(smooth, columns, tau)
    exact = ProductBlock(np.ones((1, 1)), weights[None], COUNTS[None] * 1.0, np.zeros((1, len(COUNTS))))
    flat = GaussianBlock(np.ones(1), np.zeros(1))
    whole = exact.profile(tau, 0, 0) + flat.profile(tau, 0, 0)
    np.testing.assert_allclose((smooth.profile(tau, 0, 0) + rates)[:, :3], whole[:, :3], rtol=1e-9)
    expected = exact.mmse(tau, 0, 0) + flat.mmse(tau, 0, 0)
    np.testing.assert_allclose(smooth.mmse(tau, 0, 0) + mmse, expected, rtol=1e-6)


def test_a_table_with_a_count_and_a_flag_is_measured_at_every_noise():
    pairs = make_pairs(get_process("vp-linear"), LEVELS)
    weights = COUNT_WEIGHTS / COUNT_WEIGHTS.sum()
    means = np.array([[0.0, -0.5, -0.5], [1.0, 1.5, 1.5]])
    covariances = np.tile(np.diag([0.0, 0.25, 0.25]), (2, 1, 1))
    clusters = exact_kl(GaussianMixture([0.7, 0.3], means, covariances), LEVELS)
    counts = exact_kl(atoms_law(COUNTS, weights), LEVELS)
    truth = counts + clusters + gaussian_kl(pairs, np.ones(1), np.zeros(1))
    for seed in (0, 1):
        table = kl(split_samples("table", table_rows(2500, seed)), "vp-linear", pairs=LEVELS, seed=seed)
        valid = table.valid.to_numpy()
        assert valid.sum() >= 5
        np.testing.assert_allclose(table.kl[valid], truth[valid], rtol=0.12)
        inside = (table.ci_low <= truth) & (truth <= table.ci_high)
        assert inside[valid].sum() >= valid.sum() - 1
