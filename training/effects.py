"""What a comparison of paired seeds shows: log-ratios with intervals, Holm-corrected p values, detectable effects.

For arm a, metric m, learning-rate schedule and seed s, against the baseline b under the same schedule and seed,

    d_s = log m_a(s) - log m_b(s),      mean d,  interval  d +- t_{n-1} sd/sqrt(n),  p of the paired t-test

so that -0.01 reads "1 % lower". Every metric is better when smaller. The p values of all arms, metrics and schedules of
one comparison are corrected together (Holm 1979), A/A arms left out: they are no hypotheses but the noise floor. Of a
curriculum against its own exposure without order (order.csv) every pair is a question, and a family, of its own. The
minimal detectable effect is the |d| that a two-sided test of it alone at 5 %, without correction for others, would find
with probability 80 % at this sd and n (noncentral t). Pairing can make an effect certain that is too small to matter:
one whose interval lies within +- 1 % is called so.
"""

__all__ = [
    "EFFECT_COLUMNS",
    "arms_again",
    "arms_without_order",
    "detectable",
    "effects",
    "holm",
    "iterations_to_baseline",
    "paired_intervals",
]

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq

from difficulty.errors import InputError
from difficulty.process import Array

LEVEL = 0.95
POWER = 0.80
NEGLIGIBLE = 0.01
EFFECT_COLUMNS = (
    "arm", "lr_schedule", "metric", "seeds", "log_ratio", "ci_low", "ci_high", "p", "p_holm", "mde", "noise_floor",
    "verdict",
)  # fmt: skip


def holm(p: Sequence[float]) -> Array:
    """Holm's step-down correction: p_(i) -> max over j <= i of min(1, (m - j + 1) p_(j))."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    factors = len(values) - np.arange(len(values))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    return corrected


def arms_again(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the arms that are the first one, the baseline, but for fresh seeds (A/A).

    Args:
        arms: what each arm is, by name, as in run.json of a comparison.
    """
    baseline = next(iter(arms.values()))
    return [name for name, arm in arms.items() if arm["fresh_seeds"] and {**arm, "fresh_seeds": False} == baseline]


