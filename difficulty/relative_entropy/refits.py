"""How far the relative entropy of a fit is off because the sample is finite: refits to halves, and the delta method.

With L = log KL, half the data have twice the bias and twice the variance of all. So bias_h = mean(L_half) - L_all is
the first-order bias of L_all, and differences of complementary halves give its standard error. Where the covariance
alone is the law, quarters give the next order, L = (8 L_all - 6 L_half + L_quarter)/3: with D/n = 0.15 the inverse of a
sample covariance has third-order terms that matter. (Copies of rows, as a bootstrap with replacement makes them, would
look like spikes to a density; half-samples are the bootstrap without copies.)

At high noise every law is Gaussian, and the standard error of F2 follows from its influence function, row by row:
    psi(x) = sum_k dKL/dlam_k (x_k^2 - lam_k) + sum_k dKL/dm_k x_k,    se = sd(psi)/sqrt(n).
It knows the tails of the data, and n rows know it better than a few refits do.
"""

__all__ = [
    "FAR_SHARE",
    "MANY_AXES",
    "Refits",
    "Replicated",
    "beside_rest",
    "gaussian_log_error",
    "log_of",
    "tail_shares",
]

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from difficulty.randomness import stream
from difficulty.relative_entropy.estimate import Settings
from difficulty.relative_entropy.families import MOST_AXES, Candidate, Plan, fit_candidate
from difficulty.relative_entropy.fits import Fit, Measured
from difficulty.relative_entropy.gaussian import gaussian_kl
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.sample import Sample
from difficulty.threads import together

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

# Half-sample refits are worth their number; but beyond the first number of axes half of them have to do, and beyond the
# second one pair, since each takes 10 s and more.
SOME_AXES, MANY_AXES = 24, 1024
# Most axes per row at which a quarter of the rows still spans all of them with room to spare.
QUARTER_SHARE = 0.17
SPLIT_STREAM = 23

# Where log KL of a Gaussian lies this close to the estimate the Gaussian error holds; beyond the second it says
# nothing.
GAUSSIAN, NOT_GAUSSIAN = 0.25, 0.7
# Share of the rows, those farthest out, whose weight in a fourth moment is asked for.
FAR_SHARE = 0.0025


@dataclass(frozen=True, eq=False)
class Replicated:
    """KL of a fit to all rows, (m,), and of fits to halves, (2 R, m), complementary halves next to each other.

    Args:
        fit: to all rows.
        kl, kl_reverse: of that fit, nats.
        monte_carlo: standard error of kl from its draws.
        baseline: the same KL from as many draws, and the same ones, as ``halves`` and ``quarters``.
        halves: see above.
        quarters: KL of fits to quarters, (4, m); None where they are not taken.
    """

    fit: Fit
    kl: Array
    kl_reverse: Array
    monte_carlo: Array
    baseline: Array
    halves: Array
    quarters: Array | None

    @property
    def first_order(self) -> Array:
        """Mean of log KL_half - log KL_all."""
        return log_of(self.halves).mean(0) - log_of(self.baseline)

    @property
    def bias(self) -> Array:
        """Bias of log KL_all, to the second order where quarters were fitted."""
        if self.quarters is None:
            return self.first_order
        return 2.0 * self.first_order - (log_of(self.quarters).mean(0) - log_of(self.baseline)) / 3.0

    @property
    def bias_doubt(self) -> Array:
        """Error of the correction for bias."""
        if self.quarters is None:
            return 0.4 * np.abs(self.first_order)
        return np.maximum(0.5 * np.abs(self.bias - self.first_order), 0.1 * np.abs(self.bias))

    @property
    def unresolved(self) -> Array:
        """How much of the bias the orders that were fitted leave in doubt; without quarters all of it."""
        if self.quarters is None:
            return np.abs(self.first_order)
        return np.maximum(2.0 * np.abs(self.bias - self.first_order), np.abs(self.bias) / 3.0)

    @property
    def corrected(self) -> Array:
        """log KL without its bias."""
        return log_of(self.kl) - self.bias

    @property
    def spread(self) -> Array:
        """Standard error of log KL without its bias."""
        logs = log_of(self.halves)
        return beside_rest(np.sqrt(((logs[0::2] - logs[1::2]) ** 2).mean(0) / 4), self.bias)


