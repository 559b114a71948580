"""Many runs of one small network as one batched program: `trainer.Trainer.step` for all arms and seeds at once.

The parameters of all runs are stacked along a leading run axis. The averages, the moments of AdamW, the norm of the
gradient and its clipping are per run, as are loss weights, timesteps and pacing; runs of one seed share their batch and
noise, which a seed and a step alone decide. The numbers are those of training one run after the other, up to rounding.

The networks of the trainers become views of the stacked parameters, so that a trainer can be evaluated, sampled and
asked for its held-out losses at any time, whatever trained it. Siblings: ``Stacked`` for networks of which one step is
too small to keep a core busy, ``OneByOne`` for all others.
"""

__all__ = ["OneByOne", "RunDiverged", "RunsTogether", "Stacked", "can_be_stacked", "train_together"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from difficulty.engines import Block
from difficulty.prediction import from_x0_eps
from difficulty.randomness import normal
from training.plan import TrainPlan
from training.sources import Resident
from training.streams import NOISE
from training.trainer import Diverged, Trainer, ema_share
from training.uncertainty import split_weight


class RunDiverged(Diverged):
    """The loss of run ``index`` or its gradient became NaN or infinite; every run is as before that step."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class RunsTogether(Protocol):
    """Runs that advance together; ``trainers`` hold their state."""

    trainers: Sequence[Trainer]

    def step(self) -> None:
        """One iteration of every run.

        Raises:
            RunDiverged: if the loss of a run or its gradient is not finite.
        """

    def state_dict(self) -> dict[str, Any]:
        """What `checkpoint.save_checkpoint` writes."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""


def can_be_stacked(plan: TrainPlan) -> bool:
    """Whether runs of this plan train faster as one program on a CPU, and nothing they need is missing there."""
    plain = plan.precision == "fp32" and plan.micro_batches == 1 and plan.condition == "none"
    plain = plain and plan.lr_start == "begin" and not plan.compile and not split_weight(plan.weight)[1]
    return plain and plan.network.partition(":")[0] == "mlp"


def train_together(trainers: Sequence[Trainer]) -> RunsTogether:
    """The sibling that is faster for these runs."""
    runs = [can_be_stacked(trainer.plan) and isinstance(trainer.source, Resident) for trainer in trainers]
    return Stacked(trainers) if len(trainers) > 1 and all(runs) else OneByOne(trainers)


class OneByOne:
    """One run after the other within every step."""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = trainers

    def step(self) -> None:
        """See ``RunsTogether``."""
        for index, trainer in enumerate(self.trainers):
            try:
                trainer.step()
            except Diverged as error:
                raise RunDiverged(index, str(error)) from None

    def state_dict(self) -> dict[str, Any]:
        """See ``RunsTogether``; of a single run."""
        (trainer,) = self.trainers
        return trainer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``RunsTogether``; of a single run."""
        (trainer,) = self.trainers
        trainer.load_state_dict(state)


class Stacked:
    """All runs as one vectorised program.

    Args:
        trainers: of one plan but for seed, density and weight, each at its first iteration.

    Raises:
        ValueError: if their plans differ in more.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = trainers
        self.plan = trainers[0].plan
        alike = {replace(trainer.plan, seed=0, density=None, weight="constant") for trainer in trainers}
        if len(alike) > 1:
            raise ValueError("stacked runs may differ in seed, density and weight only")
        self.bank = Block([trainer.denoiser for trainer in trainers], "vmap")
        self.current = list(self.bank.parameters.values())
        self.averaged = [value.detach().clone() for value in self.current]
        for index, trainer in enumerate(trainers):
            averaged = dict(trainer.ema.named_parameters())
            for name, own_value in trainer.denoiser.named_parameters():
                own_value.data = self.bank.parameters[name].detach()[index]
            for name, mean in zip(self.bank.parameters, self.averaged, strict=True):
                averaged[name].data = mean[index]
        self.optimizer = torch.optim.AdamW(
            self.current, lr=self.plan.lr, weight_decay=self.plan.weight_decay, fused=True
        )
        assert isinstance(trainers[0].source, Resident)
        self.samples = trainers[0].source.samples
        first = {trainer.plan.seed: trainer for trainer in reversed(trainers)}
        self.first_of_seed = list(first.values())  # one trainer reads the batch for all runs of its seed
        self.seed_of_run = torch.tensor([list(first).index(trainer.plan.seed) for trainer in trainers])
        self.loss_weight = torch.stack([trainer.loss_weight for trainer in trainers])
        self.updates = 0

    def step(self) -> None:
        """See ``RunsTogether``."""
        plan, step, device = self.plan, self.trainers[0].done, self.trainers[0].device
        read = [trainer.source.read(step, trainer.rows_of(step)) for trainer in self.first_of_seed]
        shape = (plan.batch, *read[0].shape[1:])
        noise = [normal(shape, trainer.plan.seed, NOISE, step, 0) for trainer in self.first_of_seed]
        x0, eps = torch.stack(read)[self.seed_of_run], torch.stack(noise).to(device)[self.seed_of_run]
        draws = [trainer.sampler.sample(plan.batch, step=step, device=device) for trainer in self.trainers]
        t = torch.stack([draw[0] for draw in draws])
        weight = torch.stack([draw[1] for draw in draws]) * self.loss_weight.gather(1, t)

        alpha, sigma = self.bank.template.scales(t, x0)
        target = from_x0_eps(plan.prediction, x0, eps, alpha, sigma)
        errors = (self.bank.predict(alpha * x0 + sigma * eps, t) - target).square().flatten(2).sum(2)
        losses = (errors * weight).sum(1) / (plan.batch * self.trainers[0].data.dim)
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        found = losses.detach().tolist()
        self._check("the loss", found, step)
        norms = self._gradient_norms()
        self._check("the norm of the gradient", norms.tolist(), step)
        if plan.clip:
            self._clip(norms)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr_at(step)
        self.optimizer.step()
        self._average()
        for trainer, loss in zip(self.trainers, found, strict=True):
            trainer.done += 1
            trainer.sampler.update(loss)

    def _check(self, what: str, values: list[float], step: int) -> None:
        for index, value in enumerate(values):
            if not math.isfinite(value):
                raise RunDiverged(index, self.trainers[index].divergence(what, value, step))

    def _gradients(self) -> list[Tensor]:
        return [value.grad for value in self.current if value.grad is not None]

    def _gradient_norms(self) -> Tensor:
        """Norm of the gradient of every run, (runs,)."""
        return torch.stack([gradient.flatten(1).norm(dim=1) for gradient in self._gradients()]).norm(dim=0)

    @torch.no_grad()
    def _clip(self, norms: Tensor) -> None:
        """Every run by the norm of its own gradient, as ``clip_grad_norm_`` does for one."""
        factor = (self.plan.clip / (norms + 1e-6)).clamp(max=1.0)
        for gradient in self._gradients():
            gradient.mul_(factor.reshape(-1, *[1] * (gradient.ndim - 1)))

    @torch.no_grad()
    def _average(self) -> None:
        current = [value.detach() for value in self.current]
        # The first average is the network itself, as in torch's AveragedModel.
        share = ema_share(self.plan.ema_decay, self.updates) if self.updates else 1.0
        torch._foreach_lerp_(self.averaged, current, share)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """See ``RunsTogether``."""
        names = list(self.bank.parameters)
        return {
            "model": dict(zip(names, self.current, strict=True)),
            "ema": dict(zip(names, self.averaged, strict=True)),
            "optimizer": self.optimizer.state_dict(),
            "samplers": [trainer.sampler.state_dict() for trainer in self.trainers],
            "step": self.trainers[0].done,
            "ema_updates": self.updates,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``RunsTogether``."""
        # In place: the trainers hold views of these tensors.
        for name, value, mean in zip(self.bank.parameters, self.current, self.averaged, strict=True):
            value.copy_(state["model"][name])
            mean.copy_(state["ema"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["ema_updates"]
        for trainer, sampler in zip(self.trainers, state["samplers"], strict=True):
            trainer.sampler.load_state_dict(sampler)
            trainer.done = state["step"]
