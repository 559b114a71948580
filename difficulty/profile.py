"""One profile for all schedules: the relative entropy of any process from functions of the noise scale alone (F5).

With F = d log p/d tau and q the dilation score at y = x0 + s eps, tau = log s, and A = E[F^2], B = E[F q], C = E[q^2],
a small step (dtau, dlog alpha) of any process has

    KL = 1/2 (dtau^2 A - 2 dtau dlog alpha B + dlog alpha^2 C)
       = 1/2 (dtau^2 I_min + C (dlog alpha - dtau B/C)^2),     I_min = A - B^2/C,

the second form being the one without cancellation at high noise, where B/C tends to -1. I_min is the least rate that
any choice of alpha can have, the only part that belongs to the data and not to the schedule. The mmse, that is the
least E|x0 - x0_hat|^2, is kept on the same grid: 1/2 mmse/s^2 is the entropy rate per unit of log-SNR.
"""

__all__ = ["PROFILE_COLUMNS", "Profile", "measure_profile"]

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats
from scipy.interpolate import PchipInterpolator

from difficulty.datasets import Dataset, load_dataset
from difficulty.errors import InputError
from difficulty.intervals import Z90
from difficulty.laws import GaussianMixture
from difficulty.process import Process, from_arrays, get_process
from difficulty.records import check_columns, read_table
from difficulty.relative_entropy.auto import candidates
from difficulty.relative_entropy.estimate import Settings
from difficulty.relative_entropy.exact import law_draws, time_scores
from difficulty.relative_entropy.fits import GaussianBlock
from difficulty.relative_entropy.judge import Judge
from difficulty.relative_entropy.mixture_means import mixture_rates
from difficulty.relative_entropy.pairs import make_pairs
from difficulty.relative_entropy.sample import make_sample
from difficulty.relative_entropy.score import LARGEST_STEP
from difficulty.relative_entropy.unmixing import quiet_unmixing
from difficulty.threads import one_thread, together

Array = npt.NDArray[np.float64]

NAMES = ("A", "B", "C", "i_min", "mmse", "one_plus_b_over_c")
# Of either sign, so that their intervals are on the linear scale; those of the others are on the log scale.
SIGNED = ("B", "one_plus_b_over_c")
PARTS = ("", "_se", "_ci_low", "_ci_high")
PROFILE_COLUMNS = ("log_snr", *(name + part for name in NAMES for part in PARTS), "valid", "reason")
# The next order in the step dtau, -1/12 E[f^3] (F4), is -2/3 dtau of the whole for a point mass, whose F is chi-squared
# (less for a density): the end of an interval of 90 %.
THIRD_ORDER = 2 / 3 / Z90


