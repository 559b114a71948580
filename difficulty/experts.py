"""Experts: one denoiser per task and seed, all with the same initial weights per seed, trained side by side.

Every expert sees only the timesteps of its own task. The experts of one seed share the clean samples, the noise and the
position within the task at every iteration, so that tasks differ by nothing but their timesteps. Held-out losses are
taken on one fixed set of draws (x0, eps, t) per task, the same for every seed, network and prediction:

    loss = E |eps - eps_hat|^2    summed over the D dimensions, whatever the network predicts.

Beside it stands, per draw, the loss of the best known denoiser, the *floor*: for an exact law the posterior mean, for
other data a Gaussian (Wiener) denoiser and, after training, the best expert on the same draws (`convergence.py`).

Experts start cold, from the same random weights per seed; or warm, with weights trained on all t (``shared``) or on the
next noisier task (``neighbour``, noisiest first). How they are run together is the business of `engines.py`.
"""

__all__ = [
    "STARTS",
    "ExpertCurves",
    "ExpertPlan",
    "build_expert",
    "log_spaced_iterations",
    "train_experts",
    "train_shared",
]

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from difficulty.datasets import Dataset
from difficulty.denoiser import Denoiser
from difficulty.engines import ENGINES, Bank, choose_engine
from difficulty.errors import InputError, choose
from difficulty.heldout import HeldOutDraws, floor_losses, heldout_draws, zero_losses
from difficulty.networks import build_network
from difficulty.prediction import from_x0_eps, to_eps
from difficulty.process import Process
from difficulty.randomness import normal, stream, uniform
from difficulty.records import write_bytes
from difficulty.tasks import Task

Progress = Callable[[int, int], None]  # called with (iterations done, iterations in all)
# Called at every checkpoint with the iteration, the tasks and their experts, those of the first seed first.
Watcher = Callable[[int, Sequence[Task], Bank], None]

# First counters of the random streams; held-out draws begin with another (`heldout.py`).
TRAIN_STREAM, WARM_STREAM = 1, 3
STARTS = ("cold", "shared", "neighbour")
LEAST_BUDGET = 20
CHECKPOINTS = 24
# Evaluated at a time, to bound memory: 2^22 float32 numbers of input are 16 MiB.
EVALUATION_NUMBERS = 2**22


