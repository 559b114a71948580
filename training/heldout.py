"""Held-out loss per task on fixed draws of (x0, eps, t): the same for every arm and step, and for runs of equal tasks.

The error of eps is what all predictions are compared by. Per task, and as an integral over log-SNR lambda,

    nats_k = 1/2 E |eps - eps_hat|^2             mean over the task's log-SNR; nats per unit log-SNR
    nats   = 1/2 int E |eps - eps_hat|^2 dlambda = sum_k nats_k * width_k

squared errors summed over the D dimensions: the variational bound up to a constant of the data (Kingma & Gao 2023,
arXiv 2303.00848). It is taken at some t of each task, and for runs of other tasks, as with a curriculum of other
intervals, at other t: their ``nats`` differ by some percent for that alone. ``loss`` is the error of the network's own
output per dimension, t uniform: what plain training minimises.
"""

__all__ = ["HeldOut", "HeldOutLoss"]

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.datasets import Dataset
from difficulty.denoiser import Denoiser
from difficulty.heldout import standard_error
from difficulty.prediction import eps_loss_factor
from difficulty.process import Array, Process
from difficulty.randomness import normal, stream
from training.conditional import Condition, ConditionalNetwork, Conditioning, given
from training.density import Interval, log_snr_widths
from training.streams import HELDOUT

HELDOUT_SEED = 0  # not the run's seed: all runs are judged on the same draws
CHUNK = 4096  # draws per forward pass


@dataclass(frozen=True, eq=False)
class HeldOutLoss:
    """What ``HeldOut`` measured; per task, shape (K,), and in all."""

    nats_per_task: Array  # nats per unit log-SNR
    loss_per_task: Array  # squared error of the output per dimension
    nats: float
    loss: float
    per_draw: Array  # squared error of eps of every draw, summed over dimensions, (n,)


class HeldOut:
    """Fixed held-out draws, equally many per task, t spread evenly over the task.

    Args:
        data: its ``heldout`` samples are drawn with replacement.
        process: the forward process.
        tasks: intervals that cover 1..T.
        per_task: draws per task.
        conditioning: what a conditional network is told of the samples.
    """

    def __init__(
        self,
        data: Dataset,
        process: Process,
        tasks: Sequence[Interval],
        per_task: int = 128,
        conditioning: Conditioning | None = None,
    ) -> None:
        count = per_task * len(tasks)
        spread = (np.arange(per_task) + 0.5) / per_task
        lengths = [task.t_last - task.t_first + 1 for task in tasks]
        t = np.concatenate([task.t_first + np.floor(spread * n) for task, n in zip(tasks, lengths, strict=True)])
        rows = stream(HELDOUT_SEED, HELDOUT, 0, 0).integers(0, len(data.heldout), count)
        self.rows, self.x0 = rows, data.heldout[torch.from_numpy(rows)]
        self.eps = normal(tuple(self.x0.shape), HELDOUT_SEED, HELDOUT, 1, 0)
        self.t = torch.from_numpy(t.astype(np.int64))
        self.condition = conditioning.heldout(torch.from_numpy(rows)) if conditioning else None
        self.dim, self.tasks, self.per_task = data.dim, list(tasks), per_task
        self.pure_noise = (process.alpha[t.astype(np.int64)] == 0).reshape(len(tasks), -1)
        self.share = np.array(lengths) / sum(lengths)
        self.widths = np.concatenate([[0.0], log_snr_widths(process)])[t.astype(np.int64)].reshape(len(tasks), -1)
        # Each draw stands for length/per_task timesteps.
        self.log_snr_of_draw = self.widths * (np.array(lengths) / per_task)[:, None]

    def select(self, mask: npt.NDArray[np.bool_], most: int) -> tuple[Tensor, Tensor, Tensor, Condition | None]:
        """The draws (x0, eps, t, condition) whose entry of ``mask`` is true; of more than ``most`` so many, evenly."""
        inside = np.flatnonzero(mask)
        count = min(most, len(inside))
        # From the middle of every stride: t grows within a task, and the first would be its cleanest.
        chosen = torch.from_numpy(inside[(2 * np.arange(count) + 1) * len(inside) // max(2 * count, 1)])
        condition = None if self.condition is None else self.condition[chosen]
        return self.x0[chosen], self.eps[chosen], self.t[chosen], condition

    def readable(self, values: Array) -> Array:
        """Values of the draws (K, per task), 0 where alpha is 0 and eps cannot be read from what a network returns."""
        return np.where(self.pure_noise & ~np.isfinite(values), 0.0, values)

    @torch.no_grad()
    def evaluate(self, denoiser: Denoiser) -> HeldOutLoss:
        """Losses of a denoiser on the fixed draws."""
        device = denoiser.alpha.device
        told = None if self.condition is None else self.condition.to(device)
        own = eval_losses(denoiser, self.x0.to(device), self.eps.to(device), self.t.to(device), told).cpu().double()
        alpha, sigma = denoiser.alpha.cpu()[self.t].double(), denoiser.sigma.cpu()[self.t].double()
        factor = eps_loss_factor(denoiser.prediction, alpha, sigma)
        per_draw = (own * factor).numpy()
        shaped = per_draw.reshape(len(self.tasks), -1)
        loss = own.numpy().reshape(len(self.tasks), -1).mean(1) / self.dim
        shaped = self.readable(shaped)
        integral = 0.5 * (shaped * self.log_snr_of_draw).sum(1)
        return HeldOutLoss(
            nats_per_task=integral / self.log_snr_of_draw.sum(1),
            loss_per_task=loss,
            nats=float(integral.sum()),
            loss=float((loss * self.share).sum()),
            per_draw=per_draw,
        )

    def nats_error(self, measured: HeldOutLoss) -> float:
        """Standard error of ``measured.nats`` over the draws of (x0, eps), tasks taken apart."""
        terms = 0.5 * measured.per_draw.reshape(len(self.tasks), -1) * self.log_snr_of_draw
        terms = self.readable(terms)
        apart = (terms - terms.mean(1, keepdims=True)).ravel()
        return float(len(apart) * standard_error(apart, self.rows))


@torch.no_grad()
def eval_losses(
    denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition | None = None
) -> Tensor:
    """``denoiser.losses`` in chunks, without gradients; a conditional denoiser is told the condition."""
    told = condition if isinstance(denoiser.network, ConditionalNetwork) else None
    losses = []
    for start in range(0, len(x0), CHUNK):
        part = slice(start, start + CHUNK)
        judged = denoiser if told is None else given(denoiser, told[part])
        losses.append(judged.losses(x0[part], eps[part], t[part]))
    return torch.cat(losses)
