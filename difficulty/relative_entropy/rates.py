"""The rates A, B, C and I_min of a profile (F5): from time scores, and of independent parts together.

    A = E[F^2],   B = E[F q],   C = E[q^2],   I_min = E[(F - beta q)^2] = A - B^2/C   with beta = B/C.

The means of F and q are zero, so that A, B and C of independent parts add up. With beta_p = B_p/C_p of part p

    E[(F_p - beta q_p)^2] = I_min,p + (beta_p - beta)^2 C_p,

whose sum is I_min of the whole, free of the cancellation in A - B^2/C.
"""

__all__ = ["add_rates", "beta_of", "rates_of_scores"]

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]


def beta_of(b: Array, c: Array) -> Array:
    """B/C, and 0 where there are no axes."""
    return np.divide(b, c, out=np.zeros_like(b), where=c > 0)


def rates_of_scores(flow: Tensor, dilation: Tensor, weight: Tensor | float) -> Array:
    """A, B, C, I_min, shape (m, 4), of F and q at n points of each of m levels.

    Args:
        flow, dilation: F and q, each (m, n).
        weight: of the points, summing to 1 over them; one for all, (n,) or (m, n).
    """
    a, b, c = ((part * weight).sum(1) for part in (flow.square(), flow * dilation, dilation.square()))
    beta = torch.from_numpy(beta_of(b.numpy(), c.numpy()))[:, None]
    least = ((flow - beta * dilation).square() * weight).sum(1)
    return torch.stack([a, b, c, least], 1).numpy()


def add_rates(parts: Sequence[Array]) -> Array:
    """A, B, C, I_min, shape (m, 4), of independent parts together."""
    a, b, c, least = np.moveaxis(np.stack(parts), 2, 0)
    whole = beta_of(b.sum(0), c.sum(0))
    return np.stack([a.sum(0), b.sum(0), c.sum(0), (least + c * (beta_of(b, c) - whole) ** 2).sum(0)], 1)
