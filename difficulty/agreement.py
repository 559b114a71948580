"""Do results folders agree on which tasks are hard? Predictions, processes, seeds, experts against a shared network.

Folders of `difficulty measure` and `difficulty probe` of the same data are compared two by two, and the seeds within
each. With the same process and the same tasks the comparison runs over the tasks. Otherwise it runs over bins of equal
length in log-SNR, as many as the coarser folder has tasks, over the range that both cover; the value of a bin is the
mean of the tasks' values over its log-SNR, as if a density over log-SNR such as excess_nats were the same all over a
task. It is a mean over the task's timesteps, so that tasks that are wide in log-SNR (low noise, cut evenly in t) stand
for their noisy end.

Where no Bayes loss is known, all folders on the same draws are given one floor, the best loss that any of them knows
(`floors.py`); otherwise each prediction would be judged by its own.

Intervals (90 %) come from the intervals of the values: every value is drawn anew on both sides. This repeats noise that
the estimates already hold, so that the intervals lie low where values are uncertain; the agreement of the seeds within
a folder says how much agreement its noise allows at all.
"""

__all__ = ["AGREEMENT_COLUMNS", "agreement_sentences", "agreement_table", "rank_over_joint_floor"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from difficulty.convergence import convergence_table
from difficulty.errors import InputError
from difficulty.estimate import Estimate
from difficulty.floors import FLOOR_FILE, joint_floor, over_floor, read_floor
from difficulty.heldout import heldout_rows
from difficulty.measurement_folder import (
    check_config,
    convergence_estimates,
    rank_folder,
    read_tables,
    relative_entropy_estimates,
)
from difficulty.probe import PROBE_COLUMNS, probe_estimates
from difficulty.process import Array, Process
from difficulty.process_file import read_process
from difficulty.randomness import stream
from difficulty.rank_correlation import agreement_words, kendall, spearman, with_interval
from difficulty.ranking import Ranking
from difficulty.records import fingerprint_array, read_run, read_table, write_array, write_json, write_table
from difficulty.stability import stability_table
from difficulty.tasks import Task, make_tasks

AGREEMENT_COLUMNS = (
    "first", "second", "measure", "axis", "points", "kendall", "kendall_low", "kendall_high", "spearman",
    "spearman_low", "spearman_high", "verdict",
)  # fmt: skip
REPLICATES = 2000
TASKS, LOG_SNR = "tasks", "log-SNR"


@dataclass(frozen=True, eq=False)
class _Side:
    """One folder: its tables, and the floor per draw that its excesses refer to (None where it is exact)."""

    name: str
    config: dict[str, Any]
    process: Process
    tasks: list[Task]
    losses: pd.DataFrame | None  # losses.csv of a measurement
    probe: pd.DataFrame | None  # probe.csv of a probe
    entropy: pd.DataFrame | None  # relative_entropy.csv
    floor: Array | None
    siblings: pd.DataFrame | None = None  # losses.csv of all seeds, where ``losses`` holds one of them

    @property
    def judged_alike(self) -> tuple[Any, ...]:
        """Folders of which this is equal were judged on the same tasks."""
        return self.config["process_fingerprint"]["sha256"], tuple((task.first, task.last) for task in self.tasks)

    @property
    def seeds(self) -> list[int]:
        """Training seeds of the experts."""
        return [] if self.losses is None else sorted(self.losses["seed"].unique().tolist())

    def over(self, floor: Array) -> "_Side":
        """The same with excesses over a lower floor."""
        if self.floor is None:
            return self
        samples = self.config["dataset_fingerprint"]["heldout"]["shape"][0]
        rows = heldout_rows(samples, self.tasks, floor.shape[1])
        losses, probe = (
            None if table is None else over_floor(table, self.floor, floor, rows) for table in (self.losses, self.probe)
        )
        return replace(self, losses=losses, probe=probe, floor=floor)

    def of_seed(self, seed: int) -> "_Side":
        """The experts of one seed alone."""
        assert self.losses is not None
        own = self.losses[self.losses["seed"] == seed]
        # What is no measure of the experts is the same for every seed, and agrees with itself.
        return replace(self, name=f"{self.name} seed {seed}", losses=own, siblings=self.losses, entropy=None)

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Every measure of the folder."""
        found: dict[str, Estimate] = {}
        if self.losses is not None:
            table = convergence_table(self.losses, self.config["plan"]["budget"], self.siblings)
            found |= convergence_estimates(table, len(self.tasks))
        if self.entropy is not None:
            found |= relative_entropy_estimates(self.entropy, self.tasks)
        if self.probe is not None:
            found |= probe_estimates(self.probe)
        return found


def agreement_table(folders: Sequence[Path], measures: Sequence[str] = ("excess_nats",)) -> pd.DataFrame:
    """Agreement of every two folders, and of every two seeds within a measurement, by each measure.

    Args:
        folders: of `difficulty measure` or `difficulty probe`, all of the same data.
        measures: names of measures, as in ranking.json; ``sample_quality`` is not among them.

    Returns:
        Columns ``AGREEMENT_COLUMNS``; seeds are compared by the measures that depend on them. ``points`` counts tasks
        or bins of log-SNR; the correlations are NaN where there are fewer than three or nothing to order.

    Raises:
        InputError: if a folder is no finished result, the data differ, or a folder lacks a measure.
    """
    folders = list(dict.fromkeys(Path(folder) for folder in folders))
    if not folders or not measures:
        raise InputError("give at least one results folder and one measure to compare")
    sides = _common_floors([_load(folder, name) for folder, name in zip(folders, _names(folders), strict=True)])
    data = [_data_of(side) for side in sides]
    for side, own in zip(sides, data, strict=True):
        if own != data[0]:
            raise InputError(f"{sides[0].name} and {side.name} are of different data; compare folders of the same data")
    for side in sides:
        for measure in measures:
            if measure not in side.estimates:
                raise InputError(f"{side.name} has no measure {measure!r}; it has {', '.join(side.estimates)}")
    rows = []
    for a, b in _pairs(sides):
        rows += [_compare(a, b, measure) for measure in measures if measure in a.estimates]
    if not rows:
        raise InputError(
            f"{sides[0].name} has no two seeds to compare by {' or '.join(measures)}; give another folder as well"
        )
    return pd.DataFrame(rows, columns=list(AGREEMENT_COLUMNS))


def rank_over_joint_floor(folder: Path, others: Sequence[Path]) -> Ranking:
    """Rank a measurement again over the best loss that it or any of the others knows; its tables are written anew.

    run.json names the others and the SHA-256 of their floors (``floor_from``), and so does the ranking's provenance, if
    one of them knew better.

    Args:
        folder: of `difficulty measure`, on data without an exact law.
        others: of `difficulty measure` or `difficulty probe`, with the same data, process, tasks and draws.

    Raises:
        InputError: if a folder is not finished or was judged on something else; nothing is written then.
    """
    own = _load(folder, str(folder))
    if own.losses is None or own.floor is None:
        raise InputError(f"{folder} has no best known floor to lower; give a measurement of experts without exact law")
    floors, sources = [own.floor], []
    for other in others:
        side = _load(other, str(other))
        if side.floor is None or side.judged_alike != own.judged_alike or _data_of(side) != _data_of(own):
            raise InputError(f"{other} was not judged on the data, process and tasks of {folder}")
        floors.append(side.floor)
        sources.append({"folder": str(other), "sha256": fingerprint_array(side.floor)["sha256"]})
    floor = joint_floor(floors)
    if np.array_equal(floor, own.floor):
        return rank_folder(folder)  # nobody knows better
    losses, budget = own.over(floor).losses, own.config["plan"]["budget"]
    assert losses is not None
    run = read_run(folder)
    # Were it interrupted, tables over different floors would stand beside each other.
    write_json(folder / "run.json", run | {"status": "ranking over another floor"})
    write_table(folder / "losses.csv", losses)
    write_array(folder / FLOOR_FILE, floor.astype(np.float32))
    write_table(folder / "convergence.csv", convergence_table(losses, budget))
    write_table(folder / "stability.csv", stability_table(losses, budget))
    before = run.get("floor_from", [])
    write_json(folder / "run.json", run | {"floor_from": [*before, *(one for one in sources if one not in before)]})
    return rank_folder(folder)


def agreement_sentences(table: pd.DataFrame) -> list[str]:
    """The table in words, one sentence per row."""
    sentences = []
    for row, tied in zip(table.itertuples(), table["kendall"].isna(), strict=True):
        found = f"{row.first} and {row.second}, {row.measure}: "
        if tied:
            found += "nothing to compare, since one of them tells no tasks apart."
        else:
            found += (
                f"{row.verdict} (Kendall {row.kendall:+.2f} [{row.kendall_low:+.2f}, {row.kendall_high:+.2f}], "
                f"Spearman {row.spearman:+.3f} [{row.spearman_low:+.3f}, {row.spearman_high:+.3f}], {row.points} "
                f"{_points(str(row.axis))})."
            )
        sentences.append(found)
    return sentences


def _points(axis: str) -> str:
    return "tasks" if axis == TASKS else "bins of log-SNR"


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths where these differ, else the paths."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _load(folder: Path, name: str) -> _Side:
    run = read_run(folder)
    if run.get("kind") not in ("measure", "probe"):
        raise InputError(f"{folder} was written by {run.get('kind')!r}; give folders of difficulty measure or probe")
    config, probed = check_config(run, folder), run["kind"] == "probe"
    process = read_process(folder, config["process_fingerprint"])
    tasks = make_tasks(process, config["tasks"], config["grid"])
    tables = {} if probed else read_tables(folder, config)
    losses, entropy = tables.get("losses"), tables.get("relative_entropy")
    probe = read_table(folder / "probe.csv", PROBE_COLUMNS, {"task": range(len(tasks))}) if probed else None
    judged = probe if losses is None else losses
    exact = judged is None or (judged["floor_kind"] == "exact").all()
    floor = None if exact else read_floor(folder, len(tasks))
    return _Side(name, config, process, tasks, losses, probe, entropy, floor)


def _data_of(side: _Side) -> list[str]:
    fingerprint = side.config["dataset_fingerprint"]
    return [fingerprint[part]["sha256"] for part in ("train", "heldout")]


def _common_floors(sides: list[_Side]) -> list[_Side]:
    """Every side over the best loss that any side on the same tasks knows."""
    floors: dict[tuple[Any, ...], list[Array]] = {}
    for side in sides:
        if side.floor is not None:
            floors.setdefault(side.judged_alike, []).append(side.floor)
    joint = {tasks: joint_floor(found) for tasks, found in floors.items()}
    return [side if side.floor is None else side.over(joint[side.judged_alike]) for side in sides]


def _pairs(sides: Sequence[_Side]) -> Iterable[tuple[_Side, _Side]]:
    yield from combinations(sides, 2)
    for side in sides:
        yield from combinations([side.of_seed(seed) for seed in side.seeds], 2)


def _compare(a: _Side, b: _Side, measure: str) -> dict[str, Any]:
    """One row of the table."""
    same = a.judged_alike == b.judged_alike
    edges = None if same else _common_bins(a, b)
    values, drawn, learned = [], [], np.array(True)
    for index, side in enumerate((a, b)):
        estimate = side.estimates[measure]
        shares = np.eye(len(side.tasks)) if edges is None else _shares(side, edges)
        values.append(_means(shares, estimate.centre))
        replicates = estimate.replicates(REPLICATES, stream(0, index))
        if estimate.log and not same:  # a mean of values, not of their logarithms
            with np.errstate(over="ignore"):
                replicates = np.exp(replicates)
        drawn.append(_means(shares, replicates))
        learned = learned & ~(~estimate.learned @ (shares.T > 0))  # of a bin, every task in it
    both = ~(np.isnan(values[0]) | np.isnan(values[1]))
    row: dict[str, Any] = {
        "first": a.name, "second": b.name, "measure": measure, "axis": TASKS if same else LOG_SNR,
        "points": int(both.sum()), "verdict": "too few points to compare",
    }  # fmt: skip
    for name, correlation in (("kendall", kendall), ("spearman", spearman)):
        found = (np.nan, np.nan, np.nan)
        if both.sum() >= 3:
            between = float(correlation(values[0][both], values[1][both]))
            found = with_interval(between, correlation(drawn[0][:, both], drawn[1][:, both]))
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
    if np.isfinite(row["kendall"]):
        row["verdict"] = agreement_words(row["kendall_low"], row["kendall_high"], learned[both])
    return row


def _edges(side: _Side) -> Array:
    """Log-SNR (K+1,) from clean to noisy at which one task ends and the next begins; the last finite one ends it."""
    last = side.tasks[-1].log_snr_low
    if not np.isfinite(last):
        last = float(side.process.log_snr(side.process.noisiest))
    return np.array([*(task.log_snr_high for task in side.tasks), last])


def _common_bins(a: _Side, b: _Side) -> Array:
    """Edges of bins of equal length over the log-SNR that both cover, falling.

    Raises:
        InputError: if they cover nothing in common.
    """
    first, second = _edges(a), _edges(b)
    high, low = min(first[0], second[0]), max(first[-1], second[-1])
    if high <= low:
        raise InputError(f"{a.name} and {b.name} have no log-SNR in common")
    return np.linspace(high, low, min(len(a.tasks), len(b.tasks)) + 1)


def _shares(side: _Side, bins: Array) -> Array:
    """Share of every bin's log-SNR that lies in every task, (bins, K)."""
    edges = _edges(side)
    high = np.minimum(bins[:-1, None], edges[None, :-1])
    low = np.maximum(bins[1:, None], edges[None, 1:])
    length = np.maximum(high - low, 0.0)
    return length / length.sum(1, keepdims=True)


def _means(shares: Array, values: Array) -> Array:
    """Mean of the tasks' values (..., K) in every bin; infinite or NaN where a task in the bin is."""
    infinite, missing = np.isinf(values), np.isnan(values)
    mean = np.where(infinite | missing, 0.0, values) @ shares.T
    mean = np.where(infinite @ (shares.T > 0), np.inf, mean)
    return np.where(missing @ (shares.T > 0), np.nan, mean)
