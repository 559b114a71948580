"""Which of several families explains a sample: the held-out log-likelihood at every noise level decides.

What noise hides does not count: at each level the rows are judged under its noise. Of the plausible candidates the
simplest is taken, and as few different ones as serve all levels. The others keep a weight, by which they doubt it.
Since one law is behind all levels, what less noise refutes is no rival, and what less noise chooses is one, unless the
rows under more noise refute it in turn.
"""

__all__ = ["PLAUSIBLE", "Choice", "choose"]

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from difficulty.relative_entropy.estimate import Settings
from difficulty.relative_entropy.families import Candidate
from difficulty.relative_entropy.heldout_tests import HeldoutTests
from difficulty.threads import together

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

# Of candidates with at least this weight relative to the most likely one, the simplest is taken.
PLAUSIBLE = 0.3
RICHER_WEIGHT = 0.25
# A candidate to which a level gives less weight than this cannot be the law.
REFUTED = 1e-3


@dataclass(frozen=True, eq=False)
class Choice:
    """Candidates at m levels.

    Args:
        names: the candidates.
        weight: (candidates, m), 1 for the best of a level, small for the implausible.
        plausibility: likelihood of each at each level by itself, relative to the best, (candidates, m).
    """

    names: list[Candidate]
    weight: Array
    plausibility: Array

    def take(self, levels: Rows) -> "Choice":
        """At some of the levels."""
        return Choice(self.names, self.weight[:, levels], self.plausibility[:, levels])


def choose(pool: list[Candidate], tests: HeldoutTests, tau: Array, settings: Settings) -> Choice:
    """Fit the candidates and weigh them at m levels of noise; progress counts as the first half.

    Args:
        pool: the candidates, simplest first within a kind.
        tests: which fit and judge them.
        tau: log noise scale of the levels, rising, (m,).
        settings: threads and progress.
    """
    kinds: dict[tuple[str, float], list[Candidate]] = {}
    for candidate in pool:
        kinds.setdefault(candidate.kind, []).append(candidate)
    found: dict[Candidate, Array] = {}
    # The poorest of every kind, then the next ones, but no richer ones of a kind that only gets worse.
    for place in range(max(len(kind) for kind in kinds.values())):
        now = [kind[place] for kind in kinds.values() if place < len(kind) and not _worsens(kind[:place], found)]
        folds = range(len(tests.folds))
        calls = [partial(tests.likelihood, c, fold, tau) for c in now for fold in folds]
        parts = iter(together(calls, settings.threads))
        found |= {c: np.concatenate([next(parts) for _ in folds], 1) for c in now}
        settings.progress(sum(len(kind[: place + 1]) for kind in kinds.values()), 2 * len(pool))
    names = [candidate for candidate in pool if candidate in found]
    total = np.stack([found[c].sum(1) for c in names])
    # A rival counts by the likelihood ratio on all held-out rows, tempered since the rows have other uses.
    plausibility = np.exp(0.5 * (total - total.max(0)))
    size = np.array([c.parameters(tests.sample.rank) for c in names])
    best = _simplest_cover(plausibility > PLAUSIBLE, size)
    weight = _refuted_at_less_noise(plausibility, best)
    # Richer fits that are no better are noise more often than news; simpler ones are not.
    richer = size[:, None] > size[best]
    weight = np.where(richer, np.minimum(weight, RICHER_WEIGHT), np.minimum(weight, 1.0 - 1e-9))
    weight = np.maximum(weight, _chosen_at_less_noise(plausibility, best))
    weight[best, np.arange(len(best))] = 1.0
    return Choice(names, weight, plausibility)


def _refuted_at_less_noise(weight: Array, best: Rows) -> Array:
    """Weights without those rivals of a level's choice that less noise, where that choice holds, refutes.

    Refuted is what is out of the question, not what is a little less likely.
    """
    kept = weight.copy()
    for j, i in enumerate(best):
        least = weight[:, : j + 1][:, weight[i, : j + 1] > PLAUSIBLE].min(1)
        kept[least < REFUTED, j] = 0.0
    return kept


def _chosen_at_less_noise(plausibility: Array, best: Rows) -> Array:
    """Weights (candidates, m) of what less noise made the choice, where the rows under more do not refute it."""
    weight = np.zeros_like(plausibility)
    for j, i in enumerate(best):
        weight[i, j + 1 :][plausibility[i, j + 1 :] >= REFUTED] = RICHER_WEIGHT
    return weight


def _worsens(kind: list[Candidate], found: dict[Candidate, Array]) -> bool:
    """Whether held-out likelihood at the first level fell twice with the last three, or had done so before them."""
    if len(kind) < 3 or kind[-1] not in found:
        return len(kind) >= 3
    first, second, third = (found[candidate][0].mean() for candidate in kind[-3:])
    return bool(third < second < first)


def _simplest_cover(plausible: npt.NDArray[np.bool_], size: npt.NDArray[np.int64]) -> Rows:
    """A plausible candidate for every level, from as few candidates as a greedy choice needs; simpler ones first."""
    chosen: list[int] = []
    open_ = np.ones(plausible.shape[1], dtype=bool)
    while open_.any():
        gain = (plausible & open_).sum(1)
        chosen.append(min(np.flatnonzero(gain == gain.max()).tolist(), key=lambda i: int(size[i])))
        open_ &= ~plausible[chosen[-1]]
    chosen.sort(key=lambda i: size[i])
    return np.array([next(i for i in chosen if plausible[i, j]) for j in range(plausible.shape[1])])
