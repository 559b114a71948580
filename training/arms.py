"""The arms of a comparison: each changes one thing about plain training.

vanilla            uniform t
vanilla-again      the same with fresh seeds (A/A): what a difference by chance looks like
curriculum         the given curriculum
anti               the same clusters, hard to easy
random             the same clusters in random order, another for each seed
non-accumulating   each cluster alone, in turn
first-then-all     the first cluster, then everything
static             the histogram of t that `curriculum` had in the run of the same seed, without any order
paper              20 log-SNR intervals, noisiest first, patience as published (``PAPER_SHARE`` of the budget)
log-snr, logit-normal, log-normal         another base density
min-snr, p2                               another loss weight
curriculum+min-snr, curriculum+p2         both
"""

__all__ = ["ARMS", "ArmSpec", "choose_arms"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from difficulty.errors import InputError, choose
from difficulty.process import Process
from training.clusters import order_clusters
from training.curriculum import Cluster, Curriculum, interval_curriculum

PAPER_INTERVALS = 20
PAPER_SHARE = 0.1
# Stages of `patience` last about this many tau on stationary noise.
STAGE_LENGTH_IN_TAU = 1.78


@dataclass(frozen=True)
class ArmSpec:
    """How one arm differs from plain training.

    Args:
        curriculum: None for all t from the start.
        density: base density by spec, None for the curriculum's, or uniform.
        weight: loss weight by spec.
        fresh_seeds: train with seeds of its own, so that nothing is paired (A/A).
        random_order: shuffle the clusters anew for every seed.
        exposure_of: draw t from the histogram that this arm had with the same seed.
    """

    curriculum: Curriculum | None = None
    density: str | None = None
    weight: str = "constant"
    fresh_seeds: bool = False
    random_order: bool = False
    exposure_of: str | None = None

    def curriculum_for(self, seed: int) -> Curriculum | None:
        """The curriculum of one seed."""
        if self.curriculum is None or not self.random_order:
            return self.curriculum
        order = order_clusters([[i] for i in range(len(self.curriculum.clusters))], "random", seed)
        return self.curriculum.with_clusters([self.curriculum.clusters[i] for (i,) in order])


def _anti(curriculum: Curriculum) -> ArmSpec:
    return ArmSpec(curriculum.with_clusters(curriculum.clusters[::-1]))


def _first_then_all(curriculum: Curriculum) -> ArmSpec:
    first, rest = curriculum.clusters[0], curriculum.clusters[1:]
    if not rest:
        return ArmSpec(curriculum)
    others = Cluster(tasks=sorted(task for cluster in rest for task in cluster.tasks), difficulty=None)
    return ArmSpec(curriculum.with_clusters([first, others], accumulate=True))


def _paper(process: Process, steps: int) -> ArmSpec:
    stage = PAPER_SHARE * steps / (PAPER_INTERVALS - 1)
    tau = max(1, round(stage / STAGE_LENGTH_IN_TAU))
    return ArmSpec(interval_curriculum(process, k=PAPER_INTERVALS, pacing_options={"tau": tau}))


PLAIN_ARMS: Mapping[str, ArmSpec] = {
    "vanilla": ArmSpec(),
    "vanilla-again": ArmSpec(fresh_seeds=True),
    "log-snr": ArmSpec(density="log-snr"),
    "logit-normal": ArmSpec(density="logit-normal"),
    "log-normal": ArmSpec(density="log-normal"),
    "min-snr": ArmSpec(weight="min-snr"),
    "p2": ArmSpec(weight="p2"),
}
CURRICULUM_ARMS: Mapping[str, Callable[[Curriculum], ArmSpec]] = {
    "curriculum": lambda curriculum: ArmSpec(curriculum),
    "anti": _anti,
    "random": lambda curriculum: ArmSpec(curriculum, random_order=True),
    "non-accumulating": lambda curriculum: ArmSpec(curriculum.with_clusters(curriculum.clusters, accumulate=False)),
    "first-then-all": _first_then_all,
    "static": lambda curriculum: ArmSpec(exposure_of="curriculum"),
    "curriculum+min-snr": lambda curriculum: ArmSpec(curriculum, weight="min-snr"),
    "curriculum+p2": lambda curriculum: ArmSpec(curriculum, weight="p2"),
}
PROCESS_ARMS: Mapping[str, Callable[[Process, int], ArmSpec]] = {"paper": _paper}
ARMS: tuple[str, ...] = (*PLAIN_ARMS, *CURRICULUM_ARMS, *PROCESS_ARMS)


def choose_arms(
    names: Sequence[str], curriculum: Curriculum | None, process: Process, steps: int
) -> dict[str, ArmSpec]:
    """Arms by name.

    Raises:
        InputError: if a name is unknown or needs a curriculum that was not given.
    """
    arms: dict[str, ArmSpec] = {}
    for name in names:
        choose("arm", name, dict.fromkeys(ARMS))
        if name in PLAIN_ARMS:
            arms[name] = PLAIN_ARMS[name]
        elif name in PROCESS_ARMS:
            arms[name] = PROCESS_ARMS[name](process, steps)
        elif curriculum is None:
            raise InputError(f"arm {name!r} needs a curriculum; give a ranking or a curriculum.json")
        else:
            arms[name] = CURRICULUM_ARMS[name](curriculum)
    return arms
