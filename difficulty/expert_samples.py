"""How good samples are when one expert denoises its own task and a network on all t does the rest.

This is the second curve of arXiv 2403.10348: sample quality against the iterations of each expert. Samples go from
x_T = sigma_T eps down to clean data in steps along the probability flow (DDIM, Song et al. 2021, arXiv 2010.02502,
eq. 12 with eta = 0), equally many in every task:

    x_s = alpha_s x0_hat + sigma_s eps_hat,    (x0_hat, eps_hat) of the expert inside its task, of the shared network
                                               of the same training seed elsewhere

The start is the same for all tasks and checkpoints of a seed, and differs between seeds, so that the spread over seeds
holds the noise of sampling. sample_quality.csv has one row per task, seed, checkpoint and metric:

    value    distance of the samples to the train samples; ``fd-pca`` Frechet distance on 16 principal components,
             ``sw-pixels`` sliced Wasserstein distance (`distances.py`)
    shared   the same where the shared network denoises everything
    perfect  the same of as many train samples that are left out of the reference: what a perfect sampler would show

As a measure of difficulty stands the iteration at which 90 % of the fall of fd-pca up to the budget has happened, the
definition of `convergence.py`. A task whose expert removes less than 2 % of the distance from perfect samples says
nothing about it: these samples do not depend on the expert.
"""

__all__ = ["QUALITY_COLUMNS", "SampleQuality", "quality_estimates"]

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from difficulty.convergence import paper_style, summary_over_seeds
from difficulty.datasets import Dataset
from difficulty.distances import frechet, pca, sliced_wasserstein
from difficulty.engines import Bank
from difficulty.errors import InputError
from difficulty.estimate import Estimate
from difficulty.expert_plan import ExpertPlan
from difficulty.experts import train_shared
from difficulty.losses import LearningCurves
from difficulty.prediction import to_x0
from difficulty.process import Array, Process
from difficulty.randomness import normal, stream
from difficulty.records import check_columns
from difficulty.tasks import Task

QUALITY_COLUMNS = ("task", "seed", "iteration", "samples", "metric", "value", "shared", "perfect")
# Counters of the random streams begin with another number than those of training and of held-out draws.
SAMPLE_STREAM, SPLIT_STREAM = 4, 5
STEPS = 48  # in all, at least; shared out equally among the tasks
SAMPLES = 512
REFERENCE = 2048
CHECKPOINTS = 9  # up to the budget; twice the budget comes on top
SHARED_BUDGETS = 10  # the shared network is trained for so many budgets: it has all tasks to learn
RANKED_METRIC = "fd-pca"
CHUNK_NUMBERS = 2**22  # float32 numbers of input at a time


