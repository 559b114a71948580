"""Experts: one denoiser per task and seed, all with the same initial weights per seed, trained side by side.

Every expert sees only the timesteps of its own task. The experts of one seed share the clean samples, the noise and the
position within the task at every iteration, so that tasks differ by nothing but their timesteps. Held-out losses are
taken on one fixed set of draws (x0, eps, t) per task, the same for every seed, network and prediction:

    loss = E |eps - eps_hat|^2    summed over the D dimensions, whatever the network predicts.

Beside it stands, per draw, the loss of the best known denoiser, the *floor*: for an exact law the posterior mean, for
other data a Gaussian (Wiener) denoiser and, after training, the best expert on the same draws (`convergence.py`).

Two engines give the same numbers to float tolerance: ``vmap`` stacks the parameters of all experts and runs them as one
batched program; ``loop`` runs one after the other, which is faster for convolutions and attention on a CPU.
"""

__all__ = [
    "ENGINES",
    "ExpertCurves",
    "ExpertPlan",
    "HeldOutDraws",
    "build_expert",
    "floor_losses",
    "heldout_draws",
    "log_spaced_iterations",
    "posterior_eps_at",
    "train_experts",
    "wiener",
]

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from difficulty.datasets import Dataset
from difficulty.denoiser import Denoiser
from difficulty.errors import InputError, choose
from difficulty.laws import GaussianMixture, Law
from difficulty.networks import build_network
from difficulty.prediction import from_x0_eps, to_eps
from difficulty.process import Process
from difficulty.randomness import normal, stream, uniform
from difficulty.records import write_bytes
from difficulty.tasks import Task

Progress = Callable[[int, int], None]  # called with (iterations done, iterations in all)

# First counters of the random streams: held-out draws must not depend on the training seed.
TRAIN_STREAM, HELDOUT_STREAM = 1, 2
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
        engine: a name in ``ENGINES``, or auto.
    """

    network: str = "mlp"
    prediction: str = "eps"
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: int = 2000
    batch: int = 128
    learning_rate: float = 1e-3
    heldout_draws: int = 1024
    engine: str = "auto"

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
        floor_is_exact: whether that is the posterior mean of an exact law.
    """

    iterations: list[int]
    losses: npt.NDArray[np.float32]
    excess: npt.NDArray[np.float32] | None
    floor: npt.NDArray[np.float64]
    floor_is_exact: bool


