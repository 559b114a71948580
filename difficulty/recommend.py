"""What a profile or a ranking says to a trainer: boundaries of experts with equal burden, densities of noise levels.

The burden of a stretch of noise levels is the integral over log s of a rate. The rate of a profile is that of the
Fisher-Rao length of its schedule-free part, sqrt(I_min): it adds up, and depends on neither the schedule nor the step.
A rate of another kind, such as the excess nats of a ranking, is used in the same way.

A density proportional to the burden is fitted by the families that trainers take:
    EDM and k-diffusion    log s ~ N(P_mean, P_std)                  (Karras et al. 2022, table 1)
    flow matching (SD3)    logit u ~ N(mean, std), u = s/(1 + s)     (Esser et al. 2024, arXiv 2403.03206)
Both are Gaussian in log s, since logit u = log s; the total-variation distance to the burden says how good that is.
The scripts of diffusers take the u that they draw for a place in ``scheduler.timesteps``, which fall: their u is 1 - u,
and a scheduler of another ``shift`` moves logit u by log(shift).
"""

__all__ = [
    "Boundaries",
    "Density",
    "advise",
    "burden_of_profile",
    "burden_of_ranking",
    "check_experts",
    "equal_burden",
    "fit_density",
    "flags",
    "wide_tasks",
]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import norm

from difficulty.errors import InputError, choose
from difficulty.process import Process
from difficulty.profile import Profile
from difficulty.ranking import Ranking

Array = npt.NDArray[np.float64]
WIDEST = 2.0  # units of log-SNR


@dataclass(frozen=True)
class Density:
    """A normal density of log s.

    Args:
        mean, std: of log s, which is also logit u of flow matching.
        distance: total-variation distance to the burden, 0 perfect, 1 disjoint.
    """

    mean: float
    std: float
    distance: float


@dataclass(frozen=True, eq=False)
class Boundaries:
    """Edges of K experts.

    Args:
        table: K+1 rows from clean to noisy with the columns t, u, sigma (s = sigma/alpha), log_snr.
    """

    table: pd.DataFrame


def burden_of_profile(profile: Profile) -> tuple[Array, Array]:
    """tau = log s of the valid part of the profile, rising, and the rate sqrt(I_min) there.

    Raises:
        InputError: if fewer than 3 points are valid, or the rate is zero up to rounding.
    """
    valid = profile.table["valid"].to_numpy(dtype=bool)
    if valid.sum() < 3:
        raise InputError("fewer than 3 points of the profile are valid; give more samples before asking for advice")
    rate, dilation = (profile.table[name].to_numpy()[valid] for name in ("i_min", "C"))
    # I_min is a sum of squares of what should cancel, each good to 1e-16 of its parts.
    if (rate <= 1e-24 * dilation).all():
        raise InputError(
            "the profile has no schedule-free part, as data of one variance in all directions have none; "
            "there is no burden to share"
        )
    return profile.tau[valid], np.sqrt(rate)


def burden_of_ranking(ranking: Ranking, measure: str = "excess_nats") -> tuple[Array, Array]:
    """tau = log s, rising, and the rate per unit log s that a measure per unit log-SNR states, constant in each task.

    Raises:
        InputError: if the measure is unknown, not a density over log-SNR, or without a value for some task.
    """
    chosen = choose("measure", measure, ranking.measures)
    if "per unit log-SNR" not in chosen.unit or chosen.unit.startswith("log"):
        raise InputError(f"measure {measure!r} is in {chosen.unit}; a burden must be a density per unit log-SNR")
    tau, rate = [], []
    for task in ranking.tasks:
        value = chosen.value[task.index]
        if value is None:
            raise InputError(
                f"measure {measure!r} has no value at t {task.t_first}..{task.t_last}, where experts failed or no pair "
                "is valid; there is no burden to share without it"
            )
        # A task of one timestep has no width; one that ends in pure noise has no end.
        if task.sigma_last is None or task.t_first == task.t_last:
            continue
        low, high = np.log(task.sigma_first), np.log(task.sigma_last)
        margin = 1e-6 * (high - low)  # steps, not ramps, and strictly rising
        tau += [low + margin, high - margin]
        rate += [2 * max(value, 0.0)] * 2  # d log-SNR = 2 d log s
    if not rate:
        raise InputError("every task is of one timestep or ends in pure noise and has no width; measure fewer tasks")
    if sum(rate) <= 0:
        raise InputError(f"measure {measure!r} is nowhere positive; there is no burden to share")
    return np.array(tau), np.array(rate)


def wide_tasks(ranking: Ranking) -> list[str]:
    """A sentence for every task too wide in log-SNR for a mean over its timesteps to be one over its log-SNR."""
    widths = [(task, task.log_snr_high - task.log_snr_low) for task in ranking.tasks if task.log_snr_low is not None]
    return [
        f"t {task.t_first}..{task.t_last} spans {width:.1f} units of log-SNR; its value is a mean over t, mostly of "
        "its noisy end: measure with --grid log-snr for a density over log-SNR"
        for task, width in widths
        if width > WIDEST
    ]


