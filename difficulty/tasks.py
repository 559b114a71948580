"""Denoising tasks: intervals of timesteps, numbered from the cleanest (0) to the noisiest (K - 1).

Two grids: ``t`` cuts 1..T into K parts of equal length, as in the paper; ``log-snr`` cuts the range of log-SNR into K
parts of equal length, which shows the peak of difficulty that one or two intervals of the first hide. Tasks hold whole
timesteps and at least one: where a single step of the process is longer than a part (the clipped end of the cosine
schedule), the grid is equal only as far as that allows, and every task states the log-SNR it really covers.
"""

__all__ = ["GRIDS", "Task", "make_tasks", "runs", "task_of_t"]

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from difficulty.errors import InputError, choose
from difficulty.process import Array, Process


@dataclass(frozen=True)
class Task:
    """The timesteps first..last, both included.

    Args:
        index: 0 for the cleanest task.
        first, last: timesteps in 1..T.
        log_snr_high, log_snr_low: log-SNR at ``first`` and ``last``; low is -inf where alpha is 0.
    """

    index: int
    first: int
    last: int
    log_snr_high: float
    log_snr_low: float

    @property
    def length(self) -> int:
        """Number of timesteps."""
        return self.last - self.first + 1

    @property
    def middle(self) -> float:
        """Timestep in the middle, a whole or half number."""
        return 0.5 * (self.first + self.last)


def _equal_t(process: Process, count: int) -> Array:
    return np.arange(count + 1) * process.T / count


def _equal_log_snr(process: Process, count: int) -> Array:
    # Flow matching ends at log-SNR = -inf: its last finite step bounds the grid and T joins the last task.
    edges = process.t_at(np.linspace(process.log_snr(1), process.log_snr(process.noisiest), count + 1))
    edges[0], edges[-1] = 0, process.T
    return edges


GRIDS: Mapping[str, Callable[[Process, int], Array]] = {"t": _equal_t, "log-snr": _equal_log_snr}


def make_tasks(process: Process, count: int = 20, grid: str = "t") -> list[Task]:
    """Cut the timesteps of a process into tasks, cleanest first.

    Args:
        process: the forward process.
        count: number of tasks, 1 <= count <= T.
        grid: a name in ``GRIDS``.

    Raises:
        InputError: if the grid is unknown or there are more tasks than timesteps.
    """
    # Pure noise, where alpha is 0, is no task by itself: it joins the last one.
    noisiest = process.noisiest
    if not 1 <= count <= noisiest:
        name = "T" if noisiest == process.T else "T - 1"
        raise InputError(f"the number of tasks must lie in 1..{name} = {noisiest}, got {count}")
    edges = np.floor(choose("task grid", grid, GRIDS)(process, count) + 1e-9).astype(int)
    steps = np.arange(count + 1)
    # The nearest increasing edges from below, then from above, so that every task keeps at least one timestep.
    edges = np.maximum.accumulate(edges - steps) + steps
    edges = np.append(np.minimum(edges, noisiest - steps[::-1])[:-1], process.T)
    high, low = process.log_snr(edges[:-1] + 1), process.log_snr(edges[1:])
    return [
        Task(k, int(edges[k]) + 1, int(edges[k + 1]), float(high[k]), float(low[k])) for k in range(count)
    ]


def task_of_t(tasks: list[Task], T: int) -> npt.NDArray[np.int64]:
    """Index of the task that holds each t, shape (T+1,); entry 0 (clean data) is -1."""
    index = np.full(T + 1, -1, dtype=np.int64)
    for task in tasks:
        index[task.first : task.last + 1] = task.index
    return index


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of every run of consecutive whole numbers, rising."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
