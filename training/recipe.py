"""The recipe ``measured``: from the measured difficulty alone to a base density that changes over the run.

Let e(lambda) be the measured excess nats per unit log-SNR of a task, and q the density of t that puts samples where
nats are to be gained,

    q(t) ~ e(lambda(t)) |dlambda/dt|,      so that a task has the mass e_k times its width in log-SNR.

u is uniform in t, the density under which plain training is judged. While the learning rate is high the recipe draws
from a mixture of both, and goes back to u before it is annealed: what is trained last decides the quality of samples.
The share of u in the mixture is the guard of the noisy tasks, which q all but leaves out and on which samples start.
Nothing is tuned on the metrics that judge. Designs, each a list of (share of the run from which it holds, density):

    half         (u + q) / 2 for the first half of the run, then u
    root         (u + r)/2 for the first 60 %, then u, with r the density in proportion to sqrt(u q) per task: the same
                 emphasis with fewer extremes
    root-long    the same for the first 85 %; what `measured` means without another name
    mild         (3 u + r)/4 for the first 85 %, then u
    ordered      as root-long, and over the first quarter of the run the clusters of the measured difficulty join from
                 easy to hard
    annealed     u + a (q - u) with a falling from 3/4 to 0 like a cosine, in ten parts
    guarded      as half, but every task in the noisier half of all t keeps 3/4 of its mass under u
    log-snr      (u + q)/4 + half of uniform log-SNR for the first 60 %, then u
"""

__all__ = ["CHOSEN", "DESIGNS", "MEASURE", "measured_recipe"]

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from difficulty.errors import InputError, choose
from difficulty.process import Array, Process
from difficulty.ranking import Ranking, RankingTask
from training.curriculum import Curriculum, DensityField
from training.curriculum_builders import make_curriculum
from training.density import density, log_snr_widths, normalised, task_masses

MEASURE = "excess_nats"
CHOSEN = "root-long"  # by the second rule of benchmarks/comparison_studies.py
ORDERED = ("ordered",)  # designs that add the clusters one after the other
CLUSTERS, ORDERED_SHARE = 5, 0.25
PARTS = 10
KEPT = 0.75

Phases = list[tuple[float, Array]]  # from which share of the run, mass of each task
# uniform masses, measured masses, masses uniform in log-SNR, which tasks lie in the noisier half of all t
Design = Callable[[Array, Array, Array, Array], Phases]


def _half(uniform: Array, hard: Array, log_snr: Array, noisy: Array) -> Phases:
    return [(0.0, 0.5 * uniform + 0.5 * hard), (0.5, uniform)]


def _rooted(share: float, until: float) -> Design:
    def phases(uniform: Array, hard: Array, log_snr: Array, noisy: Array) -> Phases:
        # The root is that of the density in t, not of the mass of a task.
        root = normalised(np.sqrt(hard * uniform))
        return [(0.0, (1 - share) * uniform + share * root), (until, uniform)]

    return phases


def _annealed(uniform: Array, hard: Array, log_snr: Array, noisy: Array) -> Phases:
    shares = [0.375 * (1 + math.cos(math.pi * (part + 0.5) / PARTS)) for part in range(PARTS)]
    return [(part / PARTS, (1 - share) * uniform + share * hard) for part, share in enumerate(shares)]


def _guarded(uniform: Array, hard: Array, log_snr: Array, noisy: Array) -> Phases:
    mixed = 0.5 * uniform + 0.5 * hard
    kept = np.where(noisy, np.maximum(mixed, KEPT * uniform), 0.0)
    rest = np.where(noisy, 0.0, mixed)
    if not rest.sum() > 0:
        return [(0.0, uniform)]
    return [(0.0, kept + rest * (1 - kept.sum()) / rest.sum()), (0.5, uniform)]


def _log_snr(uniform: Array, hard: Array, log_snr: Array, noisy: Array) -> Phases:
    return [(0.0, 0.25 * uniform + 0.25 * hard + 0.5 * log_snr), (0.6, uniform)]


DESIGNS: Mapping[str, Design] = {
    "half": _half,
    "root": _rooted(0.5, 0.6),
    "root-long": _rooted(0.5, 0.85),
    "mild": _rooted(0.25, 0.85),
    "ordered": _rooted(0.5, 0.85),
    "annealed": _annealed,
    "guarded": _guarded,
    "log-snr": _log_snr,
}


def measured_recipe(ranking: Ranking, process: Process, design: str = CHOSEN) -> Curriculum:
    """The recipe as a curriculum with changing base densities, which `training run` and the adapters take.

    Args:
        ranking: a measurement that holds ``excess_nats``; tasks of equal width in log-SNR resolve q best.
        process: the process of the ranking.
        design: a name in ``DESIGNS``.

    Raises:
        InputError: if the design is unknown, or the ranking has another process or lacks the measure.
    """
    process.check_fingerprint(ranking.process, "the ranking")
    make = choose("design of the recipe", design, DESIGNS)
    measure = choose("measure of this ranking", MEASURE, ranking.measures)
    tasks = ranking.tasks
    uniform, even = (task_masses(density(name, process), tasks) for name in ("uniform", "log-snr"))
    hard = normalised(_excess(measure.value) * _widths(tasks, process))
    noisy = np.array([task.t_first > process.T / 2 for task in tasks])
    (_, first), *later = make(uniform, hard, even, noisy)
    clusters = CLUSTERS if design in ORDERED else 1
    ordered = make_curriculum(
        ranking,
        k=min(clusters, len(tasks)),
        measure=MEASURE,
        pacing="fraction",
        pacing_options={"share": ORDERED_SHARE},
        process=process,
    )
    return ordered.with_clusters(
        ordered.clusters,
        density=_field(first, uniform).model_dump(),
        density_phases=[{"start": start, "density": _field(mass, uniform).model_dump()} for start, mass in later],
        provenance=ordered.provenance | {"recipe": "measured", "design": design},
    )


def _field(mass: Array, uniform: Array) -> DensityField:
    if np.array_equal(mass, uniform):
        return DensityField(name="uniform", task_mass=uniform.tolist())
    return DensityField(name="table", task_mass=mass.tolist())


def _excess(values: Sequence[float | None]) -> Array:
    known = [value for value in values if value is not None]
    if not known or max(known) <= 0:
        raise InputError("no task of the ranking has an excess; measure again with a larger budget")
    # A task that was not learned at all is as hard as the hardest; noise around zero is no excess.
    return np.array([max(known) if value is None else max(value, 0.0) for value in values])


def _widths(tasks: Sequence[RankingTask], process: Process) -> Array:
    cells = np.concatenate([[0.0], log_snr_widths(process)])
    return np.array([cells[task.t_first : task.t_last + 1].sum() for task in tasks])
