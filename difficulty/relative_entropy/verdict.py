"""When a relative entropy that was estimated from a sample counts as measured, and what to do where it does not.

A pair is valid if its error allows to promise 30 % and no held-out test objects to its fit, here or, beyond doubt, at
other noise: one law is behind all levels, what is wrong under more noise is wrong under less, and what is wrong under
less must be hidden here. A pair that passes alone, between two that do not, passed by luck: neighbours share the fit
and most of its errors, and the tests are many.
Directions in which the data do not vary contribute a part that is known exactly; the rest is judged by the share that
it *could* have by its own upper bound F7: a fit that is too smooth makes the rest small, and must not excuse itself
by that.

Where the fit is refused the relative entropy still lies in a bracket: above the exact part plus the certified lower
bound of F6, 1/2 E[f g]^2/E[f^2] on held-out rows, which holds for any f, and below F7. If the bracket is no wider than
+-30 %, its geometric middle is reported as the estimator "bracket" with the bracket as the interval.

What no fit can exclude: a law that differs from the true one by the relative amount h(x) makes chi^2 = n E[h^2] in n
samples and escapes them below 9. Under noise of scale s a wave of h of length 1/k is damped by exp(-s^2 k^2/2) and adds
s^2 k^2 h to the time score: (s k)^4 exp(-(s k)^2) <= 4/e^2 of E[h^2] to its square. So roughness on the scale of the
noise that n samples cannot show, such as a cusp in place of a rounded top, changes the relative entropy by up to
1/2 (9/n) (4/e^2) dtau^2. Where the noise exceeds the extent L of the data, h is no finer than L and this falls by the
factor (L^2/(L^2 + s^2))^2, as a Gaussian's own relative entropy does.
"""

__all__ = [
    "LIMITS", "ROUGHER",
    "Findings", "Limits",
    "bracket", "objections", "spans_too_little", "too_rough", "unseen",
]  # fmt: skip

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from difficulty.intervals import Z90
from difficulty.relative_entropy.families import Candidate
from difficulty.relative_entropy.heldout_tests import Tested
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.sample import Sample

Array = npt.NDArray[np.float64]

# chi^2 of a departure that the samples do not show: three standard errors.
UNDETECTED = 9.0
ROUGHER = "too few samples: they cannot exclude a rougher law with a much different value"


@dataclass(frozen=True)
class Limits:
    """When a pair counts as measured; all on the scale of log KL.

    Args:
        error: largest standard error; its interval of 90 % just keeps the promise.
        spread: largest sampling error. It is no doubt that may be overstated, as other parts of the error are, so that
            the interval of 97 % must keep the promise.
        bias: largest bias that refits to parts of the data may leave in doubt.
        cross: tolerated difference of the estimate from its held-out cross value, beyond ``tested`` standard errors.
        second_moment: the same for Var[f] on held-out rows above that under the fit, as an overfit makes it.
        flat: the same below it, as edges and thin shells make it.
        bound: the same for a certified lower bound above the estimate.
        tested: standard errors of a held-out figure that it may deviate beyond its tolerance.
        surely: the same, beyond which it speaks against the same fit at other noise too.
        floor: smallest noise scale in units of the step between quantised values.
        missing: largest share of a discrete law that was seen only once.
        unseen: largest share of the KL that roughness may have which the samples cannot show, together with the
            interval of 90 %: log 1.3.
        lacking: largest share of the KL that cumulants of the data may have which a refuted fit has not.
        bracket: largest ratio of upper to lower end of a bracket that is reported, 1.3^2.
    """

    error: float = 0.15
    spread: float = 0.12
    bias: float = 0.3
    cross: float = 0.15
    second_moment: float = 0.15
    flat: float = 0.1
    bound: float = 0.12
    tested: float = 1.3
    surely: float = 2.6
    floor: float = 0.5
    missing: float = 0.2
    unseen: float = 0.262
    lacking: float = 0.15
    bracket: float = 1.69


LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything found at the anchors, (m,) each, on the log scale: for the estimate and for those who doubt it.

    Args:
        log_kl: of the part that is estimated.
        reverse: KL(p_t || p_from) over KL(p_from || p_t).
        error: standard error of log_kl, all sources together.
        influence: sampling error by the influence of the rows where the law looks Gaussian, else 0.
        bias: what refits leave in doubt of it (``Replicated.unresolved``).
        spread: sampling error.
        rivals: disagreement of fits that the data hardly tell apart.
        tested: held-out figures.
        lacking: what the fit lacks by the cumulants of the data, nats, and its error, (m, 2); 0 if it is not refuted.
        family: the candidate chosen.
    """

    log_kl: Array
    reverse: Array
    error: Array
    influence: Array
    bias: Array
    spread: Array
    rivals: Array
    tested: Tested
    lacking: Array
    family: list[Candidate]


def objections(
    sample: Sample, pairs: Pairs, found: Findings, share: Array, kl: Array, of_columns: Array
) -> npt.NDArray[np.object_]:
    """Why a pair is not valid, empty where it is, (m,).

    Args:
        sample: the data.
        pairs: the anchors.
        found: at the anchors.
        share: the largest share of the KL that the estimated part can have.
        kl: the whole KL in nats.
        of_columns: error of what was added for columns of few values, nats.
    """
    test = found.tested
    noise = pairs.noise_from
    unclear = test.cross[:, 1] > 0.5
    hidden = unseen(pairs, sample) / np.maximum(kl, 1e-300)
    refuted = partial(_refuted, tau=pairs.tau, family=found.family)
    gap = np.where(unclear, 0.0, np.abs(test.cross[:, 0] - found.log_kl))
    variance = share * test.second_moment[:, 0]
    found_wanting = [
        (
            noise < LIMITS.floor * sample.step,
            "the values are quantised in steps that this noise does not hide",
        ),
        (
            np.full(len(noise), sample.discrete and sample.missing > LIMITS.missing),
            "too many atoms of the law were seen only once",
        ),
        (
            np.full(len(noise), spans_too_little(sample)),
            "too few samples for so many dimensions: half of them span fewer directions than all",
        ),
        (
            of_columns > LIMITS.error * kl,
            "columns of few values: the fit smooths over their steps, which this noise hides only in part",
        ),
        (too_rough(hidden, share * found.error), ROUGHER),
        (
            refuted(found.lacking[:, 0], LIMITS.lacking * kl, found.lacking[:, 1], measured=True),
            "the third and fourth moments of the data refute the fit",
        ),
        (share * found.bias > LIMITS.bias, "too few samples: half of them give a much different value"),
        (share * found.spread > LIMITS.spread, "too few samples: refits to halves of them disagree"),
        (share * found.rivals > LIMITS.error, "fits that held-out data cannot tell apart disagree"),
        (share * found.error > LIMITS.error, "the errors of sample, fit and draws add up to too much"),
        (
            refuted(share * gap, LIMITS.cross, share * test.cross[:, 1]),
            "held-out data contradict the fit: its time score does not predict the conditional one (F6)",
        ),
        (
            refuted(share * (test.bound[:, 0] - found.log_kl), LIMITS.bound, share * test.bound[:, 1]),
            "a certified lower bound (F6) lies above the estimate: the fit is too smooth for the data",
        ),
        (
            refuted(
                np.abs(variance), np.where(variance > 0, LIMITS.second_moment, LIMITS.flat),
                share * test.second_moment[:, 1],
            ),
            "held-out data contradict the fit: its time score has another spread on them",
        ),
    ]  # fmt: skip
    reason = np.full(len(noise), "", dtype=object)
    for fails, text in found_wanting[::-1]:
        reason[np.asarray(fails, bool)] = text
    reason[_between_refused(reason, pairs.tau)] = "the pairs of a little more and a little less noise are both refused"
    return reason


def _between_refused(reason: npt.NDArray[np.object_], tau: Array) -> npt.NDArray[np.bool_]:
    """Which valid pairs have a refused one on either side in noise, (m,)."""
    order = np.argsort(tau)
    fails = reason[order] != ""
    alone = np.zeros(len(tau), dtype=bool)
    alone[order[1:-1]] = fails[:-2] & ~fails[1:-1] & fails[2:]
    return alone


def _refuted(
    deviation: Array,
    tolerance: Array | float,
    error: Array,
    tau: Array,
    family: list[Candidate],
    *,
    measured: bool = False,
) -> npt.NDArray[np.bool_]:
    """Whether a held-out figure speaks against the fit of a pair, (m,).

    It does where it deviates beyond its tolerance; where it surely does so at more noise, since noise hides what is
    wrong and less of it brings it back; and where it surely does so at less noise and deviates here at all, since a
    tolerance is for fits that may be right. What a figure measures of the error by itself keeps its tolerance.

    Args:
        deviation, tolerance: of the figure, (m,).
        error: its standard error, (m,).
        tau: log noise scale.
        family: the candidate chosen.
        measured: whether the deviation is the error of the KL, and not only a sign of one.
    """
    surely = deviation > tolerance + LIMITS.surely * error
    same = np.array([[one == other for other in family] for one in family])
    noisier = tau[:, None] >= tau
    at_more, at_less = ((surely[:, None] & same & side).any(0) for side in (noisier, ~noisier))
    here = deviation > tolerance + LIMITS.tested * error
    return here | at_more | (at_less & (deviation > LIMITS.surely * error) & (not measured))


def unseen(pairs: Pairs, sample: Sample) -> Array:
    """Most that roughness which the samples cannot show may add to the KL, nats, (m,); see the head of this module."""
    if sample.discrete or not sample.rank:
        return np.zeros(len(pairs))
    with np.errstate(over="ignore"):
        relative = np.exp(2 * pairs.tau) / float(sample.eigenvalues.max())
    share_seen = np.minimum(4 * np.exp(-2) * pairs.dtau**2, 1.0)
    return 0.5 * UNDETECTED / sample.n * share_seen / (1 + relative) ** 2


def too_rough(hidden_share: Array, error: Array) -> npt.NDArray[np.bool_]:
    """Whether what the samples cannot show and the interval of 90 % exceed ``LIMITS.unseen`` together, (m,).

    Args:
        hidden_share: ``unseen`` as a share of the KL.
        error: standard error of log KL; one beyond ``LIMITS.error`` is refused for itself.
    """
    return np.asarray(hidden_share + Z90 * np.minimum(error, LIMITS.error) > LIMITS.unseen, dtype=bool)


def spans_too_little(sample: Sample) -> bool:
    """Whether directions may be empty for want of samples only: n points, unless they are atoms, span n - 1."""
    return not sample.discrete and sample.n // 2 - 1 < sample.rank < sample.dim


def bracket(exact: Array, test: Tested, upper: Array) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """Lower and upper end of what is certain in nats, and whether they are close enough to be an answer, (m,) each.

    Args:
        exact: KL of the directions without variance.
        test: held-out figures of the rest; the lower end is one-sided at 95 %.
        upper: F7.
    """
    known = np.isfinite(test.bound[:, 1]) & (test.bound[:, 1] < 1)
    rest = np.where(known, np.exp(np.where(known, test.bound[:, 0] - 1.645 * test.bound[:, 1], 0.0)), 0.0)
    low = np.minimum(exact + rest, upper)
    return low, upper, (low > 0) & (upper <= LIMITS.bracket * low)
