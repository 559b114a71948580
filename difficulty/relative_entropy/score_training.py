"""Training of the network that the score estimator uses where the user gives none.

One small network learns, on all noise levels at once, what the best linear denoiser misses (`score_field`):

    minimise E|eps - w(y) - c(y)|^2,    tau = log s uniform over the range of the pairs.

The learning rate falls to zero twice: after a third of the iterations, where a copy is kept, and at the end. What
changed between the two says how far the relative entropy still is from that of a network trained for longer.
"""

__all__ = ["train_score"]

import copy
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from difficulty.networks import build_network
from difficulty.randomness import stream
from difficulty.relative_entropy.score_field import NetworkScore
from difficulty.wiener import Wiener

Array = npt.NDArray[np.float64]

ITERATIONS = 4500
BATCH = 256
LEARNING_RATE = 2e-3
TRAIN_STREAM = 47


def train_score(
    rows: Array, counts: Array, wiener: Wiener, tau: tuple[float, float], seed: int, progress: Callable[[], None]
) -> tuple[NetworkScore, NetworkScore]:
    """The network after a third of the iterations and at the end.

    Args:
        rows, counts: to train on, (n, r) and (n,).
        wiener: of the same rows.
        tau: range of the log noise scale.
        seed: of weights and draws.
        progress: called after every 100 iterations.
    """
    rank = wiener.axes.shape[1]
    width = int(np.clip(64 * math.ceil(rank / 32), 128, 512))
    source = NetworkScore(build_network(f"mlp:width={width},depth=3", (rank,), seed), wiener)
    optimizer = torch.optim.AdamW(source.network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    share = np.cumsum(counts / counts.sum())
    clean = torch.from_numpy(rows)
    third = ITERATIONS // 3
    early = source
    for step in range(ITERATIONS):
        first, length = (0, third) if step < third else (third, ITERATIONS - third)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - first) / length))
        draw = stream(TRAIN_STREAM, seed, step)
        chosen = np.minimum(np.searchsorted(share, draw.random(BATCH)), len(rows) - 1)
        # Stratified over the range: every batch sees all noise levels.
        u = torch.from_numpy((draw.permutation(BATCH) + draw.random(BATCH)) / BATCH)
        scale = tau[0] + (tau[1] - tau[0]) * u
        eps = torch.from_numpy(draw.standard_normal((BATCH, rows.shape[1])))
        s = scale.exp()[:, None]
        y = clean[chosen] + s * eps
        # Row by row, since every row has a noise level of its own; the part of eps outside the axes is exact in w.
        z = (y - wiener.mean) @ wiener.axes
        residual = eps @ wiener.axes - z * s / (wiener.eigenvalues + s**2)
        loss = (residual.float() - source.correction(y, scale)).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 == third:
            early = NetworkScore(copy.deepcopy(source.network), wiener)
        if (step + 1) % 100 == 0:
            progress()
    for kept in (early, source):
        kept.network.requires_grad_(False)
    return early, source
