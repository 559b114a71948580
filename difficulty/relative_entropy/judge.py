"""Relative entropy from samples: several families are fitted, held-out data choose, and what is left is stated.

For every pair (at most ``ANCHORS`` of them; others are interpolated between their neighbours, relative to F7):

1. Choice. Each candidate is fitted to three quarters of the rows and judged by the log-likelihood of the rest *at the
   noise level of the pair*: what noise hides does not count. Of the plausible ones the simplest is taken.
2. Error of the fit. The chosen candidate is refitted to random halves of the data. With L = log KL, half the data have
   twice the bias and twice the variance of all, so L_all - mean(L_half - L_all) is free of the first-order bias, and
   the halves' differences give the standard error. (Copies of rows, as a bootstrap with replacement makes them,
   would look like spikes to a density; half-samples are the bootstrap without copies.)
3. Error of the choice. Candidates that the held-out likelihood hardly tells from the best one must agree with it; their
   differences enter the error. If the richest fit on offer is the best one, it must agree with the next poorer one:
   an edge or a spike shows as a fit that keeps changing as it gets richer. If a few rows far out dominate the fourth
   moments, the fit without them must agree too.
4. Test on held-out data (F6). With f the time score of a fit and g the conditional time score, known in closed form, on
   rows that the fit has not seen: cross = 1/2 E[f g] must agree with the estimate, E[f^2] must be what the fit itself
   says, and the certified lower bound 1/2 E[f g]^2/E[f^2] of *every* candidate must lie below the estimate.
5. A pair is valid if its error allows to promise 30 % and no test objects. Otherwise the reason says which one did.
"""

__all__ = ["PLAUSIBLE", "Judge", "leading_axes"]

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from difficulty.randomness import stream
from difficulty.relative_entropy.estimate import Estimate, Settings
from difficulty.relative_entropy.families import Candidate, Plan, fit_candidate, has_independent_axes
from difficulty.relative_entropy.fits import Fit, null_block
from difficulty.relative_entropy.pairs import Pairs, upper_bound
from difficulty.relative_entropy.sample import Sample
from difficulty.relative_entropy.score import conditional_covariance

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

ANCHORS = 40
HELDOUT_ROWS = 1500
# Numbers held at once for the held-out rows and their noise: 256 MiB.
HELDOUT_SIZE = 2**25
# Noise draws per held-out row in the tests, half of them the negatives of the others.
DRAWS = 4
MOST_AXES = 96
# Beyond so many axes one pair of half-sample refits has to do, since each takes 10 s and more.
MANY_AXES = 1024
# Of candidates with at least this weight relative to the most likely one, the simplest is taken.
PLAUSIBLE = 0.3
RICHER_WEIGHT = 0.25
# No estimate from a sample is taken to be better than this, on the log scale.
LEAST_ERROR = 0.02
MANY_COMPONENTS = 8
# Rows farthest out that are left out for a check, and the share of a fourth moment at which the check is made.
FAR_SHARE = 0.0025
FAR_DOMINATE = 0.3
SPLIT_STREAM, HELDOUT_STREAM = 23, 31


@dataclass(frozen=True)
class Limits:
    """When a pair counts as measured; all on the scale of log KL.

    Args:
        error: largest standard error.
        bias: largest first-order bias that may be corrected.
        cross: tolerated difference between the estimate and its held-out cross value, beyond 1.3 standard errors.
        second_moment: the same for Var[f] on held-out rows above that under the fit, as an overfit makes it.
        flat: the same below it, as edges and thin shells make it.
        bound: the same for a certified lower bound above the estimate.
        floor: smallest noise scale in units of the step between quantised values.
        missing: largest share of a discrete law that was seen only once.
    """

    error: float = 0.12
    bias: float = 0.3
    cross: float = 0.2
    second_moment: float = 0.4
    flat: float = 0.1
    bound: float = 0.15
    floor: float = 0.5
    missing: float = 0.2


LIMITS = Limits()


