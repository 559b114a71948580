"""Random numbers as a function of counters: (seed, step, rank, ...) names a stream, nothing is remembered.

Two runs that ask for the same counters get the same numbers, whatever else they drew; two ranks that ask for different
counters get independent ones. numpy's Philox is a counter-based generator with a 128-bit key.

Making a generator costs more than drawing a batch of timesteps from it, and most of that is numpy's hash from counters
to key (SeedSequence, after O'Neill's seed_seq). A training run asks for (seed, name, step, 0) step after step, so the
hash is evaluated for a block of steps at once; numpy guarantees that its result never changes.
"""

__all__ = ["check_seed", "integers", "normal", "seeded_torch", "stream", "torch_generator", "uniform"]

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from difficulty.errors import InputError

BLOCK = 1024  # steps whose keys are made at once


def check_seed(seed: int) -> None:
    """Raise InputError if a seed can name no stream."""
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}")


def stream(*counters: int) -> np.random.Generator:
    """The generator of the stream named by non-negative whole numbers, e.g. (seed, step, rank)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(counters)))


def normal(shape: tuple[int, ...], *counters: int) -> torch.Tensor:
    """Standard normal float32 numbers of the stream named by the counters."""
    return torch.from_numpy(_borrowed(counters).standard_normal(shape, dtype=np.float32))


def uniform(shape: tuple[int, ...], *counters: int) -> npt.NDArray[np.float64]:
    """Uniform float64 numbers in [0, 1) of the stream named by the counters; an array, as t is drawn by numpy."""
    return _borrowed(counters).random(shape)


def integers(below: int, count: int, *counters: int) -> torch.Tensor:
    """Whole numbers in [0, below), int64 (count,), of the stream named by the counters."""
    return torch.from_numpy(_borrowed(counters).integers(0, below, count))


def torch_generator(*counters: int) -> torch.Generator:
    """A torch generator seeded from the counters, for torch functions that want one (initial weights, laws)."""
    return torch.Generator().manual_seed(int(stream(*counters).integers(2**63)))


@contextlib.contextmanager
def seeded_torch(*counters: int) -> Iterator[None]:
    """torch's global generators seeded from the counters, for code of others that reads them, and put back after it."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(torch_generator(*counters).initial_seed())
        yield


class _Borrowed(threading.local):
    """One generator per thread that is set to the beginning of one stream after the other."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(0)
        self.generator = np.random.Generator(self.bits)
        self.state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": np.zeros(4, np.uint64), "key": np.zeros(2, np.uint64)},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }


_thread = _Borrowed()


def _borrowed(counters: tuple[int, ...]) -> np.random.Generator:
    """A generator at the beginning of ``stream(*counters)``, to be read before the next call."""
    if len(counters) != 4 or max(counters) >= 2**32:  # numpy hashes those in another way
        return stream(*counters)
    seed, name, step, last = counters
    _thread.state["state"]["key"] = _keys(seed, name, step // BLOCK, last)[step % BLOCK]
    _thread.bits.state = _thread.state
    return _thread.generator


@functools.lru_cache(maxsize=64)
def _keys(seed: int, name: int, block: int, last: int) -> npt.NDArray[np.uint64]:
    """SeedSequence((seed, name, step, last)).generate_state(2, uint64) of a block of steps, shape (BLOCK, 2)."""
    steps = np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.uint64).astype(np.uint32)
    factor = 0x43B0D7E5

    def hashed(value: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        nonlocal factor
        value = value ^ np.uint32(factor)
        factor = factor * 0x931E8875 & 0xFFFFFFFF
        value = value * np.uint32(factor)
        return value ^ (value >> np.uint32(16))

    pool = [hashed(np.broadcast_to(np.asarray(part, np.uint32), BLOCK)) for part in (seed, name, steps, last)]
    for source in range(4):
        for target in range(4):
            if source != target:
                mixed = np.uint32(0xCA01F9DD) * pool[target] - np.uint32(0x4973F715) * hashed(pool[source])
                pool[target] = mixed ^ (mixed >> np.uint32(16))
    factor, words = 0x8B51F9DD, []
    for value in pool:
        value = value ^ np.uint32(factor)
        factor = factor * 0x58F38DED & 0xFFFFFFFF
        value = value * np.uint32(factor)
        words.append((value ^ (value >> np.uint32(16))).astype(np.uint64))
    return np.stack([words[0] | words[1] << np.uint64(32), words[2] | words[3] << np.uint64(32)], 1)
