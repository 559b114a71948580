"""Many small matrices on several cores: whole steps side by side, each in one thread.

Threads within a product of small matrices wait for each other and cost more than they bring. Fits and tests do not
depend on each other, and so run beside each other; every result is the same for any number of threads.
"""

__all__ = ["Calls", "one_thread_each", "together"]

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")
Calls = Sequence[Callable[[], T]]

# Steps side by side; each may hold some hundred MiB.
MOST_THREADS = 4


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Libraries use one thread within; yields how many steps may run side by side, by torch's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # The filters of warnings belong to the process, so that a thread must not set them.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FastICA did not converge")
            yield min(before, MOST_THREADS)
    finally:
        torch.set_num_threads(before)


def together(calls: Calls[T], threads: int) -> list[T]:
    """The results of independent calls, in their order, so many at a time; the first exception ends the rest."""
    if threads == 1 or len(calls) < 2:
        return [call() for call in calls]
    # OpenMP counts its threads for each of ours.
    pool = ThreadPoolExecutor(min(threads, len(calls)), initializer=threadpool_limits, initargs=(1,))
    try:
        return list(pool.map(lambda call: call(), calls))
    finally:
        pool.shutdown(cancel_futures=True)
