"""Held-out loss per task on fixed draws of (x0, eps, t): the same for every arm, step, curriculum and set of tasks.

The error of eps is what all predictions are compared by. Per task, and as an integral over log-SNR lambda,

    nats_k = 1/2 E |eps - eps_hat|^2             mean over the task's log-SNR; nats per unit log-SNR
    nats   = 1/2 int E |eps - eps_hat|^2 dlambda = sum_k nats_k * width_k

squared errors summed over the D dimensions: the variational bound up to a constant of the data (Kingma & Gao 2023,
arXiv 2303.00848). The integral is taken by the trapezoid rule over all timesteps whose alpha is not 0. ``loss`` is
the error of the network's own output per dimension, t uniform: what plain training minimises.
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
from training.density import Interval, trapezoid_widths
from training.streams import HELDOUT

HELDOUT_SEED = 0  # not the run's seed: all runs are judged on the same draws
CHUNK = 4096  # draws per forward pass
DRAWS = 1536  # beside one of every timestep
STRATUM = 32  # about so many draws at neighbouring t are as good as of one t for the standard error


@dataclass(frozen=True, eq=False)
class HeldOutLoss:
    """What ``HeldOut`` measured; per task, shape (K,), and in all."""

    nats_per_task: Array  # nats per unit log-SNR
    loss_per_task: Array  # squared error of the output per dimension
    nats: float
    loss: float
    per_draw: Array  # squared error of eps of every draw, summed over dimensions, (n,)


class HeldOut:
    """Fixed held-out draws, at least one of every timestep, and more where a timestep is wide in log-SNR.

    Args:
        data: its ``heldout`` samples are drawn with replacement.
        process: the forward process.
        tasks: intervals that cover 1..T; the draws do not depend on them.
        draws: beside one of every timestep, shared out by width in log-SNR.
        conditioning: what a conditional network is told of the samples.
    """

    def __init__(
        self,
        data: Dataset,
        process: Process,
        tasks: Sequence[Interval],
        draws: int = DRAWS,
        conditioning: Conditioning | None = None,
    ) -> None:
        widths = trapezoid_widths(process)
        up_to = draws * np.concatenate([[0.0], np.cumsum(widths)]) / widths.sum()
        per_t = 1 + np.diff(np.round(up_to)).astype(np.int64)
        # Of no width, but a share of ``loss`` like that of any other timestep.
        per_t[widths == 0] = max(1, draws // process.T)
        t = np.repeat(np.arange(1, process.T + 1), per_t)
        rows = stream(HELDOUT_SEED, HELDOUT, 0, 0).integers(0, len(data.heldout), len(t))
        self.rows, self.x0 = rows, data.heldout[torch.from_numpy(rows)]
        self.eps = normal(tuple(self.x0.shape), HELDOUT_SEED, HELDOUT, 1, 0)
        self.t = torch.from_numpy(t)
        self.condition = conditioning.heldout(torch.from_numpy(rows)) if conditioning else None
        self.dim, self.tasks = data.dim, list(tasks)
        self.task = np.searchsorted([task.t_last for task in tasks], t)  # of each draw
        # The width in log-SNR that each draw stands for, and its share of the timesteps; shape (n,).
        self.log_snr_of_draw = np.repeat(widths / per_t, per_t)
        self.share = np.repeat(1 / (process.T * per_t), per_t)

    def select(self, mask: npt.NDArray[np.bool_], most: int) -> tuple[Tensor, Tensor, Tensor, Condition | None]:
        """The draws (x0, eps, t, condition) whose entry of ``mask`` is true; of more than ``most`` so many, evenly."""
        inside = np.flatnonzero(mask)
        count = min(most, len(inside))
        # From the middle of every stride: t grows, and the first would be the cleanest.
        chosen = torch.from_numpy(inside[(2 * np.arange(count) + 1) * len(inside) // max(2 * count, 1)])
        condition = None if self.condition is None else self.condition[chosen]
        return self.x0[chosen], self.eps[chosen], self.t[chosen], condition

    def integral(self, errors: Array) -> Array:
        """Squared errors of eps of the draws, (n,), as nats per task, (K,): half of them over the task's log-SNR."""
        return self._per_task(0.5 * self._weighted(errors))

    def _weighted(self, errors: Array) -> Array:
        # Where alpha is 0 eps cannot be read from what a network returns, and inf * 0 would not be 0.
        width = self.log_snr_of_draw
        return np.multiply(errors, width, out=np.zeros(len(width)), where=width > 0)

    def _per_task(self, values: Array) -> Array:
        return np.asarray(np.bincount(self.task, values, len(self.tasks)), dtype=np.float64)

    @torch.no_grad()
    def evaluate(self, denoiser: Denoiser) -> HeldOutLoss:
        """Losses of a denoiser on the fixed draws; a task of pure noise alone has no width, and 0 nats."""
        device = denoiser.alpha.device
        told = None if self.condition is None else self.condition.to(device)
        own = eval_losses(denoiser, self.x0.to(device), self.eps.to(device), self.t.to(device), told).cpu().double()
        alpha, sigma = denoiser.alpha.cpu()[self.t].double(), denoiser.sigma.cpu()[self.t].double()
        per_draw = (own * eps_loss_factor(denoiser.prediction, alpha, sigma)).numpy()
        nats, widths = self.integral(per_draw), self._per_task(self.log_snr_of_draw)
        loss = own.numpy() / self.dim * self.share
        return HeldOutLoss(
            nats_per_task=np.divide(nats, widths, out=np.zeros(len(nats)), where=widths > 0),
            loss_per_task=self._per_task(loss) / self._per_task(self.share),
            nats=float(nats.sum()),
            loss=float(loss.sum()),
            per_draw=per_draw,
        )

    def nats_error(self, measured: HeldOutLoss) -> float:
        """Standard error of ``measured.nats`` over the draws of (x0, eps), t being what it is."""
        terms, width = 0.5 * self._weighted(measured.per_draw), self.log_snr_of_draw
        t = self.t.numpy()
        stratum = np.searchsorted(t, t) // STRATUM  # of whole timesteps, one or several
        sums, widths = (np.bincount(stratum, values) for values in (terms, width))
        means = np.divide(sums, widths, out=np.zeros(len(sums)), where=widths > 0)
        return float(len(terms) * standard_error(terms - means[stratum] * width, self.rows))


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
