"""Draws of t: a curriculum (or none) as an object that any training loop can ask.

A uniform number u, given by (seed, step, rank) alone, is mapped through the inverse CDF of the current density of t:
    t = min { t : F(t) > u },    F(t) = sum_{t' <= t} p(t').
Two samplers with the same seed see the same u whatever their densities, which pairs the runs that are compared; two
ranks take different parts of one draw. The current density is the base density restricted to the tasks of the stage;
a curriculum may change the base density at stated shares of the budget, its phases.
One cluster of all tasks and no curriculum at all go through the same arithmetic and draw the same t.
"""

__all__ = ["StageRecord", "TimestepSampler", "coverage_rows", "stage_rows"]

import bisect
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.errors import InputError
from difficulty.process import Array, Process
from difficulty.randomness import uniform
from difficulty.records import digest, fingerprint_array
from training.curriculum import Curriculum
from training.density import Interval, density, normalised
from training.pacing import Fraction, Pacing, make_pacing
from training.streams import TIMESTEPS

# Held-out draws below which a check would be blind; it is then made less often instead.
LEAST_DRAWS = 64
# Forward passes without gradients that an iteration is worth at least: measured 1.9 for a DiT and more for others.
FORWARDS_PER_STEP = 1.5
# Parts of [0, 1) for whose beginnings t is kept. A binary search of random numbers is 10 steps on branches that no
# processor can foresee; from the beginning of its part on, only a u with a boundary before it has to be searched.
CELLS = 2**14
# Draws without a word of their loss after which a rule that waits for losses says so.
PATIENT_DRAWS = 100


@dataclass
class StageRecord:
    """One stage of a run, or the part of it under one base density: iterations start..end-1, why it ended, and how
    many samples each t has had.
    """

    stage: int
    tasks: list[int]
    start: int
    end: int | None = None
    reason: str = ""
    samples_per_t: list[int] = field(default_factory=list)


