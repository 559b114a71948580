"""Base densities over the timesteps: how often each t is drawn where no curriculum narrows the choice.

A density is a vector p[0..T] with p[0] = 0 (clean data) and sum 1. One that is stated on another axis x(t) is carried
to the grid by the width of the cell around t, p[t] ~ q(x(t)) |dx/dt|. Siblings, each with the density it states:

    uniform        1                                       in t
    log-snr        1                                       in log-SNR
    log-normal     N(mean, std) of log(sigma/alpha)         EDM, Karras et al. 2022, table 1: -1.2, 1.2
    logit-normal   N(mean, std) of log(u/(1-u))             Esser et al. 2024, arXiv 2403.03206, eq. 19
    cosine-map     2 / (pi - 2 pi u + 2 pi u^2)             the same, eq. 21

A density that is proportional to a measured difficulty is a table of masses per task, see ``from_task_masses``.
"""

__all__ = [
    "DENSITIES", "density", "from_task_masses", "log_snr_widths", "proportional_to", "task_masses", "trapezoid_widths",
]  # fmt: skip

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from difficulty.errors import InputError, choose
from difficulty.process import Array, Process
from difficulty.specs import parse_spec


class Interval(Protocol):
    """Anything with the first and last timestep of a task."""

    @property
    def t_first(self) -> int:
        """First timestep."""

    @property
    def t_last(self) -> int:
        """Last timestep, included."""


def finite_log_snr(process: Process) -> Array:
    """log-SNR at t = 1..T, shape (T,); a last value of -inf (alpha = 0) is replaced by linear extrapolation."""
    log_snr = process.log_snr(np.arange(1, process.T + 1))
    if np.isinf(log_snr[-1]):
        log_snr[-1] = 2 * log_snr[-2] - log_snr[-3] if process.T > 2 else log_snr[-2] - 1.0
    return log_snr


def log_snr_widths(process: Process) -> Array:
    """Width of the cell of each t in log-SNR, shape (T,), positive; where alpha is 0, as ``finite_log_snr`` has it."""
    return _cells(finite_log_snr(process))


def trapezoid_widths(process: Process) -> Array:
    """Weight of each t in an integral over log-SNR, shape (T,); 0 where alpha is 0, which lies infinitely far out.

    A single timestep with signal counts as a unit of log-SNR.
    """
    widths = np.zeros(process.T)
    if process.noisiest == 1:
        widths[0] = 1.0
        return widths
    widths[: process.noisiest] = _cells(process.log_snr(np.arange(1, process.noisiest + 1)))
    return widths


def _cells(log_snr: Array) -> Array:
    edges = np.concatenate([log_snr[:1], 0.5 * (log_snr[:-1] + log_snr[1:]), log_snr[-1:]])
    return edges[:-1] - edges[1:]


def _uniform(process: Process) -> Array:
    return np.ones(process.T)


def _log_snr(process: Process) -> Array:
    return log_snr_widths(process)


def _log_normal(process: Process, mean: float = -1.2, std: float = 1.2) -> Array:
    _positive("std", std)
    tau = -0.5 * finite_log_snr(process)
    return np.exp(-0.5 * ((tau - mean) / std) ** 2) * log_snr_widths(process)


def _logit_normal(process: Process, mean: float = 0.0, std: float = 1.0) -> Array:
    _positive("std", std)
    u = _cell_centres(process)
    return np.exp(-0.5 * ((np.log(u / (1 - u)) - mean) / std) ** 2) / (u * (1 - u))


def _cosine_map(process: Process) -> Array:
    u = _cell_centres(process)
    return 2 / (np.pi - 2 * np.pi * u + 2 * np.pi * u**2)


def _cell_centres(process: Process) -> Array:
    """u in the middle of each cell ((t-1)/T, t/T], so that u = 1, where the logit is infinite, is never asked for."""
    return (np.arange(1, process.T + 1) - 0.5) / process.T


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{name} of a density must be positive, got {value}")


DENSITIES: Mapping[str, Callable[..., Array]] = {
    "uniform": _uniform,
    "log-snr": _log_snr,
    "log-normal": _log_normal,
    "logit-normal": _logit_normal,
    "cosine-map": _cosine_map,
}


def density(spec: str, process: Process) -> Array:
    """Probability of each t, shape (T+1,), p[0] = 0.

    Args:
        spec: a name in ``DENSITIES`` with options, as in ``log-normal:mean=-1.2,std=1.2``.
        process: gives T and log-SNR.

    Raises:
        InputError: if the name or an option is unknown, or the density vanishes on the whole grid.
    """
    name, options = parse_spec(spec)
    factory = choose("density", name, DENSITIES)
    try:
        values = factory(process, **options)
    except TypeError:
        import inspect

        allowed = ", ".join(list(inspect.signature(factory).parameters)[1:]) or "none"
        raise InputError(f"density {name!r} cannot take {options}; its options are: {allowed}") from None
    return normalised(np.concatenate([[0.0], values]))


def normalised(weights: Array) -> Array:
    """Weights divided by their sum.

    Raises:
        InputError: if they are negative, not finite, or sum to zero.
    """
    total = weights.sum()
    if not np.isfinite(total) or (weights < 0).any() or total <= 0:
        raise InputError("a density over t must be finite, non-negative and positive somewhere")
    return weights / total


def task_masses(p: Array, tasks: Sequence[Interval]) -> Array:
    """Probability of each task under p, shape (K,)."""
    return np.array([p[task.t_first : task.t_last + 1].sum() for task in tasks])


def from_task_masses(masses: Sequence[float], tasks: Sequence[Interval]) -> Array:
    """The density that draws a task by its mass and then t uniformly in it, shape (T+1,).

    Raises:
        InputError: if there is not one non-negative mass per task.
    """
    if len(masses) != len(tasks):
        raise InputError(f"a tabulated density needs one mass per task: {len(tasks)} tasks, {len(masses)} masses")
    p = np.zeros(max(task.t_last for task in tasks) + 1)
    for task, mass in zip(tasks, masses, strict=True):
        p[task.t_first : task.t_last + 1] = mass / (task.t_last - task.t_first + 1)
    return normalised(p)


def proportional_to(
    values: Sequence[float | None], tasks: Sequence[Interval], power: float = 1.0, uniform_share: float = 0.5
) -> list[float]:
    """Mass of each task: a share that is uniform in t and a rest proportional to difficulty^power per timestep.

    The uniform share keeps every task trained, however easy it was found.

    Args:
        values: difficulty per task, positive; a task without a value takes the median of the others.
        tasks: the tasks.
        power: exponent on the difficulty; 0 is uniform.
        uniform_share: in [0, 1].

    Raises:
        InputError: if no value is given, one is negative, or the share lies outside [0, 1].
    """
    if not 0 <= uniform_share <= 1:
        raise InputError(f"uniform_share must lie in [0, 1], got {uniform_share}")
    known = [value for value in values if value is not None]
    if not known or min(known) < 0:
        raise InputError("a density proportional to difficulty needs non-negative values; rank by another measure")
    difficulty = np.array([np.median(known) if value is None else value for value in values]) ** power
    length = np.array([task.t_last - task.t_first + 1 for task in tasks], dtype=np.float64)
    measured = normalised(difficulty * length)
    return (uniform_share * length / length.sum() + (1 - uniform_share) * measured).tolist()
