"""Training of one denoiser: AdamW on the weighted loss, with an exponential moving average of the weights.

    loss = mean_i  w(t_i) |target - output|^2 / D,      t_i from the sampler, w from `weights.py`

The batch, the noise and u come from (seed, step) alone. Two runs of one seed therefore see the same initial weights,
samples and noise in every step, whatever their curriculum, density or weight: that is what makes a comparison paired,
and a resumed run equal to one that was never stopped. The learning rate is a function of the step and of when the last
stage began, and has no state.
"""

__all__ = ["Diverged", "TrainPlan", "Trainer", "ema_share"]

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from difficulty.datasets import Dataset
from difficulty.denoiser import Denoiser
from difficulty.errors import InputError, first_line
from difficulty.networks import NETWORKS, build_network, recompute_blocks
from difficulty.process import Array, Process
from difficulty.randomness import integers, normal, seeded_torch, uniform
from training.conditional import Condition, conditioning, given
from training.curriculum import Curriculum
from training.heldout import HeldOut, eval_losses
from training.parallel import Sharded, make_parallel, moments
from training.plan import PRECISIONS, TrainPlan
from training.sources import source_of
from training.streams import BATCH, FORWARD, LABELS, NOISE
from training.text import TextTable
from training.timesteps import TimestepSampler
from training.uncertainty import LogVariance, split_weight
from training.weights import loss_weights

LEAST_SCALE = 1e-6  # of the loss in fp16; it starts at 65536


class Diverged(InputError):
    """The loss or its gradient became NaN or infinite; the trainer still holds the weights from before that step."""


