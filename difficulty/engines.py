"""Engines: how many denoisers of one architecture are trained side by side.

Parameters of E experts are kept stacked, (E, ...), and one fused AdamW serves all of them. Siblings differ in the
program that runs a block of experts; they give the same numbers to float tolerance:

    batched    one network with layers of E weights each (`folding.py`); for networks made of known layers
    vmap       torch.func.vmap over one network; for any network, on a GPU, where its kernels are good
    loop       blocks of one expert, one after the other; for any network

What is fast was measured (`benchmarks/experts.py`). Small linear layers gain from being batched as long as a layer's
output stays in the cache; convolutions on a CPU gain from nothing but more processes with one thread each, and lose a
third of their speed under vmap. ``choose_engine`` follows this, within the memory that there is.
"""

__all__ = ["ENGINES", "Bank", "Block", "EngineChoice", "choose_engine"]

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode

from difficulty.denoiser import Denoiser
from difficulty.devices import free_bytes, same_to_rounding
from difficulty.errors import InputError, choose, first_line
from difficulty.folding import fold, shaken, unfoldable
from difficulty.randomness import seeded_torch

# (parameters (E, ...) by name, x_t (E, B, *), t (E, B)) -> predictions (E, B, *)
Program = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]

# A block is as large as keeps the largest tensor of its forward pass under this on a CPU.
CACHE_BYTES = 4 * 2**20
# Share of the free memory that parameters, moments and one block's forward pass may take.
MEMORY_SHARE = 0.6
# Per core, with small matrices, forward and backward; and what starting a process costs.
FLOPS_PER_SECOND = 4e10
WORTH_A_PROCESS_SECONDS = 15.0


