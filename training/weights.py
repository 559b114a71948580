"""Loss weights in one convention: w(lambda), the weight on the squared error of x0 at log-SNR lambda, SNR = e^lambda.

    |x0 - x0_hat|^2 = sigma^2 / (a sigma - b alpha)^2  |target - output|^2

with (a, b) of the prediction (`difficulty/prediction.py`), so one formula per paper serves every prediction:

    eps              SNR                        L_simple of Ho et al. 2020, eq. 14: weight one on eps
    x0               1
    v                SNR + 1                    weight one on v, Salimans & Ho 2022, section 4
    truncated-snr    max(SNR, 1)                the same, section 4
    min-snr          min(SNR, gamma)            Hang et al. 2023, arXiv 2303.09556, eq. 8; gamma = 5
    soft-min-snr     SNR gamma / (SNR + gamma)  Crowson et al. 2024, arXiv 2401.11605
    p2               SNR / (k + SNR)^gamma      Choi et al. 2022, arXiv 2204.00227, eq. 8; k = 1, gamma = 1
    edm              SNR + 1/sd^2               Karras et al. 2022, table 1, lambda(sigma); sd = 0.5,
                                                or the sigma_data of the prediction

``constant`` is no function of log-SNR alone: it puts weight one on the network's own output, the plain loss. A factor
per noise level that is learned beside the network is in `uncertainty.py`.
SNR 0 and infinity are taken as limits: both scales are kept at least e^-40 of the other.
"""

__all__ = ["WEIGHTS", "loss_weights", "x0_loss_factor"]

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from difficulty.errors import InputError, choose
from difficulty.prediction import EDM_SIGMA_DATA, coefficients, sigma_data_of
from difficulty.process import Array, Process
from difficulty.specs import parse_spec

LEAST_RATIO = math.exp(-40.0)
# Beyond this a single timestep would be all there is to the loss.
LARGEST_WEIGHT = 1e12


def _eps(snr: Array) -> Array:
    return snr


def _x0(snr: Array) -> Array:
    return np.ones_like(snr)


def _v(snr: Array) -> Array:
    return snr + 1


def _truncated_snr(snr: Array) -> Array:
    return np.maximum(snr, 1.0)


def _min_snr(snr: Array, gamma: float = 5.0) -> Array:
    return np.minimum(snr, gamma)


def _soft_min_snr(snr: Array, gamma: float = 5.0) -> Array:
    return snr * (gamma / (snr + gamma))


def _p2(snr: Array, k: float = 1.0, gamma: float = 1.0) -> Array:
    return snr / (k + snr) ** gamma


def _edm(snr: Array, sd: float = EDM_SIGMA_DATA) -> Array:
    return snr + 1 / sd**2


WEIGHTS: Mapping[str, Callable[..., Array]] = {
    "eps": _eps,
    "x0": _x0,
    "v": _v,
    "truncated-snr": _truncated_snr,
    "min-snr": _min_snr,
    "soft-min-snr": _soft_min_snr,
    "p2": _p2,
    "edm": _edm,
}


def x0_loss_factor(prediction: str, alpha: Array, sigma: Array) -> Array:
    """Squared error of x0 per squared error of the output."""
    a, b = (c.numpy() for c in coefficients(prediction, torch.as_tensor(alpha), torch.as_tensor(sigma)))
    return (sigma / (a * sigma - b * alpha)) ** 2


def loss_weights(spec: str, process: Process, prediction: str) -> Array:
    """Factor on the squared error of the network's output at each t, float64 (T+1,), entry 0 (clean data) being 0.

    Args:
        spec: ``constant``, or a name in ``WEIGHTS`` with options as in ``min-snr:gamma=5``.
        process: gives alpha and sigma.
        prediction: what the network outputs, a name in ``difficulty.prediction.PREDICTIONS``.

    Raises:
        InputError: if a name or option is unknown, an option is not positive, or the weight is unbounded for this
            process and prediction.
    """
    name, options = parse_spec(spec)
    if name == "constant" and not options:
        return np.concatenate([[0.0], np.ones(process.T)])
    formula: Callable[..., Array] = choose("loss weight", name, {"constant": _x0, **WEIGHTS})
    for option, value in options.items():
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise InputError(f"option {option!r} of loss weight {name!r} must be a positive number, got {value!r}")
    alpha = np.maximum(process.alpha[1:], process.sigma[1:] * LEAST_RATIO)
    sigma = np.maximum(process.sigma[1:], process.alpha[1:] * LEAST_RATIO)
    factor = x0_loss_factor(prediction, alpha, sigma)
    if formula is _edm:  # one on the output only with the standard deviation that the output is scaled by
        options = {"sd": sigma_data_of(prediction), **options}
    try:
        weight = formula((alpha / sigma) ** 2, **options) * factor
    except TypeError:
        import inspect

        allowed = ", ".join(list(inspect.signature(formula).parameters)[1:]) or "none"
        raise InputError(f"loss weight {name!r} cannot take {options}; its options are: {allowed}") from None
    if not (np.isfinite(weight).all() and (weight >= 0).all() and weight.max() < LARGEST_WEIGHT):
        worst = int(np.argmax(np.where(np.isfinite(weight), weight, np.inf))) + 1
        raise InputError(
            f"loss weight {name!r} is unbounded at t = {worst} of process {process.name!r} for prediction "
            f"{prediction!r}; choose another weight or prediction"
        )
    return np.concatenate([[0.0], weight])
