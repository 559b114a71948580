"""How curricula are made: from a measured ranking, from noise intervals alone, or from another curriculum."""

__all__ = ["exposure_matched", "first_then_all", "interval_curriculum", "make_curriculum", "pick_measure"]

import math
from typing import Any

import numpy as np
from pydantic import ValidationError

from difficulty.errors import InputError, choose
from difficulty.process import Array, Process
from difficulty.ranking import Ranking, RankingTask
from difficulty.records import digest
from difficulty.specs import parse_spec
from difficulty.tasks import Task
from training.clusters import INTERVAL_METHODS, METHODS, ORDERS, interval_cuts, order_clusters, split_by_value
from training.curriculum import Cluster, Curriculum, DensityField, PacingField, first_reason, known_process
from training.density import density, proportional_to, task_masses

# A density that varies more than this inside a task, largest over smallest, is none that a mass per task can state.
EVEN = 1.01
# Measures in the order in which one is chosen if none is named: what survived the comparison of definitions first.
PREFERRED_MEASURES = ("excess_nats", "log_regret", "relative_entropy", "paper_style")
MEASURED = "measured"  # the pseudo-density that a measure decides
NOISE = "noise-level"  # the pseudo-measure under which noisier is easier, as the paper assumes


def pick_measure(ranking: Ranking, measure: str | None) -> str:
    """The named measure, or the preferred one among those of the ranking.

    Raises:
        InputError: if the ranking does not hold it.
    """
    if measure is None:
        return next((name for name in PREFERRED_MEASURES if name in ranking.measures), next(iter(ranking.measures)))
    choose("measure of this ranking", measure, ranking.measures)
    return measure


def make_curriculum(
    ranking: Ranking,
    *,
    method: str = "kmeans",
    k: int = 5,
    measure: str | None = None,
    order: str = "easy-to-hard",
    seed: int = 0,
    accumulate: bool = True,
    pacing: str = "fraction",
    pacing_options: dict[str, float | int | bool] | None = None,
    base_density: str = "uniform",
    task_mass: list[float] | None = None,
    process: Process | None = None,
) -> Curriculum:
    """A curriculum from a measured ranking.

    Args:
        ranking: content of ranking.json.
        method: a name in ``training.clusters.METHODS`` or ``INTERVAL_METHODS``.
        k: number of clusters.
        measure: which measure of the ranking; ``noise-level`` orders by noise alone, noisiest first; None takes
            the preferred one, except for interval methods, where it means ``noise-level`` as in the paper.
        order: easy-to-hard, hard-to-easy or random.
        seed: of the random order.
        accumulate: whether clusters stay in training once they joined.
        pacing, pacing_options: a rule in ``training.pacing.PACINGS`` and its options.
        base_density: a density by name, ``table`` together with ``task_mass``, or ``measured`` with the options of
            ``density.proportional_to``: proportional to the measure, written into the file as a table.
        process: needed only where the ranking's process is none of the project's own.

    Raises:
        InputError: if a name is unknown, k does not fit, or the process is not that of the ranking.
    """
    if order not in ORDERS:
        raise InputError(f"unknown order {order!r}; known are {', '.join(ORDERS)}")
    if process is None:
        process = known_process(ranking.process, "the ranking")
    process.check_fingerprint(ranking.process, "the ranking")
    tasks, groups, measure = _grouped(ranking, process, method, k, measure)
    values = _values(ranking, tasks, measure)
    provenance = {
        "ranking_sha256": digest(ranking.model_dump()),
        "dataset": ranking.dataset,
        "measure": measure,
        "method": method,
        "k": k,
        "order": order,
        "seed": seed if order == "random" else None,
    }
    groups = order_clusters(groups, order, seed)
    if base_density.partition(":")[0] == MEASURED:
        provenance["density"] = base_density
        base_density, task_mass = "table", _measured_mass(values, tasks, base_density)
    return _assemble(
        process, tasks, groups, values, accumulate, pacing, pacing_options, base_density, task_mass, provenance
    )


def _measured_mass(values: list[float | None], tasks: list[RankingTask], spec: str) -> list[float]:
    options = parse_spec(spec)[1]
    try:
        return proportional_to(values, tasks, **options)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"density {MEASURED!r} has the options power and uniform_share, got {spec!r}") from None


def interval_curriculum(
    process: Process,
    *,
    method: str = "log-snr",
    k: int = 20,
    pacing: str = "patience",
    pacing_options: dict[str, float | int | bool] | None = None,
) -> Curriculum:
    """The paper's curriculum, which needs no measurement: noise intervals, noisiest first, accumulating.

    Args:
        process: the forward process.
        method: a name in ``INTERVAL_METHODS``; the paper does not say which, log-SNR is the one that does not put
            most of all t into one cluster.
        k: number of intervals.
        pacing, pacing_options: as in ``make_curriculum``.
    """
    tasks = _interval_tasks(process, k, method)
    values: list[float | None] = [task.log_snr_high for task in tasks]
    provenance = {"measure": NOISE, "method": method, "k": k, "order": "easy-to-hard"}
    groups = [[index] for index in reversed(range(k))]
    return _assemble(process, tasks, groups, values, True, pacing, pacing_options, "uniform", None, provenance)


