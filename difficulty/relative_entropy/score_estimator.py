"""Relative entropy from a denoiser: one that the user has trained, or a small one that is trained here.

Without a model the rows are dealt to three folds and a network is trained on every two of them, so that each is asked
at rows that it has not seen, and all rows are asked for. A model of the user's is asked at the held-out samples of the
data set. For every pair (at most ``ANCHORS``; others are interpolated) the time score of the gain-corrected denoiser
(`score_field`) gives, on held-out (x0, eps),

    KL = 1/2 E[f^2] - 1/12 E[f^3] (F4),  cross, bound and slope (F6);

the estimate is the first where the slope lies within 0.8..1.25, else cross, and never below the certified bound. A step
longer than 0.3 in log s is integrated at fixed x instead (F9). The error joins the spread over rows and folds, what
training longer changed, and the distance from the certified bound: f - f_true costs 1/2 E[(f - f_true)^2], which is the
distance if f is calibrated. A denoiser that learned too little is calibrated, too, and its KL too small: by how much a
mixture fitted to the same rows certifies more joins the error, and refuses the pair where it is beyond doubt. A pair is
valid if its error promises 30 % and the samples can exclude a rougher law (`verdict`).
"""

__all__ = ["estimate_score"]

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from difficulty.datasets import Dataset
from difficulty.errors import InputError
from difficulty.intervals import Z90
from difficulty.randomness import stream
from difficulty.relative_entropy.anchors import Anchors
from difficulty.relative_entropy.estimate import Estimate, Settings
from difficulty.relative_entropy.families import Candidate, Plan, fit_candidate
from difficulty.relative_entropy.fits import Fit, GaussianBlock, null_block
from difficulty.relative_entropy.gaussian import gaussian_kl
from difficulty.relative_entropy.montecarlo import kl_from_log_ratio
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.sample import make_sample
from difficulty.relative_entropy.score import (
    GAUSS_NODES,
    LARGEST_STEP,
    coarse_log_ratio,
    conditional_covariance,
    conditional_scores,
    time_score,
)
from difficulty.relative_entropy.score_field import EXACT_DIVERGENCE, ModelScore, ScoreSource, evaluate
from difficulty.relative_entropy.score_training import ITERATIONS, train_score
from difficulty.relative_entropy.verdict import ROUGHER, too_rough, unseen
from difficulty.wiener import Wiener

Array = npt.NDArray[np.float64]

ANCHORS = 40
FOLDS = 3
# Held-out rows of a fold and noise draws of each, half of them the negatives of the others.
ROWS, DRAWS = 1500, 4
# Dimensions up to which the divergence is exact where F4 gives way to F9: three sets of points at eight nodes.
EXACT_INTEGRATED = 4
# Components of the mixtures that must not certify more than the denoiser does, and dimensions up to which they can.
RIVALS, MOST_FOR_RIVALS = (4, 12), 1024
LARGEST_EXCESS, EXCESS_ERRORS = 0.12, 1.3
# Levels of a model of the user's through which an interval is integrated.
MOST_LEVELS, LEAST_LEVELS = 17, 5
LOW_SLOPE, HIGH_SLOPE, UNUSABLE_SLOPE, UNUSABLE_ERROR = 0.8, 1.25, 0.3, 0.5
LARGEST_ERROR = 0.12
# A small network trained here is off by several percent whatever its folds agree on; a model of the user's is not ours.
# With 5 % intervals of nominal 90 % held the truth in 83 % of 100 pairs of sixteen data sets, none of which judges now.
LEAST_ERROR = 0.07
# log s beyond which data of unit size are noise to all digits; stands for infinity in the training range.
MOST_TAU = 6.0
SPLIT_STREAM, NOISE_STREAM = 53, 37


