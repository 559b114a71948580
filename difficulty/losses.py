"""losses.csv: held-out losses of experts over training against the floor, and the same as arrays.

For an exact law the floor is the Bayes loss and the excess is E|eps_hat - E[eps|x_t]|^2 / 2, free of the noise of the
floor. Otherwise the floor is the least mean loss on the same draws over all seeds, all checkpoints up to twice the
budget, and the best linear denoiser: an upper bound, so that the excess is a lower bound.
"""

__all__ = ["LOSS_COLUMNS", "LearningCurves", "best_known", "loss_table"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from difficulty.experts import ExpertCurves
from difficulty.heldout import standard_error
from difficulty.process import Array
from difficulty.records import check_columns

# An expert that removed less than this share of the zero network's excess over the floor is stuck.
STUCK_SHARE = 0.02
LOSS_COLUMNS: Mapping[str, type] = {
    "task": int, "seed": int, "iteration": int, "samples": int, "heldout_loss": float, "floor": float,
    "floor_kind": str, "zero_loss": float, "excess_nats": float, "excess_se": float,
}  # fmt: skip
ZERO_EXCESS = "zero_excess_nats"  # only in the losses.csv of an exact law, and only since it is taken without noise


def loss_table(curves: ExpertCurves, seeds: Sequence[int], batch: int) -> pd.DataFrame:
    """losses.csv: one row per task, seed and checkpoint.

    Args:
        curves: held-out losses per draw.
        seeds: of the experts, in the order of ``curves``.
        batch: samples per iteration.

    Returns:
        Columns ``LOSS_COLUMNS``; losses are summed over dimensions, excess_nats is (loss - floor)/2 with the standard
        error over draws, floor_kind is exact or upper_bound, zero_loss is that of the network that outputs zero. For an
        exact law one more, ``ZERO_EXCESS``: the excess of that network, as free of the floor's noise as the experts'.
    """
    S, K, C, M = curves.losses.shape
    best = curves.floor if curves.excess is not None else best_known(curves)
    floor, rows = best.mean(1), np.tile(np.arange(M), (K, 1)) if curves.rows is None else curves.rows
    excess, excess_se = np.empty((S, K, C)), np.empty((S, K, C))
    for task in range(K):  # one at a time: in double precision all might not fit in memory
        if curves.excess is not None:
            draws = 0.5 * curves.excess[:, task].astype(np.float64)
        else:
            draws = 0.5 * (curves.losses[:, task].astype(np.float64) - best[task])
        excess[:, task], excess_se[:, task] = draws.mean(-1), standard_error(draws, rows[task])
    s, k, c = (a.ravel() for a in np.meshgrid(np.arange(S), np.arange(K), np.arange(C), indexing="ij"))
    iterations = np.asarray(curves.iterations)
    table = pd.DataFrame(
        {
            "task": k,
            "seed": np.asarray(seeds)[s],
            "iteration": iterations[c],
            "samples": iterations[c] * batch,
            "heldout_loss": curves.losses.mean(-1, dtype=np.float64).ravel(),
            "floor": floor[k],
            "floor_kind": "exact" if curves.floor_is_exact else "upper_bound",
            "zero_loss": curves.zero.mean(1, dtype=np.float64)[k],
            "excess_nats": excess.ravel(),
            "excess_se": excess_se.ravel(),
        },
        columns=list(LOSS_COLUMNS),
    )
    if curves.zero_excess is not None:
        table[ZERO_EXCESS] = 0.5 * curves.zero_excess.mean(1, dtype=np.float64)[k]
    return table


def best_known(curves: ExpertCurves) -> npt.NDArray[np.float64]:
    """Losses per draw (K, M) of the denoiser with the least mean loss of each task: every expert at every checkpoint,
    and the one known beforehand."""
    best = curves.floor.astype(np.float64)
    for task, known in enumerate(best):
        experts = curves.losses[:, task].reshape(-1, len(known))
        # A diverged expert is no candidate; NaN would win argmin.
        means = np.nan_to_num(experts.mean(-1, dtype=np.float64), nan=np.inf)
        if means.min() <= known.mean():
            best[task] = experts[means.argmin()]
    return best


@dataclass(frozen=True, eq=False)
class LearningCurves:
    """losses.csv as arrays, (S, K, C) for S seeds, K tasks, C checkpoints up to the budget; zero_excess is (K,)."""

    iterations: Array
    loss: Array
    excess: Array
    excess_se: Array
    zero_excess: Array

    @classmethod
    def from_table(cls, table: pd.DataFrame, budget: int) -> "LearningCurves":
        """Arrays of the checkpoints up to the budget."""
        check_columns(table, LOSS_COLUMNS, "losses.csv")
        table = table[table["iteration"] <= budget].sort_values(["seed", "task", "iteration"])
        shape = tuple(table[name].nunique() for name in ("seed", "task", "iteration"))

        def column(name: str) -> Array:
            return table[name].to_numpy(dtype=np.float64).reshape(shape)

        first = table.groupby("task").first()
        zero = first[ZERO_EXCESS] if ZERO_EXCESS in first else 0.5 * (first["zero_loss"] - first["floor"])
        zero_excess = zero.to_numpy(dtype=np.float64)
        iterations = np.unique(table["iteration"]).astype(np.float64)
        return cls(iterations, column("heldout_loss"), column("excess_nats"), column("excess_se"), zero_excess)

    @property
    def resolution(self) -> Array:
        """Standard error below which an excess says nothing, (S, K, C).

        A point that is itself the best known has no paired error at all, and is no better known for that than the other
        points of its task: it is given their median.
        """
        tasks = len(self.zero_excess)
        others = np.where(self.excess_se > 0, self.excess_se, np.nan).transpose(1, 0, 2).reshape(tasks, -1)
        known = np.isfinite(others).any(1)
        median = np.full(tasks, np.finfo(np.float64).tiny)
        median[known] = np.nanmedian(others[known], axis=1)
        return np.where(self.excess_se > 0, self.excess_se, median[:, None])

    @property
    def diverged(self) -> npt.NDArray[np.bool_]:
        """Tasks (K,) of which a seed's loss is NaN or infinite."""
        return np.asarray(~np.isfinite(self.loss).all((0, 2)))

    @property
    def stuck(self) -> npt.NDArray[np.bool_]:
        """Tasks (K,) of which a seed is no better than the network that outputs zero."""
        with np.errstate(invalid="ignore"):
            return np.asarray(~(self.excess[..., -1] <= (1 - STUCK_SHARE) * self.zero_excess).all(0))