class TimestepSampler:
    """Draws timesteps 1..T and says when the curriculum moves on.

    Args:
        process: gives T; must be the one the curriculum was made for.
        curriculum: None trains on all t from the start.
        budget: iterations of the run, for pacing rules that spend a share of it.
        base_density: density by name where there is no curriculum, or to override the curriculum's; an array (T+1,)
            of probabilities is taken as it is.
        seed: names the stream of u.
        stratified: spread the u of one step evenly over [0, 1), over all ranks together.
        reweight: return weights that undo the base density, (1/T)/p[t], instead of ones.

    Raises:
        InputError: if the curriculum was made for another process, the density is zero on a whole stage, the budget is
            below 1, or the seed negative.
    """

    def __init__(
        self,
        process: Process,
        curriculum: Curriculum | None = None,
        *,
        budget: int,
        base_density: str | Array | None = None,
        seed: int = 0,
        stratified: bool = False,
        reweight: bool = False,
    ) -> None:
        if budget < 1 or seed < 0:
            raise InputError(f"a budget of at least 1 iteration and a seed from 0 are needed, got {budget} and {seed}")
        if curriculum is not None:
            curriculum.validate_for(process)
        self.T, self.seed, self.stratified, self.curriculum = process.T, seed, stratified, curriculum
        if base_density is None and curriculum is not None:
            phases = curriculum.base_densities(process)
        else:
            name = "uniform" if base_density is None else base_density
            phases = [(0.0, density(name, process) if isinstance(name, str) else normalised(name))]
        self.budget = budget
        self.phase_starts = [round(start * budget) for start, _ in phases]
        self.bases = [table for _, table in phases]
        for table in self.bases:
            if table.shape != (self.T + 1,) or table[0] != 0:
                raise InputError(f"a density of t needs shape ({self.T + 1},) with 0 first, got {table.shape}")
            if curriculum is not None:
                curriculum.refuse_empty_stages(table)
        stages = curriculum.stages() if curriculum else [[0]]
        self.stage_masks = [self._mask(tasks) for tasks in stages]
        self.pacing: Pacing = (
            make_pacing(curriculum.pacing.rule, curriculum.pacing.options, len(stages), budget)
            if curriculum
            else Fraction(1, budget)
        )
        self.reweight = reweight
        self.stage_tasks = stages
        self.records: list[StageRecord] = []
        self.counts = np.zeros(self.T + 1, dtype=np.int64)
        self._last = -1, self.counts
        self._unheard, self._warned = 0, False
        self.warn: Callable[[str], None] = functools.partial(warnings.warn, stacklevel=3)  # a run puts its own here
        self._enter(0, 0)

    @property
    def stage(self) -> int:
        """Number of the current stage, from 0."""
        return self.records[-1].stage

    @property
    def stages(self) -> int:
        """Number of stages; in the last one all t are trained."""
        return len(self.stage_masks)

    def sample(
        self, batch: int, *, step: int, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Timesteps for one iteration.

        Args:
            batch: draws on this rank.
            step: iteration, from 0; with gradient accumulation the number of the micro-step.
            rank, world: this process and the number of processes.

        Returns:
            t, int64 in 1..T, and its weight in the loss, float32, each of shape (batch,).

        Raises:
            InputError: if the batch is empty or the rank is none of 0..world - 1.
        """
        if batch < 1 or not 0 <= rank < world:
            raise InputError(f"rank {rank} of {world} cannot draw {batch} timesteps; ranks count from 0, draws from 1")
        self.advance(step)
        self._warn_if_stuck(step)
        # Each rank draws the whole global batch, logs it, and takes its part: two ranks train and log as one would.
        u = uniform((batch * world,), self.seed, TIMESTEPS, step, 0)
        if self.stratified:
            u = (np.arange(batch * world) + u) / (batch * world)
        whole = self._t_at(u)
        self._last = step, np.bincount(whole, minlength=self.T + 1)
        self.counts += self._last[1]
        t = torch.from_numpy(whole[rank * batch : (rank + 1) * batch])
        return t.to(device), self.weight_of_t.index_select(0, t).to(device)

    def _t_at(self, u: Array) -> npt.NDArray[np.int64]:
        """min { t : F(t) > u } of numbers in [0, 1), shape (n,)."""
        t = self.t_of_cell.take((u * CELLS).astype(np.int64))
        late = (self.cdf.take(t) <= u).nonzero()[0]
        t[late] = self.cdf.searchsorted(u[late], side="right")
        return t

    def _warn_if_stuck(self, step: int) -> None:
        """Say once that later stages will not come, or have not: their timesteps would silently never be trained."""
        self._unheard += 1
        if self._warned or self.stage == self.stages - 1:
            return
        here = f"stage {self.stage + 1} of {self.stages}"
        if self.pacing.wants_loss and self._unheard > PATIENT_DRAWS:
            said = f"{PATIENT_DRAWS} draws of {here} and no call of update(loss), by which this pacing ends a stage"
        elif step >= self.budget:
            said = f"the budget of {self.budget} iterations is spent in {here}; t of later ones were never drawn"
        else:
            return
        self._warned = True
        self.warn(said)

    def take_back(self, step: int) -> None:
        """Do not count the draws of an iteration that came to nothing and will be drawn again."""
        last, drawn = self._last
        if last == step:
            self.counts -= drawn
            self._last = -1, drawn

    def advance(self, step: int) -> None:
        """Go to the stage and the base density of iteration ``step``; ``sample`` does this by itself."""
        empty = []
        while self.stage < self.stages - 1:
            reason = self.pacing.due(self.stage, self.stage_start, step)
            if reason is None:
                break
            if self.stage_start == step:
                empty.append(self.stage + 1)
            self._leave(step, reason)
            self._enter(self.stage + 1, step)
        if empty:
            which = f"stage {empty[0]}" if len(empty) == 1 else f"stages {empty[0]} to {empty[-1]}"
            advice = "make fewer clusters or give the pacing more of the budget"
            self.warn(f"{which} of {self.stages} had no iterations; {advice}")
        phase = self._phase(step)
        if phase != self.phase:
            self._leave(step, f"base density {phase + 1} of {len(self.bases)} takes over")
            self._open_record(self.stage, step)

    def update(self, loss: Tensor | float, t: Tensor | None = None) -> None:
        """Report the batch loss of the iteration just sampled.

        Args:
            loss: mean over the batch, or one loss per sample; with several ranks the mean over all of them, so that
                every rank moves on at the same iteration.
            t: the timesteps, for loops that hand them over; the rules at hand do not read them.
        """
        self._unheard = 0
        # Reading a loss waits for the accelerator, so it is done only for rules that need it.
        if self.pacing.wants_loss and self.stage < self.stages - 1:
            mean = loss.detach().float().mean() if isinstance(loss, Tensor) and loss.ndim else loss
            self.pacing.observe(float(mean))

    @property
    def heldout_every(self) -> int:
        """Iterations between calls of ``update_heldout`` that the pacing rule wants now; 0 for none."""
        return self.pacing.check_every if self.stage < self.stages - 1 else 0

    def heldout_plan(self, batch: int, available: int) -> tuple[int, int]:
        """Iterations between checks, a multiple of ``heldout_every``, and draws of each, within the rule's ``cost``.

        A check takes at least ``LEAST_DRAWS`` draws, or all there are if those are fewer. Not for the last stage, which
        has no checks.

        Args:
            batch: samples per iteration of all processes.
            available: draws there are in the current stage.
        """
        # Forward passes from one check to the next.
        affordable = FORWARDS_PER_STEP * batch * self.pacing.cost * self.heldout_every
        least = min(LEAST_DRAWS, available)
        stretch = max(1, math.ceil(least / affordable))
        return stretch * self.heldout_every, max(least, min(available, int(stretch * affordable)))

    def update_heldout(self, losses: Sequence[float]) -> None:
        """Report losses on fixed draws of the current stage's timesteps (see ``active``)."""
        self.pacing.observe_heldout(losses)

    def active(self, t: Array) -> npt.NDArray[np.bool_]:
        """Which timesteps belong to the current stage, a boolean array of the shape of t."""
        return self.stage_masks[self.stage][t]

    def probabilities(self) -> Array:
        """Current density of t, shape (T+1,)."""
        return np.diff(self.cdf, prepend=0.0)

    def finish(self, step: int) -> None:
        """Close the log at the end of a run of ``step`` iterations."""
        self._leave(step, "end of the budget")
        self._warn_if_stuck(step)

    def log(self) -> list[StageRecord]:
        """All stages so far; the current one has the counts so far."""
        current = self.records[-1]
        if current.end is None:
            current.samples_per_t = self.counts.tolist()
        return self.records

    def exposure(self) -> Array:
        """Expected histogram of t so far: the density of every stage weighted by its samples, shape (T+1,), sum 1.

        Expected, not counted: 1e5 draws over 1000 timesteps leave gaps and noise.
        """
        total = np.zeros(self.T + 1)
        for record in self.log():
            restricted = self._restricted(record)
            total += sum(record.samples_per_t) * restricted / restricted.sum()
        return total / total.sum()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, JSON only."""
        return {
            "seed": self.seed,
            "records": [asdict(record) for record in self.log()],
            "pacing": self.pacing.state_dict(),
            "curriculum": self.curriculum.sha256 if self.curriculum else None,
            "budget": self.budget,
            "density": self._density_sha256,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            InputError: if the state belongs to another curriculum, seed, budget or density.
        """
        own = self.state_dict()
        for name in ("curriculum", "seed", "budget", "density"):
            # States of earlier versions hold neither budget nor density.
            if state.get(name, own[name]) != own[name]:
                raise InputError(f"the saved sampler belongs to another {name}; start a new run")
        self.records = [StageRecord(**record) for record in state["records"]]
        self.counts = np.array(self.records[-1].samples_per_t, dtype=np.int64)
        self._set_density()
        self.pacing.load_state_dict(state["pacing"])

    @property
    def _density_sha256(self) -> str:
        # Rounded, so that the last bit of another platform's exp does not make another density.
        rounded = np.round(np.stack(self.bases), 9) + 0.0  # no negative zero
        return digest({"densities": fingerprint_array(rounded), "reweight": self.reweight})

    def _mask(self, tasks: Sequence[int]) -> npt.NDArray[np.bool_]:
        mask = np.zeros(self.T + 1, dtype=bool)
        if self.curriculum is None:
            mask[1:] = True
            return mask
        for index in tasks:
            task = self.curriculum.tasks[index]
            mask[task.t_first : task.t_last + 1] = True
        return mask

    @property
    def stage_start(self) -> int:
        """Iteration at which the current stage began."""
        return next(record.start for record in self.records if record.stage == self.stage)

    def _phase(self, step: int) -> int:
        """Number of the base density of an iteration."""
        return bisect.bisect_right(self.phase_starts, step) - 1

    def _enter(self, stage: int, step: int) -> None:
        self.pacing.begin_stage(stage)
        self._open_record(stage, step)

    def _open_record(self, stage: int, step: int) -> None:
        self.records.append(StageRecord(stage, list(self.stage_tasks[stage]), step))
        self.counts = np.zeros(self.T + 1, dtype=np.int64)
        self._set_density()

    def _leave(self, step: int, reason: str) -> None:
        record = self.records[-1]
        record.end, record.reason, record.samples_per_t = step, reason, self.counts.tolist()

    def _restricted(self, record: StageRecord) -> Array:
        return np.where(self.stage_masks[record.stage], self.bases[self._phase(record.start)], 0.0)

    def _set_density(self) -> None:
        self.phase = self._phase(self.records[-1].start)
        cdf = np.cumsum(self._restricted(self.records[-1]))
        # Divided by its own end, so that the end is exactly 1 and no u < 1 falls behind it.
        self.cdf = cdf / cdf[-1]
        self.t_of_cell = self.cdf.searchsorted(np.arange(CELLS) / CELLS, side="right")
        base = self.bases[self.phase]
        with np.errstate(divide="ignore"):
            table = np.where(base > 0, 1 / (self.T * base), 0.0) if self.reweight else np.ones(self.T + 1)
        self.weight_of_t = torch.as_tensor(table, dtype=torch.float32)


def stage_rows(sampler: TimestepSampler, tasks: Sequence[Interval]) -> list[dict[str, Any]]:
    """The rows of stages.csv: stage, start, end, reason, and the samples that each task has had in the stage.

    ``samples_per_task`` is one text of numbers, cleanest task first, separated by blanks.
    """
    rows = []
    for record in sampler.log():
        counts = [sum(record.samples_per_t[task.t_first : task.t_last + 1]) for task in tasks]
        row = {"stage": record.stage, "start": record.start, "end": record.end, "reason": record.reason}
        rows.append(row | {"samples_per_task": " ".join(map(str, counts))})
    return rows


def coverage_rows(sampler: TimestepSampler, process: Process) -> dict[str, Array]:
    """The columns of coverage.csv: every t in 1..T, its log-SNR, the samples that it had, and those to be expected."""
    samples = np.sum([record.samples_per_t for record in sampler.log()], axis=0)
    t = np.arange(1, process.T + 1)
    expected = sampler.exposure() * samples.sum()
    return {"t": t, "log_snr": process.log_snr(t), "samples": samples[1:], "expected": expected[1:]}
