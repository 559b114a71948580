"""Experts: one denoiser per task and seed, all with the same initial weights per seed, trained side by side.

Every expert sees only the timesteps of its own task. The experts of one seed share the clean samples, the noise and the
position within the task at every iteration, so that tasks differ by nothing but their timesteps. Held-out losses are
taken on one fixed set of draws (x0, eps, t) per task, the same for every seed, network and prediction:

    loss = E |eps - eps_hat|^2    summed over the D dimensions, whatever the network predicts.

Beside it stands, per draw, the loss of the best known denoiser, the *floor*: for an exact law the posterior mean, for
other data the best linear denoiser and, after training, the best expert on the same draws (`convergence.py`).

Experts start cold, from the same random weights per seed; or warm, with weights trained on all t (``shared``) or on the
next noisier task (``neighbour``, noisiest first). How they are run together is the business of `engines.py`, how they
are shared among processes that of `ranks.py`; neither changes a draw, and numbers only by rounding.
"""

__all__ = [
    "ExpertCurves",
    "build_expert",
    "choose_expert_engine",
    "train_experts",
    "train_shared",
]

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from difficulty.datasets import Dataset
from difficulty.devices import training_device
from difficulty.engines import Bank, EngineChoice, choose_engine
from difficulty.errors import InputError
from difficulty.expert_crew import (
    EVALUATION_DRAWS,
    WARM_STREAM,
    Crew,
    Found,
    Member,
    Progress,
    build_expert,
)
from difficulty.expert_plan import ExpertPlan
from difficulty.heldout import check_draws, heldout_rows
from difficulty.process import Process
from difficulty.ranks import Ranks, helpers, launched_ranks
from difficulty.tasks import Task

# Called at every checkpoint with the iteration, the tasks and their experts, those of the first seed first.
Watcher = Callable[[int, Sequence[Task], Bank], None]

@dataclass(frozen=True, eq=False)
class ExpertCurves:
    """Held-out losses of every expert on the fixed draws.

    Args:
        iterations: when they were taken, (C,).
        losses: |eps - eps_hat|^2 per draw, float32 (S, K, C, M) for S seeds, K tasks, M draws.
        excess: |eps_hat - E[eps | x_t]|^2 per draw, of the same shape; None without an exact law.
        floor: the same losses of the best denoiser known beforehand, (K, M).
        zero: the same losses of the network that outputs zero, (K, M).
        floor_is_exact: whether that is the posterior mean of an exact law.
        engine: how the experts were trained; None for curves from elsewhere.
        zero_excess: the excess per draw of the network that outputs zero, (K, M); None without an exact law.
        rows: which held-out sample each draw takes, (K, M); None where each has one of its own.
    """

    iterations: list[int]
    losses: npt.NDArray[np.float32]
    excess: npt.NDArray[np.float32] | None
    floor: npt.NDArray[np.float64]
    zero: npt.NDArray[np.float32]
    floor_is_exact: bool
    engine: EngineChoice | None = None
    zero_excess: npt.NDArray[np.float32] | None = None
    rows: npt.NDArray[np.int64] | None = None


def train_experts(
    dataset: Dataset,
    process: Process,
    tasks: Sequence[Task],
    plan: ExpertPlan,
    *,
    processes: int | None = None,
    resume_from: Path | None = None,
    progress: Progress | None = None,
    watch: Watcher | None = None,
) -> ExpertCurves:
    """Train one expert per task and seed and take their held-out losses on fixed draws.

    Under torchrun every rank must make the same call: it trains its share of the experts and returns all curves.

    Args:
        dataset: train samples are drawn with replacement; losses are taken on held-out samples.
        process: the forward process.
        tasks: of that process.
        plan: see ``ExpertPlan``.
        processes: how many share the experts on this machine, one thread each; None for the choice of
            ``choose_engine``. torchrun decides it where it is used.
        resume_from: file that keeps the state of a run; written while training by rank 0, read if it exists, and left
            to the caller, since what comes after training may be interrupted too. Experts that are trained in N rounds
            have a file for each, with ``.1-of-N`` and so on before the suffix.
        progress: called after every iteration with (done, in all).
        watch: called at every checkpoint before it is kept, so that a resumed run may call it twice for one. It needs
            one process.

    Raises:
        InputError: if the plan does not fit the data, or ``resume_from`` belongs to another run.
    """
    ranks = launched_ranks()
    watched = watch is not None
    choice = ranks.on_first(
        lambda: choose_expert_engine(dataset, process, tasks, plan, processes, watched=watched)
    )
    # Experts see whole timesteps only, and a closed form may be a lambda, which no other process could be handed.
    training = _Training(dataset, replace(process, closed_form=None), tuple(tasks), plan, choice, resume_from)
    if ranks.world == 1 and choice.processes > 1:
        with helpers(choice.processes, training) as team:
            curves = training.run(team, progress)
    else:
        curves = ranks.share(training.run(ranks, progress, watch))
    assert curves is not None
    return curves


