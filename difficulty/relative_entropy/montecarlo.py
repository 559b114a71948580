"""Monte Carlo of the relative entropy from log-ratios (F1).

With l = log p/q at points x ~ p,

    KL(p || q) = E[l + exp(-l) - 1] = E[l].

Each term of the first mean is >= 0 and of second order in l, so its relative standard error does not depend on how
small the KL is; that of the second grows like sqrt(2/(n KL)). For large KL (> 0.5 nat, say) exp(-l) has heavy tails and
the second is better. Both are computed and the one of smaller relative error is reported.

What is known to have a mean of 0 at the same points takes the better part of the error away (control variates): the
terms minus any multiple of it have the same mean, and the least variance for their regression on it.
"""

__all__ = ["kl_from_log_ratio", "mean_beside", "nonnegative_terms", "regressed"]

import torch
from torch import Tensor

# A point that is rare among those drawn, between two distant modes say, may lie far off every regression on the others:
# no error is stated below this share of that of the terms themselves.
LEAST_SHARE = 0.05


def regressed(terms: Tensor, beside: Tensor) -> Tensor:
    """Terms (m, n) minus their regression on ``beside``, (c, m, n), whose exact means are 0."""
    n = terms.shape[1]
    values = beside.transpose(0, 1)
    scale = values.std(2, keepdim=True)
    values = torch.where(scale > 0, values / scale.clamp(min=1e-300), 0.0)
    centred = values - values.mean(2, keepdim=True)
    covariance = centred @ centred.transpose(1, 2) / n
    slopes = torch.linalg.pinv(covariance, rtol=1e-9, hermitian=True) @ (centred @ terms[..., None] / n)
    return terms - (slopes * values).sum(1)


def mean_beside(terms: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means of terms (m, n), ``regressed`` if there is something beside them, and their standard errors, each (m,)."""
    mean, error = terms.mean(1), terms.std(1) / terms.shape[1] ** 0.5
    if beside is None:
        return mean, error
    rest = regressed(terms, beside)
    return rest.mean(1), torch.maximum(rest.std(1) / terms.shape[1] ** 0.5, LEAST_SHARE * error)


def nonnegative_terms(log_ratio: Tensor) -> Tensor:
    """l + exp(-l) - 1, by its series where the three terms would cancel."""
    series = log_ratio.square() * (0.5 - log_ratio / 6 + log_ratio.square() / 24)
    # exp overflows for points that q does not reach; the plain mean is then used instead.
    direct = log_ratio + torch.expm1(-log_ratio.clamp(min=-600.0))
    return torch.where(log_ratio.abs() < 1e-4, series, direct)


def kl_from_log_ratio(
    log_ratio: Tensor, weight: Tensor | None = None, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """KL in nats and its standard error, each (m,), from log-ratios (m, n) at n points drawn from the first law.

    Args:
        log_ratio: of the first law to the second.
        weight: of points drawn from another law, their ratio of densities (n,), with mean 1.
        beside: what has an exact mean of 0 at the points, times their weight, (c, m, n).
    """
    candidates = [nonnegative_terms(log_ratio), log_ratio]
    found = [mean_beside(each if weight is None else each * weight, beside) for each in candidates]
    mean, error = (torch.stack(column) for column in zip(*found, strict=True))
    relative = torch.where(mean > 0, error / mean.abs().clamp(min=1e-300), torch.inf)
    relative = torch.where(torch.isfinite(relative), relative, torch.inf)
    # A KL of exactly zero has zero terms: the first form says so.
    best = torch.where(relative[1] < relative[0], 1, 0)
    rows = torch.arange(log_ratio.shape[0])
    return mean[best, rows], error[best, rows]
