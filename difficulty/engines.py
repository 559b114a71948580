"""Engines: how many denoisers of one architecture are trained side by side.

Two siblings give the same numbers to float tolerance. ``vmap`` stacks the parameters of all experts along a leading
axis and runs them as one batched program; ``loop`` runs one after the other, which is faster for convolutions and
attention on a CPU, where vmap falls back to slow kernels. One fused AdamW serves all experts in both.
"""

__all__ = ["ENGINES", "Bank", "choose_engine"]

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from difficulty.denoiser import Denoiser


class Bank(ABC):
    """E denoisers of one architecture with parameters of their own, trained by one optimizer."""

    def __init__(self, denoisers: Sequence[Denoiser]) -> None:
        self.template = denoisers[0]
        self.parameters = self._own(denoisers)

    @abstractmethod
    def _own(self, denoisers: Sequence[Denoiser]) -> dict[str, Tensor]:
        """The leaf tensors to optimise, by name."""

    @abstractmethod
    def weights(self, index: int) -> dict[str, Tensor]:
        """A copy of the parameters of one denoiser, by their names in it."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Outputs (E, B, *) at x_t (E, B, *) and integer t (E, B)."""

    @abstractmethod
    def backward(self, x_t: Tensor, t: Tensor, target: Tensor) -> None:
        """Add the gradient of every expert's mean squared error to its parameters."""


class StackedBank(Bank):
    """Parameters stacked along a leading expert axis; one vectorised program runs all experts."""

    def _own(self, denoisers: Sequence[Denoiser]) -> dict[str, Tensor]:
        stacked, _ = stack_module_state(list(denoisers))
        return {name: value.detach().requires_grad_() for name, value in stacked.items()}

    def weights(self, index: int) -> dict[str, Tensor]:
        return {name: value[index].detach().clone() for name, value in self.parameters.items()}

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        def one(parameters: dict[str, Tensor], x: Tensor, when: Tensor) -> Tensor:
            return functional_call(self.template, parameters, (x, when))

        return vmap(one)(self.parameters, x_t, t)

    def backward(self, x_t: Tensor, t: Tensor, target: Tensor) -> None:
        # Mean within an expert, sum over experts: each expert's gradient is that of training it alone.
        (self.predict(x_t, t) - target).square().flatten(1).mean(1).sum().backward()


class LoopBank(Bank):
    """One module per expert, run one after the other."""

    def _own(self, denoisers: Sequence[Denoiser]) -> dict[str, Tensor]:
        self.denoisers = nn.ModuleList(denoisers)
        return dict(self.denoisers.named_parameters())

    def weights(self, index: int) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.denoisers[index].named_parameters()}

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.stack([one(x, when) for one, x, when in zip(self.denoisers, x_t, t, strict=True)])

    def backward(self, x_t: Tensor, t: Tensor, target: Tensor) -> None:
        for one, x, when, goal in zip(self.denoisers, x_t, t, target, strict=True):
            (one(x, when) - goal).square().mean().backward()


ENGINES: Mapping[str, type[Bank]] = {"vmap": StackedBank, "loop": LoopBank}


def choose_engine(engine: str, network: str) -> str:
    """The engine asked for; for auto the faster one: vmap for the MLP and on a GPU, loop for others on a CPU."""
    if engine != "auto":
        return engine
    return "vmap" if network.partition(":")[0] == "mlp" or torch.cuda.is_available() else "loop"
