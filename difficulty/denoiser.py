"""A denoiser: a network, the process it denoises and what it predicts, joined in one module.

The network sees its input at unit scale, x_t / sqrt(alpha^2 sd^2 + sigma^2) with sd the standard deviation of the data,
and the log-SNR, whatever the process. With ``baseline`` its output is the difference to the best estimate that is a
multiple of the input: for a prediction a x0 + b eps (`prediction.py`) and m = sd^2,

    prediction = network + (a alpha m + b sigma) / (alpha^2 m + sigma^2) x_t.

A hidden layer narrower than the data could not pass the noise through, and a task would look hard for a reason that is
not the task's; the baseline passes it. EDM's skip connection is this baseline (Karras et al. 2022, eq. 7). Without it
the output is the prediction itself. A network with a ``convention`` of its own (`diffusers_network.py`) says how its
input is scaled and what it is told in place of the log-SNR, and has no baseline. Losses are squared errors summed over
the D dimensions.
"""

__all__ = ["Denoiser"]

import torch
from torch import Tensor, nn

from difficulty.errors import InputError
from difficulty.prediction import coefficients, eps_loss_factor, from_x0_eps, sigma_data_of, to_eps, to_x0
from difficulty.process import Process

LARGEST_STD = 1e15  # squares of which, summed over samples and dimensions, stay finite in float32


class Denoiser(nn.Module):
    """A network bound to a process and a prediction.

    Args:
        network: ``forward(x, log_snr)`` with x of shape (B, *) and log_snr (B,), returning the shape of x; with a
            method ``convention(process, sigma_data)`` it is given what that says instead.
        process: gives alpha, sigma at t = 1..T.
        prediction: a name in ``PREDICTIONS``, with options as in ``edm:sigma_data=1``.
        data_std: root mean square of the data about 0, for the input scale and the baseline; positive.
        baseline: whether the network predicts the difference to the best multiple of its input.

    Raises:
        InputError: if the prediction is unknown, or data_std is not positive or too large for float32.
    """

    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor
    input_scale: Tensor
    told: Tensor

    def __init__(
        self, network: nn.Module, process: Process, prediction: str, data_std: float, *, baseline: bool = True
    ) -> None:
        super().__init__()
        coefficients(prediction, torch.ones(1), torch.ones(1))  # refuses an unknown one
        if not data_std > 0:
            raise InputError(f"data_std must be positive, got {data_std}; data that are all zero cannot be learned")
        if not data_std < LARGEST_STD:
            raise InputError(
                f"data_std must be below {LARGEST_STD:g}, got {data_std:g}: squares of the data overflow float32; "
                "divide the data by their standard deviation"
            )
        self.network, self.process, self.prediction = network, process, prediction
        self.foreign = hasattr(network, "convention")
        self.data_std, self.baseline = data_std, baseline and not self.foreign
        # Tables indexed by t; the entry of t = 0 is never read. Built in float64 and stored in float32.
        log_snr = process.log_snr([*range(process.T + 1)])
        for name, table in (("alpha", process.alpha), ("sigma", process.sigma), ("log_snr", log_snr)):
            self.register_buffer(name, torch.as_tensor(table, dtype=torch.float32), persistent=False)
        if self.foreign:
            conventions = network.convention(process, sigma_data_of(prediction))  # type: ignore[operator]
            for name, table in zip(("input_scale", "told"), conventions, strict=True):
                self.register_buffer(name, torch.as_tensor(table, dtype=torch.float32), persistent=False)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at integer t (B,) or (E, B), with trailing ones to broadcast against ``like``."""
        shape = t.shape + (1,) * (like.ndim - t.ndim)
        return self.alpha[t].reshape(shape), self.sigma[t].reshape(shape)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction at noisy samples.

        Args:
            x_t: shape (B, *).
            t: integer timesteps 1..T, shape (B,).
        """
        if self.foreign:
            return self.network(self.input_scale[t].reshape(self.scales(t, x_t)[0].shape) * x_t, self.told[t])
        alpha, sigma = self.scales(t, x_t)
        variance = (alpha * self.data_std).square() + sigma.square()
        output = self.network(x_t * variance.rsqrt(), self.log_snr[t])
        if not self.baseline:
            return output
        a, b = coefficients(self.prediction, alpha, sigma)
        return output + (a * alpha * self.data_std**2 + b * sigma) / variance * x_t

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of x0, shape of x_t."""
        return to_x0(self.prediction, self(x_t, t), x_t, *self.scales(t, x_t))

    def eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of eps, shape of x_t."""
        return to_eps(self.prediction, self(x_t, t), x_t, *self.scales(t, x_t))

    def losses(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Squared error of the prediction at given draws, summed over dimensions, shape (B,)."""
        alpha, sigma = self.scales(t, x0)
        target = from_x0_eps(self.prediction, x0, eps, alpha, sigma)
        return (self(alpha * x0 + sigma * eps, t) - target).square().flatten(1).sum(1)

    def eps_losses(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Squared error of eps that the prediction implies, summed over dimensions, shape (B,)."""
        alpha, sigma = self.scales(t, x0)
        factor = eps_loss_factor(self.prediction, alpha, sigma)
        return self.losses(x0, eps, t) * factor.flatten()
