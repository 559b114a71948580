"""When a curriculum goes on to its next stage.

A pacing rule sees, step by step, the batch loss and, if it asks for them, losses on fixed held-out draws; between two
steps it says whether the stage is over, and why. Siblings:

    fraction           equal stages that together take a share of the budget (default 10 %)
    patience           as published: the batch loss has had no new minimum for tau consecutive iterations; the minimum
                       is forgotten at each stage
    patience-smoothed  the same on an exponential average of the batch loss
    patience-kept      the same, the minimum of all stages kept
    held-out           the mean paired improvement on fixed draws over the last window is not significant

On stationary noise the minimum of n batch losses is as likely the first as the last, so `patience` ends a stage after
1.78 tau on average (exact for large tau) whatever was learned: it is a clock, not a test of convergence. `held-out`
is the test.
"""

__all__ = ["PACINGS", "Fraction", "HeldOut", "Pacing", "Patience", "check_pacing", "make_pacing"]

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.special import ndtr, stdtrit

from difficulty.errors import InputError, choose
from difficulty.specs import check_option

Option = float | int | bool


class Pacing(ABC):
    """A rule that ends stages.

    Args:
        stages: number of stages, the last of which (all tasks) never ends.
        budget: iterations of the whole run.
    """

    wants_loss = False  # whether the batch loss must be brought to the host every step
    check_every = 0  # iterations between held-out checks; 0 for never
    cost = 0.0  # largest share of the computation that these checks may take

    def __init__(self, stages: int, budget: int) -> None:
        self.stages, self.budget = stages, budget

    @abstractmethod
    def due(self, stage: int, stage_start: int, step: int) -> str | None:
        """Why the stage is over before iteration ``step``, or None if it goes on."""

    def begin_stage(self, stage: int) -> None:  # noqa: B027 - a hook that a rule may leave empty
        """Forget what belongs to the stage before."""

    def observe(self, loss: float) -> None:  # noqa: B027 - a hook that a rule may leave empty
        """Take in the batch loss of one iteration (the mean over all ranks)."""

    def observe_heldout(self, losses: Sequence[float]) -> None:  # noqa: B027 - a hook that a rule may leave empty
        """Take in the losses of the same fixed draws of the stage's tasks."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, JSON only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - a hook that a rule may leave empty
        """Continue from ``state_dict``."""


class Fraction(Pacing):
    """Equal stages over a share of the budget.

    Args:
        share: of the iterations, for all stages but the last together; in (0, 1).
    """

    def __init__(self, stages: int, budget: int, share: float = 0.1) -> None:
        super().__init__(stages, budget)
        if not 0 < share < 1:
            raise InputError(f"pacing 'fraction': share must lie in (0, 1), got {share}")
        self.share = share

    def due(self, stage: int, stage_start: int, step: int) -> str | None:
        end = round(self.share * self.budget * (stage + 1) / max(self.stages - 1, 1))
        return f"step {end} of {self.budget} reached" if step >= end else None


class Patience(Pacing):
    """No new minimum of the batch loss for ``tau`` consecutive iterations.

    Args:
        tau: iterations. The paper does not give its value.
        smoothing: weight of the past in an exponential average of the loss; 0 is the published rule.
        keep_best: keep the minimum of the stages before; False is the published rule.
    """

    wants_loss = True

    def __init__(
        self, stages: int, budget: int, tau: int = 200, smoothing: float = 0.0, keep_best: bool = False
    ) -> None:
        super().__init__(stages, budget)
        if tau < 1 or not 0 <= smoothing < 1:
            raise InputError(f"pacing 'patience' needs tau >= 1 and smoothing in [0, 1), got {tau} and {smoothing}")
        self.tau, self.smoothing, self.keep_best = tau, smoothing, keep_best
        self.best, self.since, self.smooth = math.inf, 0, math.nan

    def due(self, stage: int, stage_start: int, step: int) -> str | None:
        return f"no new minimum for {self.tau} iterations" if self.since >= self.tau else None

    def begin_stage(self, stage: int) -> None:
        self.since, self.smooth = 0, math.nan
        if not self.keep_best:
            self.best = math.inf

    def observe(self, loss: float) -> None:
        first = math.isnan(self.smooth)
        self.smooth = loss if first else self.smoothing * self.smooth + (1 - self.smoothing) * loss
        if self.smooth < self.best:
            self.best, self.since = self.smooth, 0
        else:
            self.since += 1

    def state_dict(self) -> dict[str, Any]:
        # Infinity and NaN do not exist in JSON.
        best = None if math.isinf(self.best) else self.best
        return {"best": best, "since": self.since, "smooth": None if math.isnan(self.smooth) else self.smooth}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = math.inf if state["best"] is None else state["best"]
        self.since, self.smooth = state["since"], math.nan if state["smooth"] is None else state["smooth"]


def _smoothed(stages: int, budget: int, tau: int = 200, smoothing: float = 0.99) -> Patience:
    return Patience(stages, budget, tau, smoothing)


def _kept(stages: int, budget: int, tau: int = 200) -> Patience:
    return Patience(stages, budget, tau, keep_best=True)


class HeldOut(Pacing):
    """The improvement on fixed draws is not significant any more.

    Every ``check_every`` iterations the losses of the same n draws are compared with those of the check before; a stage
    ends at the first check at which z = mean(d)/se(d) of the paired differences d = log(before/after) is below the
    threshold, that is when an improvement can no longer be shown. The threshold is that of Student's t of n - 1 degrees
    at the level of ``z_least``: a normal one would take noise for improvement far too often at few draws.

    Args:
        check_every: iterations between checks.
        z_least: one-sided threshold for many draws; 1.64 is 5 %.
        least, most: iterations of a stage; most = 0 means the cap alone bounds it.
        cap: greatest share of the budget for all stages but the last together, in (0, 1]; a stage takes at most an
            equal share of what those before it left, so that each has its turn.
        cost: greatest share of the computation of training that the checks take in a run of the trainer, which takes
            fewer draws for it, and rather than too few of them checks less often; in (0, 1].
    """

    def __init__(
        self,
        stages: int,
        budget: int,
        check_every: int = 100,
        z_least: float = 1.64,
        least: int = 100,
        most: int = 0,
        cap: float = 0.5,
        cost: float = 0.005,
    ) -> None:
        super().__init__(stages, budget)
        if check_every < 1 or least < 0 or most < 0 or not (0 < cap <= 1 and 0 < cost <= 1):
            raise InputError(
                "pacing 'held-out' needs check_every >= 1, least >= 0, most >= 0 and cap and cost in (0, 1], got "
                f"{check_every}, {least}, {most}, {cap} and {cost}"
            )
        self.check_every, self.z_least, self.least, self.most, self.cap = check_every, z_least, least, most, cap
        self.cost = cost
        self.before: list[float] | None = None
        self.z, self.draws = math.inf, 0

    def due(self, stage: int, stage_start: int, step: int) -> str | None:
        length = step - stage_start
        left = self.cap * self.budget - stage_start
        if length >= left / (self.stages - 1 - stage):
            return f"equal share of what was left of the cap of {self.cap:.0%} of the budget used"
        if self.most and length >= self.most:
            return f"longest stage of {self.most} iterations reached"
        threshold = float(stdtrit(max(self.draws - 1, 1), ndtr(self.z_least)))
        if length >= self.least and self.z < threshold:
            return f"improvement not significant (z = {self.z:.2f} < {threshold:.2f}, {self.draws} draws)"
        return None

    def begin_stage(self, stage: int) -> None:
        self.before, self.z, self.draws = None, math.inf, 0

    def observe_heldout(self, losses: Sequence[float]) -> None:
        if self.before is not None:
            pairs = [(b, a) for b, a in zip(self.before, losses, strict=True) if 0 < a < math.inf and 0 < b < math.inf]
            difference = [math.log(b / a) for b, a in pairs]
            n = len(difference)
            mean = sum(difference) / max(n, 1)
            variance = sum((d - mean) ** 2 for d in difference) / max(n - 1, 1)
            self.z = mean / math.sqrt(variance / n) if n > 1 and variance > 0 else 0.0
            self.draws = n
        self.before = list(losses)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "z": None if math.isinf(self.z) else self.z, "draws": self.draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # JSON has no NaN.
        before = state["before"]
        self.before = None if before is None else [math.nan if loss is None else loss for loss in before]
        self.z = math.inf if state["z"] is None else state["z"]
        # States of earlier versions do not hold the number of draws.
        self.draws = state.get("draws", len(self.before or ()))


PACINGS: Mapping[str, Callable[..., Pacing]] = {
    "fraction": Fraction,
    "patience": Patience,
    "patience-smoothed": _smoothed,
    "patience-kept": _kept,
    "held-out": HeldOut,
}


def make_pacing(rule: str, options: Mapping[str, Option], stages: int, budget: int) -> Pacing:
    """A pacing rule by name.

    Raises:
        InputError: if the rule or an option is unknown, or an option is no number of its kind or out of range.
    """
    factory = choose("pacing rule", rule, PACINGS)
    parameters = inspect.signature(factory).parameters
    allowed = [name for name in parameters if name not in ("stages", "budget")]
    for name, value in options.items():
        if name not in allowed:
            raise InputError(f"pacing {rule!r} has no option {name!r}; its options are: {', '.join(allowed)}")
        check_option(f"option {name!r} of pacing {rule!r}", value, parameters[name].default)
    return factory(stages, budget, **options)


def check_pacing(rule: str, options: Mapping[str, Option]) -> None:
    """Raise InputError if ``make_pacing`` would."""
    make_pacing(rule, options, stages=2, budget=1000)