def arms_without_order(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The arm with the same histogram of t without order, by the name of the arm that it copies.

    One of another loss weight says nothing about order, and is no such arm.

    Args:
        arms: what each arm is, by name, as in run.json of a comparison.
    """
    copies = {name: arm["exposure_of"] for name, arm in arms.items() if arm["exposure_of"] is not None}
    return {copied: name for name, copied in copies.items() if arms[name]["weight"] == arms[copied]["weight"]}


def effects(results: pd.DataFrame, baseline: str, again: Collection[str] = ()) -> pd.DataFrame:
    """Paired effects of every arm on every metric.

    Args:
        results: columns arm, lr_schedule, seed, metric, value; value positive, smaller is better.
        baseline: the arm that the others are compared with.
        again: arms that repeat the baseline with fresh seeds (A/A).

    Returns:
        Columns ``EFFECT_COLUMNS``. ``noise_floor`` is the half width of the interval of the A/A arm for the metric
        and schedule, NaN without one. With one seed there is no interval and no verdict.

    Raises:
        InputError: if the baseline is missing, arms have different seeds, or a value is not positive and finite.
    """
    arms = list(dict.fromkeys(results["arm"]))
    if baseline not in arms:
        raise InputError(f"baseline {baseline!r} is not among the arms {', '.join(arms)}")
    wide = results.pivot(index="seed", columns=["lr_schedule", "metric", "arm"], values="value")
    if not ((wide > 0) & (wide < np.inf)).all(axis=None):
        raise InputError("a metric is missing for a seed, infinite or not positive; every arm needs every seed")
    logs: dict[Any, Array] = dict(zip(wide.columns.to_list(), np.log(wide.to_numpy(float)).T, strict=True))
    rows = []
    for schedule in dict.fromkeys(results["lr_schedule"]):
        for metric in dict.fromkeys(results["metric"]):
            for arm in arms:
                if arm != baseline:
                    key = {"arm": arm, "lr_schedule": schedule, "metric": metric}
                    rows.append(key | _paired(logs[schedule, metric, arm] - logs[schedule, metric, baseline]))
    table = pd.DataFrame(rows, columns=[c for c in EFFECT_COLUMNS if c not in ("p_holm", "noise_floor", "verdict")])
    judged = ~table["arm"].isin(list(again)) & table["p"].notna()
    table["p_holm"] = np.nan
    table.loc[judged, "p_holm"] = holm(table.loc[judged, "p"].tolist())
    repeated = table[table["arm"].isin(list(again))]
    half_width = (0.5 * (repeated["ci_high"] - repeated["ci_low"])).rename("noise_floor")
    floor = repeated[["lr_schedule", "metric"]].join(half_width).drop_duplicates(["lr_schedule", "metric"])
    table = table.merge(floor, on=["lr_schedule", "metric"], how="left")
    numbers = table[["log_ratio", "ci_low", "ci_high", "p_holm"]].to_numpy(float)
    table["verdict"] = [
        _verdict(middle, low, high, p, arm in again)
        for (middle, low, high, p), arm in zip(numbers.tolist(), table["arm"], strict=True)
    ]
    return table[list(EFFECT_COLUMNS)]


def paired_intervals(differences: pd.DataFrame) -> pd.DataFrame:
    """Mean over the columns (seeds) of every row with its interval: columns difference, ci_low, ci_high."""
    n = differences.shape[1]
    mean = differences.mean(axis=1)
    half = np.nan if n < 2 else stats.t.ppf(0.5 + LEVEL / 2, n - 1) * differences.std(axis=1, ddof=1) / np.sqrt(n)
    return pd.DataFrame({"difference": mean, "ci_low": mean - half, "ci_high": mean + half})


def _paired(d: Array) -> dict[str, float]:
    n, mean = len(d), float(d.mean())
    if n < 2:
        return {"seeds": n, "log_ratio": mean, "ci_low": np.nan, "ci_high": np.nan, "p": np.nan, "mde": np.nan}
    se = float(d.std(ddof=1)) / np.sqrt(n)
    half = stats.t.ppf(0.5 + LEVEL / 2, n - 1) * se
    # Arms that train identically differ by exactly 0 on every seed: there is nothing to test.
    p = float(2 * stats.t.sf(abs(mean) / se, n - 1)) if se > 0 else float(mean == 0)
    mde = detectable(n) * se
    return {"seeds": n, "log_ratio": mean, "ci_low": mean - half, "ci_high": mean + half, "p": p, "mde": mde}


@functools.cache
def detectable(n: int) -> float:
    """The effect, in standard errors of a mean of n, that a two-sided t-test at 5 % finds with probability 80 %."""
    critical = stats.t.ppf(0.5 + LEVEL / 2, n - 1)
    # Averaged over the estimated deviations, since scipy's noncentral t is NaN far out with one degree of freedom.
    deviation = np.sqrt(stats.chi2.ppf((np.arange(20_000) + 0.5) / 20_000, n - 1) / (n - 1))

    def power(effect: float) -> float:
        beyond = stats.norm.sf(critical * deviation - effect) + stats.norm.cdf(-critical * deviation - effect)
        return float(beyond.mean())

    return float(brentq(lambda effect: power(effect) - POWER, 1.0, 1.5 * critical + 2.0))


def _verdict(log_ratio: float, ci_low: float, ci_high: float, p_holm: float, is_again: bool) -> str:
    if np.isnan(ci_low):
        return "one seed, no interval"
    if is_again:
        return "noise floor (A/A)"
    if not p_holm < 1 - LEVEL:
        return "no difference shown"
    word = "helps" if log_ratio < 0 else "hurts"
    return f"{word}, by less than 1 %" if max(abs(ci_low), abs(ci_high)) < NEGLIGIBLE else word


def iterations_to_baseline(curves: pd.DataFrame, baseline: str, metric: str) -> pd.DataFrame:
    """At which iteration each run first reaches the baseline's final value of its seed and schedule.

    Args:
        curves: columns arm, lr_schedule, seed, step, metric, value.

    Returns:
        Columns arm, lr_schedule, seed, metric, iterations, share (of the baseline's iterations), censored: True where
        the value was not reached and iterations is the length of the run. Between two evaluations the value is
        interpolated linearly in the iteration.
    """
    rows = []
    chosen = curves[curves["metric"] == metric].sort_values("step", kind="stable")
    ends = chosen[chosen["arm"] == baseline].groupby(["lr_schedule", "seed"])["value"].last().to_dict()
    for (arm, schedule, seed), run in chosen.groupby(["arm", "lr_schedule", "seed"], sort=False):
        step, value, final = run["step"].to_numpy(float), run["value"].to_numpy(float), ends[schedule, seed]
        reached = np.flatnonzero(value <= final)
        if len(reached) == 0:
            at = step[-1]
        elif reached[0] == 0:
            at = step[0]
        else:
            i = reached[0]
            at = step[i - 1] + (step[i] - step[i - 1]) * (value[i - 1] - final) / (value[i - 1] - value[i])
        rows.append((arm, schedule, seed, metric, at, at / step[-1], len(reached) == 0))
    return pd.DataFrame(rows, columns=["arm", "lr_schedule", "seed", "metric", "iterations", "share", "censored"])
