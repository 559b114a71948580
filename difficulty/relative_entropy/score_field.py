"""A denoiser as a source of time scores: a Gaussian baseline plus a correction that counts as far as data confirm it.

At y = x0 + s eps, tau = log s, a denoiser's estimate eps_hat enters as w + kappa (eps_hat - w), with w the best linear
denoiser of the data (`wiener.py`). At high noise what is to be learned falls like s^-3 and the error of a network does
not, so that its relative entropy would be wrong by orders of magnitude. kappa is what a regression of eps on
c = eps_hat - w gives on rows that the denoiser has not seen; with E[eps.c] = s E[div c] (Stein)

    kappa = (E[s div c - w.c] - standard error)/E[c^2],    clipped to [0, 1].

The divergence of c is exact up to 16 dimensions and otherwise Hutchinson's estimate with Rademacher probes. The square
of one probe is biased, by factors of 10^6 at high noise; so E[f^2] is the U-statistic over at least two.
"""

__all__ = ["EXACT_DIVERGENCE", "Evaluated", "ModelScore", "NetworkScore", "ScoreSource", "evaluate"]

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from difficulty.errors import InputError
from difficulty.models import TrainedModel
from difficulty.process import Process
from difficulty.randomness import stream
from difficulty.wiener import Wiener

Array = npt.NDArray[np.float64]

EXACT_DIVERGENCE = 16
PROBES = 2
# Numbers of input that are evaluated at a time.
CHUNK = 2**20
PROBE_STREAM = 43


class ScoreSource(Protocol):
    """A denoiser in the coordinates y = x_t/alpha.

    ``levels``: the log noise scales that it may be asked at, rising; None for any.
    """

    levels: Array | None

    def eps(self, y: Tensor, tau: float) -> Tensor:
        """Estimate of eps at y (n, D) of one noise level, (n, D), differentiable in y."""
        ...


class NetworkScore:
    """A network that corrects the Wiener denoiser in whitened coordinates, with a gain that decays like s^-3.

    Args:
        network: ``forward(x, log_snr)``, x (n, r) at unit variance.
        wiener: of the rows that it is trained on.
    """

    levels: Array | None = None

    def __init__(self, network: nn.Module, wiener: Wiener) -> None:
        self.network, self.wiener = network, wiener

    def eps(self, y: Tensor, tau: float) -> Tensor:
        log_scale = torch.full((len(y),), tau, dtype=torch.float64)
        return self.wiener.eps(y, tau) + self.correction(y, log_scale).double() @ self.wiener.axes.T

    def correction(self, y: Tensor, tau: Tensor) -> Tensor:
        """What is added to w along its axes, float32 (n, r), at tau (n,)."""
        lam, variance = self.wiener.eigenvalues, (2 * tau).exp()
        white = ((y - self.wiener.mean) @ self.wiener.axes) / (lam + variance[:, None]).sqrt()
        gain = (lam.max() / (lam.max() + variance)).pow(1.5)
        return gain.float()[:, None] * self.network(white.float(), (-2 * tau).float())


class ModelScore:
    """A trained model of the user's, asked at whole timesteps of its process.

    Args:
        model: estimates eps at (x_t, t).
        process: its forward process.
        shape: of one sample.
    """

    def __init__(self, model: TrainedModel, process: Process, shape: tuple[int, ...]) -> None:
        self.model, self.process, self.shape = model, process, shape
        tau = process.tau(np.arange(1, process.T + 1))
        self.levels: Array | None = tau[np.isfinite(tau)]

    def eps(self, y: Tensor, tau: float) -> Tensor:
        assert self.levels is not None
        t = 1 + int(np.abs(self.levels - tau).argmin())
        x_t = (float(self.process.alpha[t]) * y).float().reshape(-1, *self.shape)
        return self.model.eps(x_t, torch.full((len(y),), t)).double().flatten(1)


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A source at n points of one noise level.

    Args:
        y: the points, (n, D).
        baseline: w, (n, D), and its s div as a number.
        correction: c, (n, D).
        divergences: s div c, (m, n): one row if exact, one per probe otherwise.
    """

    y: Tensor
    tau: float
    baseline: Tensor
    baseline_divergence: float
    correction: Tensor
    divergences: Tensor

    def gain(self, rows: Tensor) -> float:
        """kappa from some of the points; ``rows`` holds their row, so that draws of a row are not taken for many."""
        explained = self.divergences.mean(0) - (self.baseline * self.correction).sum(1)
        energy = float(self.correction.square().sum(1).mean())
        if energy == 0:
            return 0.0
        _, index = rows.unique(return_inverse=True)
        size = index.bincount().double()
        means = torch.zeros_like(size).index_add_(0, index, explained) / size
        error = float(means.std()) / len(means) ** 0.5 if len(means) > 1 else math.inf
        return float(np.clip((float(explained.mean()) - error) / energy, 0.0, 1.0))

    def take(self, points: Tensor) -> "Evaluated":
        """Some of the points."""
        return Evaluated(
            self.y[points], self.tau, self.baseline[points], self.baseline_divergence, self.correction[points],
            self.divergences[:, points],
        )  # fmt: skip

    def time_scores(self, gain: float) -> tuple[Tensor, Tensor]:
        """F (m, n), one per probe, and q (n,)."""
        eh = self.baseline + gain * self.correction
        flow = eh.square().sum(1) - self.baseline_divergence - gain * self.divergences
        return flow, eh.shape[1] - (self.y * eh).sum(1) * math.exp(-self.tau)


def evaluate(
    source: ScoreSource, wiener: Wiener, y: Tensor, tau: float, seed: int, exact: int = EXACT_DIVERGENCE
) -> Evaluated:
    """A source at points y (n, D) of log noise scale tau.

    Args:
        source, wiener: the denoiser and its baseline.
        y, tau: where.
        seed: of the probes.
        exact: dimensions up to which the divergence is exact.

    Raises:
        InputError: if the source cannot be differentiated.
    """
    s, dim = math.exp(tau), y.shape[1]
    corrections, divergences = [], []
    size = max(1, CHUNK // dim)
    for number, part in enumerate(y.split(size)):
        part = part.detach().requires_grad_(True)
        with torch.enable_grad():
            estimate = source.eps(part, tau)
            if not estimate.requires_grad:
                raise InputError("the model's estimate of eps cannot be differentiated in x_t, as a time score needs")
            correction = estimate - wiener.eps(part, tau)
            if dim <= exact:
                total = torch.zeros(len(part), dtype=torch.float64)
                for k in range(dim):
                    (gradient,) = torch.autograd.grad(correction[:, k].sum(), part, retain_graph=True)
                    total += gradient[:, k]
                found = [total]
            else:
                found = []
                for probe in range(PROBES):
                    signs = stream(PROBE_STREAM, seed, number, probe).integers(0, 2, part.shape) * 2.0 - 1.0
                    v = torch.from_numpy(signs)
                    (gradient,) = torch.autograd.grad((correction * v).sum(), part, retain_graph=True)
                    found.append((gradient * v).sum(1))
        corrections.append(correction.detach())
        divergences.append(s * torch.stack(found))
    return Evaluated(
        y, tau, wiener.eps(y, tau), wiener.divergence(tau), torch.cat(corrections), torch.cat(divergences, 1)
    )
