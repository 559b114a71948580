"""How fast experts converge, from their held-out losses: seven definitions side by side.

With L(i) the held-out loss E|eps - eps_hat|^2 (summed over dimensions) after i iterations and L* the floor,

    excess_nats   e = (L(budget) - L*) / 2: nats per unit log-SNR not yet learned (I-MMSE relation, Guo, Shamai and
                  Verdu 2005); the same whatever the network predicts.
    log_regret    mean over log-spaced iterations up to the budget of log e(i): the whole curve in one number.
    paper_style   iterations until (L(i) - L_end) / (L(0) - L_end) falls to 0.1, the curve's own end being the limit
                  (arXiv 2403.10348); depends on the prediction and on the budget, and a stuck expert looks easy.
    paper_style_floor  the same with L* as the limit.
    normalised_area    mean over log-spaced iterations of (L(i) - L_end) / (L(0) - L_end).
    exponential   time constant of the least-squares fit L(i) = c + a exp(-i/time), a > 0.
    power_law     slope of log e(i) against log i over the second half of the log-spaced iterations; 0 is no progress.

Larger is harder in all of them. The first two survive a change of prediction and of optimizer, the others are what
papers use and are kept for comparison.

L* is the Bayes loss of an exact law, otherwise the best loss that is known, so that e is a lower bound (``losses``).

Intervals (90 %) join two errors: that of the finite set of held-out draws, and that of the training seed, whose
variance is shrunk towards its median over the tasks, because a handful of seeds estimate it badly; how far, follows
from how much the variances of the tasks differ (Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3, article 3). One seed does
not show it at all, and its values have no interval. Rates and the area, which are read off whole curves, have the
second error alone.

A value that is only a bound is censored, and its interval is open on the side where the truth may be: above where the
budget ended before the fall did (rates, area), below where the fall was over at the first checkpoint (rates) or where
the excess is below its own error: at the budget (excess, log-regret), or anywhere in the second half (power law).
"""

