"""A ScheduleSampler of the guided-diffusion family (ADM, iDDPM, DiT and what descends from them).

Their loop calls ``t, weights = sampler.sample(batch, device)`` with t from 0, and reports losses only to instances of
its own ``LossAwareSampler``; the class is therefore made from theirs.
"""

__all__ = ["schedule_sampler"]

from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.adapters.draws import Draws


def schedule_sampler(draws: Draws, base: Any) -> Any:
    """An instance of a subclass of the host's own sampler class.

    Args:
        draws: the timesteps.
        base: the host's ``LossAwareSampler``, so that losses are reported and reduced over the ranks by its own code;
            or its ``ScheduleSampler``, if no pacing rule needs the loss.
    """

    class CurriculumSampler(base):
        """Draws from the current stage of a curriculum."""

        def __init__(self) -> None:
            self.draws = draws

        def weights(self) -> np.ndarray:
            """Current probabilities of indices 0..T-1; zero outside the stage."""
            return draws.sampler.probabilities()[1:]

        def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
            """Indices from 0 and their weights in the loss."""
            t, weight = draws.draw(batch_size, device)
            return t - 1, weight

        def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
            """Losses of all ranks, reduced by the host."""
            draws.update(float(np.mean(losses)))

    return CurriculumSampler()
