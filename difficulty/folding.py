"""Experts folded into one network: a batch (E * B, *) in which every run of B rows meets weights of its own.

What has no weights (activations, attention, reshapes) does not care whose rows it sees and runs once for all experts;
a layer with weights is replaced by a sibling that holds E of them, (E, ...), and multiplies block by block. Against
vmap over a single network this keeps the fused kernels of attention and normalisation, and needs no batching rules.

Only layers in ``FOLDED`` are known, and a network must treat rows independently; ``unfoldable`` says why one cannot be
folded, by its layers and by comparing numbers.
"""

__all__ = ["FOLDED", "fold", "shaken", "unfoldable"]

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from difficulty.devices import same_to_rounding
from difficulty.errors import first_line
from difficulty.networks import LearnedPositions, NoiseEmbedding
from difficulty.randomness import torch_generator


class FoldedLinear(nn.Module):
    """``nn.Linear`` with weights (E, out, in) on rows (E * B, ..., in)."""

    def __init__(self, layer: nn.Linear, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.weight = _own(layer.weight, experts)
        self.bias = None if layer.bias is None else _own(layer.bias, experts)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(self.experts, -1, x.shape[-1])
        y = _BlockwiseLinear.apply(rows, self.weight, self.bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class _BlockwiseLinear(torch.autograd.Function):
    """Rows (E, B, in), weights (E, out, in) and biases (E, out) or None -> (E, B, out).

    What sets it apart from ``torch.baddbmm`` on transposed weights is that the gradient of the weights has their own
    memory layout; the other would come transposed and be copied before it is accumulated.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (rows, weight) = gradients, ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            torch.bmm(gradient, weight) if needs_rows else None,
            torch.bmm(gradient.mT, rows) if needs_weight else None,
            gradient.sum(1) if needs_bias else None,
        )


class FoldedLayerNorm(nn.Module):
    """``nn.LayerNorm`` with gains and shifts (E, *) on rows (E * B, ..., *)."""

    def __init__(self, layer: nn.LayerNorm, experts: int) -> None:
        super().__init__()
        self.experts, self.shape, self.eps = experts, layer.normalized_shape, layer.eps
        # Either may be None, whatever the annotations of nn.LayerNorm say.
        self.weight = None if layer.weight is None else _own(layer.weight, experts)
        self.bias = None if layer.bias is None else _own(layer.bias, experts)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, self.shape, None, None, self.eps)
        if self.weight is not None:
            h = _each(torch.mul, h, self.weight, self.experts)
        return h if self.bias is None else _each(torch.add, h, self.bias, self.experts)


class FoldedPositions(nn.Module):
    """``LearnedPositions`` with tables (E, tokens, width) on rows (E * B, tokens, width)."""

    def __init__(self, layer: LearnedPositions, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.table = _own(layer.table, experts)

    def forward(self, x: Tensor) -> Tensor:
        return _each(torch.add, x, self.table, self.experts)


class FoldedNoiseEmbedding(NoiseEmbedding):
    """``NoiseEmbedding`` of E experts: (E * B,) -> (E * B, width).

    An expert sees the few noise levels of its task again and again; on a CPU each is embedded once and looked up.
    """

    def __init__(self, layer: NoiseEmbedding, experts: int) -> None:
        nn.Module.__init__(self)
        self.experts = experts
        self.register_buffer("frequencies", layer.frequencies, persistent=False)
        self.layers = nn.Sequential(*(fold(inner, experts) for inner in layer.layers))

    def forward(self, log_snr: Tensor) -> Tensor:
        if log_snr.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(log_snr)  # the number of levels would have to be waited for
        levels, order = log_snr.reshape(self.experts, -1).sort(dim=1)
        slot = F.pad((levels[:, 1:] != levels[:, :-1]).long().cumsum(1), (1, 0))
        width = int(slot[:, -1].max()) + 1
        table = levels.new_zeros(self.experts, width).scatter_(1, slot, levels)
        first = torch.arange(self.experts)[:, None] * width
        row = torch.empty_like(slot).scatter_(1, order, slot) + first
        return F.embedding(row.flatten(), super().forward(table.flatten()))


FOLDED: Mapping[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: FoldedLinear,
    nn.LayerNorm: FoldedLayerNorm,
    LearnedPositions: FoldedPositions,
    NoiseEmbedding: FoldedNoiseEmbedding,
}


def fold(network: nn.Module, experts: int) -> nn.Module:
    """The network with every layer that has weights replaced; its parameters (E, ...) keep their names.

    Their values are copies of the network's; `engines.Bank` calls the result with weights of its own.
    """
    return _fold(network, experts, {})


def unfoldable(network: nn.Module, *inputs: Tensor) -> str | None:
    """Why a network cannot be folded, or None if it can.

    Args:
        network: maps the inputs to a tensor.
        inputs: of shape (B, *) with B even; two experts with different weights are given a half each.
    """
    for name, module in network.named_modules():
        if type(module) not in FOLDED and next(module.parameters(recurse=False), None) is not None:
            return f"it has weights in a {type(module).__name__} ({name or 'the network itself'})"
    weights = shaken(network, 2)
    halves = [value.chunk(2) for value in inputs]
    with torch.no_grad():
        try:
            together = functional_call(fold(network, 2), weights, inputs)
        except RuntimeError as error:
            return f"it fails on a folded batch ({first_line(error)})"
        own = [{name: value[k] for name, value in weights.items()} for k in range(2)]
        alone = torch.cat([functional_call(network, own[k], tuple(half[k] for half in halves)) for k in range(2)])
    if not alone.isfinite().all():
        return "its outputs are not finite, so that its rows cannot be checked"
    if not same_to_rounding(together, alone):
        return "its rows depend on one another"
    return None


def shaken(network: nn.Module, count: int) -> dict[str, Tensor]:
    """Weights (count, ...) about those of a network: its own are often zero in the last layer, where all agree."""
    generator = torch_generator(0)
    return {
        name: 0.1 * torch.randn(count, *value.shape, generator=generator).to(value.device) + value.detach()
        for name, value in network.named_parameters()
    }


def _fold(module: nn.Module, experts: int, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:  # a layer used twice has one set of weights
        return done[module]
    if type(module) in FOLDED:
        folded = FOLDED[type(module)](module, experts)
    else:
        folded = copy.copy(module)
        folded._modules = {
            name: None if child is None else _fold(child, experts, done) for name, child in module._modules.items()
        }
    done[module] = folded
    return folded


def _own(value: Tensor, experts: int) -> nn.Parameter:
    return nn.Parameter(value.detach().expand(experts, *value.shape).clone())


def _each(operation: Callable[[Tensor, Tensor], Tensor], x: Tensor, values: Tensor, experts: int) -> Tensor:
    """Rows (E * B, ..., *) with values (E, *) of their expert."""
    blocks = x.unflatten(0, (experts, -1))
    between = blocks.ndim - values.ndim
    return operation(blocks, values.reshape(experts, *(1,) * between, *values.shape[1:])).flatten(0, 1)