@dataclass(frozen=True, eq=False)
class Fold:
    """A denoiser and rows that it has not seen.

    Args:
        rows: (n, D), float64.
        wiener, source: baseline and denoiser.
        early: the denoiser after less training; None for a model of the user's.
        rivals: mixtures fitted to the rows that it has seen.
    """

    rows: Tensor
    wiener: Wiener
    source: ScoreSource
    early: ScoreSource | None
    rivals: list[Fit]


@dataclass(frozen=True, eq=False)
class Measured:
    """Means over the rows of a fold for one pair, nats.

    Args:
        kl, kl_reverse: F4, or F9 if ``integrated``.
        se: standard error of kl over the rows.
        cross, cross_se: 1/2 E[f g] (F6); of an integrated step the mean over its nodes.
        energy: 1/2 E[f^2] likewise.
        rivals: log of the certified lower bound of each rival and its standard error, (k, 2).
        i_min: rate of the schedule-free part.
        integrated: whether the step was too long for F4.
    """

    kl: float
    kl_reverse: float
    se: float
    cross: float
    cross_se: float
    energy: float
    rivals: Array
    i_min: float
    integrated: bool


def estimate_score(dataset: Dataset, pairs: Pairs, settings: Settings) -> Estimate:
    """F4, F6 and F9 with a trained denoiser.

    Raises:
        InputError: if the model belongs to another process, cannot be differentiated, or there are too few rows.
    """
    net = Anchors.choose(pairs, ANCHORS)
    if settings.model is None:
        sample = make_sample(dataset)
        if sample.rank == 0:
            raise InputError(f"all samples of {dataset.name} are one point; use estimator 'auto', which is exact there")
        if sample.n < 10 * FOLDS:
            raise InputError(f"estimator 'score' trains on {FOLDS} folds and needs {10 * FOLDS} distinct samples")
        null, moment = null_block(sample), sample.second_moment
        folds = _train(sample.rows + sample.mean, sample.counts, net.chosen, settings)
        hidden = unseen(net.chosen, sample)
    else:
        assert settings.process is not None
        if settings.model.process is not None:
            settings.process.check_fingerprint(settings.model.process.fingerprint, settings.model.name)
        train, rows = (part.flatten(1).double() for part in (dataset.train, dataset.heldout))
        wiener = Wiener(train.numpy(), np.ones(len(train)))
        source = ModelScore(settings.model, settings.process, dataset.shape)
        null, moment = GaussianBlock(np.zeros(0), np.zeros(0)), float(rows.square().sum(1).mean())
        folds = [Fold(rows, wiener, source, None, _rivals(train.numpy(), np.ones(len(train)), pairs, settings.seed))]
        # How many samples the model has seen is not known; it answers for what it learnt from them.
        hidden = np.zeros(len(net.chosen))
    return _estimate(folds, net, null, hidden, dataset.dim, moment, settings)