def log_spaced_iterations(last: int, count: int = CHECKPOINTS) -> list[int]:
    """At most ``count`` different whole numbers from about last/100 to last, evenly spaced on the log scale."""
    first = max(1, last // 100)
    return sorted({round(value) for value in np.geomspace(first, last, count)})


class Bank(ABC):
    """E denoisers of one architecture with parameters of their own, trained by one optimizer."""

    def __init__(self, denoisers: Sequence[Denoiser]) -> None:
        self.template = denoisers[0]
        self.parameters = self._own(denoisers)

    @abstractmethod
    def _own(self, denoisers: Sequence[Denoiser]) -> dict[str, Tensor]:
        """The leaf tensors to optimise, by name."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Outputs (E, B, *) at x_t (E, B, *) and integer t (E, B)."""

    @abstractmethod
    def backward(self, x_t: Tensor, t: Tensor, target: Tensor) -> None:
        """Add the gradient of every expert's mean squared error to its parameters."""


class StackedBank(Bank):
    """Parameters stacked along a leading expert axis; one vectorised program runs all experts."""

    def _own(self, denoisers: Sequence[Denoiser]) -> dict[str, Tensor]:
        stacked, _ = stack_module_state(list(denoisers))
        return {name: value.detach().requires_grad_() for name, value in stacked.items()}

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        def one(parameters: dict[str, Tensor], x: Tensor, when: Tensor) -> Tensor:
            return functional_call(self.template, parameters, (x, when))

        return vmap(one)(self.parameters, x_t, t)

    def backward(self, x_t: Tensor, t: Tensor, target: Tensor) -> None:
        # Mean within an expert, sum over experts: each expert's gradient is that of training it alone.
        (self.predict(x_t, t) - target).square().flatten(1).mean(1).sum().backward()


class LoopBank(Bank):
    """One module per expert, run one after the other."""

    def _own(self, denoisers: Sequence[Denoiser]) -> dict[str, Tensor]:
        self.denoisers = nn.ModuleList(denoisers)
        return dict(self.denoisers.named_parameters())

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.stack([one(x, when) for one, x, when in zip(self.denoisers, x_t, t, strict=True)])

    def backward(self, x_t: Tensor, t: Tensor, target: Tensor) -> None:
        for one, x, when, goal in zip(self.denoisers, x_t, t, target, strict=True):
            (one(x, when) - goal).square().mean().backward()


ENGINES: Mapping[str, type[Bank]] = {"vmap": StackedBank, "loop": LoopBank}


def choose_engine(plan: ExpertPlan) -> str:
    """The faster engine: vmap for the MLP and on a GPU, loop for convolutions and attention on a CPU."""
    if plan.engine != "auto":
        return plan.engine
    return "vmap" if plan.network.partition(":")[0] == "mlp" or torch.cuda.is_available() else "loop"


@dataclass(frozen=True, eq=False)
class HeldOutDraws:
    """The fixed draws of every task: x0 and eps (K, M, *), t (K, M)."""

    x0: Tensor
    eps: Tensor
    t: Tensor


def heldout_draws(dataset: Dataset, tasks: Sequence[Task], count: int) -> HeldOutDraws:
    """Fixed draws per task: held-out samples in turn, fresh noise, t stratified over the task.

    The same for every network, prediction and training seed, on every machine.
    """
    clean, noise, times = [], [], []
    for task in tasks:
        rng = stream(HELDOUT_STREAM, task.first, task.last)
        rounds = math.ceil(count / len(dataset.heldout))
        rows = np.concatenate([rng.permutation(len(dataset.heldout)) for _ in range(rounds)])[:count]
        strata = (rng.permutation(count) + 0.5) / count
        clean.append(dataset.heldout[torch.from_numpy(rows)])
        noise.append(normal((count, *dataset.shape), HELDOUT_STREAM, task.first, task.last, 1))
        times.append(torch.from_numpy(task.first + np.floor(strata * task.length).astype(np.int64)))
    return HeldOutDraws(torch.stack(clean), torch.stack(noise), torch.stack(times))


def train_experts(
    dataset: Dataset,
    process: Process,
    tasks: Sequence[Task],
    plan: ExpertPlan,
    *,
    resume_from: Path | None = None,
    progress: Progress | None = None,
) -> ExpertCurves:
    """Train one expert per task and seed and take their held-out losses on fixed draws.

    Args:
        dataset: train samples are drawn with replacement; losses are taken on held-out samples.
        process: the forward process.
        tasks: of that process.
        plan: see ``ExpertPlan``.
        resume_from: file that keeps the state of an unfinished run; written while training, read if it exists.
        progress: called after every iteration.

    Raises:
        InputError: if the plan does not fit the data, or ``resume_from`` belongs to another run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    E, K, S = len(tasks) * len(plan.seeds), len(tasks), len(plan.seeds)
    denoisers = [build_expert(dataset, process, plan, seed).to(device) for seed in plan.seeds for _ in tasks]
    bank = ENGINES[choose_engine(plan)](denoisers)
    optimizer = torch.optim.AdamW(
        bank.parameters.values(), lr=plan.learning_rate, weight_decay=0.0, fused=True
    )
    draws = heldout_draws(dataset, tasks, plan.heldout_draws)
    floor, posterior = floor_losses(dataset, process, draws)
    run = _Checkpoint(resume_from, bank, optimizer, (dataset, process, tasks, plan))
    losses, excess = run.load()

    train = dataset.train.to(device)
    first = torch.tensor([task.first for task in tasks], device=device)
    length = torch.tensor([task.length for task in tasks], device=device)
    iterations = plan.iterations
    start = iterations[len(losses) - 1] if losses else 0
    if not losses:
        _append(losses, excess, bank, draws, posterior, S)
    for step in range(start, iterations[-1]):
        x0, eps, u = _training_draws(train, plan, step)
        t = (first[:, None] + (u[:, None] * length[:, None]).floor().long()).reshape(E, plan.batch)
        x0, eps = (_per_expert(a, K) for a in (x0, eps))
        alpha, sigma = bank.template.scales(t, x0)
        optimizer.zero_grad()
        bank.backward(alpha * x0 + sigma * eps, t, from_x0_eps(plan.prediction, x0, eps, alpha, sigma))
        optimizer.step()
        if step + 1 == iterations[len(losses)]:
            _append(losses, excess, bank, draws, posterior, S)
            run.save(losses, excess)
        if progress is not None:
            progress(step + 1, iterations[-1])
    return ExpertCurves(
        iterations,
        np.stack(losses, axis=2),
        np.stack(excess, axis=2) if posterior is not None else None,
        floor,
        posterior is not None,
    )


def build_expert(dataset: Dataset, process: Process, plan: ExpertPlan, seed: int) -> Denoiser:
    """An untrained expert; all experts of a seed start alike.

    Raises:
        InputError: if the network or the prediction is unknown or does not fit the data.
    """
    data_std = float(dataset.train.double().square().mean().sqrt())
    return Denoiser(build_network(plan.network, dataset.shape, seed), process, plan.prediction, data_std)


def _training_draws(train: Tensor, plan: ExpertPlan, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean samples and noise (S, B, *), position within the task (S, B) of one iteration."""
    shape = (plan.batch, *train.shape[1:])
    rows, noise, u = [], [], []
    for seed in plan.seeds:
        rows.append(torch.from_numpy(stream(TRAIN_STREAM, seed, step, 0).integers(len(train), size=plan.batch)))
        noise.append(normal(shape, TRAIN_STREAM, seed, step, 1))
        u.append(uniform((plan.batch,), TRAIN_STREAM, seed, step, 2))
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


def floor_losses(
    dataset: Dataset, process: Process, draws: HeldOutDraws
) -> tuple[npt.NDArray[np.float64], Tensor | None]:
    """Losses (K, M) of the best denoiser known beforehand, and E[eps | x_t] (K, M, *) where the law is exact."""
    law = dataset.law or wiener(dataset)
    estimate = posterior_eps_at(law, process, draws.x0.flatten(0, 1), draws.eps.flatten(0, 1), draws.t.flatten())
    losses = (estimate - draws.eps.flatten(0, 1).double()).square().flatten(1).sum(1).reshape(draws.t.shape)
    posterior = estimate.float().reshape(draws.x0.shape) if dataset.law else None
    return losses.numpy(), posterior


def wiener(dataset: Dataset) -> GaussianMixture:
    """The Gaussian of the train samples' mean and covariance; its posterior mean is the best linear denoiser."""
    flat = dataset.train.flatten(1).double().numpy()
    covariance = np.atleast_2d(np.cov(flat, rowvar=False))
    return GaussianMixture([1.0], flat.mean(0, keepdims=True), covariance[None])


def posterior_eps_at(law: Law, process: Process, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """E[eps | x_t] in float64 at draws x0, eps (n, *) and integer t (n,)."""
    estimate = torch.empty(x0.shape, dtype=torch.float64)
    for step in t.unique().tolist():
        rows = t == step
        alpha, sigma = float(process.alpha[step]), float(process.sigma[step])
        x_t = (alpha * x0[rows].double() + sigma * eps[rows].double()).flatten(1)
        estimate[rows] = law.posterior_eps(x_t, alpha, sigma).reshape(x0[rows].shape)
    return estimate


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