@dataclass(frozen=True)
class ExpertPlan:
    """How experts are trained; together with data, process and tasks it determines every number.

    Args:
        network: a name in ``NETWORKS`` with options, e.g. ``mlp:width=128``, or ``FILE.py:FACTORY``.
        prediction: a name in ``PREDICTIONS``.
        seeds: one expert per task is trained for each.
        budget: iterations at which difficulty is read off, >= 20. Training goes on to twice that, for the floor.
        batch: samples per expert and iteration.
        learning_rate: of AdamW, constant, no weight decay.
        heldout_draws: fixed draws (x0, eps, t) per task.
        engine: a name in ``difficulty.engines.ENGINES``, or auto.
        start: a name in ``STARTS``. A network on all t is trained for the budget first and not counted.
    """

    network: str = "mlp"
    prediction: str = "eps"
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: int = 2000
    batch: int = 128
    learning_rate: float = 1e-3
    heldout_draws: int = 1024
    engine: str = "auto"
    start: str = "cold"

    def __post_init__(self) -> None:
        if self.budget < LEAST_BUDGET:
            raise InputError(f"a budget of {self.budget} iterations ends before the first checkpoints; use >= 20")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise InputError(f"seeds must be different non-negative whole numbers, got {self.seeds}")
        for name in ("batch", "heldout_draws", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        if self.engine != "auto":
            choose("engine", self.engine, ENGINES)
        choose("start", self.start, dict.fromkeys(STARTS))

    @property
    def iterations(self) -> list[int]:
        """Iterations after which held-out losses are taken: 0, log-spaced up to the budget, and twice the budget."""
        return [0, *log_spaced_iterations(self.budget), round(1.4 * self.budget), 2 * self.budget]


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
    """

    iterations: list[int]
    losses: npt.NDArray[np.float32]
    excess: npt.NDArray[np.float32] | None
    floor: npt.NDArray[np.float64]
    zero: npt.NDArray[np.float32]
    floor_is_exact: bool


def log_spaced_iterations(last: int, count: int = CHECKPOINTS) -> list[int]:
    """At most ``count`` different whole numbers from about last/100 to last, evenly spaced on the log scale."""
    first = max(1, last // 100)
    return sorted({round(value) for value in np.geomspace(first, last, count)})


def train_experts(
    dataset: Dataset,
    process: Process,
    tasks: Sequence[Task],
    plan: ExpertPlan,
    *,
    resume_from: Path | None = None,
    progress: Progress | None = None,
    watch: Watcher | None = None,
) -> ExpertCurves:
    """Train one expert per task and seed and take their held-out losses on fixed draws.

    Args:
        dataset: train samples are drawn with replacement; losses are taken on held-out samples.
        process: the forward process.
        tasks: of that process.
        plan: see ``ExpertPlan``.
        resume_from: file that keeps the state of an unfinished run; written while training, read if it exists.
        progress: called after every iteration with (done, in all).
        watch: called at every checkpoint before it is kept, so that a resumed run may call it twice for one.

    Raises:
        InputError: if the plan does not fit the data, or ``resume_from`` belongs to another run.
    """
    state = _State(dataset, process, plan, resume_from, watch)
    if plan.start == "neighbour":
        return _train_in_turn(state, tasks, progress)
    weights: list[dict[str, Tensor]] | None = None
    if plan.start == "shared":
        bank = train_shared(dataset, process, plan, plan.budget)
        weights = [bank.weights(index) for index in range(len(plan.seeds))]
    return _train(state, tasks, weights, resume_from, progress)[0]


@dataclass(frozen=True, eq=False)
class _State:
    """What every stage of a training needs."""

    dataset: Dataset
    process: Process
    plan: ExpertPlan
    resume_from: Path | None = None
    watch: Watcher | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def bank(self, tasks: int, weights: Sequence[dict[str, Tensor]] | None) -> Bank:
        """One denoiser per seed and task, all of a seed with the same weights."""
        denoisers = []
        for index, seed in enumerate(self.plan.seeds):
            for _ in range(tasks):
                denoiser = build_expert(self.dataset, self.process, self.plan, seed)
                if weights is not None:
                    denoiser.load_state_dict(weights[index], strict=False)  # buffers of the process are not weights
                denoisers.append(denoiser.to(self.device))
        return ENGINES[choose_engine(self.plan.engine, self.plan.network)](denoisers)

    def optimizer(self, bank: Bank) -> torch.optim.Optimizer:
        """AdamW over all denoisers; it acts on every number by itself, so that they stay independent."""
        return torch.optim.AdamW(bank.parameters.values(), lr=self.plan.learning_rate, weight_decay=0.0, fused=True)


def _train(
    state: _State,
    tasks: Sequence[Task],
    weights: Sequence[dict[str, Tensor]] | None,
    resume_from: Path | None,
    progress: Progress | None,
) -> tuple[ExpertCurves, Bank]:
    """Train the experts of all tasks side by side, from the given weights per seed or cold."""
    plan, S = state.plan, len(state.plan.seeds)
    bank = state.bank(len(tasks), weights)
    optimizer = state.optimizer(bank)
    draws = heldout_draws(state.dataset, tasks, plan.heldout_draws)
    floor, posterior = floor_losses(state.dataset, state.process, draws)
    run = _Checkpoint(resume_from, bank, optimizer, (state.dataset, state.process, tasks, plan))
    losses, excess = run.load()
    iterations = plan.iterations
    start = iterations[len(losses) - 1] if losses else 0
    watch = state.watch or (lambda iteration, tasks, bank: None)
    if not losses:
        _append(losses, excess, bank, draws, posterior, S)
        watch(0, tasks, bank)
    train = state.dataset.train.to(state.device)
    for step in range(start, iterations[-1]):
        _step(bank, optimizer, train, tasks, plan, TRAIN_STREAM, step)
        if step + 1 == iterations[len(losses)]:
            _append(losses, excess, bank, draws, posterior, S)
            watch(step + 1, tasks, bank)
            run.save(losses, excess)
        if progress is not None:
            progress(step + 1, iterations[-1])
    stacked = np.stack(excess, axis=2) if posterior is not None else None
    zero = zero_losses(bank.template, draws)
    return ExpertCurves(iterations, np.stack(losses, axis=2), stacked, floor, zero, posterior is not None), bank


def _step(
    bank: Bank,
    optimizer: torch.optim.Optimizer,
    train: Tensor,
    tasks: Sequence[Task],
    plan: ExpertPlan,
    counter: int,
    step: int,
) -> None:
    """One iteration of all experts."""
    first = torch.tensor([task.first for task in tasks], device=train.device)
    length = torch.tensor([task.length for task in tasks], device=train.device)
    x0, eps, u = _training_draws(train, plan, counter, step)
    t = (first[:, None] + (u[:, None] * length[:, None]).floor().long()).flatten(0, 1)
    x0, eps = (_per_expert(a, len(tasks)) for a in (x0, eps))
    alpha, sigma = bank.template.scales(t, x0)
    optimizer.zero_grad()
    bank.backward(alpha * x0 + sigma * eps, t, from_x0_eps(plan.prediction, x0, eps, alpha, sigma))
    optimizer.step()


def train_shared(dataset: Dataset, process: Process, plan: ExpertPlan, iterations: int) -> Bank:
    """One denoiser per seed on all timesteps together, started as the experts are; repeated, not stored, on resuming.

    Args:
        dataset, process, plan: as of the experts.
        iterations: of training.
    """
    state = _State(dataset, process, plan)
    everything = [Task(0, 1, process.T, float("inf"), float("-inf"))]
    bank = state.bank(1, None)
    optimizer = state.optimizer(bank)
    train = dataset.train.to(state.device)
    for step in range(iterations):
        _step(bank, optimizer, train, everything, plan, WARM_STREAM, step)
    return bank


def _train_in_turn(state: _State, tasks: Sequence[Task], progress: Progress | None) -> ExpertCurves:
    """Train the tasks one after the other, noisiest first, each from the weights of the one before."""
    parts: list[ExpertCurves] = []
    weights: list[dict[str, Tensor]] | None = None
    total = state.plan.iterations[-1] * len(tasks)
    for turn, task in enumerate(reversed(tasks)):
        path = state.resume_from and state.resume_from.with_suffix(f".{task.index}{state.resume_from.suffix}")
        report = None if progress is None else _shifted(progress, turn * state.plan.iterations[-1], total)
        curves, bank = _train(state, [task], weights, path, report)
        parts.insert(0, curves)
        weights = [bank.weights(index) for index in range(len(state.plan.seeds))]
    if state.resume_from is not None:
        for task in tasks:
            state.resume_from.with_suffix(f".{task.index}{state.resume_from.suffix}").unlink(missing_ok=True)
    joined = [part.excess for part in parts if part.excess is not None]
    return replace(
        parts[0],
        losses=np.concatenate([part.losses for part in parts], axis=1),
        excess=np.concatenate(joined, axis=1) if joined else None,
        floor=np.concatenate([part.floor for part in parts]),
        zero=np.concatenate([part.zero for part in parts]),
    )


def _shifted(progress: Progress, offset: int, total: int) -> Progress:
    return lambda done, _: progress(offset + done, total)


def build_expert(dataset: Dataset, process: Process, plan: ExpertPlan, seed: int) -> Denoiser:
    """An untrained expert; all experts of a seed start alike.

    Raises:
        InputError: if the network or the prediction is unknown or does not fit the data.
    """
    data_std = float(dataset.train.double().square().mean().sqrt())
    return Denoiser(build_network(plan.network, dataset.shape, seed), process, plan.prediction, data_std)


def _training_draws(train: Tensor, plan: ExpertPlan, counter: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean samples and noise (S, B, *), position within the task (S, B) of one iteration."""
    shape = (plan.batch, *train.shape[1:])
    rows, noise, u = [], [], []
    for seed in plan.seeds:
        rows.append(torch.from_numpy(stream(counter, seed, step, 0).integers(len(train), size=plan.batch)))
        noise.append(normal(shape, counter, seed, step, 1))
        u.append(uniform((plan.batch,), counter, seed, step, 2))
    x0 = train[torch.stack(rows).to(train.device)]
    return x0, torch.stack(noise).to(train.device), torch.stack(u).to(train.device)


def _per_expert(values: Tensor, tasks: int) -> Tensor:
    """(S, B, *) repeated for every task, (S * K, B, *), without copying before it is used."""
    return values[:, None].expand(-1, tasks, *values.shape[1:]).flatten(0, 1)


def _append(
    losses: list[npt.NDArray[np.float32]],
    excess: list[npt.NDArray[np.float32]],
    bank: Bank,
    draws: HeldOutDraws,
    posterior: Tensor | None,
    seeds: int,
) -> None:
    """Add the losses (S, K, M), and the excess where the posterior is known, of all experts at this moment."""
    K, M = draws.t.shape
    per_chunk = max(1, EVALUATION_NUMBERS // (seeds * draws.x0[:, 0].numel()))
    device = bank.template.alpha.device
    parts: list[Tensor] = []
    parts_excess: list[Tensor] = []
    for chunk in torch.arange(M).split(per_chunk):
        x0, eps, t = (a[:, chunk].to(device) for a in (draws.x0, draws.eps, draws.t))
        x0, eps, t = (a.repeat(seeds, *(1,) * (a.ndim - 1)) for a in (x0, eps, t))
        alpha, sigma = bank.template.scales(t, x0)
        x_t = alpha * x0 + sigma * eps
        with torch.no_grad():
            output = bank.predict(x_t, t)
        estimate = to_eps(bank.template.prediction, output, x_t, alpha, sigma)
        parts.append((estimate - eps).square().flatten(2).sum(2).unflatten(0, (seeds, K)).cpu())
        if posterior is not None:
            goal = posterior[:, chunk].to(device).repeat(seeds, *(1,) * (posterior.ndim - 1))
            parts_excess.append((estimate - goal).square().flatten(2).sum(2).unflatten(0, (seeds, K)).cpu())
    losses.append(torch.cat(parts, -1).numpy())
    if parts_excess:
        excess.append(torch.cat(parts_excess, -1).numpy())


@dataclass(eq=False)
class _Checkpoint:
    """State of an unfinished run: parameters, AdamW's moments and the losses so far, in one safetensors file."""

    path: Path | None
    bank: Bank
    optimizer: torch.optim.Optimizer
    inputs: tuple[Dataset, Process, Sequence[Task], ExpertPlan]
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        dataset, process, tasks, plan = self.inputs
        bounds = [(task.first, task.last) for task in tasks]
        facts = [dataset.fingerprint, process.fingerprint, bounds, asdict(plan)]
        self.identity = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()

    def load(self) -> tuple[list[npt.NDArray[np.float32]], list[npt.NDArray[np.float32]]]:
        """Restore parameters and moments; return the losses and excesses taken so far (none for a fresh run)."""
        if self.path is None or not self.path.exists():
            return [], []
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path} is not readable ({error}); delete it to start afresh") from None
        if metadata.get("identity") != self.identity:
            raise InputError(f"{self.path} belongs to a run with other settings; delete it or choose another --out")
        for name, parameter in self.bank.parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"parameter/{name}"])
            self.optimizer.state[parameter] = {
                "step": tensors[f"step/{name}"],
                "exp_avg": tensors[f"exp_avg/{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(parameter.device),
            }
        excess = list(tensors["excess"].numpy()) if "excess" in tensors else []
        return list(tensors["losses"].numpy()), excess

    def save(self, losses: list[npt.NDArray[np.float32]], excess: list[npt.NDArray[np.float32]]) -> None:
        if self.path is None:
            return
        tensors = {"losses": torch.from_numpy(np.stack(losses))}
        if excess:
            tensors["excess"] = torch.from_numpy(np.stack(excess))
        for name, parameter in self.bank.parameters.items():
            tensors[f"parameter/{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        content = {name: value.cpu().contiguous() for name, value in tensors.items()}
        write_bytes(self.path, save(content, {"identity": self.identity}))
