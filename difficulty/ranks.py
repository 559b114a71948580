"""Processes that share one measurement: those that torchrun started, or helpers started here.

Every process (rank) trains its share of the experts; rank 0 gathers what they found and is the only one that writes.
However they were started, they are one torch.distributed group that exchanges Python objects over gloo.
"""

__all__ = ["ONE", "Ranks", "help_out", "helpers", "join_group", "launched_ranks"]

import atexit
import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from difficulty.errors import InputError

Value = TypeVar("Value")

# A rank may train for days before it has something to say.
PATIENCE = timedelta(days=30)
HELPER = "import sys; from difficulty.ranks import help_out; help_out(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together.

    Args:
        rank: of this process, 0 <= rank < world.
        world: how many there are.
        group: what they exchange objects through; None if there is one.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order, on rank 0; nothing on others. All ranks must call it."""
        if self.world == 1:
            return [value]
        found: list[Any] | None = [None] * self.world if self.first else None
        dist.gather_object(value, found, dst=0, group=self.group)
        return found or []

    def share(self, value: Any) -> Any:
        """The value that rank 0 gave, whatever the others give. All ranks must call it."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def on_first(self, function: Callable[[], Value]) -> Value:
        """Call the function on rank 0 alone and return its result on every rank; all ranks must call this.

        Raises:
            InputError: on every rank, if the function raised it.
        """
        found: Any = None
        if self.first:
            try:
                found = function()
            except InputError as error:
                found = error
        found = self.share(found)
        if isinstance(found, InputError):
            raise found
        return found


ONE = Ranks()


def join_group(backend: str, timeout: timedelta | None = None) -> None:
    """Join the processes that torchrun started, until this one ends.

    Args:
        backend: of torch.distributed, gloo or nccl.
        timeout: of one exchange; the backend's own without it.
    """
    dist.init_process_group(backend, timeout=timeout)
    atexit.register(_leave_group)


def _leave_group() -> None:
    """End the group while the interpreter still runs.

    A thread of gloo drops the tensors of its last exchange after the exchange is over, and needs the interpreter for
    it; if that is being torn down already, the process ends with SIGABRT. Destroying the group waits for its threads,
    but not where something in C++ still holds the group, as torch's fully_shard does to the end. Sleeping hands the
    interpreter to them.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(0.5)


@functools.cache
def launched_ranks() -> Ranks:
    """The ranks that torchrun started, joined on the first call; one where it did not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if dist.is_initialized():
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    else:
        join_group("gloo", PATIENCE)
        group = None
    return Ranks(dist.get_rank(), dist.get_world_size(), group)


@contextlib.contextmanager
def helpers(world: int, job: Any) -> Iterator[Ranks]:
    """Start ``world - 1`` processes that do a job beside this one, each with one thread, as this one then has.

    Args:
        world: ranks in all.
        job: called as ``job(ranks)`` by every helper; must be picklable.

    Raises:
        RuntimeError: if a helper ended before its time; what it had to say is on stderr.
    """
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "store")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", HELPER, str(rank), str(world), path],
                env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )
            for rank in range(1, world)
        ]  # fmt: skip
        try:
            torch.set_num_threads(1)
            _await(started, path)
            ranks = _meet(0, world, path)
            ranks.share(job)
            yield ranks
            for process in started:
                process.wait()
        finally:
            torch.set_num_threads(threads)
            for process in started:
                process.kill()
                process.wait()
            if dist.is_initialized():
                dist.destroy_process_group()


def _await(started: list[subprocess.Popen[bytes]], path: str) -> None:
    """Wait until every helper has come up; the rendezvous itself would wait for ever for one that did not."""
    while not all(Path(f"{path}.{rank}").exists() for rank in range(1, len(started) + 1)):
        if any(process.poll() is not None for process in started):
            raise RuntimeError("a helper process ended before it began; what it had to say is on stderr")
        time.sleep(0.02)


def _meet(rank: int, world: int, path: str) -> Ranks:
    dist.init_process_group("gloo", store=dist.FileStore(path, world), rank=rank, world_size=world, timeout=PATIENCE)
    return Ranks(rank, world)


def help_out(rank: int, world: int, path: str) -> None:
    """What the process of a helper does: take the job from rank 0 and do it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches rank 0, which ends its helpers
    torch.set_num_threads(1)
    Path(f"{path}.{rank}").touch()
    ranks = _meet(rank, world, path)
    job = ranks.share(None)
    job(ranks)
    dist.destroy_process_group()