@dataclass(frozen=True, eq=False)
class Profile:
    """A profile on a grid.

    Args:
        table: with ``PROFILE_COLUMNS``, log-SNR falling; standard errors and 90 % intervals in the units of their
            quantity.
    """

    table: pd.DataFrame

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Read ``profile.csv``, or the folder that holds it.

        Raises:
            InputError: if it is missing or malformed.
        """
        path = path / "profile.csv" if path.is_dir() else path
        table = read_table(path, PROFILE_COLUMNS)
        return cls(table.assign(reason=table["reason"].astype(object).fillna(""), valid=table["valid"].astype(bool)))

    @property
    def tau(self) -> Array:
        """log s of the grid, rising."""
        return -0.5 * self.table["log_snr"].to_numpy()

    def kl(self, process: Process | str) -> pd.DataFrame:
        """KL(p_{t-1} || p_t) of all pairs t = 2..T of a process: t, log_snr, kl, se, ci_low, ci_high, valid, reason.

        Pairs outside the grid, or of too large a step, are not valid and say so.
        """
        check_columns(self.table, PROFILE_COLUMNS, "the profile")
        pairs = make_pairs(get_process(process))
        tau, dtau, dlog = pairs.tau, pairs.dtau, pairs.dlog_alpha
        inside = (tau >= self.tau[0]) & (tau <= self.tau[-1]) & np.isfinite(dtau)
        at = np.clip(tau, self.tau[0], self.tau[-1])
        rate, dilation, lag = (self._at(name, at) for name in ("i_min", "C", "one_plus_b_over_c"))
        with np.errstate(invalid="ignore"):
            # dlog alpha - dtau B/C = dlog sigma - dtau (1 + B/C): the large parts cancel before rounding.
            offset = dlog + dtau - dtau * lag
            parts = 0.5 * np.stack([dtau**2 * rate, dilation * offset**2])
            kl = parts.sum(0)
            relative = [self._at(f"{name}_se", at, linear=True) for name in ("i_min", "C")]
            errors = np.stack(
                [
                    parts[0] * relative[0] / rate,
                    parts[1] * relative[1] / dilation,
                    dilation * offset * dtau * self._at("one_plus_b_over_c_se", at, linear=True),
                ]
            )
            # Two ways to carry the errors over, each an upper estimate: by the second form above, tight where noise
            # is high and A, B, C nearly cancel, and by the first one, tight where B is small.
            steps = 0.5 * np.stack([dtau**2, 2 * np.abs(dtau * dlog), dlog**2])
            spreads = np.stack([self._at(f"{name}_se", at, linear=True) for name in "ABC"])
            direct = (steps * spreads).sum(0)
        # 0/0 where a rate is exactly zero: no error.
        se = np.minimum(np.sqrt((np.nan_to_num(errors).clip(-1e100, 1e100) ** 2).sum(0)), direct)
        se = np.hypot(se, THIRD_ORDER * dtau * kl)
        known = np.interp(at, self.tau, self.table["valid"].to_numpy(dtype=float)) > 0.999
        reasons = [
            (~inside, "outside the log-SNR range of the profile"),
            (dtau > LARGEST_STEP, "the step is too large for the quadratic formula; use `difficulty kl`"),
            (~known, "the profile is not valid at this noise level"),
            (~(se <= 0.2 * kl), "the errors of the profile add up to too much"),
        ]
        reason = np.full(len(pairs), "", dtype=object)
        for fails, text in reasons[::-1]:
            reason[fails] = text
        kl = np.where(inside, kl, np.nan)
        width = np.exp(Z90 * np.minimum(np.divide(se, kl, out=np.zeros_like(kl), where=kl > 0), 100.0))
        columns = {"t": pairs.t, "log_snr": pairs.log_snr, "kl": kl, "se": se, "ci_low": kl / width}
        return pd.DataFrame(columns | {"ci_high": kl * width, "valid": reason == "", "reason": reason})

    def _at(self, name: str, tau: Array, *, linear: bool = False) -> Array:
        values = self.table[name].to_numpy(dtype=np.float64)
        if linear or (values <= 0).any():
            return np.interp(tau, self.tau, values)
        return np.exp(PchipInterpolator(self.tau, np.log(values))(tau))


def measure_profile(
    data: Dataset | str | Path,
    *,
    points: int = 60,
    log_snr: tuple[float, float] = (12.5, -10.5),
    samples: int = 4000,
    bootstrap: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Measure the profile of a data set; no process is involved.

    Args:
        data: a data set, its name or its path.
        points: of the grid, evenly in log-SNR.
        log_snr: from the cleanest to the noisiest level; the default covers the built-in processes.
        samples, bootstrap, seed, progress: as in ``kl``.

    Raises:
        InputError: if the range or the number of points cannot be used.
    """
    clean, noisy = log_snr
    if not (np.isfinite(clean) and np.isfinite(noisy) and clean > noisy) or points < 5:
        raise InputError(f"a profile needs a falling log-SNR range and at least 5 points, got {log_snr} and {points}")
    dataset = load_dataset(data)
    tau = -0.5 * np.linspace(clean, noisy, points)
    report = progress or (lambda done, total: None)
    with one_thread() as threads, quiet_unmixing():
        settings = Settings(samples, bootstrap, seed, report, threads=threads)
        values, errors, reason = (_of_law if dataset.law else _of_sample)(dataset, tau, settings)
    table = pd.DataFrame({"log_snr": -2 * tau})
    # Refits to halves know their own spread only roughly: Student's quantile.
    quantile = Z90 if dataset.law else float(stats.t.ppf(0.95, max(bootstrap // 2, 1)))
    for column, name in enumerate(NAMES):
        value, error = values[:, column], errors[:, column]
        if name in SIGNED:
            low, high = value - quantile * error, value + quantile * error
        else:
            relative = np.divide(error, value, out=np.zeros_like(value), where=value > 0)
            width = np.exp(quantile * np.minimum(relative, 100.0))
            low, high = value / width, value * width
        for part, content in zip(PARTS, (value, error, low, high), strict=True):
            table[name + part] = content
    return Profile(table.assign(valid=reason == "", reason=reason)[list(PROFILE_COLUMNS)])


def _of_law(dataset: Dataset, tau: Array, settings: Settings) -> tuple[Array, Array, npt.NDArray[np.object_]]:
    law = dataset.law
    assert law is not None
    if isinstance(law, GaussianMixture) and len(law.means) == 1:
        block = GaussianBlock(law.eigenvalues[0].numpy(), law.rotated_means[0].numpy())
        values = _with_lag(np.column_stack([block.profile(tau, 0, 0), block.mmse(tau, 0, 0)]))
        return values, np.zeros_like(values), np.full(len(tau), "", dtype=object)
    draws = law_draws(law, settings.samples, settings.seed)
    trace = np.stack([law.posterior_trace(draws.x0 + s * draws.eps, 1.0, s).numpy() for s in np.exp(tau).tolist()])
    if isinstance(law, GaussianMixture):
        rates, rate_errors = mixture_rates(law, tau, draws)
    else:
        f, q = (part.numpy() for part in time_scores(law, tau, draws))
        beta = (f * q).mean(1, keepdims=True) / (q * q).mean(1, keepdims=True)
        parts = [f * f, f * q, q * q, (f - beta * q) ** 2, (f + q) * q / (q * q).mean(1, keepdims=True)]
        rates = np.stack([part.mean(1) for part in parts], 1)
        rate_errors = np.stack([part.std(1) for part in parts], 1) / len(draws.x0) ** 0.5
    # The mmse stands before 1 + B/C.
    values = np.insert(rates, 4, trace.mean(1), 1)
    errors = np.insert(rate_errors, 4, trace.std(1) / len(draws.x0) ** 0.5, 1)
    return values, errors, np.full(len(tau), "", dtype=object)


def _of_sample(dataset: Dataset, tau: Array, settings: Settings) -> tuple[Array, Array, npt.NDArray[np.object_]]:
    sample = make_sample(dataset)
    half = 0.5 * (tau[1] - tau[0])
    edges = np.append(tau - half, tau[-1] + half)
    # Pairs of alpha = 1 whose middles are the grid: the estimate of A is that of their relative entropy.
    steps = make_pairs(from_arrays(np.ones(len(edges)), np.exp(edges), "profile grid"))
    judge = Judge(sample, steps, settings, candidates(sample), anchors=len(tau))
    judge.estimate()
    reason = judge.fit_reasons
    if sample.rank == 0:
        rates = judge.null.profile(tau, 0, 0)
        rates[:, 3] = 1e-300
        values = _with_lag(np.column_stack([rates, np.zeros(len(tau))]))
        return values, np.zeros_like(values), reason

    def measured(split: int | None = None, half: int = 0) -> Array:
        fits = judge.chosen_fits(split, half)
        return _with_lag(np.column_stack([judge.rates(fits), judge.mmse(fits)]))

    whole = measured()
    parts = [partial(measured, split, half) for split in range(len(judge.refits.halves)) for half in (0, 1)]
    halves = np.stack(together(parts, settings.threads)).reshape(-1, 2, *whole.shape)
    spread = np.sqrt(((halves[:, 0] - halves[:, 1]) ** 2).mean(0) / 4)
    bias = halves.mean((0, 1)) - whole
    # Half the data have twice the bias: what they show beyond the whole is what the whole shows beyond the truth.
    small = np.abs(bias) < 0.3 * np.abs(whole)
    values = np.where(small, whole - bias, whole)
    return values, np.sqrt(spread**2 + (0.4 * bias) ** 2 + (0.02 * whole) ** 2), reason


def _with_lag(moments: Array) -> Array:
    """Append 1 + B/C."""
    return np.concatenate([moments, (1 + moments[:, 1] / moments[:, 2])[:, None]], 1)
