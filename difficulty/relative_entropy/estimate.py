"""What every estimator is given and what it returns."""

__all__ = ["Estimate", "Settings", "log_interval"]

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from difficulty.intervals import Z90
from difficulty.models import TrainedModel
from difficulty.process import Process

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """Arguments common to the estimators.

    Args:
        samples: Monte Carlo draws per pair.
        bootstrap: number of half-sample refits.
        seed: of every draw.
        progress: called with (done, total).
        model: a trained denoiser for the score estimator; without one it trains its own.
        process: the forward process of the pairs, which a trained denoiser must share.
        threads: steps that may run side by side (`difficulty/threads.py`).
    """

    samples: int
    bootstrap: int
    seed: int
    progress: Callable[[int, int], None]
    model: TrainedModel | None = None
    process: Process | None = None
    threads: int = 1


@dataclass(frozen=True, eq=False)
class Estimate:
    """Relative entropies of pairs; every field has shape (m,).

    Args:
        kl, kl_reverse: KL(p_from || p_t) and KL(p_t || p_from), nats.
        se: standard error of kl, nats.
        ci_low, ci_high: 90 % interval, nats.
        i_min: schedule-free rate A - B^2/C at the middle of the pair.
        estimator: which estimator gave the row.
        valid: whether it may be believed.
        reason: why not, empty where valid.
    """

    kl: Array
    kl_reverse: Array
    se: Array
    ci_low: Array
    ci_high: Array
    i_min: Array
    estimator: npt.NDArray[np.object_]
    valid: npt.NDArray[np.bool_]
    reason: npt.NDArray[np.object_]


def log_interval(kl: Array, log_error: Array, quantile: float = Z90) -> tuple[Array, Array]:
    """90 % interval of a positive quantity whose logarithm has the given standard error, times ``quantile``."""
    factor = np.exp(quantile * np.minimum(log_error, 200.0))
    return kl / factor, kl * factor
