"""How processes that train together share the weights. Started by torchrun; siblings of one trajectory:

    ddp     every process holds everything; gradients are summed, as one message
    fsdp    weights, gradients, moments and averages are cut into one part per process, put together for each forward
            and backward pass and dropped again (torch's fully_shard, Zhao et al. 2023, arXiv 2304.11277)

A checkpoint holds whole tensors, so a run may go on with the other sibling or another number of processes.
"""

__all__ = ["PARALLEL", "Parallel", "Replicated", "Sharded", "join_processes", "make_parallel", "moments"]

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from difficulty.errors import choose
from difficulty.ranks import join_group

BLOCKS = ("blocks", "transformer_blocks")  # lists of modules that are put together one at a time


class Parallel(ABC):
    """The part of one of ``world`` processes.

    Args:
        world: number of processes; torch.distributed is initialised if there is more than one.
        device: of this process.
    """

    loss_factor = 1.0  # on the loss whose gradient is taken

    def __init__(self, world: int, device: torch.device) -> None:
        self.world, self.device = world, device

    def prepare(self, module: nn.Module) -> None:  # noqa: B027 - nothing is to be done where weights are replicated
        """Take this process's part of a module's weights."""

    @abstractmethod
    def reduce(self, total: Tensor, parameters: Sequence[Tensor]) -> None:
        """Sum the loss and the gradients over the processes, in place."""

    def gather(self, part: Tensor) -> Tensor:
        """The parts (n, *) of all processes in their order, (world n, *), on each of them; all must ask."""
        if self.world == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.world)]
        dist.all_gather(parts, part)
        return torch.cat(parts)

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor put together from its parts; all processes must ask."""
        return tensor

    def saved(self, tensor: Tensor) -> Tensor:
        """A whole tensor for a checkpoint of the first process; all processes must ask."""
        return tensor

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """This process's part of a whole tensor, cut as ``like`` is."""
        return whole


class Replicated(Parallel):
    """Everything everywhere."""

    def reduce(self, total: Tensor, parameters: Sequence[Tensor]) -> None:
        """See ``Parallel``."""
        if self.world == 1:
            return
        # A network that leaves layers out at random has other gradients in every process.
        reached = torch.tensor([parameter.grad is not None for parameter in parameters]).to(total)
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        message = torch.cat([total.reshape(1), reached, *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(message)
        total.copy_(message[0])
        counts = message[1 : 1 + len(gradients)].tolist()
        parts = message[1 + len(gradients) :].split([gradient.numel() for gradient in gradients])
        for parameter, gradient, count, summed in zip(parameters, gradients, counts, parts, strict=True):
            if count:  # the optimizer passes over what no process reached
                parameter.grad = gradient.copy_(summed.view_as(gradient))


class Sharded(Parallel):
    """One part of everything per process."""

    def __init__(self, world: int, device: torch.device) -> None:
        super().__init__(world, device)
        self.loss_factor = float(world)  # fully_shard takes the mean of the gradients, and gloo can do no other
        self.mesh = dist.init_device_mesh(device.type, (world,))

    def prepare(self, module: nn.Module) -> None:
        """See ``Parallel``."""
        from torch.distributed.fsdp import fully_shard

        for name, child in module.named_modules():
            if name.rpartition(".")[2] in BLOCKS and isinstance(child, nn.ModuleList):
                for block in child:
                    fully_shard(block, mesh=self.mesh)
        fully_shard(module, mesh=self.mesh, reshard_after_forward=True)

    def reduce(self, total: Tensor, parameters: Sequence[Tensor]) -> None:
        """See ``Parallel``; the gradients were reduced in the backward pass."""
        dist.all_reduce(total)

    def whole(self, tensor: Tensor) -> Tensor:
        """See ``Parallel``."""
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def saved(self, tensor: Tensor) -> Tensor:
        """See ``Parallel``; one after the other, as all together may not fit where a part of each does."""
        whole = self.whole(tensor)
        return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0)

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """See ``Parallel``."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor) or whole.shape != like.shape:  # AdamW counts its steps in a scalar
            return whole
        return distribute_tensor(whole.to(self.device), like.device_mesh, like.placements)


PARALLEL: Mapping[str, type[Parallel]] = {"ddp": Replicated, "fsdp": Sharded}


def make_parallel(name: str, world: int, device: torch.device) -> Parallel:
    """The sibling of that name; of a single process, which has nothing to share, always ``Replicated``.

    Raises:
        InputError: if the name is unknown.
    """
    kind = choose("way to share weights", name, PARALLEL)
    return kind(world, device) if world > 1 else Replicated(world, device)


def join_processes(device: str) -> tuple[int, str]:
    """Rank of this process and its device; joins the others if torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        join_group("nccl" if device.startswith("cuda") else "gloo")
    return dist.get_rank(), device


def moments(parallel: Parallel, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer with every moment cut as its parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        index: {name: parallel.part(value, parameters[index]) for name, value in sorted(values.items())}
        for index, values in sorted(state["state"].items())  # in one order in all processes
    }
    return {"state": cut, "param_groups": state["param_groups"]}
