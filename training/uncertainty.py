"""A learned weight per noise level: the log-variance u(lambda) of the loss, trained beside the network.

    objective = w L / exp(u(lambda)) + u(lambda)

with L the squared error per dimension and w its weight (`weights.py`); Karras et al. 2024, arXiv 2312.02696, eq. 14 and
appendix B.3, after Kendall & Gal 2018. At its minimum exp(u) = E[w L | lambda], so that every noise level contributes
alike to the gradient, whatever w is. u is linear in Fourier features of log-SNR and starts at 0, where the objective is
w L; it is no part of the trained network.
"""

__all__ = ["LogVariance", "split_weight"]

import math

import torch
from torch import Tensor, nn

from difficulty.networks import LOG_SNR_LIMIT

UNCERTAINTY = "uncertainty"
FREQUENCIES = 16


def split_weight(spec: str) -> tuple[str, bool]:
    """The weight w of ``w+uncertainty``, constant for ``uncertainty`` alone, and whether u is learned."""
    if spec == UNCERTAINTY:
        return "constant", True
    plain = spec.removesuffix(f"+{UNCERTAINTY}")
    return plain, plain != spec


class LogVariance(nn.Module):
    """u(lambda): log-SNR (B,) -> (B,), nats."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Periods from 160, a quarter of a turn over the whole range, down to 4 units of log-SNR.
        periods = torch.logspace(math.log10(160.0), math.log10(4.0), FREQUENCIES)
        self.register_buffer("frequencies", 2 * math.pi / periods, persistent=False)
        self.linear = nn.Linear(2 * FREQUENCIES, 1)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)

    def forward(self, log_snr: Tensor) -> Tensor:
        angle = log_snr.clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT)[:, None] * self.frequencies
        return self.linear(torch.cat([angle.sin(), angle.cos()], -1))[:, 0]

    def objective(self, losses: Tensor, log_snr: Tensor) -> Tensor:
        """w L / exp(u) + u of weighted losses w L (B,) per dimension, shape (B,)."""
        u = self(log_snr)
        return losses * torch.exp(-u) + u
