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
measured           the recipe of `recipe.py`: a density from the measured difficulty that changes over the run;
                   ``measured:NAME`` is another of its designs
measured-static    the histogram of t that `measured` had in the run of the same seed, without any order
log-snr, logit-normal, log-normal         another base density
min-snr, p2                               another loss weight
curriculum+WEIGHT, measured+WEIGHT        with any loss weight, as in ``curriculum+soft-min-snr:gamma=5``
FILE.json          the curriculum of a file
"""

__all__ = ["ARMS", "ArmSpec", "choose_arms"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from difficulty.errors import InputError, choose
from difficulty.process import Process
from difficulty.ranking import Ranking
from training.clusters import order_clusters
from training.curriculum import Curriculum
from training.curriculum_builders import first_then_all, interval_curriculum
from training.recipe import CHOSEN, measured_recipe

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
    "first-then-all": lambda curriculum: ArmSpec(first_then_all(curriculum)),
    "static": lambda curriculum: ArmSpec(exposure_of="curriculum"),
}
PROCESS_ARMS: Mapping[str, Callable[[Process, int], ArmSpec]] = {"paper": _paper}
MEASURED, MEASURED_STATIC = "measured", "measured-static"
ARMS: tuple[str, ...] = (*PLAIN_ARMS, *CURRICULUM_ARMS, *PROCESS_ARMS, MEASURED, MEASURED_STATIC)


def choose_arms(
    names: Sequence[str],
    curriculum: Curriculum | None,
    process: Process,
    steps: int,
    ranking: Ranking | None = None,
) -> dict[str, ArmSpec]:
    """Arms by name, in the forms that stand at the head of this file.

    Raises:
        InputError: if a name is unknown or needs a curriculum or a ranking that was not given.
    """
    return {name: _arm(name, curriculum, process, steps, ranking) for name in names}


def _arm(
    name: str, curriculum: Curriculum | None, process: Process, steps: int, ranking: Ranking | None
) -> ArmSpec:
    if name.endswith(".json"):
        return ArmSpec(Curriculum.load(Path(name)))
    kind, plus, weight = name.partition("+")
    if plus:
        plain = _arm(kind, curriculum, process, steps, ranking)
        if plain.weight != "constant":
            raise InputError(f"arm {name!r} asks for two loss weights; name one of them")
        return replace(plain, weight=weight)
    kind, _, design = name.partition(":")
    if kind == MEASURED:
        if ranking is None:
            raise InputError(f"arm {name!r} needs a ranking; give a measured one")
        return ArmSpec(measured_recipe(ranking, process, design or CHOSEN))
    choose("arm", name, dict.fromkeys(ARMS))
    if name == MEASURED_STATIC:
        return ArmSpec(exposure_of=MEASURED)
    if name in PLAIN_ARMS:
        return PLAIN_ARMS[name]
    if name in PROCESS_ARMS:
        return PROCESS_ARMS[name](process, steps)
    if curriculum is None:
        raise InputError(f"arm {name!r} needs a curriculum; give a ranking or a curriculum.json")
    return CURRICULUM_ARMS[name](curriculum)
