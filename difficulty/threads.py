"""Many small matrices on several cores: whole steps side by side, each in one thread.

Threads within a product of small matrices wait for each other and cost more than they bring, and the last bits of a sum
depend on their number. Steps that do not depend on each other may run beside each other instead.
"""

__all__ = ["Calls", "one_thread", "together"]

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
def one_thread() -> Iterator[int]:
    """Libraries use one thread within; yields how many torch used before, which are free for steps side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield before
    finally:
        torch.set_num_threads(before)


def together(calls: Calls[T], threads: int) -> list[T]:
    """The results of independent calls, in their order; the first exception ends the rest.

    Args:
        calls: to be made within ``one_thread``.
        threads: so many at a time, but no more than ``MOST_THREADS``.
    """
    if threads == 1 or len(calls) < 2:
        return [call() for call in calls]
    # OpenMP counts its threads for each of ours.
    pool = ThreadPoolExecutor(min(threads, MOST_THREADS, len(calls)), initializer=threadpool_limits, initargs=(1,))
    try:
        return list(pool.map(lambda call: call(), calls))
    finally:
        pool.shutdown(cancel_futures=True)
