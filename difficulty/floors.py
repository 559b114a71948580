"""The best known loss of a task over several results folders, and excesses over it.

Where no Bayes loss is known, the floor of a measurement is the best loss of its own experts: an upper bound, and
another one for every prediction. The excesses of two folders compare only over a common floor. All folders of the same
data, process, tasks and number of draws were judged on the same draws (`heldout.py`); of each task the least mean loss
among them is the floor of all. floor.npy of a folder holds, per draw, the losses of the best denoiser that it knows.

Over a lower floor the excess grows by half the difference. Its standard error is bounded by the sum of two, of the
excess over the own floor and of the difference of the floors draw by draw (triangle inequality).
"""

__all__ = ["FLOOR_FILE", "joint_floor", "over_floor", "read_floor"]

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from difficulty.errors import InputError
from difficulty.heldout import standard_errors
from difficulty.process import Array
from difficulty.records import read_array

FLOOR_FILE = "floor.npy"  # (K, M): losses of the best denoiser of each task on its held-out draws


def read_floor(folder: Path, tasks: int) -> Array:
    """Best known losses per draw, (K, M).

    Raises:
        InputError: if there is none or it is of another number of tasks.
    """
    best = read_array(folder / FLOOR_FILE)
    if best.ndim != 2 or len(best) != tasks or best.dtype.kind != "f":
        raise InputError(
            f"{folder / FLOOR_FILE} holds {best.dtype} of shape {best.shape}, but the folder has {tasks} tasks"
        )
    return best.astype(np.float64)


def joint_floor(floors: Sequence[Array]) -> Array:
    """Of each task the floor with the least mean, (K, M).

    Raises:
        InputError: if the floors were taken on different numbers of draws.
    """
    counts = sorted({floor.shape[1] for floor in floors})
    if len(counts) > 1:
        raise InputError(f"floors on {counts[0]} and on {counts[-1]} draws per task cannot be joined; use equal draws")
    stacked = np.stack(floors)
    means = np.nan_to_num(stacked.mean(2), nan=np.inf)  # a diverged model is no floor; NaN would win argmin
    return stacked[means.argmin(0), np.arange(stacked.shape[1])]


def over_floor(table: pd.DataFrame, own: Array, floor: Array, rows: npt.NDArray[np.int64]) -> pd.DataFrame:
    """A table of losses per task with its excess over another floor.

    Args:
        table: losses.csv or probe.csv, with the columns task, heldout_loss, floor, excess_nats, excess_se.
        own: floor per draw that the table's excess refers to, (K, M).
        floor: the lower floor, (K, M).
        rows: which held-out sample each draw takes, (K, M).
    """
    task = table["task"].to_numpy()
    between = standard_errors(0.5 * (own - floor), rows)
    # A probed model below its floor is itself the best that its folder knows.
    own_se = table["excess_se"].where(table["excess_nats"] > 0, 0.0)
    return table.assign(
        floor=floor.mean(1)[task],
        excess_nats=0.5 * (table["heldout_loss"] - floor.mean(1)[task]),
        excess_se=own_se + between[task],
    )