__all__ = ["CONVERGENCE_COLUMNS", "DEFINITIONS", "convergence_table", "paper_style", "summary_over_seeds"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import polygamma
from scipy.stats import chi2
from scipy.stats import t as student_t

from difficulty.intervals import INTERVAL_LEVEL
from difficulty.losses import LearningCurves
from difficulty.process import Array

# Weight of the tasks' median variance against a task's own, in degrees of freedom: at most, and at least.
PRIOR_DEGREES, LEAST_PRIOR = 4.0, 0.5
PAPER_FALL = 0.9
CONVERGENCE_COLUMNS: Mapping[str, type] = {
    "task": int, "definition": str, "value": float, "ci_low": float, "ci_high": float, "scale": str, "censored": bool,
    "unit": str, "degrees": float,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class SeedValues:
    """One definition evaluated per seed and task.

    Args:
        value: (S, K), on the scale on which errors are added (log where ``log`` is true).
        draw_sd: standard deviation on that scale from the finite set of draws, (K,).
        at_least, at_most: (K,), the value is only a lower or an upper bound of what it stands for.
        log: whether the scale is logarithmic.
        unit: of the value on the original scale.
    """

    value: Array
    draw_sd: Array
    at_least: npt.NDArray[np.bool_]
    at_most: npt.NDArray[np.bool_]
    log: bool
    unit: str


def _resolvable(curves: LearningCurves) -> Array:
    """Excess, no lower than its own standard error: below it its logarithm is noise."""
    return np.maximum(curves.excess, curves.resolution)


def excess_nats(curves: LearningCurves) -> SeedValues:
    """Excess over the floor at the budget."""
    final = _resolvable(curves)[..., -1]
    relative = (curves.resolution[..., -1] / final).mean(0)
    return SeedValues(np.log(final), relative, _never(curves), _unresolved(curves), True, "nats per unit log-SNR")


def log_regret(curves: LearningCurves) -> SeedValues:
    """Mean log excess over the log-spaced checkpoints from the first after 0 to the budget."""
    excess = _resolvable(curves)[..., 1:]
    relative = (curves.resolution[..., 1:] / excess).mean((0, 2))
    value = np.log(excess).mean(-1)
    return SeedValues(value, relative, _never(curves), _unresolved(curves), False, "log nats per unit log-SNR")


def _unresolved(curves: LearningCurves, since: int = -1) -> npt.NDArray[np.bool_]:
    """Tasks (K,) of which a seed's excess is below its own error at a checkpoint from ``since`` on."""
    return np.asarray((curves.excess[..., since:] <= curves.resolution[..., since:]).any((0, 2)))


def _never(curves: LearningCurves) -> npt.NDArray[np.bool_]:
    return np.zeros(curves.loss.shape[1], dtype=bool)


def paper_style(curves: LearningCurves) -> SeedValues:
    """Iterations until 90 % of the fall from the first to the last held-out loss has happened."""
    return _iterations_to_fall(curves, _remaining(curves))


def paper_style_floor(curves: LearningCurves) -> SeedValues:
    """Iterations until 90 % of the way from the first held-out loss to the floor is done."""
    return _iterations_to_fall(curves, _above_floor(curves))


def _above_floor(curves: LearningCurves) -> Array:
    """Share of the way to the floor that is still to go, (S, K, C)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(curves.excess / curves.excess[..., :1])


def _remaining(curves: LearningCurves) -> Array:
    """Share of the fall to the curve's own end that is still to come, (S, K, C)."""
    first, end = curves.loss[..., :1], curves.loss[..., -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (curves.loss - end) / (first - end)


def _crossing(remaining: Array) -> npt.NDArray[np.int64]:
    """Index of the first checkpoint with at most 10 % remaining, (S, K); the last one where there is none.

    With a curve's own end as the limit its last point is always below: crossing there says "not before the budget".
    """
    below = remaining <= 1 - PAPER_FALL
    return np.where(below.any(-1), below.argmax(-1), remaining.shape[-1] - 1)


def _end_not_seen(remaining: Array) -> npt.NDArray[np.bool_]:
    """Tasks (K,) of which a seed has more than 10 % remaining at every checkpoint before the budget."""
    return np.asarray((_crossing(remaining) >= remaining.shape[-1] - 1).any(0))


def _iterations_to_fall(curves: LearningCurves, remaining: Array) -> SeedValues:
    """First crossing of 10 % remaining, interpolated in log iteration.

    A lower bound where there is none before the last checkpoint, which is the budget; the first checkpoint, an upper
    bound, where it lies below.
    """
    crossing = _crossing(remaining)
    log_iterations = np.log(curves.iterations[1:])
    value = np.empty(crossing.shape)
    for s, k in np.ndindex(*crossing.shape):
        j = max(int(crossing[s, k]), 1)
        value[s, k] = log_iterations[j - 1]
        before, after = remaining[s, k, j - 1], remaining[s, k, j]
        if j > 1 and before > after:
            share = np.clip((before - (1 - PAPER_FALL)) / (before - after), 0, 1)
            value[s, k] -= (1 - share) * (log_iterations[j - 1] - log_iterations[j - 2])
    start_not_seen = np.asarray((crossing <= 1).any(0))
    return _rate(curves, value, _end_not_seen(remaining), start_not_seen, "iterations", log=True)


def _rate(
    curves: LearningCurves,
    value: Array,
    at_least: npt.NDArray[np.bool_],
    at_most: npt.NDArray[np.bool_],
    unit: str,
    *,
    log: bool,
) -> SeedValues:
    """A rate of the fall: a stuck expert falls by nothing quickly, and has no rate rather than a good one."""
    value[:, curves.stuck] = np.nan
    return SeedValues(value, np.zeros(value.shape[1]), at_least, at_most, log, unit)


def normalised_area(curves: LearningCurves) -> SeedValues:
    """Mean over log-spaced iterations of the share of the fall that is still to come.

    A lower bound where the budget ends before 90 % of the way to the floor, or with less than that after a rise: the
    rest was still to come as well.
    """
    value = _remaining(curves)[..., 1:].mean(-1)
    above = _above_floor(curves)
    at_least = _end_not_seen(above) | ~(above[..., -1] <= 1 - PAPER_FALL).all(0)
    return _rate(curves, value, at_least, _never(curves), "share of the fall", log=False)


def exponential(curves: LearningCurves) -> SeedValues:
    """Time constant, from the first checkpoint to the budget, of the least-squares exponential fit to the loss.

    A lower bound at the budget, where a longer one would fit better or nothing falls; an upper one at the first
    checkpoint.
    """
    shortest, longest = np.log(curves.iterations[1]), np.log(curves.iterations[-1])
    # The sum of squares may have several minima, hence a grid first. Longest first: where nothing falls all are alike.
    log_time, step = np.linspace(longest, shortest, 200, retstep=True)
    value = log_time[_explained(curves, log_time).argmax(-1)]
    for _ in range(5):
        near = np.clip(value[..., None] + step * np.linspace(-1, 1, 21), shortest, longest)
        best = _explained(curves, near).argmax(-1)
        value, step = np.take_along_axis(near, best[..., None], -1)[..., 0], step / 10
    end_not_seen, start_not_seen = (value >= longest).any(0), (value <= shortest).any(0)
    value[~np.isfinite(curves.loss).all(-1)] = np.nan
    return _rate(curves, value, end_not_seen, start_not_seen, "iterations", log=True)


def _explained(curves: LearningCurves, log_time: Array) -> Array:
    """How much of the sum of squares of a loss the best c + a exp(-i/time) with a > 0 explains, (S, K, G).

    Args:
        curves: of C checkpoints.
        log_time: logarithms of the times, (G,) or (S, K, G).
    """
    fall = np.exp(-curves.iterations / np.exp(log_time)[..., None])  # (..., G, C)
    fall -= fall.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):  # a diverged expert's is NaN
        loss = curves.loss - curves.loss.mean(-1, keepdims=True)
        product = (fall @ loss[..., None])[..., 0]
        return np.asarray(np.maximum(product, 0) ** 2 / (fall**2).sum(-1))


def power_law(curves: LearningCurves) -> SeedValues:
    """Least-squares slope of log excess against log iteration over the second half of the checkpoints.

    An upper bound where the excess falls below its own error there: what is left falls on unseen.
    """
    half = 1 + (len(curves.iterations) - 1) // 2
    x = np.log(curves.iterations[half:])
    y = np.log(_resolvable(curves)[..., half:])
    centred = x - x.mean()
    value = (centred * y).sum(-1) / (centred**2).sum()
    unit = "d log excess / d log iterations"
    return _rate(curves, value, _never(curves), _unresolved(curves, since=half), unit, log=False)


DEFINITIONS: Mapping[str, Callable[[LearningCurves], SeedValues]] = {
    "excess_nats": excess_nats,
    "log_regret": log_regret,
    "paper_style": paper_style,
    "paper_style_floor": paper_style_floor,
    "normalised_area": normalised_area,
    "exponential": exponential,
    "power_law": power_law,
}


def convergence_table(losses: pd.DataFrame, budget: int, siblings: pd.DataFrame | None = None) -> pd.DataFrame:
    """convergence.csv: one row per task and definition.

    Args:
        losses: losses.csv.
        budget: iterations at which difficulty is read off.
        siblings: losses.csv of more seeds of the same experts, which say how far one seed lies from another.

    Returns:
        Columns task, definition, value, ci_low, ci_high, scale (log or linear: where the interval is symmetric),
        censored, unit, degrees (of freedom of the errors between seeds). A task one of whose experts diverged has no
        value; one of whose experts is stuck has no paper-style value; both are censored, and so is a value that is only
        a bound. Bounds of an interval are NaN where they are not known: both of a single seed without siblings, the
        open one of a bound. A lower bound of a single seed is its own lower end.

    Raises:
        InputError: if a column is missing.
    """
    curves = LearningCurves.from_table(losses, budget)
    others = None if siblings is None else LearningCurves.from_table(siblings, budget)
    parts = []
    for name, definition in DEFINITIONS.items():
        values = definition(curves)
        parts.append(summary_over_seeds(name, values, curves, values if others is None else definition(others)))
    return pd.concat(parts, ignore_index=True)


def summary_over_seeds(name: str, values: SeedValues, curves: LearningCurves, siblings: SeedValues) -> pd.DataFrame:
    """The rows of one definition in convergence.csv: mean over seeds on the definition's scale, interval, censoring.

    Args:
        name: of the definition.
        values: of the seeds in question.
        curves: of the same seeds.
        siblings: of the seeds that say how much seeds differ; may be the same.
    """
    centre = values.value.mean(0)
    variance, degrees = _seed_variance(siblings.value)
    sd = np.sqrt(variance / len(values.value) + values.draw_sd**2)
    half = student_t.ppf(0.5 + INTERVAL_LEVEL / 2, degrees) * sd
    back = np.exp if values.log else np.asarray
    table = pd.DataFrame(
        {
            "task": np.arange(len(centre)),
            "definition": name,
            "value": back(centre),
            "ci_low": back(centre - half),
            "ci_high": back(centre + half),
            "scale": "log" if values.log else "linear",
            "censored": values.at_least | values.at_most | curves.diverged | curves.stuck,
            "unit": values.unit,
            "degrees": degrees,
        }
    )
    if np.isnan(half).all():  # of a single seed what is at least so much is so nevertheless
        table.loc[values.at_least, "ci_low"] = table["value"]
    table.loc[values.at_least, "ci_high"] = np.nan
    table.loc[values.at_most, "ci_low"] = np.nan
    table.loc[curves.diverged, ["value", "ci_low", "ci_high"]] = np.nan
    return table


def _seed_variance(values: Array) -> tuple[Array, float]:
    """Variance (K,) between the seeds of values (S, K), and its degrees of freedom; NaN of a single seed."""
    S, K = values.shape
    if S == 1:
        return np.full(K, np.nan), np.inf
    own = values.var(0, ddof=1)
    # Tasks cut off at the budget or the first checkpoint by every seed differ by nothing, which says nothing of others.
    known = own[np.isfinite(own) & (own > 0)]
    # The median of a chi-squared variable lies below its mean, the more so the fewer seeds there are.
    typical = np.median(known) * (S - 1) / chi2.median(S - 1) if len(known) else 0.0
    prior = _prior_degrees(known, S - 1)
    return (prior * typical + (S - 1) * own) / (prior + S - 1), prior + S - 1


def _prior_degrees(variances: Array, degrees: int) -> float:
    """How much the typical variance says of a task's own: less, the more the logarithms of the variances differ.

    Their own noise makes them differ by polygamma(1, degrees/2) in the square; what is beyond, by a prior of so many
    degrees of freedom as have polygamma(1, prior/2) equal to it.
    """
    if len(variances) < 3:
        return PRIOR_DEGREES
    beyond = float(np.log(variances).var(ddof=1) - polygamma(1, degrees / 2))
    grid = np.linspace(LEAST_PRIOR, PRIOR_DEGREES, 200)
    return float(grid[np.abs(polygamma(1, grid / 2) - beyond).argmin()])
