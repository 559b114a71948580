"""Where the samples of a batch come from: memory, or files that are read while the network trains.

Which samples form the batch of a step is a function of (seed, step) alone (`trainer.py`), whatever they are read from:
shards and tables give the batches that the same samples would give from memory, a run resumes at any step, and every
process gets samples of its own. Reading ahead is torch's DataLoader's.
"""

__all__ = ["Resident", "Source", "Streamed", "source_of"]

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from difficulty.datasets import Dataset
from difficulty.errors import InputError
from difficulty.large import Large

RowsOf = Callable[[int], Tensor]  # numbers of this process's samples in a step, (B,)
WORKERS = 2
AHEAD = 4  # batches that each worker reads ahead


class Source(Protocol):
    """Batches by step."""

    def __len__(self) -> int:
        """Number of samples to choose from."""

    def read(self, step: int, rows: Tensor) -> Tensor:
        """The samples of a step, whose numbers are ``rows``, (B, *)."""


class Resident:
    """Samples in memory, on the device of the network."""

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, step: int, rows: Tensor) -> Tensor:
        return self.samples[rows.to(self.samples.device)]


class Streamed:
    """Samples read from files by worker processes, some batches ahead.

    Args:
        large: the samples.
        rows_of: numbers of the samples of any step, so that later batches can be read before they are asked for.
        steps: length of the run; nothing is read beyond it.
        device: where batches go.
        workers: processes that read; 0 reads in this one.
    """

    def __init__(
        self, large: Large, rows_of: RowsOf, steps: int, device: torch.device, workers: int = WORKERS
    ) -> None:
        self.large, self.rows_of, self.steps, self.device, self.workers = large, rows_of, steps, device, workers
        self.next = -1  # the step whose batch the loader gives next
        self.batches: Iterator[Tensor | InputError] = iter(())

    def __len__(self) -> int:
        return len(self.large)

    def read(self, step: int, rows: Tensor) -> Tensor:
        """See ``Source``.

        Raises:
            DataLost: if a sample can no longer be read.
            InputError: if a sample cannot be used.
        """
        if step != self.next:
            self.batches, self.next = self._from(step), step
        batch = next(self.batches)
        if isinstance(batch, InputError):
            self.next = -1
            raise batch
        self.next += 1
        return batch.to(self.device)

    def _from(self, step: int) -> Iterator[Tensor | InputError]:
        loader: DataLoader[Tensor | InputError] = DataLoader(
            _Readable(self.large),  # type: ignore[arg-type]
            batch_sampler=_Steps(self.rows_of, step, self.steps),
            num_workers=self.workers,
            prefetch_factor=AHEAD if self.workers else None,
            collate_fn=_batch,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)


class _Steps(Sampler[list[int]]):
    """The numbers of the samples of each step, from one step on."""

    def __init__(self, rows_of: RowsOf, first: int, end: int) -> None:
        self.rows_of, self.first, self.end = rows_of, first, end

    def __iter__(self) -> Iterator[list[int]]:
        return (self.rows_of(step).tolist() for step in range(self.first, self.end))


class _Readable:
    """Samples, or the error instead of one: the exception of a worker would reach the user with a traceback in it."""

    def __init__(self, large: Large) -> None:
        self.large = large

    def __len__(self) -> int:
        return len(self.large)

    def __getitem__(self, number: int) -> Tensor | InputError:
        try:
            return self.large[number]
        except InputError as error:
            return error


def _batch(samples: list[Tensor | InputError]) -> Tensor | InputError:
    found: list[Tensor] = []
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
        found.append(sample)
    return torch.stack(found)


def source_of(data: Dataset, rows_of: RowsOf, steps: int, device: torch.device) -> Source:
    """The sibling that holds the train samples of a data set."""
    if data.large is None:
        return Resident(data.train.to(device))
    return Streamed(data.large, rows_of, steps, device)
