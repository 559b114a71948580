"""Training of one denoiser: AdamW on the weighted loss, with an exponential moving average of the weights.

    loss = mean_i  w(t_i) |target - output|^2 / D,      t_i from the sampler, w from `weights.py`

The batch, the noise and u come from (seed, step) alone. Two runs of one seed therefore see the same initial weights,
samples and noise in every step, whatever their curriculum, density or weight: that is what makes a comparison paired,
and a resumed run equal to one that was never stopped. The learning rate is a function of the step and has no state.
"""

__all__ = ["LR_SCHEDULES", "PRECISIONS", "Diverged", "TrainPlan", "Trainer", "ema_share"]

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from difficulty.datasets import Dataset
from difficulty.denoiser import Denoiser
from difficulty.errors import InputError, choose
from difficulty.networks import NETWORKS, build_network
from difficulty.process import Array, Process
from difficulty.randomness import integers, normal, seeded_torch, uniform
from training.conditional import CONDITIONS, Condition, conditioning, given
from training.curriculum import Curriculum
from training.heldout import HeldOut, eval_losses
from training.streams import BATCH, FORWARD, LABELS, NOISE
from training.text import TextTable
from training.timesteps import TimestepSampler
from training.weights import loss_weights


def _constant(progress: float) -> float:
    return 1.0


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


# Factor on the learning rate as a function of the share of the run that is done, in [0, 1).
PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
LR_SCHEDULES: Mapping[str, Callable[[float], float]] = {"constant": _constant, "cosine": _cosine, "linear": _linear}


class Diverged(InputError):
    """The loss became NaN or infinite; the trainer still holds the weights from before that step."""


