"""What one measure says of the difficulty of every task: values, intervals, and what is a bound or was not learned."""

__all__ = ["Estimate"]

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from difficulty.intervals import Z90
from difficulty.process import Array


@dataclass(frozen=True, eq=False)
class Estimate:
    """One measure's difficulty per task with its 90 % interval; larger is harder.

    Args:
        unit: of the value.
        value, ci_low, ci_high: shape (K,); NaN where the measure gives none. An interval may be open on one side, where
            the value is a bound, or on both, where its error is not known.
        log: whether the interval is symmetric on the log scale.
        flagged: (K,), the value is censored or not valid.
        hardest_if_missing: whether a missing value means that the task could not be learned (it is ranked hardest),
            rather than that the measure says nothing about it (it is not ranked).
        note: for the reader.
        unlearned: (K,), flagged because the network did not learn the task: the value is how far it is from that, and
            may be large or small, but says nothing of how easy the task is. None means no task.
        degrees: of freedom with which the errors of the values are known, as from a handful of seeds.
    """

    unit: str
    value: Array
    ci_low: Array
    ci_high: Array
    log: bool
    flagged: npt.NDArray[np.bool_]
    hardest_if_missing: bool
    note: str = ""
    unlearned: npt.NDArray[np.bool_] | None = None
    degrees: float = np.inf

    @property
    def centre(self) -> Array:
        """The value per task, +inf where missing means hardest."""
        return np.where(np.isnan(self.value) & self.hardest_if_missing, np.inf, self.value)

    @property
    def end_not_seen(self) -> npt.NDArray[np.bool_]:
        """Tasks (K,) whose value is a lower bound: its interval is open above."""
        return np.isfinite(self.value) & np.isfinite(self.ci_low) & np.isnan(self.ci_high)

    @property
    def learned(self) -> npt.NDArray[np.bool_]:
        """Tasks (K,) that the network learned, as far as is known."""
        finite = ~np.isinf(self.centre)
        return finite if self.unlearned is None else finite & ~self.unlearned

    @property
    def surely_hard(self) -> npt.NDArray[np.bool_]:
        """Tasks (K,) that were not learned, or whose value is at least what is stated."""
        return ~self.learned | self.end_not_seen

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """The tasks that have a rank, easiest first."""
        ranked = np.flatnonzero(~np.isnan(self.centre))
        return ranked[np.argsort(self.centre[ranked], kind="stable")]

    @property
    def surely_beyond(self) -> npt.NDArray[np.bool_]:
        """Tasks (K,) that are beyond all others: missing as hardest, or lower bounds that no other value may exceed."""
        others = np.where(self.of_unknown_error, np.inf, self.value)[np.isfinite(self.value) & ~self.end_not_seen]
        return np.isinf(self.centre) | (self.end_not_seen & (self.centre >= others.max(initial=-np.inf)))

    @property
    def of_unknown_error(self) -> npt.NDArray[np.bool_]:
        """Tasks (K,) with a value and no interval at all."""
        centre, sides = self._sides
        return np.isfinite(centre) & ~np.isfinite(sides).any(0)

    @property
    def scaled(self) -> tuple[Array, Array]:
        """Value and half the width of its interval, each (K,), on the interval's own scale.

        An interval that is open on one side counts as symmetric; a value without one may be any.
        """
        centre, sides = self._sides
        known = np.isfinite(sides)
        half = np.where(known, sides, 0.0).sum(0) / np.maximum(known.sum(0), 1)
        if self.of_unknown_error.any():
            half[self.of_unknown_error] = 1e6 * (1.0 + np.ptp(centre[np.isfinite(centre)]))
        return centre, half

    @property
    def _sides(self) -> tuple[Array, Array]:
        """Value (K,) and the parts (2, K) of its interval below and above it, on the interval's own scale."""
        to_scale = np.log if self.log else np.asarray
        with np.errstate(invalid="ignore", divide="ignore"):
            centre, low, high = (to_scale(a) for a in (self.value, self.ci_low, self.ci_high))
            return centre, np.stack([centre - low, high - centre])

    def replicates(self, count: int, rng: np.random.Generator) -> Array:
        """Values (count, K) as they might have come out: normal about the value on the interval's own scale.

        Missing values are +inf where they mean hardest, NaN otherwise. A lower bound, with an interval open above, is
        +inf as well if no task whose end was seen has more; if one has, half the time. A value without an interval may
        be any.
        """
        centre, half = self.scaled
        drawn = centre + half / Z90 * rng.standard_normal((count, len(centre)))
        beyond = self.surely_beyond | (self.end_not_seen & (rng.random((count, 1)) < 0.5))
        drawn = np.where(beyond, np.inf, drawn)
        return np.where(np.isnan(centre), np.inf if self.hardest_if_missing else np.nan, drawn)
