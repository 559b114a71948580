"""Is a diffusers scheduler the process that a curriculum was made for? If not, its t would mean other noise."""

__all__ = ["matches_ddpm", "matches_flow"]

from typing import Any

import numpy as np

from difficulty.errors import InputError
from difficulty.process import Process

# diffusers keeps its tables in float32; sigma = sqrt(1 - alpha^2) loses digits where alpha is near 1.
TOLERANCE = 2e-3


def matches_ddpm(scheduler: Any, process: Process) -> None:
    """Check a variance-preserving scheduler with ``alphas_cumprod`` (DDPM, DDIM, ...); its index i is t = i + 1.

    Raises:
        InputError: if the number of steps or a noise level differs.
    """
    cumulative = scheduler.alphas_cumprod.double().numpy()
    _same(np.sqrt((1 - cumulative) / cumulative), process, type(scheduler).__name__)


def matches_flow(scheduler: Any, process: Process) -> None:
    """Check a flow-matching scheduler with descending ``timesteps`` and ``sigmas``, before any inference shift.

    Raises:
        InputError: if the number of steps, the order of the timesteps or a noise level differs.
    """
    timesteps = scheduler.timesteps.double().numpy()
    if not (np.diff(timesteps) < 0).all():
        raise InputError(f"the timesteps of {type(scheduler).__name__} do not descend; this adapter would reverse them")
    sigma = scheduler.sigmas.double().numpy()[: len(timesteps)][::-1]
    with np.errstate(divide="ignore"):
        _same(sigma / (1 - sigma), process, type(scheduler).__name__)


def _same(noise_to_signal: np.ndarray, process: Process, name: str) -> None:
    if len(noise_to_signal) != process.T:
        raise InputError(f"{name} has {len(noise_to_signal)} timesteps, process {process.name!r} has T = {process.T}")
    # As an angle, which is finite where the signal vanishes.
    theirs, ours = np.arctan(noise_to_signal), np.arctan2(process.sigma[1:], process.alpha[1:])
    worst = int(np.argmax(np.abs(theirs / ours - 1)))
    if abs(theirs[worst] / ours[worst] - 1) > TOLERANCE:
        raise InputError(
            f"{name} has noise-to-signal {noise_to_signal[worst]:.4g} at t = {worst + 1}, process {process.name!r} has "
            f"{np.tan(ours[worst]):.4g}; the curriculum was made for other noise levels"
        )
