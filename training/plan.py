"""What determines a training run, but the data, the process and the curriculum."""

__all__ = ["LR_SCHEDULES", "LR_STARTS", "PRECISIONS", "TrainPlan"]

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from difficulty.errors import InputError, choose
from training.conditional import CONDITIONS


def _constant(progress: float) -> float:
    return 1.0


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Factor on the learning rate as a function of the share of the run that is done, in [0, 1).
LR_SCHEDULES: Mapping[str, Callable[[float], float]] = {"constant": _constant, "cosine": _cosine, "linear": _linear}
LR_STARTS = ("begin", "after-curriculum")


@dataclass(frozen=True)
class TrainPlan:
    """Everything that determines a run but the data, the process and the curriculum.

    Args:
        steps: iterations.
        batch: samples per iteration, over all processes and micro-batches together.
        micro_batches: parts into which a process cuts its samples to save memory; the gradient is that of the whole.
        precision: a name in ``PRECISIONS``, of the forward and backward pass; weights and optimizer stay in float32,
            and the loss is scaled for fp16 so that small gradients survive.
        gradient_checkpointing: compute the blocks of a network again in the backward pass, which saves memory.
        compile: compile the network with torch.compile.
        network: spec of the network, as in ``mlp:width=256``.
        prediction: what the network predicts.
        weight: loss weight, a spec of `weights.py`; ``+uncertainty`` behind it learns a factor per noise level.
        density: base density of t by spec; None takes the curriculum's, or uniform.
        stratified: spread the t of a batch evenly.
        lr: peak learning rate.
        lr_schedule: a name in ``LR_SCHEDULES``.
        lr_start: a name in ``LR_STARTS``; ``after-curriculum`` keeps the peak until the last stage has begun.
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
    gradient_checkpointing: bool = False
    compile: bool = False
    network: str = "mlp"
    prediction: str = "eps"
    weight: str = "constant"
    density: str | None = None
    stratified: bool = False
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    lr_start: str = "begin"
    warmup: int = 50
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_decay: float = 0.9999
    condition: str = "none"
    condition_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        choose("learning-rate schedule", self.lr_schedule, LR_SCHEDULES)
        choose("start of the learning-rate schedule", self.lr_start, dict.fromkeys(LR_STARTS))
        choose("precision", self.precision, PRECISIONS)
        choose("condition", self.condition, CONDITIONS)
        for name in ("steps", "batch", "micro_batches", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "clip", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not 0 <= self.condition_dropout <= 1:
            raise InputError(f"condition_dropout must lie in [0, 1], got {self.condition_dropout}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")

    def lr_at(self, step: int, start: int | None = 0) -> float:
        """Learning rate of an iteration, from 0.

        Args:
            step: the iteration.
            start: the iteration at which the schedule starts; None if it has not yet.
        """
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        progress = 0.0 if start is None else (step - start) / (self.steps - start)
        return self.lr * warm * LR_SCHEDULES[self.lr_schedule](progress)