def _train(rows: Array, counts: Array, pairs: Pairs, settings: Settings) -> list[Fold]:
    order = stream(SPLIT_STREAM, settings.seed).permutation(len(rows))
    finite = pairs.tau[np.isfinite(pairs.tau)]
    tau = (float(finite.min()) - 0.5, float(min(finite.max() + 0.5, MOST_TAU)))
    total, done = FOLDS * (ITERATIONS // 100), 0

    def count() -> None:
        nonlocal done
        done += 1
        settings.progress(done, 2 * total)

    folds = []
    for number, outside in enumerate(np.array_split(order, FOLDS)):
        inside = np.setdiff1d(order, outside)
        wiener = Wiener(rows[inside], counts[inside])
        early, source = train_score(rows[inside], counts[inside], wiener, tau, settings.seed + number, count)
        # A row that occurs often counts often.
        held = np.repeat(rows[outside], counts[outside].astype(int), axis=0)
        rivals = _rivals(rows[inside], counts[inside], pairs, settings.seed)
        folds.append(Fold(torch.from_numpy(held), wiener, source, early, rivals))
    return folds


def _rivals(rows: Array, counts: Array, pairs: Pairs, seed: int) -> list[Fit]:
    n, dim = rows.shape
    if dim > MOST_FOR_RIVALS:
        return []
    plan = Plan.of(dim, n, float(rows.var(0).max()), pairs, seed)
    kinds = [Candidate("mixture", k, plan.leading + 1.0) for k in RIVALS if n / k >= max(30, plan.leading)]
    return [fit_candidate(rows, counts, kind, plan) for kind in kinds]


def _estimate(
    folds: list[Fold],
    net: Anchors,
    null: GaussianBlock,
    hidden: Array,
    dim: int,
    second_moment: float,
    settings: Settings,
) -> Estimate:
    pairs, m = net.chosen, len(net.at)
    exact = null.measure(pairs, 0, 0)
    rows, reasons = [], []
    for i in range(m):
        if np.isfinite(pairs.tau[i]):
            found = [_measure(fold, fold.source, pairs, i, settings) for fold in folds]
            early = folds[0].early
            less = None if early is None else _measure(folds[0], early, pairs, i, settings)
            kl, error, reason = _judge(found, less)
            known = folds[0].source.levels is None or len(_levels(folds[0], pairs, i)) >= LEAST_LEVELS
            if found[0].integrated and not known:
                reason = "the step is too long for the few timesteps that the model knows in it"
            back, i_min = (float(np.mean([getattr(one, name) for one in found])) for name in ("kl_reverse", "i_min"))
        else:
            one = pairs.take([i])
            kl, back = (float(np.mean([_gaussian(fold, one, way) for fold in folds])) for way in (False, True))
            error, i_min = 1.0, 0.0
            reason = "alpha ends at 0, where a time score is not defined; the Gaussian value is given"
        total = kl + exact.kl[i]
        if not reason and too_rough(hidden[i] / total, error * kl / total):
            reason = ROUGHER
        rows.append((total, max(back, 0.0) + exact.kl_reverse[i], error * kl / total, max(i_min, 0.0)))
        reasons.append(reason)
        settings.progress(m + i + 1, 2 * m)
    total_kl, reverse, log_error, rate = np.array(rows).T
    texts, name, blank = np.array(reasons, dtype=object), np.full(m, "score", dtype=object), np.zeros(m)
    at_anchors = Estimate(total_kl, reverse, blank, blank, blank, rate, name, texts == "", texts)
    return net.everywhere(at_anchors, log_error, np.full(m, Z90), dim, second_moment)


def _judge(found: list[Measured], early: Measured | None) -> tuple[float, float, str]:
    """KL, its standard error on the log scale, and what speaks against it."""
    kl, cross, energy = (float(np.mean([getattr(one, name) for one in found])) for name in ("kl", "cross", "energy"))
    cross_se = float(np.sqrt(np.sum([one.cross_se**2 for one in found]))) / len(found)
    slope = cross / energy if energy > 0 else 0.0
    if slope < UNUSABLE_SLOPE or cross_se > UNUSABLE_ERROR * cross:
        # The bound is of second order in the step; the fit says what the others make of it.
        sure = (max(cross - Z90 * cross_se, 0.0) / energy) ** 2 * kl if energy > 0 else 0.0
        text = f"the time score is not calibrated here; only the lower bound {sure:.3g} nat holds (F6)"
        return max(max(slope, 0.0) ** 2 * kl, kl, 1e-300), 1.0, text
    value = _value(kl, cross, energy, found[0].integrated)
    logs = np.log(np.maximum([_value(one.kl, one.cross, one.energy, one.integrated) for one in found], 1e-300))
    between = float(logs.std(ddof=1)) / len(logs) ** 0.5 if len(logs) > 1 else 0.0
    within = float(np.sqrt(np.sum([one.se**2 for one in found]))) / len(found) / value
    # Bounds are of second order in the step and compared with what is.
    estimate = _second_order(cross, energy, found[0].integrated)
    gap = abs(np.log(estimate / (cross * slope)))
    # The bound is a square of cross: its own noise would otherwise count as a distance.
    gap = max(gap - Z90 * 2 * cross_se / cross, 0.0)
    change = 0.0
    if early is not None:
        change = float(logs[0] - np.log(max(_value(early.kl, early.cross, early.energy, early.integrated), 1e-300)))
    short = 0.0
    for log_bound, bound_se in zip(*_rival_bounds(found), strict=True):
        excess = float(log_bound - np.log(estimate))
        if excess > LARGEST_EXCESS + EXCESS_ERRORS * bound_se:
            return value, 1.0, "a certified lower bound (F6) of a mixture lies above what the denoiser says"
        short = max(short, excess)
    own = LEAST_ERROR if early is not None else 0.0
    error = float(np.sqrt(max(between, within) ** 2 + (0.5 * gap) ** 2 + change**2 + short**2 + own**2))
    text = "the errors of the denoiser, the sample and the draws add up to too much"
    return value, error, "" if error <= LARGEST_ERROR else text


def _rival_bounds(found: list[Measured]) -> Array:
    """Log of the certified bound of each rival over all folds, and its standard error, (2, k)."""
    stacked = np.array([one.rivals for one in found]).reshape(len(found), -1, 2)
    return np.stack([stacked[..., 0].mean(0), np.sqrt((stacked[..., 1] ** 2).sum(0)) / len(found)])


def _value(kl: float, cross: float, energy: float, integrated: bool) -> float:
    """The KL as far as the time score is calibrated: its second order, and the rest in the share that the fit says."""
    return _second_order(cross, energy, integrated) * kl / energy if energy > 0 else kl


def _second_order(cross: float, energy: float, integrated: bool) -> float:
    """1/2 E[f^2] of the true f from that of an approximate one."""
    slope = cross / energy if energy > 0 else 0.0
    if integrated or LOW_SLOPE <= slope <= HIGH_SLOPE:
        return energy
    return cross if slope < LOW_SLOPE else cross * slope


def _gaussian(fold: Fold, pairs: Pairs, reverse: bool) -> float:
    wiener = fold.wiener
    along = wiener.mean @ wiener.axes
    outside = (wiener.mean - wiener.axes @ along).norm()
    rest = np.zeros(wiener.dim - len(along))
    rest[:1] = float(outside)
    lam = np.concatenate([wiener.eigenvalues.numpy(), np.zeros(len(rest))])
    return float(gaussian_kl(pairs, lam, np.concatenate([along.numpy(), rest]), reverse=reverse)[0])


def _levels(fold: Fold, pairs: Pairs, i: int) -> Array:
    """Log noise scales at which the denoiser of a fold is asked about a small step: the middle, or those it knows."""
    levels = fold.source.levels
    if levels is None:
        return pairs.tau[[i]]
    middle, half = pairs.tau[i], 0.5 * pairs.dtau[i] + 1e-9
    return levels[np.abs(levels - middle) <= half]


def _nodes(fold: Fold, pairs: Pairs, i: int) -> tuple[Array, Array]:
    """Places in [0, 1] along a long step, and weights."""
    if fold.source.levels is None:
        return GAUSS_NODES
    levels = _levels(fold, pairs, i)
    even = np.linspace(levels[0], levels[-1], MOST_LEVELS)
    u = (np.unique(levels[np.abs(levels[:, None] - even).argmin(0)]) - levels[0]) / (levels[-1] - levels[0])
    # The levels lie where the process has them: the integral of the cubic spline through the values there.
    return u, CubicSpline(u, np.eye(len(u))).integrate(0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Draws:
    """Held-out rows with noise: x0, eps (N, D) of n rows with DRAWS each, and the row of each, (N,)."""

    x0: Tensor
    eps: Tensor
    row: Tensor

    @classmethod
    def of(cls, rows: Tensor, seed: int) -> "Draws":
        noise = stream(NOISE_STREAM, seed).standard_normal((len(rows), DRAWS // 2, rows.shape[1]))
        eps = torch.from_numpy(np.concatenate([noise, -noise], 1)).flatten(0, 1)
        return cls(rows.repeat_interleave(DRAWS, 0), eps, torch.arange(len(rows)).repeat_interleave(DRAWS))

    def by_row(self, values: Tensor) -> Tensor:
        """(N,) as (n, 2, DRAWS/2): opposite noise next to each other."""
        return values.reshape(-1, 2, DRAWS // 2)


def _at_level(
    fold: Fold, source: ScoreSource, draws: Draws, tau: float, seed: int, points: list[Tensor],
    exact: int = EXACT_DIVERGENCE,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """F (probes, N) and q (N,) at each of some sets of points y, and the conditional F and q of the draws.

    Rows with an even number set the gain of the others, and the other way round.
    """
    own = draws.x0 + float(np.exp(tau)) * draws.eps
    judged = evaluate(source, fold.wiener, own, tau, seed, exact)
    even = draws.row % 2 == 0
    gains = [judged.take(part).gain(draws.row[part]) for part in (~even, even)]
    found = []
    for y in points:
        asked = judged if y is own or torch.equal(y, own) else evaluate(source, fold.wiener, y, tau, seed, exact)
        (f0, q0), (f1, q1) = (asked.time_scores(gain) for gain in gains)
        found.append((torch.where(even, f0, f1), torch.where(even, q0, q1)))
    return found, *conditional_scores(draws.x0, draws.eps, float(np.exp(tau)))


def _measure(fold: Fold, source: ScoreSource, pairs: Pairs, i: int, settings: Settings) -> Measured:
    if pairs.dtau[i] > LARGEST_STEP:
        return _integrated(fold, source, pairs, i, settings)
    draws = Draws.of(fold.rows[:ROWS], settings.seed)
    dtau, dlog = float(pairs.dtau[i]), float(pairs.dlog_alpha[i])
    parts, rates = [], []
    rivals: list[list[Tensor]] = [[] for _ in fold.rivals]
    for tau in _levels(fold, pairs, i):
        y = draws.x0 + float(np.exp(tau)) * draws.eps
        [(flow, dilation)], flow_g, dilation_g = _at_level(fold, source, draws, float(tau), settings.seed, [y])
        f, g = time_score(flow, dilation, dtau, dlog), time_score(flow_g, dilation_g, dtau, dlog)
        mean = f.mean(0)
        cross = conditional_covariance(draws.by_row(mean), draws.by_row(g))
        second, cubic = (draws.by_row(v).mean((1, 2)) for v in (_second_moment(f), mean.pow(3)))
        parts.append(torch.stack([cross, second, cubic]))
        _collect(rivals, fold, draws, float(tau), (dtau, dlog), g)
        beta = (flow.mean(0) * dilation).mean() / dilation.square().mean()
        rates.append(float(_second_moment(flow - beta * dilation).mean()))
    cross, second, cubic = torch.stack(parts).mean(0)
    n = len(cross) ** 0.5
    energy, third = 0.5 * float(second.mean()), float(cubic.mean()) / 12
    return Measured(
        energy - third, energy + third, 0.5 * float(second.std()) / n, 0.5 * float(cross.mean()),
        0.5 * float(cross.std()) / n, energy, _bounds(rivals, None), float(np.mean(rates)), False,
    )  # fmt: skip


def _integrated(fold: Fold, source: ScoreSource, pairs: Pairs, i: int, settings: Settings) -> Measured:
    """F9 from both ends, and F6 at the nodes."""
    draws = Draws.of(fold.rows[:ROWS], settings.seed)
    (a1, s1), (a2, s2) = pairs.first[i].tolist(), pairs.second[i].tolist()
    first, second = (a1, s1), (a2, s2)
    ends = [draws.x0 * a + draws.eps * s for a, s in (first, second)]
    dtau, dlog = float(pairs.dtau[i]), float(pairs.dlog_alpha[i])
    crosses, energies, rates = [], [], []
    rivals: list[list[Tensor]] = [[] for _ in fold.rivals]

    def scores(x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        tau = float(np.log(sigma / alpha))
        own = draws.x0 + sigma / alpha * draws.eps
        points = [own, *(end / alpha for end in ends)]
        [(flow, dilation), *asked], flow_g, dilation_g = _at_level(
            fold, source, draws, tau, settings.seed, points, EXACT_INTEGRATED
        )
        f, g = time_score(flow, dilation, dtau, dlog), time_score(flow_g, dilation_g, dtau, dlog)
        crosses.append(0.5 * conditional_covariance(draws.by_row(f.mean(0)), draws.by_row(g)))
        energies.append(0.5 * _second_moment(f).mean())
        _collect(rivals, fold, draws, tau, (dtau, dlog), g)
        beta = (flow.mean(0) * dilation).mean() / dilation.square().mean()
        rates.append(float(_second_moment(flow - beta * dilation).mean()))
        # Both ends at once: the points of either are asked under one gain.
        return torch.cat([part.mean(0) for part, _ in asked]), torch.cat([part for _, part in asked])

    nodes = _nodes(fold, pairs, i)
    ratio = coarse_log_ratio(scores, torch.cat(ends), first, second, nodes)
    forward, backward = ratio[: len(draws.row)], -ratio[len(draws.row) :]
    weights = torch.from_numpy(nodes[1])
    cross = (torch.stack(crosses) * weights[:, None]).sum(0)
    kl, back = (float(kl_from_log_ratio(ratios[None])[0]) for ratios in (forward, backward))
    se = draws.by_row(forward).mean((1, 2))
    return Measured(
        kl, back, float(se.std()) / len(se) ** 0.5, float(cross.mean()), float(cross.std()) / len(cross) ** 0.5,
        float((torch.stack(energies) * weights).sum()), _bounds(rivals, weights),
        float(np.array(rates) @ nodes[1]), True,
    )  # fmt: skip


def _collect(
    rivals: list[list[Tensor]], fold: Fold, draws: Draws, tau: float, step: tuple[float, float], g: Tensor
) -> None:
    """Add E[f g | row] and the mean f^2 of each row, (2, n), of every rival at one level."""
    for found, fit in zip(rivals, fold.rivals, strict=True):
        flow, dilation, _ = fit.evaluate(draws.x0, draws.eps, np.array([tau]))
        f = time_score(flow[0], dilation[0], *step)
        product = conditional_covariance(draws.by_row(f), draws.by_row(g))
        found.append(torch.stack([product, draws.by_row(f.square()).mean((1, 2))]))


def _bounds(rivals: list[list[Tensor]], weights: Tensor | None) -> Array:
    """Log of 1/2 E[f g]^2/E[f^2] over the levels of a pair and its standard error for each rival, (k, 2)."""
    out = []
    for found in rivals:
        levels = torch.stack(found)
        product, square = levels.mean(0) if weights is None else (levels * weights[:, None, None]).sum(0)
        c, e, n = float(product.mean()), float(square.mean()), len(product) ** 0.5
        if c <= 0:
            out.append((-np.inf, 1.0))
            continue
        error = np.hypot(2 * float(product.std()) / n / c, float(square.std()) / n / e)
        out.append((np.log(0.5 * c**2 / e), float(error)))
    return np.array(out).reshape(-1, 2)


def _second_moment(f: Tensor) -> Tensor:
    """f^2 from probes (m, N), free of the square of any probe's error; (N,)."""
    m = len(f)
    return f[0].square() if m == 1 else (f.sum(0).square() - f.square().sum(0)) / (m * (m - 1))
