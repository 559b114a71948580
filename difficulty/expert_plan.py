"""What is asked of the experts: together with data, process and tasks it determines every number."""

__all__ = ["STARTS", "ExpertPlan", "log_spaced_iterations"]

import math
from dataclasses import dataclass

import numpy as np

from difficulty.engines import ENGINES
from difficulty.errors import InputError, choose

STARTS = ("cold", "shared", "neighbour")
LEAST_BUDGET = 20
CHECKPOINTS = 24


@dataclass(frozen=True)
class ExpertPlan:
    """How experts are trained.

    Args:
        network: a name in ``NETWORKS`` with options, e.g. ``mlp:width=128``, or ``FILE.py:FACTORY``.
        prediction: a name in ``PREDICTIONS``.
        seeds: one expert per task is trained for each.
        budget: iterations at which difficulty is read off, >= 20. Training goes on to twice that, for the floor.
        batch: samples per expert and iteration.
        learning_rate: of AdamW, constant, no weight decay.
        heldout_draws: fixed draws (x0, eps, t) per task, at least 2.
        engine: a name in ``difficulty.engines.ENGINES``, or auto.
        compile: whether the experts' program goes through torch.compile.
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
    compile: bool = False
    start: str = "cold"

    def __post_init__(self) -> None:
        if self.budget < LEAST_BUDGET:
            raise InputError(f"a budget of {self.budget} iterations ends before the first checkpoints; use >= 20")
        if not self.seeds:
            raise InputError("experts need at least one seed")
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise InputError(f"seeds must be different non-negative whole numbers, got {self.seeds}")
        for name in ("batch", "heldout_draws", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.heldout_draws < 2:
            raise InputError(f"a standard error needs at least 2 held-out draws, got {self.heldout_draws}")
        if self.engine != "auto":
            choose("engine", self.engine, ENGINES)
        choose("start", self.start, dict.fromkeys(STARTS))

    @property
    def iterations(self) -> list[int]:
        """Iterations after which held-out losses are taken: 0, log-spaced up to the budget, and twice the budget."""
        return [0, *log_spaced_iterations(self.budget), round(1.4 * self.budget), 2 * self.budget]


def log_spaced_iterations(last: int, count: int = CHECKPOINTS) -> list[int]:
    """At most ``count`` different whole numbers from about last/100 to last, evenly spaced on the log scale."""
    first = max(1, last // 100)
    return sorted({round(value) for value in np.geomspace(first, last, count)})