def leading_axes(sample: Sample) -> int:
    """Number of axes that a mixture models; the others are Gaussian."""
    return min(sample.rank, MOST_AXES, max(1, sample.n // 20))


@dataclass(frozen=True, eq=False)
class Replicated:
    """KL of a fit to all rows, (m,), and of fits to halves, (2 R, m), complementary halves next to each other.

    ``baseline`` is the KL of the fit to all rows from as many draws, and the same ones, as ``halves``.
    """

    fit: Fit
    kl: Array
    kl_reverse: Array
    monte_carlo: Array
    baseline: Array
    halves: Array

    @property
    def bias(self) -> Array:
        """Mean of log KL_half - log KL_all: the first-order bias of log KL_all."""
        return _log(self.halves).mean(0) - _log(self.baseline)

    @property
    def corrected(self) -> Array:
        """log KL without its first-order bias."""
        return _log(self.kl) - self.bias

    @property
    def spread(self) -> Array:
        """Standard error of log KL_all."""
        logs = _log(self.halves)
        return np.sqrt(((logs[0::2] - logs[1::2]) ** 2).mean(0) / 4)


@dataclass(frozen=True, eq=False)
class Tested:
    """Held-out figures of a candidate (F6), each (m, 2): the value and its standard error.

    Args:
        second_moment: log of Var[f] on held-out rows over that under the fit.
        bound: log of the certified lower bound 1/2 E[f g]^2/E[f^2], nats.
        cross: log of 1/2 E[f g] in nats; -inf where it is not positive.
        slope: E[f g]/E[f^2].
    """

    second_moment: Array
    bound: Array
    cross: Array
    slope: Array


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything found at the anchors, (m,) each, on the log scale: for the estimate and for those who doubt it."""

    log_kl: Array
    reverse: Array
    error: Array
    bias: Array
    spread: Array
    monte_carlo: Array
    rivals: Array
    tested: Tested
    family: list[Candidate]


class Judge:
    """Estimates of one sample at given pairs.

    Args:
        sample: the data.
        pairs: where.
        settings: number of draws, refits and the seed.
        pool: the candidates.
        anchors: at most so many pairs are estimated, the others interpolated.
    """

    def __init__(
        self, sample: Sample, pairs: Pairs, settings: Settings, pool: list[Candidate], anchors: int = ANCHORS
    ) -> None:
        self.sample, self.pairs, self.settings = sample, pairs, settings
        self.at = _anchors(pairs, anchors)
        self.anchors = pairs.take(self.at)
        self.rows = sample.rows + sample.mean
        largest = float(sample.eigenvalues.max(initial=1e-30))
        noise = pairs.sigma_from / np.maximum(pairs.alpha_from, 1e-12)
        floor = max(1e-2 * float(noise.min()) ** 2, 1e-10 * largest)
        self.plan = Plan(leading_axes(sample), floor, settings.seed)
        small = sample.n >= 8 * sample.rank and 1 <= sample.rank <= MOST_AXES
        if not (small and has_independent_axes(sample.rows, sample.counts, settings.seed)):
            pool = [c for c in pool if c.family != "product"]
        self.pool = pool
        # Beyond this noise every law is Gaussian to all digits, and s itself may be infinite.
        self.tau = np.minimum(self.anchors.tau, 0.5 * np.log(sample.second_moment + 1e-30) + 7)
        self.halves = self._halves()
        self.folds = self._folds()
        self.fold_fits: dict[tuple[Candidate, int], Fit] = {}
        self.null = null_block(sample)

    def estimate(self) -> Estimate:
        """All pairs."""
        if self.sample.rank == 0:
            return self._point_mass()
        names, weight = self.choose()
        self.findings = found = self._measure(names, weight)
        exact = self.null.measure(self.anchors, 0, 0)
        rest = np.exp(found.log_kl)
        kl = rest + exact.kl
        share = rest / kl
        reasons = self._reasons(found, share)
        i_min = self.moments()[:, 3]
        reverse = found.reverse * rest + exact.kl_reverse
        family = np.array([c.family for c in found.family], dtype=object)
        return self._everywhere(kl, reverse, np.hypot(share * found.error, LEAST_ERROR), i_min, family, reasons)

    # -- choice ------------------------------------------------------------------------------------------------------

    def choose(self) -> tuple[list[Candidate], Array]:
        """Candidates and their weights (candidates, m): 1 for the best of an anchor, small for the implausible."""
        found: dict[Candidate, Array] = {}
        tops: dict[tuple[str, float], list[float]] = {}
        for done, candidate in enumerate(self.pool):
            means = tops.setdefault((candidate.family, candidate.strength), [])
            if len(means) >= 3 and means[-1] < means[-2] < means[-3]:
                continue  # richer ones of the kind only get worse
            found[candidate] = self._likelihood(candidate)
            means.append(float(found[candidate][0].mean()))
            self.settings.progress(done + 1, 2 * len(self.pool))
        names = list(found)
        total = np.stack([found[c].sum(1) for c in names])
        # A rival counts by the likelihood ratio on all held-out rows, tempered since the rows have other uses.
        weight = np.exp(0.5 * (total - total.max(0)))
        size = np.array([c.parameters(self.sample.rank) for c in names])
        best = _simplest_cover(weight > PLAUSIBLE, size)
        # Richer fits that are no better are noise more often than news; simpler ones are not.
        richer = size[:, None] > size[best]
        weight = np.where(richer, np.minimum(weight, RICHER_WEIGHT), np.minimum(weight, 1.0 - 1e-9))
        weight[best, np.arange(len(best))] = 1.0
        return names, weight

    def _likelihood(self, candidate: Candidate) -> Array:
        """Log-likelihood of each held-out row at each anchor, (m, n)."""
        if candidate.family == "atoms":
            return np.zeros((len(self.at), 1))
        parts = []
        for fold, (inside, outside) in enumerate(self.folds):
            fit = self._fold_fit(candidate, fold, inside)
            x, eps, n = self._heldout(outside, fold, 2)
            parts.append(fit.log_density(x, eps, self.tau).reshape(len(self.at), n, 2).mean(2).numpy())
        return np.concatenate(parts, 1)

    def _fold_fit(self, candidate: Candidate, fold: int, inside: Rows) -> Fit:
        key = (candidate, fold)
        if key not in self.fold_fits:
            self.fold_fits[key] = fit_candidate(self.rows[inside], self.sample.counts[inside], candidate, self.plan)
        return self.fold_fits[key]

    # -- measurement -------------------------------------------------------------------------------------------------

    def _measure(self, names: list[Candidate], weight: Array) -> Findings:
        best = weight.argmax(0)
        winners = sorted(set(best.tolist()))
        order = np.argsort(-np.where(weight < 1, weight, 0).max(1), kind="stable")
        rivals = [int(i) for i in order if weight[i].max() > 0.1 and i not in winners][:3]
        replicated, tested = {}, {}
        jobs = [*winners, *rivals]
        for done, i in enumerate(jobs):
            where = np.flatnonzero(weight[i] > 0.02)
            splits = len(self.halves) if i in winners else min(2, len(self.halves))
            replicated[i] = self._replicate(names[i], splits, where)
            tested[i] = self._test(names[i])
            self.settings.progress(len(jobs) + done + 1, 2 * len(jobs))
        self.replicated, self.names, self.best, self.weight = replicated, names, best, weight
        columns = np.arange(len(self.at))

        def pick(values: dict[int, Array]) -> Array:
            return np.stack([values[i][j] for i, j in zip(best, columns, strict=True)])

        log_kl = pick({i: replicated[i].corrected for i in winners})
        spread = pick({i: replicated[i].spread for i in winners})
        bias = pick({i: replicated[i].bias for i in winners})
        monte_carlo = pick({i: replicated[i].monte_carlo / replicated[i].kl for i in winners})
        reverse = pick({i: replicated[i].kl_reverse / replicated[i].kl for i in winners})
        doubt, total = np.zeros(len(best)), np.ones(len(best))
        for i, other in replicated.items():
            w = np.where(best == i, 0.0, weight[i])
            doubt += w * (other.corrected - log_kl) ** 2
            total += w
        doubt = np.sqrt(doubt / total)
        capacity, far = self._capacity(names, best, replicated), self._far_rows(names, best, replicated)
        doubt = np.sqrt(doubt**2 + capacity**2 + far**2)
        error = np.sqrt(spread**2 + monte_carlo**2 + doubt**2 + (0.4 * bias) ** 2)
        test = Tested(
            pick({i: tested[i].second_moment for i in winners}),
            self._highest_bound(tested, weight),
            pick({i: tested[i].cross for i in winners}),
            pick({i: tested[i].slope for i in winners}),
        )
        chosen = [names[i] for i in best]
        return Findings(log_kl, reverse, error, bias, spread, monte_carlo, doubt, test, chosen)

    def _highest_bound(self, tested: dict[int, Tested], weight: Array) -> Array:
        """The best lower bound of all candidates that were tested, by its lower end, (m, 2)."""
        bounds = np.stack([t.bound for t in tested.values()])
        lower = bounds[..., 0] - 1.64 * np.where(bounds[..., 1] < 1, bounds[..., 1], np.inf)
        return bounds[lower.argmax(0), np.arange(lower.shape[1])]

    def _capacity(self, names: list[Candidate], best: Rows, replicated: dict[int, Replicated]) -> Array:
        """Change of log KL from the next poorer fit where the richest of a family is the best, (m,).

        Also where a one-dimensional law takes so many components that it is no mixture but a curve drawn with them.
        """
        change = np.zeros(len(best))
        for i in set(best.tolist()):
            top = names[i]
            kind = [c for c in self.pool if (c.family, c.strength) == (top.family, top.strength)]
            position = kind.index(top)
            smooth = top.family == "product" and top.components >= MANY_COMPONENTS
            if position == 0 or not (top == kind[-1] or smooth):
                continue
            rows = np.flatnonzero(best == i)
            change[rows] = np.abs(_log(self._whole(kind[position - 1], rows)) - _log(replicated[i].kl[rows]))
        return change

    def _far_rows(self, names: list[Candidate], best: Rows, replicated: dict[int, Replicated]) -> Array:
        """Change of log KL without the rows farthest out, if these dominate the fourth moments, (m,)."""
        change = np.zeros(len(best))
        x = self.sample.rows / np.sqrt(self.sample.eigenvalues)
        few = max(2, round(FAR_SHARE * len(x)))
        fourth = np.sort(x[:, :MOST_AXES] ** 4, axis=0)
        if self.sample.discrete or float((fourth[-few:].sum(0) / fourth.sum(0)).max()) < FAR_DOMINATE:
            return change
        far = np.argsort((x**2).sum(1))[len(x) - few :]
        kept = np.setdiff1d(np.arange(len(x)), far)
        for i in set(best.tolist()):
            rows = np.flatnonzero(best == i)
            change[rows] = np.abs(_log(self._whole(names[i], rows, kept)) - _log(replicated[i].kl[rows]))
        return change

    def _whole(self, candidate: Candidate, where: Rows, rows: Rows | None = None) -> Array:
        """KL at some anchors of a fit to all rows, or to the given ones."""
        chosen = np.arange(len(self.rows)) if rows is None else rows
        fit = fit_candidate(self.rows[chosen], self.sample.counts[chosen], candidate, self.plan)
        return fit.forward(self.anchors.take(where), self.settings.samples, self.settings.seed)

    def _replicate(self, candidate: Candidate, splits: int, where: Rows) -> Replicated:
        """Fits to all rows and to halves; the halves are measured at the anchors where the candidate matters."""
        samples, seed = self.settings.samples, self.settings.seed
        pairs = self.anchors.take(where)
        whole = fit_candidate(self.rows, self.sample.counts, candidate, self.plan)
        measured = whole.measure(self.anchors, samples, seed)
        fewer = max(samples // 2, 100)
        baseline = measured.kl.copy()
        baseline[where] = whole.forward(pairs, fewer, seed)
        halves = []
        for split in range(splits):
            for rows, counts in self._counts(split):
                fit = fit_candidate(rows, counts, candidate, self.plan, whole)
                values = baseline.copy()
                values[where] = fit.forward(pairs, fewer, seed)
                halves.append(values)
        return Replicated(whole, measured.kl, measured.kl_reverse, measured.error, baseline, np.array(halves))

    def _counts(self, split: int) -> list[tuple[Array, Array]]:
        """Rows and counts of two complementary halves of the data."""
        counts = self.sample.counts
        if not self.sample.discrete:
            return [(self.rows[rows], counts[rows]) for rows in self.halves[split]]
        # Copies of an atom are draws of it: they are dealt to both halves.
        part = stream(SPLIT_STREAM, self.settings.seed, split).binomial(counts.astype(int), 0.5).astype(float)
        return [(self.rows[c > 0], c[c > 0]) for c in (part, counts - part)]

    # -- tests on held-out rows --------------------------------------------------------------------------------------

    def _test(self, candidate: Candidate) -> Tested:
        if candidate.family == "atoms":
            unknown = np.stack([np.zeros(len(self.at)), np.full(len(self.at), np.inf)], 1)
            return Tested(unknown, unknown - [np.inf, 0], unknown, unknown)
        held, cross, own, centred = [], [], [], []
        for fold, (inside, outside) in enumerate(self.folds):
            fit = self._fold_fit(candidate, fold, inside)
            x, eps, n = self._heldout(outside, fold, DRAWS)
            flow, dilation, _ = fit.evaluate(x, eps, self.tau)
            f = self._along(flow, dilation).reshape(len(self.at), n, 2, DRAWS // 2)
            held.append(f.square().mean((2, 3)).numpy())
            centred.append((f - f.mean((1, 2, 3), keepdim=True)).square().mean((2, 3)).numpy())
            s = torch.from_numpy(np.exp(self.tau))[:, None]
            square, dim = eps.square().sum(1), eps.shape[1]
            g = self._along((square - dim).expand(len(s), -1), dim - square - (x * eps).sum(1) / s).reshape(f.shape)
            cross.append(conditional_covariance(f, g).numpy())
            own_flow, own_dilation, _ = fit.evaluate(*fit.draw(2000, fold), self.tau)
            own.append(self._along(own_flow, own_dilation).square().numpy())
        (e, e_se), (c, c_se), (u, u_se) = (_mean(np.concatenate(part, 1)) for part in (held, cross, own))
        v, v_se = _mean(np.concatenate(centred, 1))
        positive = c > 0
        safe = np.where(positive, c, 1.0)
        log_cross = np.where(positive, np.log(0.5 * safe), -np.inf)
        return Tested(
            np.stack([np.log(v / u), np.hypot(v_se / v, u_se / u)], 1),
            np.stack([2 * log_cross - np.log(0.5 * e), np.hypot(2 * c_se / safe, e_se / e)], 1),
            np.stack([log_cross, np.where(positive, c_se / safe, np.inf)], 1),
            np.stack([c / e, np.hypot(c_se, c * e_se / e) / e], 1),
        )

    def _along(self, flow: Tensor, dilation: Tensor) -> Tensor:
        """f = dtau F - dlog(alpha) q at the anchors; only its direction matters where alpha ends at 0."""
        infinite = ~np.isfinite(self.anchors.dtau)
        dtau = np.where(infinite, 1.0, self.anchors.dtau)
        dlog = np.where(infinite, -1.0, self.anchors.dlog_alpha)
        return torch.from_numpy(dtau)[:, None] * flow - torch.from_numpy(dlog)[:, None] * dilation

    def _heldout(self, outside: Rows, fold: int, draws: int) -> tuple[Tensor, Tensor, int]:
        """Rows, each ``draws`` times, and noise: first half of the draws, then their negatives."""
        rows = outside[: max(50, min(HELDOUT_ROWS, HELDOUT_SIZE // (draws * self.sample.rank)))]
        shape = (len(rows), draws // 2, self.sample.rank)
        noise = stream(HELDOUT_STREAM, self.settings.seed, fold).standard_normal(shape)
        eps = torch.from_numpy(np.concatenate([noise, -noise], 1)).flatten(0, 1)
        return torch.from_numpy(self.rows[rows]).repeat_interleave(draws, 0), eps, len(rows)

    def _halves(self) -> list[tuple[Rows, Rows]]:
        rng = stream(SPLIT_STREAM, self.settings.seed)
        n = self.sample.n
        refits = self.settings.bootstrap if self.sample.rank <= MANY_AXES else 2
        orders = [rng.permutation(n) for _ in range(max(1, refits // 2))]
        return [(order[: n // 2], order[n // 2 :]) for order in orders]

    def _folds(self) -> list[tuple[Rows, Rows]]:
        """Two folds, each of three quarters to fit and a quarter to judge; the judging quarters are disjoint."""
        order = np.concatenate(self.halves[0])
        quarter = max(len(order) // 4, 1)
        return [
            (order[quarter:], order[:quarter]),
            (np.concatenate([order[:quarter], order[2 * quarter :]]), order[quarter : 2 * quarter]),
        ]

    # -- verdict -----------------------------------------------------------------------------------------------------

    def _reasons(self, found: Findings, share: Array) -> npt.NDArray[np.object_]:
        """Why a pair is not valid, empty where it is; ``share`` of the KL is estimated, the rest is exact."""
        test, z = found.tested, 1.3
        variance, variance_error = share * test.second_moment[:, 0], z * share * test.second_moment[:, 1]
        gap = np.abs(test.cross[:, 0] - found.log_kl)
        noise = self.anchors.sigma_from / np.maximum(self.anchors.alpha_from, 1e-12)
        unclear = test.cross[:, 1] > 0.5
        objections = [
            (
                noise < LIMITS.floor * self.sample.step,
                "the values are quantised in steps that this noise does not hide",
            ),
            (
                np.full(len(noise), self.sample.discrete and self.sample.missing > LIMITS.missing),
                "too many atoms of the law were seen only once",
            ),
            (
                # n points span at most n - 1 directions: what is empty may be empty for want of samples only.
                np.full(len(noise), self.sample.n // 2 - 1 < self.sample.rank < self.sample.dim),
                "too few samples for so many dimensions: half of them span fewer directions than all",
            ),
            (share * np.abs(found.bias) > LIMITS.bias, "too few samples: half of them give a much different value"),
            (share * found.spread > LIMITS.error, "too few samples: refits to halves of them disagree"),
            (share * found.rivals > LIMITS.error, "fits that held-out data cannot tell apart disagree"),
            (share * found.error > LIMITS.error, "the errors of sample, fit and draws add up to too much"),
            (
                ~unclear & (share * gap > LIMITS.cross + z * share * test.cross[:, 1]),
                "held-out data contradict the fit: its time score does not predict the conditional one (F6)",
            ),
            (
                share * (test.bound[:, 0] - found.log_kl) > LIMITS.bound + z * share * test.bound[:, 1],
                "a certified lower bound (F6) lies above the estimate: the fit is too smooth for the data",
            ),
            (
                (variance > LIMITS.second_moment + variance_error) | (variance < -LIMITS.flat - variance_error),
                "held-out data contradict the fit: its time score has another spread on them",
            ),
        ]  # fmt: skip
        reason = np.full(len(self.at), "", dtype=object)
        for fails, text in objections[::-1]:
            reason[np.asarray(fails, bool)] = text
        return reason

    def moments(self, split: int | None = None, half: int = 0) -> Array:
        """A, B, C, A - B^2/C (F5) and mmse of the chosen fits at the anchors, shape (m, 5); after ``estimate``.

        Args:
            split, half: of the refit to half of the data; by default the fit to all of them.
        """
        out = np.zeros((len(self.at), 5))
        samples, seed = min(self.settings.samples, 2000), self.settings.seed
        for i in sorted(set(self.best.tolist())):
            where = np.flatnonzero(self.best == i)
            tau, fit = self.tau[where], self.replicated[i].fit
            if split is not None:
                fit = fit_candidate(*self._counts(split)[half], self.names[i], self.plan, fit)
            out[where, :3] = fit.profile(tau, samples, seed) + self.null.profile(tau, 0, 0)
            beta = out[where, 1] / out[where, 2]
            out[where, 3] = fit.residual(tau, beta, samples, seed) + self.null.residual(tau, beta, 0, 0)
            out[where, 4] = fit.mmse(tau, samples, seed)
        return out

    def _point_mass(self) -> Estimate:
        m = len(self.pairs)
        found = self.null.measure(self.pairs, 0, 0)
        name, reason = np.full(m, "gaussian", dtype=object), np.full(m, "", dtype=object)
        zero = np.zeros(m)
        return Estimate(found.kl, found.kl_reverse, zero, found.kl, found.kl, zero, name, np.ones(m, bool), reason)

    def _everywhere(
        self, kl: Array, reverse: Array, error: Array, i_min: Array, family: npt.NDArray[np.object_],
        reason: npt.NDArray[np.object_],
    ) -> Estimate:  # fmt: skip
        """From the anchors to all pairs: ratios to the closed-form bound are smooth in log-SNR."""
        if len(self.at) < len(self.pairs):
            bound = upper_bound(self.pairs, self.sample.dim, self.sample.second_moment)
            to = np.minimum(self.pairs.tau, self.tau.max() + 1.0)
            x = to[self.at]

            def spread_out(y: Array, scale: Array) -> Array:
                return np.exp(PchipInterpolator(x, np.log(y / scale[self.at]))(to)) * scale

            kl, reverse = spread_out(kl, bound), spread_out(reverse, bound)
            i_min = spread_out(np.maximum(i_min, 1e-300), np.ones(len(to)))
            error = np.interp(to, x, error)
            everywhere = np.arange(len(to))
            left = np.searchsorted(self.at, everywhere, side="right") - 1
            right = np.minimum(left + (self.at[left] < everywhere), len(self.at) - 1)
            family = family[np.where(to - x[left] <= x[right] - to, left, right)]
            reason = np.where(reason[left] != "", reason[left], reason[right])
        # Few refits know their own spread only roughly: Student's quantile, not the normal one.
        width = np.exp(stats.t.ppf(0.95, len(self.halves)) * np.minimum(error, 50.0))
        valid = np.asarray(reason == "", dtype=bool)
        return Estimate(kl, reverse, kl * error, kl / width, kl * width, i_min, family, valid, reason)


def _simplest_cover(plausible: npt.NDArray[np.bool_], size: npt.NDArray[np.int64]) -> Rows:
    """A plausible candidate for every anchor, from as few candidates as a greedy choice needs; simpler ones first."""
    chosen: list[int] = []
    open_ = np.ones(plausible.shape[1], dtype=bool)
    while open_.any():
        gain = (plausible & open_).sum(1)
        chosen.append(min(np.flatnonzero(gain == gain.max()).tolist(), key=lambda i: int(size[i])))
        open_ &= ~plausible[chosen[-1]]
    chosen.sort(key=lambda i: size[i])
    return np.array([next(i for i in chosen if plausible[i, j]) for j in range(plausible.shape[1])])


def _anchors(pairs: Pairs, most: int) -> Rows:
    """Positions of the pairs that are estimated: all of a few, otherwise spread evenly in log-SNR with both ends."""
    m = len(pairs)
    if m <= most:
        return np.arange(m)
    tau = pairs.tau
    last = np.flatnonzero(np.isfinite(tau))[-1]
    even = np.searchsorted(tau, np.linspace(tau[0], tau[last], most)).clip(0, m - 1)
    return np.unique(np.concatenate([even, [0, 1, last, m - 1]]))


def _mean(values: Array) -> tuple[Array, Array]:
    """Mean over the second axis and its standard error."""
    return values.mean(1), values.std(1) / values.shape[1] ** 0.5


def _log(values: Array) -> Array:
    return np.log(np.maximum(values, 1e-300))