def batched(template: Denoiser, experts: int) -> Program:
    """One network with layers of E weights each."""
    folded = fold(template, experts)

    def program(parameters: Mapping[str, Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        output = functional_call(folded, dict(parameters), (x_t.flatten(0, 1), t.flatten()))
        return output.reshape(x_t.shape)

    return program


def vmapped(template: Denoiser, experts: int) -> Program:
    """One network, vectorised by torch.func."""

    def one(parameters: dict[str, Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        return functional_call(template, parameters, (x_t, t))

    return lambda parameters, x_t, t: vmap(one)(dict(parameters), x_t, t)


def alone(template: Denoiser, experts: int) -> Program:
    """One network as it is; E is 1."""

    def program(parameters: Mapping[str, Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        own = {name: value.squeeze(0) for name, value in parameters.items()}
        return functional_call(template, own, (x_t.squeeze(0), t.squeeze(0)))[None]

    return program


ENGINES: Mapping[str, Callable[[Denoiser, int], Program]] = {"batched": batched, "vmap": vmapped, "loop": alone}


class Block:
    """E denoisers of one architecture with parameters of their own, run as one program.

    Args:
        denoisers: of one architecture, with the same buffers, on one device; their values are copied. Parameters that
            require no gradient get one of zero.
        engine: a name in ``ENGINES``; ``loop`` takes one denoiser.
        program: of that engine for as many denoisers of the same architecture; made if not given.
    """

    def __init__(self, denoisers: Sequence[Denoiser], engine: str, program: Program | None = None) -> None:
        self.template = denoisers[0]
        self.program = program or ENGINES[engine](self.template, len(denoisers))
        stacked, _ = stack_module_state(list(denoisers))
        self.parameters = {name: value.detach().requires_grad_() for name, value in stacked.items()}
        for name, value in self.template.named_parameters():
            if not value.requires_grad:
                # No gradient at all would leave a hole in the optimizer's state.
                self.parameters[name].register_hook(torch.zeros_like)
        self.count = len(denoisers)

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Outputs (E, B, *) at x_t (E, B, *) and integer t (E, B)."""
        return self.program(self.parameters, x_t, t)

    def backward(self, x_t: Tensor, t: Tensor, target: Tensor) -> None:
        """Add the gradient of every expert's mean squared error to its parameters."""
        # Mean within an expert, sum over experts: each expert's gradient is that of training it alone.
        (self.predict(x_t, t) - target).square().flatten(1).mean(1).sum().backward()


@dataclass(frozen=True)
class EngineChoice:
    """How experts are trained, as said in run.json.

    Args:
        engine: a name in ``ENGINES``.
        block: experts in one program.
        at_once: experts that one process holds in memory; the rest wait for their turn.
        processes: that share the experts.
        compiled: whether the program goes through torch.compile.
        reason: why.
    """

    engine: str
    block: int
    at_once: int
    processes: int
    compiled: bool
    reason: str


class Bank:
    """Any number of denoisers of one architecture, in blocks.

    Args:
        denoisers: at least one.
        engine: a name in ``ENGINES``.
        block: denoisers in one program; 1 for the engine ``loop``.
        compiled: whether programs go through torch.compile.
    """

    def __init__(self, denoisers: Sequence[Denoiser], engine: str, block: int = 1, *, compiled: bool = False) -> None:
        self.template = denoisers[0]
        programs: dict[int, Program] = {}
        self.blocks: list[Block] = []
        for first in range(0, len(denoisers), block):
            part = denoisers[first : first + block]
            if len(part) not in programs:
                program = ENGINES[engine](part[0], len(part))
                programs[len(part)] = torch.compile(program, dynamic=False) if compiled else program
            self.blocks.append(Block(part, engine, programs[len(part)]))

    @property
    def leaves(self) -> list[Tensor]:
        """All parameters, to be optimised."""
        return [value for block in self.blocks for value in block.parameters.values()]

    def slices(self) -> list[tuple[Block, slice]]:
        """Every block with the places of its denoisers."""
        found, first = [], 0
        for block in self.blocks:
            found.append((block, slice(first, first + block.count)))
            first += block.count
        return found

    def weights(self, index: int) -> dict[str, Tensor]:
        """A copy of the parameters of one denoiser, by their names in it."""
        for block, places in self.slices():
            if index < places.stop:
                return {name: value[index - places.start].detach().clone() for name, value in block.parameters.items()}
        raise IndexError(f"there is no denoiser {index}")

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Outputs (E, B, *) at x_t (E, B, *) and integer t (E, B)."""
        return torch.cat([block.predict(x_t[places], t[places]) for block, places in self.slices()])


def choose_engine(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    *,
    batch: int,
    experts: int,
    iterations: int,
    engine: str = "auto",
    compiled: bool = False,
    processes: int | None = None,
) -> EngineChoice:
    """The engine, the size of its blocks and the number of processes, by network, memory and amount of work.

    Args:
        denoiser: one of the experts, on the device of the training.
        shape: of one sample.
        batch: samples per expert and iteration.
        experts: how many there are.
        iterations: of each.
        engine: a name in ``ENGINES``, or auto.
        compiled: whether to compile.
        processes: how many share the experts; None for the choice: one per thread that torch may use if the work is
            worth starting them, which a GPU's never is.

    Raises:
        InputError: if the engine does not fit the network, its output is random or depends on other rows of the batch,
            there is no compiler, or not even one expert fits in memory.
    """
    device = denoiser.alpha.device
    on_cpu = device.type == "cpu"
    if compiled:
        _check_compiler(on_cpu)
    x, t = torch.zeros(4, *shape, device=device), torch.ones(4, dtype=torch.long, device=device)
    _check_rows(denoiser, x, t)
    forward, largest = (batch * value // len(x) for value in _forward_bytes(denoiser, x, t))
    widest = max(1, CACHE_BYTES // max(largest, 1)) if on_cpu else experts
    if engine == "auto":
        engine, reason = _fitting(denoiser, x, t, widest, on_cpu)
        if engine == "vmap" and (obstacle := _unmappable(denoiser, x, t)) is not None:
            engine, reason = "loop", f"{reason}, nor vectorised: {obstacle}"
    else:
        choose("engine", engine, ENGINES)
        reason = "asked for"
        if engine == "batched" and (obstacle := _obstacle(denoiser, x, t)) is not None:
            raise InputError(f"engine 'batched' does not fit this network: {obstacle}; use vmap, loop or auto")
        if engine == "vmap" and (obstacle := _unmappable(denoiser, x, t)) is not None:
            raise InputError(f"engine 'vmap' does not fit this network: {obstacle}; use loop or auto")

    if processes is None:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            denoiser(x, t)
        seconds = 3 * counter.get_total_flops() / len(x) * batch * experts * iterations / FLOPS_PER_SECOND
        worthwhile = on_cpu and seconds > WORTH_A_PROCESS_SECONDS
        processes = min(torch.get_num_threads(), experts) if worthwhile else 1
    if not 1 <= processes <= experts:
        raise InputError(f"{experts} experts can be shared by 1 to {experts} processes, got {processes}")

    own = math.ceil(experts / processes)
    free = int(MEMORY_SHARE * free_bytes(device) / (processes if on_cpu else 1))
    # A parameter, its gradient and two moments.
    state = 4 * sum(value.numel() * value.element_size() for value in denoiser.parameters())
    at_once = min(own, (free - forward) // max(state, 1))
    if at_once < 1:
        raise InputError(
            f"one expert needs about {_gib(state + forward)} with a batch of {batch}, and {_gib(free)} are to be had "
            f"per process; use a smaller batch or network, or fewer processes"
        )
    block = 1
    if engine != "loop":
        block = min(at_once, widest, max(1, (free - at_once * state) // max(forward, 1)))
        block = math.ceil(at_once / math.ceil(at_once / block))  # of about equal size
    reason += f"; {_gib(state)} of weights and moments and {_gib(forward)} of activations per expert, {_gib(free)} free"
    return EngineChoice(engine, block, at_once, processes, compiled, reason)


def _fitting(denoiser: Denoiser, x: Tensor, t: Tensor, widest: int, on_cpu: bool) -> tuple[str, str]:
    """The fastest engine, and why it is."""
    if widest == 1:
        return "loop", "layers large enough to be fast alone"
    if (obstacle := _obstacle(denoiser, x, t)) is None:
        return "batched", "layers known to be faster together"
    return ("loop" if on_cpu else "vmap"), f"not batched, since {obstacle}"


def _obstacle(denoiser: Denoiser, x: Tensor, t: Tensor) -> str | None:
    return unfoldable(denoiser, _unlike_rows(x), t)


def _unmappable(denoiser: Denoiser, x: Tensor, t: Tensor) -> str | None:
    """Why torch cannot vectorise a network and its gradient, or None if it can."""
    parameters = {name: value.requires_grad_() for name, value in shaken(denoiser, 2).items()}
    rows = _unlike_rows(x)
    try:
        vmapped(denoiser, 2)(parameters, torch.stack([rows, rows]), torch.stack([t, t])).square().mean().backward()
    except RuntimeError as error:  # what torch raises for an operation that it has no rule for
        return first_line(error)
    return None


def _unlike_rows(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), device=x.device).reshape(x.shape)


def _check_rows(denoiser: Denoiser, x: Tensor, t: Tensor) -> None:
    """Raise InputError if the output for a row is random or depends on the other rows, as with dropout and batch norm.

    Experts of a task would then differ from those of another by more than their timesteps, and their held-out losses
    would depend on how many draws are judged at a time.
    """
    weights = {name: value[0] for name, value in shaken(denoiser, 1).items()}
    rows = _unlike_rows(x)
    with torch.no_grad(), seeded_torch(0):
        together, again = (functional_call(denoiser, weights, (rows, t)) for _ in range(2))
        halves = torch.cat(
            [functional_call(denoiser, weights, pair) for pair in zip(rows.chunk(2), t.chunk(2), strict=True)]
        )
    if not together.isfinite().all():
        return  # nothing to compare; its experts will be censored
    if not same_to_rounding(again, together):
        raise InputError("the network's output is random in training; experts need one without dropout")
    if not same_to_rounding(halves, together):
        raise InputError("the network's output for a sample depends on the rest of its batch; use no batch norm")


def _forward_bytes(denoiser: nn.Module, x: Tensor, t: Tensor) -> tuple[int, int]:
    """Bytes that one forward pass keeps for the backward pass: in all, and in the largest tensor."""
    weights = {value.untyped_storage().data_ptr() for value in (*denoiser.parameters(), *denoiser.buffers())}
    found: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = denoiser(x, t).square().mean()
    del output
    return sum(found.values()), max(found.values(), default=0)


def _check_compiler(on_cpu: bool) -> None:
    if on_cpu:
        names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
        if not any(shutil.which(name) for name in names):
            raise InputError(f"compiling needs a C++ compiler, and {' or '.join(names)} is not to be found")
        if " " in torch.__file__:  # torch hands its own folder to the compiler unquoted
            raise InputError("torch cannot compile where the path of its installation has a space in it; move it")
    elif importlib.util.find_spec("triton") is None:
        raise InputError("compiling for a GPU needs the package triton, which is not installed")


def _gib(count: int) -> str:
    return f"{count / 2**30:.2g} GiB"
