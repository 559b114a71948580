"""One run of a comparison, an arm with a seed and a learning-rate schedule: trained and judged.

Runs that can share a batched program (`batched.py`) are trained in groups. A group that is interrupted goes on from its
last checkpoint.
"""

__all__ = ["HELD_OUT", "Job", "Setting", "group_jobs", "run_file", "run_group"]

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from difficulty.datasets import Dataset
from difficulty.errors import InputError
from difficulty.process import Array, Process
from difficulty.ranking import RankingTask
from difficulty.records import write_bytes
from training.arms import ArmSpec
from training.batched import RunDiverged, can_be_stacked, train_together
from training.checkpoint import load_latest, save_checkpoint
from training.excess import Excess
from training.heldout import HeldOut
from training.metrics import SampleJudge
from training.plan import TrainPlan
from training.sampling import draw_samples
from training.timesteps import stage_rows
from training.trainer import Trainer

# Added to the seeds of A/A arms: far from any seed that a user would give.
FRESH = 1_000_003
EVALUATIONS = 20
SHOWN = 64
HELD_OUT = ("nats", "excess", "loss")  # the metrics of a learning curve, the second only of a known law
# Wider programs gain little more, and a narrow one loses little when it is interrupted.
LARGEST_GROUP = 16
SECONDS_BETWEEN_CHECKPOINTS = 60.0


@dataclass(frozen=True, eq=False)
class Setting:
    """What all runs of a comparison share."""

    data: Dataset
    process: Process
    tasks: list[RankingTask]
    plan: TrainPlan
    samples: int
    metrics: tuple[str, ...]
    device: str = "cpu"

    @cached_property
    def heldout(self) -> HeldOut:
        """The fixed draws, made once in every process."""
        return HeldOut(self.data, self.process, self.tasks)

    @cached_property
    def excess(self) -> Excess | None:
        """Nats above the Bayes loss, where the law of the data is known."""
        return Excess(self.heldout, self.data, self.process) if self.data.law else None

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        """One point of the learning curve, of the averaged weights."""
        found = self.heldout.evaluate(trainer.ema)
        point = {"step": trainer.done, "nats": found.nats, "loss": found.loss}
        if self.excess is not None:
            point["excess"] = self.excess(trainer.ema)
        return point | {"nats_per_task": found.nats_per_task.tolist()}

    @cached_property
    def judge(self) -> SampleJudge:
        """The metrics of samples, with features fitted once in every process."""
        return SampleJudge(self.data.train, self.metrics, self.data.value_range)

    def trainer(self, spec: ArmSpec, seed: int, lr_schedule: str, exposure: Array | None = None) -> Trainer:
        """The trainer of one run.

        Raises:
            InputError: if it cannot be built.
        """
        own = seed + FRESH if spec.fresh_seeds else seed
        plan = replace(self.plan, seed=own, density=spec.density, weight=spec.weight, lr_schedule=lr_schedule)
        curriculum = spec.curriculum_for(seed)
        return Trainer(self.data, self.process, plan, curriculum, base_density=exposure, device=self.device)


@dataclass(frozen=True)
class Job:
    """One run; ``exposure`` replaces the density of t where the arm copies another's histogram."""

    arm: str
    spec: ArmSpec
    seed: int
    lr_schedule: str
    file: Path
    keep_samples: bool
    exposure: Array | None = None

    @property
    def label(self) -> str:
        """What a reader calls it."""
        return f"{self.arm} seed {self.seed}"


def run_file(out: Path, arm: str, seed: int, lr_schedule: str) -> Path:
    """Where a finished run is kept."""
    # An arm's options may hold characters that not every file system takes.
    return out / "runs" / f"{re.sub(r'[^A-Za-z0-9_.+-]', '-', arm)}-{lr_schedule}-seed{seed}.json"


def group_jobs(setting: Setting, jobs: Sequence[Job], workers: int) -> list[list[Job]]:
    """Jobs in groups that train together, no fewer groups than workers where there are enough jobs."""
    able: list[Job] = []
    alone: list[Job] = []
    for job in jobs:
        in_memory = setting.data.large is None
        together = in_memory and can_be_stacked(replace(setting.plan, weight=job.spec.weight))
        (able if together else alone).append(job)
    groups = [[job] for job in alone]
    for schedule in dict.fromkeys(job.lr_schedule for job in able):
        alike = [job for job in able if job.lr_schedule == schedule]
        size = min(LARGEST_GROUP, -(-len(alike) // workers))
        groups += [alike[first : first + size] for first in range(0, len(alike), size)]
    return groups


def run_group(setting: Setting, jobs: Sequence[Job], partial: Path) -> list[dict[str, Any]]:
    """Train the runs of a group side by side and judge each.

    Args:
        setting: what they share.
        jobs: of one learning-rate schedule.
        partial: folder of unfinished groups.

    Raises:
        InputError: if the loss of a run diverged.
    """
    began = time.monotonic()
    trainers = [setting.trainer(job.spec, job.seed, job.lr_schedule, job.exposure) for job in jobs]
    together, steps = train_together(trainers), setting.plan.steps
    at = {max(1, round(steps * (i + 1) / EVALUATIONS)) for i in range(EVALUATIONS)}
    curves: list[list[dict[str, Any]]] = [[] for _ in jobs]
    own = partial / hashlib.sha256(" ".join(job.file.name for job in jobs).encode()).hexdigest()[:16]
    state, _ = load_latest(own)
    if state is not None:
        curves = state.pop("curves")
        together.load_state_dict(state)
    saved = time.monotonic()
    while trainers[0].done < steps:
        try:
            together.step()
        except RunDiverged as error:
            job = jobs[error.index]
            raise InputError(f"arm {job.arm!r} with seed {job.seed}: {error}; finished runs are kept") from None
        for trainer, curve in zip(trainers, curves, strict=True):
            trainer.report_heldout(setting.heldout)
            if trainer.done in at:
                curve.append(setting.measure(trainer))
        if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS and trainers[0].done < steps:
            save_checkpoint(own, together.state_dict() | {"curves": curves}, keep=1)
            saved = time.monotonic()
    results = [_judged(setting, *each) for each in zip(jobs, trainers, curves, strict=True)]
    seconds = round((time.monotonic() - began) / len(jobs), 2)
    return [result | {"seconds": seconds} for result in results]


def _judged(setting: Setting, job: Job, trainer: Trainer, curve: list[dict[str, Any]]) -> dict[str, Any]:
    trainer.sampler.finish(trainer.done)
    drawn = draw_samples(
        trainer.ema, setting.samples, setting.data.shape, seed=trainer.plan.seed, device=setting.device
    )
    try:
        judged = setting.judge(drawn)
    except InputError as error:
        raise InputError(f"arm {job.arm!r} with seed {job.seed}: {error}; finished runs are kept") from None
    if job.keep_samples:
        from safetensors.torch import save

        write_bytes(job.file.with_suffix(".safetensors"), save({"data": drawn[:SHOWN].contiguous()}))
    return {
        "arm": job.arm,
        "seed": job.seed,
        "lr_schedule": job.lr_schedule,
        "final": {name: curve[-1][name] for name in HELD_OUT if name in curve[-1]} | judged,
        "curve": curve,
        "stages": stage_rows(trainer.sampler, setting.tasks),
        "exposure": trainer.sampler.exposure().tolist(),
    }
