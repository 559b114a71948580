"""Relative entropy from samples: several families are fitted, held-out data choose, and what is left is stated.

For every pair (at most ``ANCHORS`` of them; others are interpolated, ``anchors``):

1. Choice (``choice``). Each candidate is fitted to three quarters of the rows and judged by the log-likelihood of the
   rest *at the noise level of the pair*: what noise hides does not count. Of the plausible ones the simplest is taken.
   A few levels of less noise are looked at in any case, since they refute candidates for more of it.
2. Error of the fit. The chosen candidate is refitted to random halves of the data, which gives the bias and the
   standard error; where the law looks Gaussian, the influence of every row gives the latter as well (``refits``).
3. Error of the choice. Candidates that the held-out likelihood hardly tells from the best one must agree with it, and
   so must what less noise chooses, since one law is behind all levels; their differences enter the error. The next
   richer fit of the same kind must agree, and if the richest on offer is the best one, the next poorer: an edge, a
   spike or a curve shows as a fit that keeps changing as it gets richer. If a few rows far out dominate the fourth
   moments, the fit without them must agree too.
4. Test on held-out data (F6, ``heldout_tests``): the time score must predict the conditional one, must have the spread
   that the fit says, and the certified lower bound of *every* candidate must lie below the estimate. What a covariance
   of many dimensions makes of the first two for want of rows alone is taken off.
5. Columns of few values: what the fit lacks for want of their atoms is added (``discrete_columns``).
6. A pair is valid if its error allows to promise 30 % and no test objects to its fit, here or, beyond doubt, at other
   noise. Otherwise the reason says which one did, unless the bracket of certified bounds is itself narrow enough
   (``verdict``).
"""

__all__ = ["Judge"]

from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import stats

from difficulty.intervals import Z90
from difficulty.relative_entropy.anchors import Anchors
from difficulty.relative_entropy.choice import Choice, choose
from difficulty.relative_entropy.cumulants import DRAWS, lacking
from difficulty.relative_entropy.discrete_columns import (
    lacking_in_columns,
    mmse_lacking_in_columns,
    rates_lacking_in_columns,
)
from difficulty.relative_entropy.estimate import Estimate, Settings
from difficulty.relative_entropy.families import MOST_AXES, Candidate, Plan
from difficulty.relative_entropy.fits import Fit, Measured, null_block
from difficulty.relative_entropy.heldout_tests import HeldoutTests, Tested
from difficulty.relative_entropy.pairs import Pairs, upper_bound
from difficulty.relative_entropy.rates import add_rates
from difficulty.relative_entropy.refits import (
    FAR_SHARE,
    MANY_AXES,
    Refits,
    Replicated,
    beside_rest,
    gaussian_log_error,
    log_of,
    tail_shares,
)
from difficulty.relative_entropy.sample import Sample
from difficulty.relative_entropy.unmixing import contrast_of_axes
from difficulty.relative_entropy.verdict import LIMITS, Findings, bracket, objections, spans_too_little
from difficulty.threads import Calls, together

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
T = TypeVar("T")

