"""Grouping tasks into clusters of like difficulty, and the order in which a curriculum adds them.

Methods that group the tasks of a ranking by the values of one measure:

    kmeans        scikit-learn's k-means on the values: clusters may hold separate runs of t
    quantile      equally many tasks per cluster, in order of the value
    mass          equal sums of the value per cluster, in order of the value
    uniform       neighbouring tasks, equally many
    contiguous    neighbouring tasks with least within-cluster variance of the value (exact dynamic programme)

Methods that cut t = 1..T anew, by noise level alone (as in ANT, arXiv 2306.00354, which the paper follows):

    snr, log-snr  intervals with least sum_t |z_t - z_centre|, z = SNR or log-SNR (exact dynamic programme)

The paper does not say which of the last two it uses, and that decides everything: on the linear schedule raw SNR puts
74 % of all t into one cluster. Values that are all positive and span more than a factor ``LOG_SPAN`` are clustered by
their logarithm, because otherwise the largest alone would decide; tasks without a value join the hardest cluster.
"""

__all__ = ["INTERVAL_METHODS", "METHODS", "ORDERS", "interval_cuts", "order_clusters", "split_by_value"]

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from difficulty.errors import InputError, choose
from difficulty.process import Array, Process
from difficulty.randomness import check_seed, stream
from training.density import finite_log_snr
from training.streams import ORDER

LOG_SPAN = 10.0
Clusters = list[list[int]]


def scaled_values(values: Array) -> Array:
    """The values, or their logarithms where they are positive and span more than ``LOG_SPAN``."""
    if values.min() > 0 and values.max() / values.min() > LOG_SPAN:
        return np.log(values)
    return values


def _kmeans(values: Array, k: int) -> npt.NDArray[np.int64]:
    from sklearn.cluster import KMeans

    return KMeans(k, n_init=10, random_state=0).fit_predict(scaled_values(values)[:, None]).astype(np.int64)


def _quantile(values: Array, k: int) -> npt.NDArray[np.int64]:
    position = np.empty(len(values), dtype=np.int64)
    position[np.argsort(values, kind="stable")] = np.arange(len(values))
    return position * k // len(values)


def _mass(values: Array, k: int) -> npt.NDArray[np.int64]:
    if values.min() < 0 or values.sum() <= 0:
        raise InputError("method 'mass' needs non-negative values; use quantile instead")
    order = np.argsort(values, kind="stable")
    middle = (np.cumsum(values[order]) - 0.5 * values[order]) / values.sum()
    ranked = np.minimum((middle * k).astype(np.int64), k - 1)
    # One task can outweigh a whole share: labels are raised or lowered so that each cluster keeps a task.
    place = np.arange(len(values))
    ranked = np.minimum(np.maximum(ranked, k - len(values) + place), place)
    for i in range(1, len(ranked)):
        ranked[i] = min(ranked[i], ranked[i - 1] + 1)
    label = np.empty_like(ranked)
    label[order] = ranked
    return label


def _uniform(values: Array, k: int) -> npt.NDArray[np.int64]:
    return np.arange(len(values)) * k // len(values)


def _contiguous(values: Array, k: int) -> npt.NDArray[np.int64]:
    z = scaled_values(values)
    z = z - z.mean()  # a sum of squares less a squared sum cancels where the values are far from 0
    first, second = (np.concatenate([[0.0], np.cumsum(power)]) for power in (z, z**2))
    i, j = np.meshgrid(np.arange(len(z)), np.arange(1, len(z) + 1), indexing="ij")
    count = np.maximum(j - i, 1)
    cost = (second[j] - second[i]) - (first[j] - first[i]) ** 2 / count
    cuts = _best_partition(np.where(j > i, np.maximum(cost, 0.0), np.inf), k)
    return np.repeat(np.arange(k), np.diff(cuts))


METHODS: Mapping[str, Callable[[Array, int], npt.NDArray[np.int64]]] = {
    "kmeans": _kmeans,
    "quantile": _quantile,
    "mass": _mass,
    "uniform": _uniform,
    "contiguous": _contiguous,
}