def check_experts(experts: int) -> None:
    """Raise InputError if there is no such number of experts."""
    if experts < 1:
        raise InputError(f"the number of experts must be at least 1, got {experts}")


def equal_burden(tau: Array, rate: Array, process: Process, experts: int) -> Boundaries:
    """Edges between which the integral of the rate over log s is the same.

    Args:
        tau, rate: from ``burden_of_profile``; tau rising.
        process: in whose range of log-SNR the experts work.
        experts: K >= 1.

    Raises:
        InputError: if K is below 1 or the process and the rate do not overlap.
    """
    check_experts(experts)
    low, high = max(tau[0], float(process.tau(1))), min(tau[-1], float(process.tau(process.noisiest)))
    if low >= high:
        raise InputError(f"process {process.name!r} and the profile have no common range of log-SNR")
    fine = np.linspace(low, high, 2001)
    total = _cumulative(fine, np.interp(fine, tau, rate))
    edges = np.interp(np.linspace(0, total[-1], experts + 1), total, fine)
    edges[[0, -1]] = low, high
    t = process.t_at(-2 * edges)
    return Boundaries(pd.DataFrame({"t": t, "u": t / process.T, "sigma": np.exp(edges), "log_snr": -2 * edges}))


def fit_density(tau: Array, rate: Array) -> Density:
    """The normal density of log s with the moments of the burden."""
    fine = np.linspace(tau[0], tau[-1], 4001)
    weight = np.interp(fine, tau, rate)
    weight = weight / _cumulative(fine, weight)[-1]
    mean = float(np.trapezoid(fine * weight, fine))
    std = float(np.sqrt(np.trapezoid((fine - mean) ** 2 * weight, fine)))
    outside = norm.cdf(tau[0], mean, std) + norm.sf(tau[-1], mean, std)
    distance = 0.5 * (np.trapezoid(np.abs(weight - norm.pdf(fine, mean, std)), fine) + outside)
    return Density(mean, std, float(distance))


def flags(density: Density) -> dict[str, str]:
    """Arguments of common trainers for a density."""
    mean, std = f"{density.mean:.3f}", f"{density.std:.3f}"
    return {
        "EDM (loss_kwargs)": f"P_mean={mean} P_std={std}",
        "k-diffusion (sigma_sample_density)": f'{{"type": "lognormal", "mean": {mean}, "std": {std}}}',
        "diffusers flow matching (shift 1; add log(shift) to the mean)": (
            f"--weighting_scheme=logit_normal --logit_mean={-density.mean:.3f} --logit_std={std}"
        ),
    }


def advise(
    burden: str, tau: Array, rate: Array, processes: Mapping[str, Process], experts: int
) -> dict[str, Any]:
    """Everything that follows from a burden, for recommendation.json; ``sentences`` are for people.

    Args:
        burden: what the rate is.
        tau, rate: from ``burden_of_profile`` or ``burden_of_ranking``.
        processes: on which the boundaries are stated, each under the name that it has in the answer.
        experts: K >= 1.

    Raises:
        InputError: as ``equal_burden``.
    """
    density = fit_density(tau, rate)
    sentences = [
        f"Burden {burden} over log-SNR {-2 * tau[0]:.3g} to {-2 * tau[-1]:.3g}: normal in log s with mean "
        f"{density.mean:.3f}, std {density.std:.3f}; total-variation distance {density.distance:.2f} "
        f"({'good' if density.distance < 0.1 else 'fair' if density.distance < 0.2 else 'poor'} fit).",
        *(f"  {trainer}: {text}" for trainer, text in flags(density).items()),
    ]
    boundaries = {}
    for name, process in processes.items():
        table = equal_burden(tau, rate, process, experts).table
        boundaries[name] = table.to_dict(orient="list")
        sentences.append(f"Boundaries of {experts} experts of equal burden, {name}:")
        sentences += [
            f"  t = {row.t:7.1f}  u = {row.u:.4f}  sigma/alpha = {row.sigma:9.4g}  log-SNR = {row.log_snr:7.3f}"
            for row in table.itertuples()
        ]
        if table["t"].iloc[-1] < process.T:
            sentences.append(f"  noisier timesteps, up to {process.T}, go to the last one: no burden is known of them")
    return {
        "burden": burden,
        "density": {"P_mean": density.mean, "P_std": density.std, "total_variation_distance": density.distance},
        # d log-SNR = 2 d log s
        "piecewise_density_over_log_snr": {"log_snr": (-2 * tau).tolist(), "rate": (0.5 * rate).tolist()},
        "boundaries": boundaries,
        "sentences": sentences,
    }


def _cumulative(x: Array, y: Array) -> Array:
    steps = np.diff(x) * 0.5 * (y[1:] + y[:-1])
    return np.concatenate([[0.0], np.cumsum(steps)])