ANCHORS = 40
# No estimate from a sample is taken to be better than this, on the log scale.
LEAST_ERROR = 0.001
# The parts of an error beside the sampling error are doubts that overlap: their sum is twice the root mean square of
# the true errors. Intervals state this share of them, and never less than ``LEAST_ERROR``. Both were set on 131 data
# sets that judge nothing: those of laws by independent testers, whose truths were kept back until then, are covered at
# 89 %, those of ``LAWS`` in benchmarks/known_laws.py, with which the families were made, at 94 %, and data sets 16 and
# 17 of the other laws there, of which later ones judge, at 91 %, by process between 84 and 96 %. The verdict rests on
# all of the error.
CALIBRATED = 0.5
MANY_COMPONENTS = 8
# Weight from which a candidate is a rival of the chosen one.
RIVAL = 0.1
# Share of a fourth moment that the rows farthest out must have for a check without them.
FAR_DOMINATE = 0.3
# Change of the log noise scale up to which a KL is 1/2 E[f^2]; it is less by up to 2/3 of the change, which a point
# mass attains.
SMALL_STEP = 0.03
# Levels of noise at which candidates are judged besides the anchors, log of the noise over the largest standard
# deviation, unless an anchor of less or more noise is as near as this.
LEVELS, NEAR = np.arange(-4.0, 1.0), 0.5
# Rows per axis below which a fourth moment of all axes says nothing, and the first number of the draws against it.
FEW_FOR_CUMULANTS, FIRST_DRAW = 4, 1000
# Axes from which a covariance is fitted so loosely that held-out rows show it. In fewer a mixture that overfits draws a
# curve or an edge with its components, which must not excuse it.
OVERFIT_AXES, EXPECTED_DRAW = 8, 2000


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
        self.sample, self.settings = sample, settings
        self.net = Anchors.choose(pairs, anchors)
        self.anchors = self.net.chosen
        self.rows = sample.rows + sample.mean
        largest = float(sample.eigenvalues.max(initial=1e-30))
        self.plan = Plan.of(sample.rank, sample.n, largest, pairs, settings.seed)
        small = sample.n >= 8 * sample.rank and 1 <= sample.rank <= MOST_AXES
        if any(c.independent_axes for c in pool):
            contrast = contrast_of_axes(sample.rows, sample.counts, settings.seed) if small else None
            if contrast is None:
                pool = [c for c in pool if not c.independent_axes]
            else:
                self.plan = replace(self.plan, contrast=contrast)
        self.pool = pool
        # Beyond this noise every law is Gaussian to all digits, and s itself may be infinite.
        self.tau = np.minimum(self.anchors.tau, 0.5 * np.log(sample.second_moment + 1e-30) + 7)
        self.refits = Refits(sample, self.rows, self.plan, self.anchors, settings)
        order = np.concatenate(self.refits.halves[0])
        self.tests = HeldoutTests(sample, self.rows, order, self.plan, self.anchors, self.tau, settings.seed)
        self.null = null_block(sample)
        self.few = min(settings.samples, 2000)  # draws of the rates

    def estimate(self) -> Estimate:
        """All pairs; afterwards ``fit_reasons`` says at each anchor what speaks against the fit."""
        if self.sample.rank == 0:
            self.fit_reasons = np.full(len(self.tau), "", dtype=object)
            return self._point_mass()
        choice = self.choose()
        found = self._measure(choice.names, choice.weight)
        sample, exact, columns = self.sample, self.null.measure(self.anchors, 0, 0), self._columns()
        rest = np.exp(found.log_kl)
        kl = rest + exact.kl + columns.kl
        upper = upper_bound(self.anchors, sample.dim, sample.second_moment)
        reasons = objections(sample, self.anchors, found, (upper - exact.kl).clip(min=0.0) / upper, kl, columns.error)
        self.fit_reasons = reasons.copy()
        reverse = (found.reverse * rest + exact.kl_reverse + columns.kl_reverse) / kl
        family = np.array([c.family for c in found.family], dtype=object)
        doubts = (found.error**2 - found.spread**2).clip(min=0.0)
        stated = np.sqrt(found.spread**2 + CALIBRATED**2 * doubts)
        error = np.sqrt((rest / kl * stated) ** 2 + (columns.error / kl) ** 2 + LEAST_ERROR**2)
        # Few refits know their own spread only roughly: Student's quantile, but the influence of n rows is well known.
        by_rows = (family == "gaussian") | (found.influence > CALIBRATED * found.error)
        quantile = np.where(by_rows, Z90, stats.t.ppf(0.95, len(self.refits.halves)))
        low, high, narrow = bracket(exact.kl, found.tested, upper)
        # Directions that are empty for want of samples are not known to contribute what they seem to.
        narrow &= (reasons != "") & (not spans_too_little(sample))
        kl[narrow] = np.sqrt(low * high)[narrow]
        error[narrow], quantile[narrow] = np.log(high[narrow] / low[narrow]) / (2 * Z90), Z90
        family[narrow], reasons[narrow] = "bracket", ""
        i_min = self.rates(self.chosen_fits())[:, 3]
        blank = np.zeros(len(kl))
        at_anchors = Estimate(kl, reverse * kl, blank, blank, blank, i_min, family, reasons == "", reasons)
        return self.net.everywhere(at_anchors, error, quantile, sample.dim, sample.second_moment)

    def choose(self) -> Choice:
        """Which candidates explain the held-out rows at every anchor.

        What is asked for must not decide what is known: less noise refutes candidates for more of it, so that some of
        it is looked at in any case.
        """
        scale, step = float(np.sqrt(self.sample.eigenvalues.max())), self.sample.step
        less = np.log(scale) + LEVELS
        less = less[(less < self.tau.max()) & (np.exp(less) >= LIMITS.floor * step)]
        less = less[np.abs(less[:, None] - self.tau).min(1) > NEAR]
        levels = np.concatenate([self.tau, less])
        order = np.argsort(levels, kind="stable")
        choice = choose(self.pool, self.tests, levels[order], self.settings)
        return choice.take(np.argsort(order)[: len(self.tau)])

    def together(self, calls: Calls[T]) -> list[T]:
        """The results of independent calls, so many at a time as the settings allow."""
        return together(calls, self.settings.threads)

    # -- measurement -------------------------------------------------------------------------------------------------

    def _measure(self, names: list[Candidate], weight: Array) -> Findings:
        best = weight.argmax(0)
        winners = sorted(set(best.tolist()))
        order = np.argsort(-np.where(weight < 1, weight, 0).max(1), kind="stable")
        rivals = [int(i) for i in order if weight[i].max() > RIVAL and i not in winners][:3]
        replicated, tested, long_step = {}, {}, {}
        jobs = [*winners, *rivals]
        tests = self.together([partial(self.tests.test, names[i]) for i in jobs])
        fits = self.together([partial(self.refits.whole, names[i]) for i in jobs])
        loose = [(i, fit) for i, (fit, _) in zip(jobs, fits, strict=True) if i in winners and self._overfits(names[i])]
        expected = self.together([partial(self._expected, names[i], fit) for i, fit in loose])
        of_right_fits = {i: test for (i, _), test in zip(loose, expected, strict=True)}
        for done, (i, test, fitted) in enumerate(zip(jobs, tests, fits, strict=True)):
            where = np.flatnonzero(weight[i] > 0.02)
            splits = len(self.refits.halves) if i in winners else min(2, len(self.refits.halves))
            replicated[i] = self.refits.replicate(names[i], *fitted, splits, where)
            long_step[i] = self._long_step(replicated[i])
            tested[i] = test.scaled(long_step[i])
            if i in of_right_fits:
                tested[i] = tested[i].beyond(of_right_fits[i].scaled(long_step[i]), log_of(fitted[1].kl))
            half = len(self.pool)
            self.settings.progress(half + round(half * (done + 1) / len(jobs)), 2 * half)
        self.replicated, self.names, self.best = replicated, names, best
        return self._findings(weight, tested, long_step)

    def _findings(self, weight: Array, tested: dict[int, Tested], long_step: dict[int, Array]) -> Findings:
        """What the fits of the chosen candidates and of their rivals say together."""
        fits = self.replicated

        def pick(values: dict[int, Array]) -> Array:
            return np.stack([values[i][j] for j, i in enumerate(self.best)])

        log_kl = pick({i: fit.corrected for i, fit in fits.items()})
        bias = pick({i: fit.bias for i, fit in fits.items()})
        influence = beside_rest(gaussian_log_error(self.sample, self.anchors, log_kl + bias), bias)
        spread = np.maximum(pick({i: fit.spread for i, fit in fits.items()}), influence)
        monte_carlo = pick({i: fit.monte_carlo / fit.kl for i, fit in fits.items()})
        bias_doubt = pick({i: fit.bias_doubt for i, fit in fits.items()})
        doubt = np.sqrt(self._rivals(weight, log_kl) ** 2 + self._capacity(weight) ** 2 + self._far_rows() ** 2)
        test = Tested(
            pick({i: t.second_moment for i, t in tested.items()}),
            self._highest_bound(tested),
            pick({i: t.cross for i, t in tested.items()}),
        )
        # A certified bound above the estimate says how much too low that is, at the least: the square without its bias.
        excess, excess_error = (test.bound[:, 0] - log_kl).clip(min=0.0), test.bound[:, 1]
        too_low = np.sqrt((excess**2 - excess_error**2).clip(min=0.0))
        lacks = self._lacking() * np.exp(pick(long_step))[:, None]
        # A refuted fit is off by what its cumulants lack, which is known to its error only, and by what a narrower
        # spread of the time score adds to first order.
        narrow = np.where(lacks[:, 0] > 0, (-test.second_moment[:, 0]).clip(min=0.0), 0.0)
        refuted = np.hypot(lacks[:, 0].clip(min=0.0), lacks[:, 1]) / np.exp(log_kl) + narrow
        return Findings(
            log_kl=log_kl,
            reverse=pick({i: fit.kl_reverse / fit.kl for i, fit in fits.items()}),
            error=np.sqrt(spread**2 + monte_carlo**2 + doubt**2 + bias_doubt**2 + refuted**2 + too_low**2),
            influence=influence,
            bias=pick({i: fit.unresolved for i, fit in fits.items()}),
            spread=spread,
            rivals=doubt,
            tested=test,
            lacking=lacks,
            family=[self.names[i] for i in self.best],
        )

    def _rivals(self, weight: Array, log_kl: Array) -> Array:
        """Weighted root mean square of what the candidates differ from the chosen one in log KL, (m,)."""
        doubt, total = np.zeros(len(self.best)), np.ones(len(self.best))
        for i, other in self.replicated.items():
            w = np.where(self.best == i, 0.0, weight[i])
            doubt += w * (other.corrected - log_kl) ** 2
            total += w
        return np.sqrt(doubt / total)

    def _overfits(self, candidate: Candidate) -> bool:
        """Whether held-out rows show how loosely so few rows determine its covariances."""
        return candidate.of_gaussians and OVERFIT_AXES <= self.sample.rank <= MANY_AXES and not self.sample.discrete

    def _expected(self, candidate: Candidate, fit: Fit) -> Tested:
        """The held-out figures if the fit were the law: those of as many rows drawn from it."""
        drawn = fit.draw(self.sample.n, EXPECTED_DRAW)[0].numpy()
        order = np.arange(self.sample.n)
        tests = HeldoutTests(self.sample, drawn, order, self.plan, self.anchors, self.tau, self.settings.seed)
        return tests.test(candidate)

    def _long_step(self, fitted: Replicated) -> Array:
        """Log of the KL of a fit over its 1/2 E[f^2] in the middle of the pair; 0 where the step is small, (m,)."""
        dtau, dlog = self.anchors.dtau, self.anchors.dlog_alpha
        long = np.flatnonzero(np.isfinite(dtau) & (dtau > SMALL_STEP))
        found = np.zeros(len(dtau))
        if len(long):
            a, b, c, _ = fitted.fit.profile(self.tau[long], self.settings.samples, self.settings.seed).T
            middle = 0.5 * (dtau[long] ** 2 * a - 2 * dtau[long] * dlog[long] * b + dlog[long] ** 2 * c)
            found[long] = log_of(fitted.kl[long]) - log_of(middle)
        return found

    def _lacking(self) -> Array:
        """What the chosen fits lack by the cumulants of the data, nats of a small step, and its error, (m, 2)."""
        sample = self.sample
        found = np.zeros((len(self.best), 2))
        if sample.discrete or not FEW_FOR_CUMULANTS * sample.rank <= sample.n or sample.rank < 2:
            return found
        for where, fit in self.chosen_fits():
            drawn = [fit.draw(sample.n, FIRST_DRAW + k)[0].numpy() for k in range(DRAWS)]
            candidate, pairs = self.names[self.best[where[0]]], self.anchors.take(where)
            found[where] = lacking(
                sample.rows, drawn, sample.eigenvalues, pairs, gaussian=candidate.family == "gaussian",
                one_radius=candidate.one_radius, threads=self.settings.threads,
            )  # fmt: skip
        return found

    def _columns(self) -> Measured:
        """What the chosen fits lack for want of the atoms of columns of few values, nats, and its error, (m,) each."""
        found = np.zeros((3, len(self.best)))
        for where, fit in self.chosen_fits():
            lacks = lacking_in_columns(fit, self.sample.columns, self.anchors.take(where))
            found[:, where] = lacks.kl, lacks.kl_reverse, lacks.error
        return Measured(*found)

    def _highest_bound(self, tested: dict[int, Tested]) -> Array:
        """The best lower bound of all candidates that were tested, by its lower end, (m, 2)."""
        bounds = np.stack([t.bound for t in tested.values()])
        lower = bounds[..., 0] - 1.64 * np.where(bounds[..., 1] < 1, bounds[..., 1], np.inf)
        return bounds[lower.argmax(0), np.arange(lower.shape[1])]

    def _capacity(self, weight: Array) -> Array:
        """What log KL still changes by with ever richer fits, which an edge, a tail or a curve makes differ, (m,).

        If a fit with K components errs by c/K, that with half as many is as far from it as the truth. It is asked where
        the richest of a family is the best, and where a one-dimensional law takes so many that it is no mixture but a
        curve drawn with them. The next richer fit, with K' components, goes a part 1 - K/K' of the way: what is left
        is counted with it if it leads up, since a smooth fit is too low, and is no worse.
        """
        change = np.zeros(len(self.best))
        measured = {self.names[i]: fitted.kl for i, fitted in self.replicated.items()}
        for i in set(self.best.tolist()):
            top = self.names[i]
            kind = [c for c in self.pool if c.kind == top.kind]
            position = kind.index(top)
            smooth = top.family == "product" and top.components >= MANY_COMPONENTS
            poorer = [c for c in kind if 2 * c.components <= top.components]
            others = poorer[-1:] if top == kind[-1] or smooth else []
            others += kind[position + 1 : position + 2]
            rows = np.flatnonzero(self.best == i)
            # Rivals are fitted to all rows already.
            fresh = [other for other in others if other not in measured]
            new = self.together([partial(self.refits.forward, other, rows) for other in fresh])
            found = dict(zip(fresh, new, strict=True)) | {c: measured[c][rows] for c in others if c in measured}
            for other, kl in found.items():
                difference = log_of(kl) - log_of(self.replicated[i].kl[rows])
                if other.components > top.components >= MANY_COMPONENTS and other in self.names:
                    ahead = (difference > 0) & (weight[self.names.index(other), rows] > RIVAL)
                    difference[ahead] *= other.components / (other.components - top.components)
                change[rows] = np.maximum(change[rows], np.abs(difference))
        return change

    def _far_rows(self) -> Array:
        """Change of log KL without the rows farthest out, if these dominate the fourth moments, (m,)."""
        change = np.zeros(len(self.best))
        x = self.sample.rows / np.sqrt(self.sample.eigenvalues)
        few = max(2, round(FAR_SHARE * len(x)))
        if self.sample.discrete or float(tail_shares(self.sample).max()) < FAR_DOMINATE:
            return change
        far = np.argsort((x**2).sum(1))[len(x) - few :]
        kept = np.setdiff1d(np.arange(len(x)), far)
        light = [i for i in set(self.best.tolist()) if not self.names[i].heavy_tailed]
        where = [np.flatnonzero(self.best == i) for i in light]
        without = self.together(
            [partial(self.refits.forward, self.names[i], w, kept) for i, w in zip(light, where, strict=True)]
        )
        for i, rows, kl in zip(light, where, without, strict=True):
            change[rows] = np.abs(log_of(kl) - log_of(self.replicated[i].kl[rows]))
        return change

    def chosen_fits(self, split: int | None = None, half: int = 0) -> list[tuple[Rows, Fit]]:
        """The anchors of every chosen candidate and its fit to all rows; after ``estimate``.

        Args:
            split, half: refit to this half of the data.
        """
        fits = []
        for i in sorted(set(self.best.tolist())):
            fit = self.replicated[i].fit
            if split is not None:
                fit = self.refits.of_half(self.names[i], fit, split, half)
            fits.append((np.flatnonzero(self.best == i), fit))
        return fits

    def rates(self, fits: list[tuple[Rows, Fit]]) -> Array:
        """A, B, C, I_min (F5) of ``chosen_fits`` at the anchors, shape (m, 4)."""
        out = np.zeros((len(self.tau), 4))
        for where, fit in fits:
            tau = self.tau[where]
            out[where] = add_rates([fit.profile(tau, self.few, self.settings.seed), self.null.profile(tau, 0, 0)])
            out[where] += rates_lacking_in_columns(fit, self.sample.columns, tau)
        return out

    def mmse(self, fits: list[tuple[Rows, Fit]]) -> Array:
        """Least possible E|x0 - x0_hat|^2 of ``chosen_fits`` at the anchors, shape (m,)."""
        out = np.zeros(len(self.tau))
        for where, fit in fits:
            tau = self.tau[where]
            out[where] = fit.mmse(tau, self.few, self.settings.seed)
            out[where] += mmse_lacking_in_columns(fit, self.sample.columns, tau)
        return out

    def _point_mass(self) -> Estimate:
        pairs = self.net.pairs
        m = len(pairs)
        found = self.null.measure(pairs, 0, 0)
        name, reason = np.full(m, "gaussian", dtype=object), np.full(m, "", dtype=object)
        zero = np.zeros(m)
        return Estimate(found.kl, found.kl_reverse, zero, found.kl, found.kl, zero, name, np.ones(m, bool), reason)
