"""Random numbers as a function of counters: (seed, step, rank, ...) names a stream, nothing is remembered.

Two runs that ask for the same counters get the same numbers, whatever else they drew; two ranks that ask for different
counters get independent ones. numpy's Philox is a counter-based generator with a 128-bit key.
"""

__all__ = ["normal", "seeded_torch", "stream", "torch_generator", "uniform"]

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


def stream(*counters: int) -> np.random.Generator:
    """The generator of the stream named by non-negative whole numbers, e.g. (seed, step, rank)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(counters)))


def normal(shape: tuple[int, ...], *counters: int) -> torch.Tensor:
    """Standard normal float32 numbers of the stream named by the counters."""
    return torch.from_numpy(stream(*counters).standard_normal(shape, dtype=np.float32))


def uniform(shape: tuple[int, ...], *counters: int) -> torch.Tensor:
    """Uniform float64 numbers in [0, 1) of the stream named by the counters."""
    return torch.from_numpy(stream(*counters).random(shape))


def torch_generator(*counters: int) -> torch.Generator:
    """A torch generator seeded from the counters, for torch functions that want one (initial weights, laws)."""
    return torch.Generator().manual_seed(int(stream(*counters).integers(2**63)))


@contextlib.contextmanager
def seeded_torch(*counters: int) -> Iterator[None]:
    """torch's global generators seeded from the counters, for code of others that reads them, and put back after it."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(torch_generator(*counters).initial_seed())
        yield