def _assemble(
    process: Process,
    tasks: list[RankingTask],
    groups: list[list[int]],
    values: list[float | None],
    accumulate: bool,
    pacing: str,
    pacing_options: dict[str, float | int | bool] | None,
    base_density: str,
    task_mass: list[float] | None,
    provenance: dict[str, Any],
) -> Curriculum:
    mass = task_mass if base_density == "table" else task_masses(density(base_density, process), tasks).tolist()
    if mass is None:
        raise InputError("density 'table' needs the mass of each task")
    try:
        return Curriculum(
            process=process.fingerprint,
            tasks=tasks,
            clusters=[Cluster(tasks=group, difficulty=_mean([values[i] for i in group])) for group in groups],
            accumulate=accumulate,
            pacing=PacingField(rule=pacing, options=pacing_options or {}),
            density=DensityField(name=base_density, task_mass=mass),
            provenance=provenance,
        )
    except ValidationError as error:
        raise InputError(f"no curriculum can be made: {first_reason(error)}") from None


def _interval_tasks(process: Process, k: int, method: str) -> list[RankingTask]:
    edges = interval_cuts(process, k, method)
    high, low = process.log_snr(np.array(edges[:-1]) + 1), process.log_snr(edges[1:])
    return [
        RankingTask.of(Task(i, edges[i] + 1, edges[i + 1], float(high[i]), float(low[i])), process) for i in range(k)
    ]


def _grouped(
    ranking: Ranking, process: Process, method: str, k: int, measure: str | None
) -> tuple[list[RankingTask], list[list[int]], str]:
    """Tasks, clusters of them from easiest to hardest, and the measure that decided."""
    if method in INTERVAL_METHODS:
        tasks = _interval_tasks(process, k, method)
        measure = NOISE if measure in (None, NOISE) else pick_measure(ranking, measure)
        values = _values(ranking, tasks, measure)
        # Intervals inside one measured task have its value up to rounding; of these the noisier comes first.
        rounded = [math.inf if value is None else float(f"{value:.12g}") for value in values]
        return tasks, [[i] for i in sorted(range(k), key=lambda i: (rounded[i], -i))], measure
    choose("clustering method", method, {**METHODS, **INTERVAL_METHODS})
    measure = NOISE if measure == NOISE else pick_measure(ranking, measure)
    return ranking.tasks, split_by_value(_values(ranking, ranking.tasks, measure), k, method), measure


def _values(ranking: Ranking, tasks: list[RankingTask], measure: str) -> list[float | None]:
    """Value of a measure for tasks that may be cut differently: the mean over their timesteps."""
    if measure == NOISE:
        return [task.log_snr_high for task in tasks]
    per_t = np.full(ranking.tasks[-1].t_last + 1, np.nan)
    for task, value in zip(ranking.tasks, ranking.measures[measure].value, strict=True):
        per_t[task.t_first : task.t_last + 1] = np.nan if value is None else value
    means = [per_t[task.t_first : task.t_last + 1] for task in tasks]
    return [float(np.nanmean(part)) if np.isfinite(part).any() else None for part in means]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def first_then_all(curriculum: Curriculum) -> Curriculum:
    """The first cluster alone, then everything."""
    first, rest = curriculum.clusters[0], curriculum.clusters[1:]
    if not rest:
        return curriculum
    others = Cluster(tasks=sorted(task for cluster in rest for task in cluster.tasks), difficulty=None)
    return curriculum.with_clusters([first, others], accumulate=True)


def exposure_matched(curriculum: Curriculum, exposure: Array) -> Curriculum:
    """All tasks from the start, drawn as often as a run of the curriculum drew them: its histogram without its order.

    Args:
        curriculum: of that run.
        exposure: how often its densities asked for each t, shape (T+1,), up to a factor.

    Raises:
        InputError: if a count is missing or negative, or t was not drawn evenly inside a task, which no mass per task
            can state.
    """
    if not (np.isfinite(exposure).all() and (exposure >= 0).all() and exposure.sum() > 0):
        raise InputError("how often t was drawn is missing or negative somewhere; was coverage.csv edited?")
    for task in curriculum.tasks:
        inside = exposure[task.t_first : task.t_last + 1]
        if inside.max() > EVEN * inside.min():
            raise InputError(
                f"t was drawn unevenly inside task {task.index} (t = {task.t_first}..{task.t_last}); only a curriculum "
                "with a base density uniform in t, or a table, has a static copy in a file"
            )
    table = DensityField(name="table", task_mass=task_masses(exposure / exposure.sum(), curriculum.tasks).tolist())
    every = Cluster(tasks=list(range(len(curriculum.tasks))), difficulty=None)
    return curriculum.with_clusters(
        [every],
        density=table.model_dump(),
        density_phases=[],
        pacing=PacingField(rule="fraction").model_dump(),
        provenance={"static_of": curriculum.sha256, "curriculum": curriculum.provenance},
    )