@dataclass(frozen=True)
class TrainPlan:
    """Everything that determines a run but the data, the process and the curriculum.

    Args:
        steps: iterations.
        batch: samples per iteration, over all processes and micro-batches together.
        micro_batches: parts into which a process cuts its samples to save memory; the gradient is that of the whole.
        precision: a name in ``PRECISIONS``; weights and optimizer stay in float32.
        network: spec of the network, as in ``mlp:width=256``.
        prediction: what the network predicts.
        weight: loss weight, a spec of `weights.py`.
        density: base density of t by spec; None takes the curriculum's, or uniform.
        stratified: spread the t of a batch evenly.
        lr: peak learning rate.
        lr_schedule: a name in ``LR_SCHEDULES``.
        warmup: iterations of linear warm-up.
        weight_decay: of AdamW.
        clip: greatest norm of the gradient; 0 for none.
        condition: what the network is told about a sample, a name in ``CONDITIONS``.
        condition_dropout: how often it is not told, for guidance.
        ema_decay: greatest decay of the moving average; after n updates it is min(ema_decay, (1+n)/(10+n)).
        seed: of weights, batches, noise and timesteps.
    """

    steps: int = 2000
    batch: int = 128
    micro_batches: int = 1
    precision: str = "fp32"
    network: str = "mlp"
    prediction: str = "eps"
    weight: str = "constant"
    density: str | None = None
    stratified: bool = False
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    warmup: int = 50
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_decay: float = 0.9999
    condition: str = "none"
    condition_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        choose("learning-rate schedule", self.lr_schedule, LR_SCHEDULES)
        choose("precision", self.precision, PRECISIONS)
        choose("condition", self.condition, CONDITIONS)
        for name in ("steps", "batch", "micro_batches", "lr"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "clip", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.condition_dropout <= 1:
            raise InputError(f"condition_dropout must lie in [0, 1], got {self.condition_dropout}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")

    def lr_at(self, step: int) -> float:
        """Learning rate of an iteration, from 0."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * warm * LR_SCHEDULES[self.lr_schedule](step / self.steps)


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

    Raises:
        InputError: if a name is unknown, the curriculum was made for another process, or the batch cannot be shared
            equally.
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
    ) -> None:
        if plan.batch % (world * plan.micro_batches):
            raise InputError(
                f"a batch of {plan.batch} cannot be cut into {plan.micro_batches} micro-batches on each of {world} "
                "processes; make it a multiple"
            )
        self.rank, self.world = rank, world
        self.data, self.process, self.plan, self.device = data, process, plan, torch.device(device)
        self.samples = data.train.to(self.device)
        data_std = float(data.train.double().square().mean().sqrt())
        network = build_network(plan.network, data.shape, plan.seed) if network is None else network
        # Networks of this project draw nothing; others may, by dropout, and then do so from a stream of the step.
        self.draws = type(network) not in NETWORKS.values()
        self.conditioning = conditioning(plan.condition, data, text)
        if self.conditioning:
            network = self.conditioning.network(network, plan.seed)
        self.denoiser = Denoiser(network, process, plan.prediction, data_std).to(self.device)
        self.averaged = AveragedModel(self.denoiser.network, multi_avg_fn=_ema_with_warmup(plan.ema_decay)).eval()
        # The same process and scales around the averaged weights.
        self.ema = copy.copy(self.denoiser)
        self.ema._modules = dict(self.denoiser._modules) | {"network": self.averaged.module}
        self.optimizer = torch.optim.AdamW(
            self.denoiser.network.parameters(), lr=plan.lr, weight_decay=plan.weight_decay, fused=True
        )
        self.sampler = TimestepSampler(
            process,
            curriculum,
            budget=plan.steps,
            base_density=plan.density if base_density is None else base_density,
            seed=plan.seed,
            stratified=plan.stratified,
        )
        table = loss_weights(plan.weight, process, plan.prediction)
        self.loss_weight = torch.as_tensor(table, dtype=torch.float32, device=self.device)
        self.done = 0

    def step(self) -> Tensor:
        """One iteration; returns the weighted batch loss per dimension, a scalar.

        Raises:
            Diverged: if the loss is not finite; weights, average and optimizer are as before the step.
        """
        plan, step = self.plan, self.done
        share = plan.batch // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        # Every process draws the whole batch and takes its part, so that any number of them trains as one would.
        rows = integers(len(self.samples), plan.batch, plan.seed, BATCH, step, 0)[mine]
        x0 = self.samples[rows.to(self.device)]
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
            loss = (losses.float() * self.loss_weight[t[part]] * weight[part]).sum() / (plan.batch * self.data.dim)
            loss.backward()
            total += loss.detach()
        if self.world > 1:
            self._sum_over_processes(total)
        # The same number on every process, so that all of them stop, or all go on.
        if not torch.isfinite(total):
            raise Diverged(self.divergence(float(total), step))
        if plan.clip:
            nn.utils.clip_grad_norm_(self.denoiser.network.parameters(), plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr_at(step)
        self.optimizer.step()
        self.averaged.update_parameters(self.denoiser.network)
        self.done += 1
        self.sampler.update(total)
        return total

    def divergence(self, loss: float, step: int) -> str:
        """What to say when a loss is not finite."""
        return (
            f"the loss became {loss} at step {step}; lower the learning rate (now {self.plan.lr:g}) "
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

    def _sum_over_processes(self, total: Tensor) -> None:
        """Sum gradients and loss over the processes, as one message."""
        gradients = [p.grad for p in self.denoiser.network.parameters() if p.grad is not None]
        message = torch.cat([total.reshape(1), *(gradient.flatten() for gradient in gradients)])
        torch.distributed.all_reduce(message)
        total.copy_(message[0])
        parts = message[1:].split([gradient.numel() for gradient in gradients])
        for gradient, summed in zip(gradients, parts, strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _condition(self, rows: Tensor, step: int, mine: slice) -> Condition | None:
        """What the network is told of this process's part of a batch, some of it dropped."""
        if self.conditioning is None:
            return None
        dropped = uniform((self.plan.batch,), self.plan.seed, LABELS, step, 0)[mine] < self.plan.condition_dropout
        return self.conditioning.train(rows, dropped).to(self.device)

    def report_heldout(self, heldout: HeldOut) -> None:
        """Give the pacing rule its held-out losses if it wants them after this iteration.

        They are those of the network in training, not of the average, which lags behind a new stage.
        """
        every = self.sampler.heldout_every
        if every and self.done % every == 0:
            x0, eps, t, condition = heldout.select(self.sampler.active(heldout.t.numpy()))
            told = None if condition is None else condition.to(self.device)
            self.denoiser.eval()
            losses = eval_losses(self.denoiser, x0.to(self.device), eps.to(self.device), t.to(self.device), told)
            self.denoiser.train()
            self.sampler.update_heldout(losses.cpu().double().tolist())

    def state_dict(self) -> dict[str, Any]:
        """Weights, average, optimizer, sampler and step; see `checkpoint.py`."""
        return {
            "model": self.denoiser.network.state_dict(),
            "ema": self.averaged.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "step": self.done,
            "ema_updates": int(self.averaged.n_averaged),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            InputError: if the weights are those of another network.
        """
        try:
            self.denoiser.network.load_state_dict(state["model"])
            self.averaged.module.load_state_dict(state["ema"])
        except RuntimeError as error:
            reason = str(error).splitlines()[0].rstrip(":")
            raise InputError(f"the saved weights do not fit network {self.plan.network!r} ({reason})") from None
        self.optimizer.load_state_dict(state["optimizer"])
        self.averaged.n_averaged.fill_(state["ema_updates"])
        self.sampler.load_state_dict(state["sampler"])
        self.done = state["step"]


Tensors = tuple[Tensor, ...] | list[Tensor]


def ema_share(decay: float, updates: int) -> float:
    """Share of the current weights in the moving average after ``updates`` earlier ones."""
    return 1 - min(decay, (1 + updates) / (10 + updates))


def _ema_with_warmup(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, updates: Tensor | int) -> None:
        torch._foreach_lerp_(averaged, current, ema_share(decay, int(updates)))

    return update
