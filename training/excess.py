"""What a network has left to learn, where the law of the data is known: nats above the Bayes loss.

    excess = 1/2 int E |eps_hat(x_t) - E[eps | x_t]|^2 dlambda

on the fixed draws of `heldout.py`. It differs from their ``nats`` by the part that no network can remove, which on some
data is nearly all of it. Measured as a distance to the posterior mean, not as a difference of two losses, it is never
negative and the noise of eps is not in it.
"""

__all__ = ["Excess"]

import torch

from difficulty.datasets import Dataset
from difficulty.denoiser import Denoiser
from difficulty.heldout import posterior_eps_at
from difficulty.process import Process
from training.heldout import CHUNK, HeldOut


class Excess:
    """Nats above the Bayes loss on the draws of ``heldout``.

    Args:
        heldout: the fixed draws.
        data: must have an exact law.
        process: the forward process.
    """

    def __init__(self, heldout: HeldOut, data: Dataset, process: Process) -> None:
        assert data.law is not None
        self.heldout = heldout
        self.posterior = posterior_eps_at(data.law, process, heldout.x0, heldout.eps, heldout.t).float()

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser) -> float:
        """The excess of a denoiser, nats."""
        held, device = self.heldout, denoiser.alpha.device
        squares = []
        for start in range(0, len(held.t), CHUNK):
            part = slice(start, start + CHUNK)
            x0, eps, t = (x[part].to(device) for x in (held.x0, held.eps, held.t))
            alpha, sigma = denoiser.scales(t, x0)
            estimate = denoiser.eps(alpha * x0 + sigma * eps, t).cpu()
            squares.append((estimate - self.posterior[part]).double().square().flatten(1).sum(1))
        return float(held.integral(torch.cat(squares).numpy()).sum())