def choose_expert_engine(
    dataset: Dataset,
    process: Process,
    tasks: Sequence[Task],
    plan: ExpertPlan,
    processes: int | None = None,
    *,
    watched: bool = False,
) -> EngineChoice:
    """How these experts would be trained here; see ``choose_engine`` and ``train_experts``.

    Raises:
        InputError: if a task is empty, or the plan does not fit the data or the machine.
    """
    if not tasks:
        raise InputError("there is no task to train an expert for")
    for task in tasks:
        if not 1 <= task.first <= task.last <= process.T:
            raise InputError(
                f"task {task.index} holds no timesteps of 1..{process.T} (first {task.first}, last {task.last})"
            )
    check_draws(dataset, len(tasks), plan.heldout_draws)
    world = launched_ranks().world
    if world > 1 and processes not in (None, world):
        raise InputError(f"torchrun started {world} processes, but {processes} were asked for; leave the number to it")
    if world > 1 or dist.is_initialized():
        processes = world  # the group of another program cannot be joined by helpers
    if watched and processes not in (None, 1):
        raise InputError(
            "samples of experts are judged in one process, which must hold them; leave out torchrun and --workers"
        )
    choice = _choose(dataset, process, plan, len(tasks) * len(plan.seeds), 1 if watched else processes)
    _check_buffers(dataset, process, plan)
    if watched and choice.at_once < len(plan.seeds):
        raise InputError("experts of all seeds must fit in memory together to be judged by samples; use fewer seeds")
    return choice


def train_shared(dataset: Dataset, process: Process, plan: ExpertPlan, iterations: int) -> Bank:
    """One denoiser per seed on all timesteps together, started as the experts are; repeated, not stored, on resuming.

    Args:
        dataset, process, plan: as of the experts.
        iterations: of training.
    """
    everything = Task(0, 1, process.T, float("inf"), float("-inf"))
    members = [(s, 0) for s in range(len(plan.seeds))]
    choice = _choose(dataset, process, plan, len(members), 1)
    crew = Crew(dataset, process, [everything], plan, choice, members, {})
    for step in range(iterations):
        crew.step(WARM_STREAM, step)
    assert crew.bank is not None
    return crew.bank


def _check_buffers(dataset: Dataset, process: Process, plan: ExpertPlan) -> None:
    """Raise InputError if seeds differ in buffers: those of a block's first expert serve the whole block."""
    first, *others = (dict(build_expert(dataset, process, plan, seed).named_buffers()) for seed in plan.seeds)
    for name, value in first.items():
        if any(not torch.equal(value, other[name]) for other in others):
            raise InputError(
                f"buffer {name!r} of network {plan.network!r} differs between seeds; make it a parameter that requires "
                "no gradient"
            )


def _choose(
    dataset: Dataset, process: Process, plan: ExpertPlan, experts: int, processes: int | None
) -> EngineChoice:
    return choose_engine(
        build_expert(dataset, process, plan, plan.seeds[0]).to(training_device()),
        dataset.shape,
        batch=max(plan.batch, EVALUATION_DRAWS),
        experts=experts,
        iterations=plan.iterations[-1],
        engine=plan.engine,
        compiled=plan.compile,
        processes=processes,
    )


