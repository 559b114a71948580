"""The experts that one process trains at the same time: their draws, their steps and their held-out losses.

All experts of a seed see the same clean samples, noise and positions within the task at a step, whatever process trains
them; see `experts.py` for what is trained and why.
"""

__all__ = [
    "EVALUATION_DRAWS",
    "TRAIN_STREAM",
    "WARM_STREAM",
    "Crew",
    "Found",
    "Member",
    "Progress",
    "build_expert",
]

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.datasets import Dataset
from difficulty.denoiser import Denoiser
from difficulty.devices import full_precision, training_device
from difficulty.engines import Bank, EngineChoice
from difficulty.expert_plan import ExpertPlan
from difficulty.expert_state import ExpertState
from difficulty.heldout import Floors, heldout_draws, zero_losses
from difficulty.network_file import fingerprint_network
from difficulty.networks import build_network
from difficulty.prediction import from_x0_eps, to_eps
from difficulty.process import Process
from difficulty.randomness import integers, normal, uniform
from difficulty.ranks import Ranks
from difficulty.tasks import Task

Progress = Callable[[int, int], None]  # called with (iterations done, iterations in all)
Member = tuple[int, int]  # index of the seed, index of the task

# First counters of the random streams; held-out draws begin with another (`heldout.py`).
TRAIN_STREAM, WARM_STREAM = 1, 3
# Evaluated at a time as many draws as are trained on, and at least these, so that no more memory is needed.
EVALUATION_DRAWS = 64


@dataclass(frozen=True, eq=False)
class Found:
    """Of one expert: losses and excess (C, M), and of its task: floor, and loss and excess of the zero network (M,)."""

    losses: npt.NDArray[np.float32]
    excess: npt.NDArray[np.float32] | None
    floor: npt.NDArray[np.float64]
    zero: npt.NDArray[np.float32]
    zero_excess: npt.NDArray[np.float32] | None


