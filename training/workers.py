"""Groups of runs, here or in worker processes; each process gets one thread, because the networks are small."""

__all__ = ["GroupRunner", "worker_processes"]

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from difficulty.commandline import plain_warnings
from difficulty.errors import InputError
from difficulty.threads import one_thread
from training.jobs import Job, Setting, run_group

Results = list[dict[str, Any]]
# Groups of jobs -> each group with its results, in the order in which they are finished.
GroupRunner = Callable[[Sequence[list[Job]]], Iterator[tuple[list[Job], Results]]]


@contextmanager
def worker_processes(setting: Setting, partial: Path, count: int) -> Iterator[GroupRunner]:
    """A function that runs groups of jobs.

    Args:
        setting: what all runs share.
        partial: folder of unfinished groups.
        count: processes; with one or none the runs happen here.
    """
    if count <= 1:
        with one_thread():
            yield lambda groups: ((group, run_group(setting, group, partial)) for group in groups)
        return
    # Spawned, not forked: a fork would inherit torch's thread pools in an unknown state. The setting is pickled once,
    # by plain pickle, because torch's own would pass tensors through shared memory, which containers keep small.
    pool = ProcessPoolExecutor(count, get_context("spawn"), _begin_worker, (pickle.dumps((setting, partial)),))

    def run(groups: Sequence[list[Job]]) -> Iterator[tuple[list[Job], Results]]:
        futures = {pool.submit(_work, pickle.dumps(group)): group for group in groups}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield run
    except BrokenProcessPool:
        raise InputError(
            "a worker process died, perhaps for lack of memory; finished runs are kept, repeat with one worker"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_shared: tuple[Setting, Path] | None = None  # of this worker process, set once when it starts


def _begin_worker(shared: bytes) -> None:
    global _shared
    # Ctrl-C reaches the workers too; they end without a word and leave the sentence to the parent.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    plain_warnings()
    sys.stdout = sys.stderr  # what the user's functions print; standard output is for the parent's result
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    threadpool_limits(1)
    _shared = pickle.loads(shared)


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers, which would wait for it forever."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(group: bytes) -> Results:
    assert _shared is not None
    setting, partial = _shared
    return run_group(setting, pickle.loads(group), partial)