class SampleQuality:
    """Judges experts by samples at some of their checkpoints; to be handed to ``train_experts`` as ``watch``.

    Training the shared networks, for ``SHARED_BUDGETS`` budgets, is the first thing that it does.

    Args:
        dataset, process, tasks, plan: as of the experts.
        earlier: rows of an interrupted run, with ``QUALITY_COLUMNS``.
        write: called with all rows so far after every checkpoint judged.
    """

    def __init__(
        self,
        dataset: Dataset,
        process: Process,
        tasks: Sequence[Task],
        plan: ExpertPlan,
        *,
        earlier: pd.DataFrame | None = None,
        write: Callable[[pd.DataFrame], None] = lambda table: None,
    ) -> None:
        self.plan, self.tasks, self.write = plan, list(tasks), write
        self.table = pd.DataFrame(columns=list(QUALITY_COLUMNS)) if earlier is None else earlier
        within = [iteration for iteration in plan.iterations if iteration <= plan.budget]
        chosen = np.linspace(0, len(within) - 1, CHECKPOINTS).round().astype(int)
        self.iterations = {plan.iterations[-1], *(within[index] for index in chosen)}
        order = stream(SPLIT_STREAM, 0, 0, 0).permutation(len(dataset.train))
        self.count = min(SAMPLES, len(order) // 2)
        flat = dataset.train.flatten(1).double().numpy()[order]
        held, reference = flat[: self.count], flat[self.count : self.count + REFERENCE]
        self.metrics = _metrics(reference)
        self.perfect = {name: metric(held) for name, metric in self.metrics.items()}
        self.grid = [_steps_in(task, process, -(-STEPS // len(tasks))) for task in tasks]
        self.shared = train_shared(dataset, process, plan, SHARED_BUDGETS * plan.budget)
        start = torch.stack(
            [normal((self.count, *dataset.shape), SAMPLE_STREAM, seed, 0, 0) for seed in plan.seeds]
        )
        self.entries = self._pass_all(float(process.sigma[self.grid[-1][0]]) * start.to(self.shared.template.alpha))
        self.shared_values = [self._judge(final) for final in self.entries[-1]]

    def __call__(self, iteration: int, tasks: Sequence[Task], bank: Bank) -> None:
        """Judge the experts of some tasks, one per seed and task, those of the first seed first."""
        if iteration not in self.iterations:
            return
        S, K = len(self.plan.seeds), len(tasks)
        entries = torch.stack([self.entries[len(self.tasks) - 1 - task.index] for task in tasks], dim=1)
        passed = _through(bank, entries.flatten(0, 1), [self.grid[task.index] for _ in range(S) for task in tasks])
        finals = self._finish(list(tasks), passed.unflatten(0, (S, K)))
        rows = [
            (task.index, seed, iteration, iteration * self.plan.batch, name, value, self.shared_values[s][name],
             self.perfect[name])
            for k, task in enumerate(tasks)
            for s, seed in enumerate(self.plan.seeds)
            for name, value in self._judge(finals[k][s]).items()
        ]  # fmt: skip
        fresh = pd.DataFrame(rows, columns=list(QUALITY_COLUMNS))
        # A first checkpoint starts its tasks afresh; a later one may come twice after an interruption.
        mine = self.table["task"].isin(fresh["task"]) & (self.table["iteration"] >= iteration)
        kept = self.table[~mine]
        self.table = fresh if kept.empty else pd.concat([kept, fresh], ignore_index=True)
        self.table = self.table.sort_values(["metric", "task", "seed", "iteration"], ignore_index=True)
        self.write(self.table)

    def _pass_all(self, start: Tensor) -> list[Tensor]:
        """States (S, n, *) of the shared networks at the entry of every task, noisiest first, and at the end."""
        states = [start]
        for steps in reversed(self.grid):
            states.append(_through(self.shared, states[-1], [steps] * len(self.plan.seeds)))
        return states

    def _finish(self, tasks: Sequence[Task], passed: Tensor) -> list[Tensor]:
        """Clean samples (S, n, *) per task, from the states (S, K, n, *) after the experts, by the shared networks."""
        waiting = {task.index: passed[:, k] for k, task in enumerate(tasks)}
        under_way: dict[int, Tensor] = {}
        for level in range(len(self.tasks) - 1, -1, -1):
            if under_way:
                joined = torch.cat(list(under_way.values()), dim=1)
                moved = _through(self.shared, joined, [self.grid[level]] * len(self.plan.seeds))
                under_way = dict(zip(under_way, moved.split(self.count, dim=1), strict=True))
            if level in waiting:
                under_way[level] = waiting[level]
        return [under_way[task.index] for task in tasks]

    def _judge(self, samples: Tensor) -> dict[str, float]:
        """Every metric of samples (n, *); infinite where an expert diverged."""
        flat = samples.flatten(1).double().cpu().numpy()
        if not np.isfinite(flat).all():
            return dict.fromkeys(self.metrics, np.inf)
        return {name: metric(flat) for name, metric in self.metrics.items()}


def quality_estimates(table: pd.DataFrame, budget: int, tasks: int) -> dict[str, Estimate]:
    """The measure ``sample_quality`` from sample_quality.csv.

    Raises:
        InputError: if a column is missing or a task has no rows.
    """
    check_columns(table, QUALITY_COLUMNS, "sample_quality.csv")
    rows = table[(table["metric"] == RANKED_METRIC) & (table["iteration"] <= budget)]
    rows = rows.sort_values(["seed", "task", "iteration"])
    if sorted(rows["task"].unique()) != list(range(tasks)):
        raise InputError("sample_quality.csv does not have rows for every task; measure again")
    iterations = np.unique(rows["iteration"]).astype(np.float64)
    distance = rows["value"].to_numpy(dtype=np.float64).reshape(-1, tasks, len(iterations))
    above = distance - rows["perfect"].iloc[0]
    curves = LearningCurves(iterations, distance, above, np.zeros_like(above), above[..., 0].mean(0))
    values = paper_style(curves)
    found = summary_over_seeds("sample_quality", values, curves, values)
    value, low, high = (found[name].to_numpy(dtype=np.float64) for name in ("value", "ci_low", "ci_high"))
    return {
        "sample_quality": Estimate(
            unit="iterations",
            # That a value is missing says nothing here, but an expert that diverged is hardest.
            value=np.where(curves.diverged, np.inf, value),
            ci_low=low,
            ci_high=high,
            log=True,
            flagged=found["censored"].to_numpy(dtype=bool),
            hardest_if_missing=False,
            note=f"until 90 % of the fall of {RANKED_METRIC}; none where samples do not depend on the expert",
        )
    }


def _metrics(reference: Array) -> Mapping[str, Callable[[Array], float]]:
    features = pca(reference)
    seen = features(reference)
    return {
        "fd-pca": lambda samples: frechet(features(samples), seen),
        "sw-pixels": lambda samples: sliced_wasserstein(samples, reference),
    }


def _steps_in(task: Task, process: Process, count: int) -> npt.NDArray[np.int64]:
    """Timesteps (count + 1,) from the noisy end of a task to the noisy end of the next; equal ones are no step."""
    # Where alpha is 0 nothing can be told about x0: the last timestep with signal begins.
    last = min(task.last, process.noisiest)
    # Rounded up, so that t = 0 is reached by the last step only.
    return np.ceil(np.linspace(last, task.first - 1, count + 1) - 1e-9).astype(np.int64).clip(max=last)


@torch.no_grad()
def _through(bank: Bank, x: Tensor, steps: Sequence[npt.NDArray[np.int64]]) -> Tensor:
    """States (E, n, *) after E denoisers took x of that shape through their own steps."""
    per_chunk = max(1, CHUNK_NUMBERS // max(1, x[:, 0].numel()))
    template, times = bank.template, torch.from_numpy(np.stack(steps)).to(x.device)
    parts = []
    for part in x.split(per_chunk, dim=1):
        for t, s in zip(times.T[:-1], times.T[1:], strict=True):
            now, then = (step[:, None].expand(-1, part.shape[1]) for step in (t, s))
            alpha, sigma = template.scales(now, part)
            x0 = to_x0(template.prediction, bank.predict(part, now), part, alpha, sigma)
            alpha_next, sigma_next = template.scales(then, part)
            part = alpha_next * x0 + sigma_next * (part - alpha * x0) / sigma
        parts.append(part)
    return torch.cat(parts, dim=1)