class Refits:
    """Fits of candidates to one sample and to parts of it.

    Args:
        sample: the data.
        rows: its rows with their mean, shape (n, r).
        plan: of every fit.
        pairs: where they are measured, m of them.
        settings: number of draws and refits, the seed, threads.

    Attributes:
        halves: complementary halves of the rows.
    """

    def __init__(self, sample: Sample, rows: Array, plan: Plan, pairs: Pairs, settings: Settings) -> None:
        self.sample, self.rows, self.plan, self.pairs, self.settings = sample, rows, plan, pairs, settings
        few = settings.bootstrap // 2 if sample.rank > SOME_AXES else settings.bootstrap
        few = 2 if sample.rank > MANY_AXES else few
        rng = stream(SPLIT_STREAM, settings.seed)
        orders = [rng.permutation(sample.n) for _ in range(max(1, few // 2))]
        self.halves = [(order[: sample.n // 2], order[sample.n // 2 :]) for order in orders]

    def whole(self, candidate: Candidate) -> tuple[Fit, Measured]:
        """The fit to all rows and its relative entropies."""
        fit = fit_candidate(self.rows, self.sample.counts, candidate, self.plan)
        return fit, fit.measure(self.pairs, self.settings.samples, self.settings.seed)

    def forward(self, candidate: Candidate, where: Rows, rows: Rows | None = None) -> Array:
        """KL at some pairs of a fit to all rows, or to the given ones."""
        chosen = np.arange(len(self.rows)) if rows is None else rows
        fit = fit_candidate(self.rows[chosen], self.sample.counts[chosen], candidate, self.plan)
        return fit.forward(self.pairs.take(where), self.settings.samples, self.settings.seed)

    def of_half(self, candidate: Candidate, whole: Fit, split: int, half: int) -> Fit:
        """The fit to one of two complementary halves, from the one to all rows."""
        return fit_candidate(*self._parts(split)[half], candidate, self.plan, whole)

    def replicate(self, candidate: Candidate, whole: Fit, measured: Measured, splits: int, where: Rows) -> Replicated:
        """With fits to parts of the rows, which are measured at the pairs where the candidate matters."""
        samples, seed = self.settings.samples, self.settings.seed
        pairs = self.pairs.take(where)
        fewer = max(samples // 2, 100)

        def refit(rows: Array, counts: Array) -> Array:
            return fit_candidate(rows, counts, candidate, self.plan, whole).forward(pairs, fewer, seed)

        parts = [part for split in range(splits) for part in self._parts(split)]
        halves = len(parts)
        if self.sample.rank < QUARTER_SHARE * self.sample.n and candidate.one_covariance:
            quarters = [part for half in self.halves[0] for part in np.array_split(half, 2)]
            parts += [(self.rows[part], self.sample.counts[part]) for part in quarters]
        calls = [partial(whole.forward, pairs, fewer, seed), *(partial(refit, *part) for part in parts)]
        values = np.tile(measured.kl, (len(calls), 1))
        values[:, where] = together(calls, self.settings.threads)
        last = 1 + halves
        return Replicated(
            whole, measured.kl, measured.kl_reverse, measured.error, values[0], values[1:last],
            values[last:] if len(values) > last else None,
        )  # fmt: skip

    def _parts(self, split: int) -> list[tuple[Array, Array]]:
        """Rows and counts of two complementary halves of the data."""
        counts = self.sample.counts
        if not self.sample.discrete:
            return [(self.rows[rows], counts[rows]) for rows in self.halves[split]]
        # Copies of an atom are draws of it: they are dealt to both halves.
        part = stream(SPLIT_STREAM, self.settings.seed, split).binomial(counts.astype(int), 0.5).astype(float)
        return [(self.rows[c > 0], c[c > 0]) for c in (part, counts - part)]


def beside_rest(error: Array, bias: Array) -> Array:
    """Standard error of log KL without its bias, from that of log KL_all: KL is smaller without it and varies as much.

    Args:
        error: of log KL_all, (m,).
        bias: of log KL_all, (m,); one that makes it too small takes nothing off.
    """
    return error * np.exp(bias.clip(0.0, 1.0))


def gaussian_log_error(sample: Sample, pairs: Pairs, log_kl: Array) -> Array:
    """Sampling error of log KL where a Gaussian explains the estimate, falling to 0 where it does not, (m,).

    Args:
        sample: the data.
        pairs: where.
        log_kl: the estimate, bias and all.
    """
    lam, mean = sample.eigenvalues, sample.mean
    a1, s1, a2, s2 = (column[:, None] for column in (*pairs.first.T, *pairs.second.T))
    v1, v2 = a1**2 * lam + s1**2, a2**2 * lam + s2**2
    change = ((a1 - a2) * (a1 + a2) * lam + (s1 - s2) * (s1 + s2)) / v2
    step = (a1 - a2) ** 2
    by_variance = 0.5 * change * v2 / v1 * (a1**2 * v2 - a2**2 * v1) / v2**2 - 0.5 * step * (a2 * mean / v2) ** 2
    by_mean = step * mean / v2
    influence = (sample.rows**2 - lam) @ by_variance.T + sample.rows @ by_mean.T
    weights = sample.counts / sample.counts.sum()
    gaussian = gaussian_kl(pairs, lam, mean)
    error = np.sqrt((weights @ influence**2) / sample.counts.sum()) / np.maximum(gaussian, 1e-300)
    distance = np.abs(log_of(gaussian) - log_kl)
    return error * np.clip((NOT_GAUSSIAN - distance) / (NOT_GAUSSIAN - GAUSSIAN), 0.0, 1.0)


def tail_shares(sample: Sample) -> Array:
    """Share of the fourth moment along each leading axis that ``FAR_SHARE`` of the rows, the farthest out, make, (d,).

    A normal law has 0.1, Laplace's 0.25, Student's with 4 degrees of freedom 0.6.
    """
    x = sample.rows[:, :MOST_AXES] / np.sqrt(sample.eigenvalues[:MOST_AXES])
    fourth = np.sort(x**4, axis=0)
    few = max(2, round(FAR_SHARE * len(x)))
    return fourth[-few:].sum(0) / fourth.sum(0)


def log_of(values: Array) -> Array:
    """Logarithm, with 1e-300 for zero."""
    return np.log(np.maximum(values, 1e-300))