@dataclass(frozen=True, eq=False)
class _Training:
    """All experts, in rounds of as many as the processes together can hold."""

    dataset: Dataset
    process: Process
    tasks: tuple[Task, ...]
    plan: ExpertPlan
    choice: EngineChoice
    resume_from: Path | None

    def __call__(self, ranks: Ranks) -> None:
        """What a helper does."""
        self.run(ranks, None)

    def run(
        self, ranks: Ranks, progress: Progress | None, watch: Watcher | None = None
    ) -> ExpertCurves | None:
        """The curves of all experts, on rank 0."""
        rounds = self._rounds(ranks.on_first(lambda: self._count_rounds(self.choice.at_once * ranks.world)))
        weights: dict[int, dict[str, Tensor]] = {}
        if self.plan.start == "shared":
            weights = self._shared_weights(sorted({s for members in rounds for s, _ in _share(members, ranks)}))
        total = self.plan.iterations[-1] * len(rounds)
        paths = [self._path(number, len(rounds)) for number in range(len(rounds))]
        found: list[tuple[Member, Found]] = []
        for number, members in enumerate(rounds):
            offset = number * self.plan.iterations[-1]
            report = None if progress is None else _shifted(progress, offset, total)
            crew = Crew(
                self.dataset, self.process, self.tasks, self.plan, self.choice, _share(members, ranks), weights
            )
            show = None if watch is None else functools.partial(self._show, watch, members)
            crew.train(members, ranks, paths[number], report, show)
            if self.plan.start == "neighbour":
                weights |= crew.weights()
            for part in ranks.gather(crew.found()):
                found += part
            del crew, show  # before those of the next round take their memory
        if not ranks.first:
            return None
        return self._curves(dict(found))

    def _count_rounds(self, size: int) -> int:
        """As many rounds as an interrupted run had, else as few as hold no more than ``size`` experts each.

        Raises:
            InputError: if those of the interrupted run hold more.
        """
        S, K = len(self.plan.seeds), len(self.tasks)
        one_task = self.plan.start == "neighbour" or size < S
        count = K * math.ceil(S / size) if one_task else math.ceil(K / (size // S))
        if (begun := self._begun()) is None:
            return count
        if (most := max(map(len, self._rounds(begun)))) > size:
            raise InputError(
                f"this run was begun with {most} experts at a time, and only {size} fit in memory now; free some, or "
                "use more processes"
            )
        return begun

    def _begun(self) -> int | None:
        """The number of rounds of an interrupted run."""
        path = self.resume_from
        if path is None or path.exists():
            return None if path is None else 1
        for file in path.parent.glob(f"{path.stem}.*-of-*{path.suffix}"):
            return int(file.stem.rpartition("-of-")[2])
        return None

    def _rounds(self, count: int) -> list[list[Member]]:
        """The experts of each round; up to K rounds of whole tasks, or a multiple of K with some seeds of one task."""
        S, K = len(self.plan.seeds), len(self.tasks)
        # Seeds stay with their ranks from task to task, which therefore have the neighbours that they need.
        order = range(K)[::-1] if self.plan.start == "neighbour" else range(K)
        stages = np.array_split(np.array(order), min(count, K))
        parts = np.array_split(np.arange(S), max(1, count // K))
        return [[(int(s), int(k)) for s in part for k in stage] for stage in stages for part in parts]

    def _show(self, watch: Watcher, members: Sequence[Member], iteration: int, bank: Bank) -> None:
        watch(iteration, [self.tasks[k] for k in dict.fromkeys(k for _, k in members)], bank)

    def _path(self, number: int, rounds: int) -> Path | None:
        path = self.resume_from
        return path if path is None or rounds == 1 else path.with_suffix(f".{number + 1}-of-{rounds}{path.suffix}")

    def _shared_weights(self, seeds: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        if not seeds:
            return {}
        plan = replace(self.plan, seeds=tuple(self.plan.seeds[s] for s in seeds))
        bank = train_shared(self.dataset, self.process, plan, plan.budget)
        return {s: bank.weights(index) for index, s in enumerate(seeds)}

    def _curves(self, found: dict[Member, Found]) -> ExpertCurves:
        S, K = len(self.plan.seeds), len(self.tasks)
        first = [found[0, k] for k in range(K)]
        exact = first[0].excess is not None
        return ExpertCurves(
            self.plan.iterations,
            np.stack([np.stack([found[s, k].losses for k in range(K)]) for s in range(S)]),
            np.stack([np.stack([found[s, k].excess for k in range(K)]) for s in range(S)]) if exact else None,  # type: ignore[misc]
            np.stack([one.floor for one in first]),
            np.stack([one.zero for one in first]),
            exact,
            self.choice,
            np.stack([one.zero_excess for one in first]) if exact else None,  # type: ignore[misc]
            heldout_rows(len(self.dataset.heldout), self.tasks, self.plan.heldout_draws),
        )


def _share(members: Sequence[Member], ranks: Ranks) -> Sequence[Member]:
    """The members of a round that this rank trains."""
    edges = [len(members) * rank // ranks.world for rank in (ranks.rank, ranks.rank + 1)]
    return members[edges[0] : edges[1]]


def _shifted(progress: Progress, offset: int, total: int) -> Progress:
    return lambda done, _: progress(offset + done, total)