def split_by_value(values: Sequence[float | None], k: int, method: str) -> Clusters:
    """Group tasks by the value of a measure.

    Args:
        values: one per task, cleanest first; None where the measure is undefined.
        k: number of clusters, at most the number of tasks that have a value.
        method: a name in ``METHODS``.

    Returns:
        Task indices of each cluster, easiest cluster (lowest mean value) first.

    Raises:
        InputError: if the method is unknown or there are fewer values than clusters.
    """
    known = [index for index, value in enumerate(values) if value is not None]
    if not known:
        raise InputError("no task has a value of this measure; cluster by another one")
    if not 1 <= k <= len(known):
        raise InputError(f"{k} clusters asked for, but {len(known)} tasks have a value; choose 1 <= k <= {len(known)}")
    numbers = np.array([values[index] for index in known], dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise InputError("a measure with NaN or infinite values cannot be clustered")
    distinct = len(np.unique(numbers))
    if method == "kmeans" and distinct < k:
        raise InputError(f"k-means into {k} clusters needs {k} distinct values, the measure has {distinct}")
    label = choose("clustering method", method, METHODS)(numbers, k)
    groups = [[known[i] for i in np.flatnonzero(label == c)] for c in range(k)]
    groups.sort(key=lambda group: float(np.mean([values[i] for i in group])))
    groups[-1] = sorted(groups[-1] + [i for i, value in enumerate(values) if value is None])
    return groups


def _snr(process: Process) -> Array:
    return np.exp(finite_log_snr(process))


INTERVAL_METHODS: Mapping[str, Callable[[Process], Array]] = {"snr": _snr, "log-snr": finite_log_snr}


def interval_cuts(process: Process, k: int, method: str) -> list[int]:
    """Cut t = 1..T into k intervals with least sum of |z_t - z_centre|; the exact optimum.

    z falls with t, so the best centre of an interval is its middle element (the median), as in ANT.

    Returns:
        Edges e_0 = 0 < e_1 < ... < e_k = T; interval i holds the timesteps e_i + 1 .. e_{i+1}. Pure noise, where alpha
        is 0, is no interval by itself: it joins the last one.
    """
    z = choose("interval method", method, INTERVAL_METHODS)(process)
    T = process.noisiest
    z = z[:T]
    if not 1 <= k <= T:
        name = "T" if process.T == T else "T - 1"
        raise InputError(f"the number of intervals must lie in 1..{name} = {T}, got {k}")
    total = np.concatenate([[0.0], np.cumsum(z)])
    i, j = np.meshgrid(np.arange(T), np.arange(1, T + 1), indexing="ij")
    middle = (i + j) // 2
    # z falls: elements left of the middle lie above the median z[middle], the others below.
    above = (total[middle] - total[i]) - (middle - i) * z[np.minimum(middle, T - 1)]
    below = (j - middle) * z[np.minimum(middle, T - 1)] - (total[j] - total[middle])
    return [*_best_partition(np.where(j > i, above + below, np.inf), k)[:-1], process.T]


def _best_partition(cost: Array, k: int) -> list[int]:
    """Edges of the k consecutive intervals of least total cost; cost[i, j-1] is that of elements i..j-1."""
    n = len(cost)
    best, back = cost[0].copy(), np.zeros((k, n), dtype=np.int64)
    for pieces in range(1, k):
        # candidate[i, j-1]: the last interval starts at i, the others cover 0..i-1.
        candidate = best[:-1, None] + cost[1:, :]
        back[pieces] = candidate.argmin(0) + 1
        best = candidate.min(0)
    edges = [n]
    for pieces in range(k - 1, 0, -1):
        edges.append(int(back[pieces][edges[-1] - 1]))
    return [0, *reversed(edges)]


ORDERS = ("easy-to-hard", "hard-to-easy", "random")


def order_clusters(easiest_first: Clusters, order: str, seed: int = 0) -> Clusters:
    """The clusters in training order.

    Raises:
        InputError: if the order is unknown, or random with a negative seed.
    """
    if order == "random":
        check_seed(seed)
        return [easiest_first[i] for i in stream(seed, ORDER, 0, 0).permutation(len(easiest_first))]
    choose("order", order, dict.fromkeys(ORDERS, None))
    return easiest_first if order == "easy-to-hard" else easiest_first[::-1]