class Trainer:
    """The state of one training run.

    Args:
        data: samples; trained on ``data.train``.
        process: the forward process.
        plan: what to do.
        curriculum: None for plain training on all t.
        base_density: probabilities of t, shape (T+1,), in place of the plan's density.
        device: where the network lives.
        network: a module ``forward(x, log_snr)`` in place of the one that the plan names; its weights are taken over.
        text: the embedded captions of the data, if the plan's condition is text.
        rank, world: this process and the number of processes that train together (torch.distributed is initialised).
        parallel: how they share the weights, a name in ``training.parallel.PARALLEL``.

    Raises:
        InputError: if a name is unknown, the curriculum was made for another process, the batch cannot be shared
            equally, or the device or the network cannot do what the plan asks for.
    """

    def __init__(
        self,
        data: Dataset,
        process: Process,
        plan: TrainPlan,
        curriculum: Curriculum | None = None,
        *,
        base_density: Array | None = None,
        device: torch.device | str = "cpu",
        network: nn.Module | None = None,
        text: TextTable | None = None,
        rank: int = 0,
        world: int = 1,
        parallel: str = "ddp",
    ) -> None:
        if plan.batch % (world * plan.micro_batches):
            raise InputError(
                f"a batch of {plan.batch} cannot be cut into {plan.micro_batches} micro-batches on each of {world} "
                "processes; make it a multiple"
            )
        self.rank, self.world = rank, world
        self.data, self.process, self.plan, self.device = data, process, plan, torch.device(device)
        _check_abilities(plan, self.device, parallel if world > 1 else "ddp")
        self.source = source_of(data, self.rows_of, plan.steps, self.device)
        data_std = float(data.train.double().square().mean().sqrt())
        network = build_network(plan.network, data.shape, plan.seed) if network is None else network.train()
        # Networks of this project draw nothing; others may, by dropout, and then do so from a stream of the step.
        self.draws = type(network) not in NETWORKS.values()
        if plan.gradient_checkpointing:
            recompute_blocks(network, plan.network)
        self.conditioning = conditioning(plan.condition, data, text)
        if self.conditioning:
            network = self.conditioning.network(network, plan.seed)
        self.denoiser = Denoiser(network, process, plan.prediction, data_std).to(self.device)
        self.averaged = AveragedModel(self.denoiser.network, multi_avg_fn=_ema_with_warmup(plan.ema_decay)).eval()
        # The same process and scales around the averaged weights, whole on the process that evaluates them.
        self.ema = copy.copy(self.denoiser)
        self.parallel = make_parallel(parallel, world, self.device)
        apart = isinstance(self.parallel, Sharded) and rank == 0
        evaluated = copy.deepcopy(self.averaged.module) if apart else self.averaged.module
        self.ema._modules = dict(self.denoiser._modules) | {"network": evaluated}
        weight, learned = split_weight(plan.weight)
        self.uncertainty = LogVariance().to(self.device) if learned else None
        for module in (self.denoiser.network, self.averaged.module, self.uncertainty):
            if module is not None:
                self.parallel.prepare(module)
        if plan.compile:
            self.denoiser.network.compile()
        groups: list[dict[str, Any]] = [{"params": [*self.denoiser.network.parameters()]}]
        if self.uncertainty is not None:
            groups.append({"params": [*self.uncertainty.parameters()], "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type) if plan.precision == "fp16" else None
        self.sampler = TimestepSampler(
            process,
            curriculum,
            budget=plan.steps,
            base_density=plan.density if base_density is None else base_density,
            seed=plan.seed,
            stratified=plan.stratified,
        )
        table = loss_weights(weight, process, plan.prediction)
        self.loss_weight = torch.as_tensor(table, dtype=torch.float32, device=self.device)
        self.done = 0

    def step(self) -> Tensor:
        """One iteration; returns the weighted batch loss per dimension, a scalar.

        Raises:
            Diverged: if the loss or its gradient is not finite; weights, average and optimizer are as before the step.
            DataLost: if samples can no longer be read; likewise.
        """
        plan, step, mine = self.plan, self.done, self._mine
        share = plan.batch // self.world
        rows = self.rows_of(step)
        x0 = self.source.read(step, rows)
        eps = normal((plan.batch, *x0.shape[1:]), plan.seed, NOISE, step, 0)[mine].to(self.device)
        t, weight = self.sampler.sample(share, step=step, rank=self.rank, world=self.world, device=self.device)
        condition = self._condition(rows, step, mine)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        size = share // plan.micro_batches
        for first in range(0, share, size):
            part = slice(first, first + size)
            denoiser = self.denoiser if condition is None else given(self.denoiser, condition[part])
            with self._autocast(), self._drawing(step, first):
                losses = denoiser.losses(x0[part], eps[part], t[part])
            weighted = losses.float() * self.loss_weight[t[part]]
            loss = (weighted * weight[part]).sum() / (plan.batch * self.data.dim)
            self._backward(self._objective(loss, weighted, t[part], weight[part]))
            total += loss.detach()
        self.parallel.reduce(total, self.trained)
        # The same number on every process, so that all of them stop, or all go on.
        if not torch.isfinite(total):
            raise Diverged(self.divergence("the loss", float(total), step))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(step)
        self._update()
        self.averaged.update_parameters(self.denoiser.network)
        self.done += 1
        self.sampler.update(total)
        return total

    def lr_at(self, step: int) -> float:
        """Learning rate of an iteration that was sampled, from 0."""
        sampler, start = self.sampler, None
        if self.plan.lr_start == "begin":
            start = 0
        elif sampler.stage == sampler.stages - 1:
            start = sampler.stage_start
        return self.plan.lr_at(step, start)

    def _objective(self, loss: Tensor, weighted: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        """What is minimised: the loss, or its form with learned uncertainty."""
        if self.uncertainty is None:
            return loss
        objective = self.uncertainty.objective(weighted / self.data.dim, self.denoiser.log_snr[t])
        return (objective * weight).sum() / self.plan.batch

    def _backward(self, objective: Tensor) -> None:
        if self.parallel.loss_factor != 1:
            objective = objective * self.parallel.loss_factor
        (objective if self.scaler is None else self.scaler.scale(objective)).backward()

    def _update(self) -> None:
        """Clip and step. With fp16 a step whose gradients overflow is left out, and the next one scaled less."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.denoiser.network.parameters(), self.plan.clip or math.inf)
        if self.scaler is None:
            self._check_gradient(norm)
            self.optimizer.step()
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < LEAST_SCALE:
            raise Diverged(f"the gradients overflow fp16 at step {self.done} however they are scaled; use bf16 or fp32")

    def _check_gradient(self, norm: Tensor) -> None:
        """Raise Diverged unless every gradient is finite; ``norm`` is that of the network's."""
        norms = [norm]
        if self.uncertainty is not None:
            own = [parameter.grad for parameter in self.uncertainty.parameters() if parameter.grad is not None]
            norms.append(nn.utils.get_total_norm(own))
        # A finite loss can have a NaN gradient: that of sqrt at 0.
        for each in norms:
            value = float(self.parallel.whole(each))
            if not math.isfinite(value):
                raise Diverged(self.divergence("the norm of the gradient", value, self.done))

    @property
    def _mine(self) -> slice:
        """This process's part of a batch."""
        share = self.plan.batch // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def rows_of(self, step: int) -> Tensor:
        """Numbers of the train samples that this process has in a step, (batch / world,)."""
        # Every process draws the whole batch and takes its part, so that any number of them trains as one would.
        return integers(len(self.source), self.plan.batch, self.plan.seed, BATCH, step, 0)[self._mine]

    def divergence(self, what: str, value: float, step: int) -> str:
        """What to say when a loss or the norm of its gradient is not finite."""
        return (
            f"{what} became {value} at step {step}; lower the learning rate (now {self.plan.lr:g}) "
            "or check the data and the loss weight"
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.plan.precision == "fp32":  # even a disabled autocast costs time in a small network
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.plan.precision])

    def _drawing(self, step: int, micro_batch: int) -> contextlib.AbstractContextManager[Any]:
        if not self.draws:
            return contextlib.nullcontext()
        return seeded_torch(self.plan.seed, FORWARD, step, self.rank, micro_batch)

    def _condition(self, rows: Tensor, step: int, mine: slice) -> Condition | None:
        """What the network is told of this process's part of a batch, some of it dropped."""
        if self.conditioning is None:
            return None
        dropped = uniform((self.plan.batch,), self.plan.seed, LABELS, step, 0)[mine] < self.plan.condition_dropout
        return self.conditioning.train(rows, torch.from_numpy(dropped)).to(self.device)

    def report_heldout(self, heldout: HeldOut) -> None:
        """Give the pacing rule its held-out losses if it wants them after this iteration.

        They are those of the network in training, not of the average, which lags behind a new stage. Every process
        computes those of its part of the draws and is told all; all of them must call this.
        """
        every = self.sampler.heldout_every
        if not every or self.done % every:
            return
        inside = self.sampler.active(heldout.t.numpy())
        stretched, most = self.sampler.heldout_plan(self.plan.batch, int(inside.sum()))
        if self.done % stretched:
            return
        x0, eps, t, condition = heldout.select(inside, most)
        # Parts of one size, the last filled up from the first: under fsdp all must make the same forward passes.
        size = math.ceil(len(t) / self.world)
        own = torch.arange(self.rank * size, (self.rank + 1) * size) % len(t)
        told = None if condition is None else condition[own].to(self.device)
        part = (x0[own].to(self.device), eps[own].to(self.device), t[own].to(self.device))
        if self.draws:  # for others the two walks through the modules are a tenth of a check
            self.denoiser.eval()
        losses = eval_losses(self.denoiser, *part, told)
        if self.draws:
            self.denoiser.train()
        self.sampler.update_heldout(self.parallel.gather(losses)[: len(t)].cpu().double().tolist())

    @torch.no_grad()
    def gather(self) -> None:
        """Bring ``ema`` up to date where the average is shared between processes; all of them must call this."""
        if not isinstance(self.parallel, Sharded):
            return
        parts, wholes = self.averaged.module, self.ema.network
        for part, whole in zip(parts.parameters(), wholes.parameters(), strict=True):
            value = self.parallel.whole(part)
            if self.rank == 0:
                whole.copy_(value)
        if self.rank == 0:  # every process has them whole
            for own, evaluated in zip(parts.buffers(), wholes.buffers(), strict=True):
                evaluated.copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """Weights, average, optimizer, sampler and step, whole; see `checkpoint.py`. All processes must call this.

        Where weights are cut into parts the first process alone is given the whole of them, on the CPU.
        """
        whole, optimizer = self.parallel.saved, self.optimizer.state_dict()
        values = {i: {name: whole(value) for name, value in each.items()} for i, each in optimizer["state"].items()}
        state = {
            "model": {name: whole(value) for name, value in self.denoiser.network.state_dict().items()},
            "ema": {name: whole(value) for name, value in self.averaged.module.state_dict().items()},
            "optimizer": optimizer | {"state": values},
            "sampler": self.sampler.state_dict(),
            "step": self.done,
            "ema_updates": int(self.averaged.n_averaged),
        }
        if self.uncertainty is not None:
            weights = self.uncertainty.state_dict().items()
            state["uncertainty"] = {name: whole(value).tolist() for name, value in weights}
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_weights(self, model: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> None:
        """Take over weights and their average.

        Raises:
            InputError: if they are those of another network.
        """
        try:
            self._load(self.denoiser.network, model)
            self._load(self.averaged.module, ema)
        except RuntimeError as error:
            reason = first_line(error).rstrip(":")
            raise InputError(f"the saved weights do not fit network {self.plan.network!r} ({reason})") from None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            InputError: if the weights are those of another network.
        """
        self.load_weights(state["model"], state["ema"])
        self.optimizer.load_state_dict(moments(self.parallel, self.optimizer, state["optimizer"]))
        if self.uncertainty is not None:
            self._load(self.uncertainty, {name: torch.tensor(value) for name, value in state["uncertainty"].items()})
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.averaged.n_averaged.fill_(state["ema_updates"])
        self.sampler.load_state_dict(state["sampler"])
        self.done = state["step"]
        self.gather()

    def _load(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        own = module.state_dict()
        # Cut in the module's order, the same in all processes; that of a file is not.
        cut = {name: self.parallel.part(weights[name], like) for name, like in own.items() if name in weights}
        module.load_state_dict(dict(weights) | cut)


def _check_abilities(plan: TrainPlan, device: torch.device, parallel: str) -> None:
    """Raise InputError if the device, the compiler or the way to share weights cannot do what the plan asks for."""
    if plan.precision != "fp32":
        try:
            with torch.autocast(device.type, PRECISIONS[plan.precision]):
                able = nn.functional.linear(*torch.ones(2, 2, 2, device=device)).dtype == PRECISIONS[plan.precision]
        except RuntimeError:
            able = False
        if not able:
            raise InputError(f"device {device.type!r} cannot compute in {plan.precision}; choose another precision")
    if parallel == "fsdp" and (plan.precision == "fp16" or plan.compile):
        raise InputError("fsdp goes with fp32 and bf16 and without --compile; choose ddp for the others")
    if plan.compile:
        try:
            torch.compile(torch.nn.functional.silu)(torch.ones(2, device=device))
        except Exception as error:  # torch raises many kinds where a compiler is missing or fails
            reason = first_line(error)
            raise InputError(f"torch.compile does not work here ({reason}); train without --compile") from None


Tensors = tuple[Tensor, ...] | list[Tensor]


def ema_share(decay: float, updates: int) -> float:
    """Share of the current weights in the moving average after ``updates`` earlier ones."""
    return 1 - min(decay, (1 + updates) / (10 + updates))


def _ema_with_warmup(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, updates: Tensor | int) -> None:
        torch._foreach_lerp_(averaged, current, ema_share(decay, int(updates)))

    return update