class Crew:
    """The experts that this process trains at the same time.

    Args:
        dataset, process, plan: as in ``experts.train_experts``.
        tasks: in the numbering of the members.
        choice: how they are run.
        members: of this process; may be empty.
        weights: to start from, by seed; others start cold.
    """

    def __init__(
        self,
        dataset: Dataset,
        process: Process,
        tasks: Sequence[Task],
        plan: ExpertPlan,
        choice: EngineChoice,
        members: Sequence[Member],
        weights: dict[int, dict[str, Tensor]],
    ) -> None:
        self.dataset, self.process, self.tasks, self.plan = dataset, process, tasks, plan
        self.members = list(members)
        device = training_device()
        denoisers = []
        for s, _ in self.members:
            denoiser = build_expert(dataset, process, plan, plan.seeds[s])
            if s in weights:
                denoiser.load_state_dict(weights[s], strict=False)  # buffers of the process are not weights
            denoisers.append(denoiser.to(device))
        self.bank = (
            Bank(denoisers, choice.engine, choice.block, compiled=choice.compiled) if denoisers else None
        )
        self.train_samples = dataset.train.to(device)
        self.seeds = sorted({s for s, _ in self.members})
        # Of every member: place of its seed, first timestep, number of timesteps.
        self.place = torch.tensor([self.seeds.index(s) for s, _ in self.members], device=device)
        self.first = torch.tensor([[tasks[k].first] for _, k in self.members], device=device)
        self.length = torch.tensor([[tasks[k].length] for _, k in self.members], device=device)
        self.optimizer: torch.optim.Optimizer | None = None
        if self.bank:
            # AdamW acts on every number by itself, so that one serves all experts and they stay independent.
            self.optimizer = torch.optim.AdamW(self.bank.leaves, lr=plan.learning_rate, weight_decay=0.0, fused=True)
        self.held = sorted({k for _, k in self.members})
        self.posterior: Tensor | None = None
        self.losses: list[npt.NDArray[np.float32]] = []
        self.excess: list[npt.NDArray[np.float32]] = []

    def weights(self) -> dict[int, dict[str, Tensor]]:
        """A copy of the weights by seed; of the last task where there are several."""
        return {s: self.bank.weights(index) for index, (s, _) in enumerate(self.members) if self.bank}

    def train(
        self,
        everybody: Sequence[Member],
        ranks: Ranks,
        path: Path | None,
        progress: Progress | None,
        watch: Callable[[int, Bank], None] | None,
    ) -> None:
        """Train to the end, from the state in the file at ``path`` if there is one.

        Args:
            everybody: the members of all ranks in this round, in order of rank.
            ranks: that train at the same time.
            path: of the state, which rank 0 reads and writes.
            progress: called with (iterations done, in all).
            watch: called at every checkpoint with the iteration and the experts, before it is kept.
        """
        plan, iterations = self.plan, self.plan.iterations
        if self.bank:
            held = [self.tasks[k] for k in self.held]
            self.draws = heldout_draws(self.dataset, held, plan.heldout_draws)
            floors = Floors(self.dataset, self.process)
            known = [floors.losses(self.draws.of_task(row)) for row in range(len(held))]
            self.floor = np.stack([losses for losses, _ in known])
            if self.dataset.law is not None:
                self.posterior = torch.stack([posterior for _, posterior in known if posterior is not None])
            self.zero, self.zero_excess = zero_losses(self.bank.template, self.draws, self.posterior)
        bounds = [(plan.seeds[s], self.tasks[k].first, self.tasks[k].last) for s, k in everybody]
        network = fingerprint_network(plan.network)
        facts = [self.dataset.fingerprint, self.process.fingerprint, bounds, asdict(plan), network]
        state = ExpertState(path, facts, self.bank, self.optimizer, ranks, (len(self.members), plan.heldout_draws))
        self.losses, self.excess = state.load(iterations)
        if not self.losses:
            self._evaluate()
            self._show(0, watch)
        start = iterations[len(self.losses) - 1]
        for step in range(start, iterations[-1]):
            self.step(TRAIN_STREAM, step)
            if step + 1 == iterations[len(self.losses)]:
                self._evaluate()
                self._show(step + 1, watch)
                state.save(self.losses, self.excess)
            if progress is not None:
                progress(step + 1, iterations[-1])

    def _show(self, iteration: int, watch: Callable[[int, Bank], None] | None) -> None:
        if watch is not None and self.bank is not None:
            watch(iteration, self.bank)

    def found(self) -> list[tuple[Member, Found]]:
        """What the members of this rank came to."""
        found = []
        for index, (s, k) in enumerate(self.members):
            row = self.held.index(k)
            losses = np.stack([values[index] for values in self.losses])
            excess = np.stack([values[index] for values in self.excess]) if self.excess else None
            zero_excess = None if self.zero_excess is None else self.zero_excess[row]
            found.append(((s, k), Found(losses, excess, self.floor[row], self.zero[row], zero_excess)))
        return found

    def step(self, counter: int, step: int) -> None:
        """One iteration of every member."""
        if self.bank is None or self.optimizer is None:
            return
        plan, template = self.plan, self.bank.template
        seeds = [plan.seeds[s] for s in self.seeds]
        x0s, noise, us = _training_draws(self.train_samples, plan.batch, seeds, counter, step)
        self.optimizer.zero_grad()
        for block, own in self.bank.slices():
            x0, eps, u = (values[self.place[own]] for values in (x0s, noise, us))
            t = self.first[own] + (u * self.length[own]).floor().long()
            alpha, sigma = template.scales(t, x0)
            block.backward(alpha * x0 + sigma * eps, t, from_x0_eps(plan.prediction, x0, eps, alpha, sigma))
        self.optimizer.step()

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Add the losses (E, M), and the excess where the posterior is known, of all members at this moment."""
        M, size = self.plan.heldout_draws, max(self.plan.batch, EVALUATION_DRAWS)
        losses = np.empty((len(self.members), M), dtype=np.float32)
        excess = np.empty_like(losses)
        with full_precision():
            for block, own in self.bank.slices() if self.bank else []:
                rows = torch.tensor([self.held.index(k) for _, k in self.members[own]])
                device = block.template.alpha.device
                for first in range(0, M, size):
                    chunk = slice(first, first + size)
                    x0, eps, t = (
                        values[rows, chunk].to(device) for values in (self.draws.x0, self.draws.eps, self.draws.t)
                    )
                    alpha, sigma = block.template.scales(t, x0)
                    x_t = alpha * x0 + sigma * eps
                    estimate = to_eps(block.template.prediction, block.predict(x_t, t), x_t, alpha, sigma)
                    losses[own, chunk] = (estimate - eps).square().flatten(2).sum(2).cpu()
                    if self.posterior is not None:
                        goal = self.posterior[rows, chunk].to(device)
                        excess[own, chunk] = (estimate - goal).square().flatten(2).sum(2).cpu()
        self.losses.append(losses)
        if self.dataset.law is not None:
            self.excess.append(excess)


def build_expert(dataset: Dataset, process: Process, plan: ExpertPlan, seed: int) -> Denoiser:
    """An untrained expert; all experts of a seed start alike.

    Raises:
        InputError: if the network or the prediction is unknown or does not fit the data.
    """
    data_std = float(dataset.train.double().square().mean().sqrt())
    return Denoiser(build_network(plan.network, dataset.shape, seed), process, plan.prediction, data_std)


def _training_draws(
    train: Tensor, batch: int, seeds: Sequence[int], counter: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Clean samples and noise (S, B, *), position within the task (S, B) of one iteration."""
    rows, noise, u = [], [], []
    for seed in seeds:
        rows.append(integers(len(train), batch, counter, seed, step, 0))
        noise.append(normal((batch, *train.shape[1:]), counter, seed, step, 1))
        u.append(torch.from_numpy(uniform((batch,), counter, seed, step, 2)))
    x0 = train[torch.stack(rows).to(train.device)]
    return x0, torch.stack(noise).to(train.device), torch.stack(u).to(train.device)
