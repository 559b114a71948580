from itertools import chain, combinations

import numpy as np
import pytest

from difficulty.errors import InputError
from difficulty.process import PROCESSES, get_process
from training.clusters import INTERVAL_METHODS, METHODS, ORDERS, interval_cuts, order_clusters, split_by_value
from training.curriculum_builders import interval_curriculum
from training.density import finite_log_snr

VALUES = [9.0, 10.0, 1.0, 1.1, 10.5, 0.1, 0.11, 0.12]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_every_method_puts_every_task_in_exactly_one_of_k_clusters_easiest_first(method, k):
    groups = split_by_value(VALUES, k, method)
    assert sorted(chain(*groups)) == list(range(8))
    assert len(groups) == k
    means = [np.mean([VALUES[i] for i in group]) for group in groups]
    assert means == sorted(means)


def test_kmeans_finds_groups_that_are_scattered_over_t():
    assert [sorted(group) for group in split_by_value(VALUES, 3, "kmeans")] == [[5, 6, 7], [2, 3], [0, 1, 4]]


def test_quantiles_hold_equally_many_tasks_and_mass_equal_sums():
    assert [len(group) for group in split_by_value(VALUES, 4, "quantile")] == [2, 2, 2, 2]
    sums = [
        sum([4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0][i] for i in g)
        for g in split_by_value([4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0], 4, "mass")
    ]
    assert sums == [4.0, 4.0, 4.0, 4.0]


def test_contiguous_clusters_are_the_best_of_all_cuts():
    values = np.random.default_rng(0).normal(size=9)
    found = split_by_value(values.tolist(), 4, "contiguous")
    cost = sum(np.var(values[group]) * len(group) for group in found)
    best = min(
        sum(np.var(part) * len(part) for part in np.split(values, cuts)) for cuts in combinations(range(1, 9), 3)
    )
    assert cost == pytest.approx(best)
    assert all(max(group) - min(group) == len(group) - 1 for group in found)


def test_task_without_a_value_joins_the_hardest_cluster():
    assert 2 in split_by_value([1.0, 2.0, None, 30.0], 2, "quantile")[-1]


@pytest.mark.parametrize("method", INTERVAL_METHODS)
def test_interval_cuts_are_the_best_of_all_cuts(method):
    process = get_process("vp-cosine:T=12")
    z = INTERVAL_METHODS[method](process)

    def cost(cuts):
        return sum(np.abs(part - np.median(part)).sum() for part in np.split(z, cuts))

    edges = interval_cuts(process, 4, method)
    assert edges[0] == 0
    assert edges[-1] == 12
    assert cost(edges[1:-1]) == pytest.approx(min(cost(cuts) for cuts in combinations(range(1, 12), 3)))


def test_raw_snr_puts_three_quarters_of_all_timesteps_into_the_noisiest_cluster():
    raw = interval_cuts(get_process("vp-linear"), 20, "snr")
    assert 1000 - raw[-2] == pytest.approx(740, abs=10)
    logarithmic = interval_cuts(get_process("vp-linear"), 20, "log-snr")
    assert 1000 - logarithmic[-2] == pytest.approx(46, abs=2)


@pytest.mark.parametrize("process", PROCESSES)
def test_log_snr_is_finite_for_clustering_on_every_process(process):
    z = finite_log_snr(get_process(process))
    assert np.isfinite(z).all()
    assert (np.diff(z) < 0).all()


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_only_permutes_the_clusters(order):
    clusters = [[0], [1, 2], [3]]
    assert sorted(order_clusters(clusters, order, seed=3)) == clusters


def test_hard_to_easy_is_the_reverse_and_random_depends_on_the_seed():
    clusters = [[i] for i in range(10)]
    assert order_clusters(clusters, "hard-to-easy") == clusters[::-1]
    assert order_clusters(clusters, "random", 1) != order_clusters(clusters, "random", 2)
    assert order_clusters(clusters, "random", 1) == order_clusters(clusters, "random", 1)


def test_contiguous_clusters_do_not_depend_on_an_offset_of_the_values():
    values = np.random.default_rng(0).normal(size=24)
    assert split_by_value(values + 1e8, 5, "contiguous") == split_by_value(np.round(values, 7), 5, "contiguous")


def test_random_order_of_a_negative_seed_is_refused():
    with pytest.raises(InputError, match="seed must not be negative, got -1"):
        order_clusters([[0], [1]], "random", -1)


@pytest.mark.parametrize(("k", "method"), [(0, "kmeans"), (9, "quantile"), (3, "k-means")])
def test_impossible_numbers_of_clusters_and_unknown_methods_are_refused(k, method):
    with pytest.raises(InputError):
        split_by_value(VALUES, k, method)


def test_kmeans_refuses_more_clusters_than_distinct_values():
    with pytest.raises(InputError, match="distinct"):
        split_by_value([1.0, 1.0, 2.0], 3, "kmeans")


@pytest.mark.parametrize("method", INTERVAL_METHODS)
def test_pure_noise_is_no_interval_by_itself(method):
    process = get_process("flow-matching:T=40")
    edges = interval_cuts(process, 39, method)
    assert edges == [*range(39), 40]
    with pytest.raises(InputError, match="T - 1 = 39, got 40"):
        interval_cuts(process, 40, method)
    every = interval_curriculum(process, k=20)
    assert every.tasks[-1].t_last == 40
