"""Timesteps on the axes of other training loops.

Here t counts 1..T and noise grows with t. Elsewhere the same t is called

    indices        t - 1                    DDPM codes, DiT, diffusers' DDPM scripts: from 0, noise grows
    times          t / T in (0, 1]          time in [0, 1], noise grows; or the host's time of equal log-SNR
    data_times     1 - t / T in [0, 1)      SiT, torchcfm, flow_matching, rectified flow: t = 1 is data
    sigmas         sigma_t / alpha_t        EDM, k-diffusion
    scheduler_u    (T - t + 1/2) / T        diffusers' flow scripts: floor(u T) indexes timesteps that descend

Every call draws the timesteps of the next micro-step; gradient accumulation needs nothing more.
"""

__all__ = ["Draws"]

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difficulty.errors import InputError
from difficulty.process import Process
from training.timesteps import TimestepSampler


class Draws:
    """Counts the micro-steps of a host and draws its timesteps.

    Args:
        sampler: with its curriculum; its budget counts micro-steps.
        process: the process of the sampler.
        rank, world: this process and the number of processes; every rank gets its own part of one draw.

    Raises:
        InputError: if the sampler is for another number of timesteps.
    """

    def __init__(self, sampler: TimestepSampler, process: Process, *, rank: int = 0, world: int = 1) -> None:
        if sampler.T != process.T:
            raise InputError(
                f"the sampler draws from T = {sampler.T}, but process {process.name!r} has T = {process.T}"
            )
        if not 0 <= rank < world:
            raise InputError(f"rank must lie in 0..world-1, got rank {rank} of {world}")
        self.sampler, self.process, self.rank, self.world, self.step = sampler, process, rank, world, 0

    def draw(self, n: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """t in 1..T, int64, and its weight in the loss, float32, each of shape (n,)."""
        drawn = self.sampler.sample(n, step=self.step, rank=self.rank, world=self.world, device=device)
        self.step += 1
        return drawn

    def indices(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """t - 1 in 0..T-1, int64 (n,), in place of ``torch.randint(0, T, (n,), device=device)``."""
        return self.draw(n, device)[0] - 1

    def times(
        self, n: int, device: torch.device | str = "cpu", log_snr: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Times in [0, 1], float32 (n,), noise growing with time.

        Args:
            n: number of draws.
            device: where they go.
            log_snr: the host's own log-SNR as a falling function of time; the time returned has the log-SNR of our t,
                held to the ends of [0, 1] where the host does not reach it. None takes t / T.
        """
        t, _ = self.draw(n)
        if log_snr is None:
            return (t / self.process.T).float().to(device)
        target = torch.from_numpy(self.process.log_snr(t.numpy()))
        low, high = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        for _ in range(50):
            middle = 0.5 * (low + high)
            too_clean = log_snr(middle) > target
            low, high = torch.where(too_clean, middle, low), torch.where(too_clean, high, middle)
        return (0.5 * (low + high)).float().to(device)

    def data_times(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """Times 1 - t/T in [0, 1), float32 (n,), where time 1 is data."""
        return (1 - self.draw(n)[0] / self.process.T).float().to(device)

    def sigmas(
        self, shape: int | Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Noise scales sigma/alpha of the given shape, as k-diffusion calls its ``sample_density``."""
        size = [shape] if isinstance(shape, int) else list(shape)
        alpha, sigma = self.process.alpha_sigma(self.draw(math.prod(size))[0].numpy())
        if (alpha == 0).any():
            raise InputError(f"process {self.process.name!r} reaches alpha = 0, where sigma/alpha is infinite")
        return torch.from_numpy(sigma / alpha).to(device=device, dtype=dtype).reshape(size)

    def scheduler_u(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """u in (0, 1), float32 (n,), so that ``scheduler.timesteps[(u * T).long()]`` is our t.

        It takes the place of diffusers' ``compute_density_for_timestep_sampling``. Half a cell keeps the product away
        from whole numbers, where rounding would decide.
        """
        return ((self.process.T - self.draw(n)[0] + 0.5) / self.process.T).float().to(device)

    def update(self, loss: Tensor | float, t: Tensor | None = None) -> None:
        """Report the loss of the micro-step just drawn: the mean over all ranks, or one loss per sample of it."""
        self.sampler.update(loss, t)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, JSON only; accelerate's ``register_for_checkpointing`` takes the object itself."""
        return {"step": self.step, "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            InputError: if the state belongs to another curriculum or seed.
        """
        self.sampler.load_state_dict(state["sampler"])
        self.step = state["step"]
