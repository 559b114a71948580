"""What a network predicts, and how one prediction is turned into another: the only place that does so.

With x_t = alpha x0 + sigma eps, every prediction is one linear combination of x0 and eps,

    output = a x0 + b eps,

so that the estimate of (x0, eps) follows from two equations: the output and x_t itself. Siblings below state (a, b):

    eps       ( 0, 1 )                                  Ho et al. 2020
    x0        ( 1, 0 )
    v         (-sigma, alpha)                            Salimans & Ho 2022, arXiv 2202.00512
    score     ( 0, -1/sigma )                            grad log p_t(x_t | x0)
    velocity  (-1, 1 )                                   dx_t/du of flow matching, Lipman et al. 2023
    edm       (sigma/(sd r), -sd alpha/r)                F of Karras et al. 2022, eq. 7; r^2 = sigma^2 + sd^2 alpha^2,
                                                        sd = 0.5 or as in edm:sigma_data=1

EDM's F = (x0 - c_skip y)/c_out is written in y = x_t/alpha, s = sigma/alpha, with c_skip = sd^2/(s^2 + sd^2) and
c_out = s sd/sqrt(s^2 + sd^2); multiplied out it is the form above, which stays finite where alpha = 0; v has sd = 1.

The determinant a sigma - b alpha says where a prediction cannot be inverted: x0 from eps where alpha = 0, eps from x0
where sigma = 0. The conversion then returns infinities or NaN rather than hide it.
"""

__all__ = [
    "PREDICTIONS",
    "Coefficients",
    "coefficients",
    "eps_loss_factor",
    "from_x0_eps",
    "sigma_data_of",
    "to_eps",
    "to_x0",
]

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from difficulty.errors import InputError
from difficulty.specs import build, parse_spec

Coefficients = tuple[Tensor, Tensor]
Formula = Callable[[Tensor, Tensor], Coefficients]

# Standard deviation of the data that EDM's preconditioning assumes (Karras et al. 2022, table 1).
EDM_SIGMA_DATA = 0.5


def _eps(alpha: Tensor, sigma: Tensor) -> Coefficients:
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def _x0(alpha: Tensor, sigma: Tensor) -> Coefficients:
    return torch.ones_like(alpha), torch.zeros_like(alpha)


def _v(alpha: Tensor, sigma: Tensor) -> Coefficients:
    return -sigma, alpha


def _score(alpha: Tensor, sigma: Tensor) -> Coefficients:
    return torch.zeros_like(alpha), -1 / sigma


def _velocity(alpha: Tensor, sigma: Tensor) -> Coefficients:
    return -torch.ones_like(alpha), torch.ones_like(alpha)


def _edm(sigma_data: float = EDM_SIGMA_DATA) -> Formula:
    if not sigma_data > 0:
        raise InputError(f"prediction 'edm': sigma_data must be positive, got {sigma_data}")

    def formula(alpha: Tensor, sigma: Tensor) -> Coefficients:
        r = (sigma.square() + (sigma_data * alpha).square()).sqrt()
        return sigma / (sigma_data * r), -sigma_data * alpha / r

    return formula


PREDICTIONS: Mapping[str, Callable[..., Formula]] = {
    "eps": lambda: _eps,
    "x0": lambda: _x0,
    "v": lambda: _v,
    "score": lambda: _score,
    "velocity": lambda: _velocity,
    "edm": _edm,
}


@functools.cache
def _formula(prediction: str) -> Formula:
    return build("prediction", prediction, PREDICTIONS)


def sigma_data_of(prediction: str) -> float:
    """The standard deviation of the data that EDM's preconditioning assumes under this prediction."""
    return float(parse_spec(prediction)[1].get("sigma_data", EDM_SIGMA_DATA))


def coefficients(prediction: str, alpha: Tensor, sigma: Tensor) -> Coefficients:
    """(a, b) of ``output = a x0 + b eps``, each of the shape of alpha and sigma.

    Args:
        prediction: a name in ``PREDICTIONS``, with options as in ``edm:sigma_data=1``.
        alpha, sigma: signal and noise scales.

    Raises:
        InputError: if the prediction or an option is unknown.
    """
    return _formula(prediction)(alpha, sigma)


def from_x0_eps(prediction: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The training target of a prediction.

    Args:
        prediction: a name in ``PREDICTIONS``.
        x0, eps: clean data and noise, shape (B, *).
        alpha, sigma: scales that broadcast against x0, for instance (B, 1, 1, 1).
    """
    a, b = coefficients(prediction, alpha, sigma)
    return a * x0 + b * eps


def to_x0(prediction: str, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The estimate of x0 that an output implies; shapes as in ``from_x0_eps``."""
    a, b = coefficients(prediction, alpha, sigma)
    # Where b = 0 the output is x0 up to a factor, and stays so where the determinant vanishes; likewise below.
    return torch.where(b == 0, output / a, (sigma * output - b * x_t) / (a * sigma - b * alpha))


def to_eps(prediction: str, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The estimate of eps that an output implies; shapes as in ``from_x0_eps``."""
    a, b = coefficients(prediction, alpha, sigma)
    return torch.where(a == 0, output / b, (a * x_t - alpha * output) / (a * sigma - b * alpha))


def eps_loss_factor(prediction: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Squared error of eps per squared error of the output: alpha^2 / (a sigma - b alpha)^2.

    Held-out losses are stated as errors of eps whatever the network predicts, so that they compare.
    """
    a, b = coefficients(prediction, alpha, sigma)
    return torch.where(a == 0, 1 / b, alpha / (a * sigma - b * alpha)).square()
