"""Candidates judged on rows that they were not fitted to: likelihood under the noise of a pair, and the tests of F6.

With f the time score of a fit and g the conditional time score, which is known in closed form:
    cross = 1/2 E[f g]                      what the data say of the KL, whatever the fit says
    bound = 1/2 E[f g]^2/E[f^2]             a lower bound for any f
    second_moment = Var[f] on held-out rows over Var[f] under the fit itself
There are two folds, each of three quarters to fit and a quarter to judge; the judging quarters are disjoint.

A covariance of D dimensions from n rows makes Var[f] on held-out rows larger than under the fit by a share of several
D/n, however right the family, and shifts the cross value. By how much is known from the same test of rows drawn from
the fit (``Tested.beyond``).
"""

__all__ = ["HeldoutTests", "Tested"]

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from difficulty.randomness import stream
from difficulty.relative_entropy.families import Candidate, Plan, fit_candidate
from difficulty.relative_entropy.fits import Fit
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.sample import Sample
from difficulty.relative_entropy.score import conditional_covariance

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

HELDOUT_ROWS = 1500
# Numbers held at once for the held-out rows and their noise: 256 MiB.
HELDOUT_SIZE = 2**25
# Noise draws per held-out row in the tests, half of them the negatives of the others, and draws of the fit itself; more
# where a row is short.
DRAWS, OWN_DRAWS = 4, 2000
MORE_DRAWS, MORE_OWN_DRAWS, FEW_AXES = 8, 12_000, 24
HELDOUT_STREAM = 31


@dataclass(frozen=True, eq=False)
class Tested:
    """Held-out figures of a candidate (F6), each (m, 2): the value and its standard error.

    Args:
        second_moment: log of Var[f] on held-out rows over that under the fit.
        bound: log of the certified lower bound 1/2 E[f g]^2/E[f^2], nats.
        cross: log of 1/2 E[f g] in nats; -inf where it is not positive.
    """

    second_moment: Array
    bound: Array
    cross: Array

    def scaled(self, by: Array) -> "Tested":
        """With ``by``, (m,), added to the logs of bound and cross."""
        step = np.stack([by, np.zeros_like(by)], 1)
        return Tested(self.second_moment, self.bound + step, self.cross + step)

    def beyond(self, expected: "Tested", log_kl: Array) -> "Tested":
        """With second moment and cross less what a right fit would show; the bound is one whatever it shows.

        Args:
            expected: figures of the same test on rows drawn from the fit.
            log_kl: of that fit, (m,).
        """
        moment = self.second_moment[:, 0] - expected.second_moment[:, 0]
        moment_error = np.hypot(self.second_moment[:, 1], expected.second_moment[:, 1])
        cross, error = self.cross[:, 0].copy(), np.hypot(self.cross[:, 1], expected.cross[:, 1])
        known = np.isfinite(error)
        cross[known] -= (expected.cross[:, 0] - log_kl)[known]
        return Tested(np.stack([moment, moment_error], 1), self.bound, np.stack([cross, error], 1))


class HeldoutTests:
    """The two folds of one sample.

    Args:
        sample: the data.
        rows: its rows with their mean, shape (n, r).
        order: in which rows are dealt to the folds, (n,).
        plan: of every fit.
        pairs: the anchors.
        tau: log noise scale at each, finite.
        seed: of the noise.
    """

    def __init__(
        self, sample: Sample, rows: Array, order: Rows, plan: Plan, pairs: Pairs, tau: Array, seed: int
    ) -> None:
        self.sample, self.rows, self.plan, self.pairs, self.tau, self.seed = sample, rows, plan, pairs, tau, seed
        quarter = max(len(order) // 4, 1)
        self.folds = [
            (order[quarter:], order[:quarter]),
            (np.concatenate([order[:quarter], order[2 * quarter :]]), order[quarter : 2 * quarter]),
        ]
        few = sample.rank <= FEW_AXES
        self.draws, self.own_draws = (MORE_DRAWS, MORE_OWN_DRAWS) if few else (DRAWS, OWN_DRAWS)
        self.fits: dict[tuple[Candidate, int], Fit] = {}

    def likelihood(self, candidate: Candidate, fold: int, tau: Array) -> Array:
        """Log-likelihood of each held-out row of a fold at levels ``tau``, (m,), of log noise scale: (m, n)."""
        if candidate.family == "atoms":
            return np.zeros((len(tau), 1))
        inside, outside = self.folds[fold]
        x, eps, n = self._heldout(outside, fold, 2)
        log_density = self._fit(candidate, fold, inside).log_density(x, eps, tau)
        return log_density.reshape(len(tau), n, 2).mean(2).numpy()

    def test(self, candidate: Candidate) -> Tested:
        """The figures of F6."""
        m = len(self.tau)
        if candidate.family == "atoms":
            unknown = np.stack([np.zeros(m), np.full(m, np.inf)], 1)
            return Tested(unknown, unknown - [np.inf, 0], unknown)
        held, cross, own, centred = [], [], [], []
        for fold, (inside, outside) in enumerate(self.folds):
            fit = self._fit(candidate, fold, inside)
            x, eps, n = self._heldout(outside, fold, self.draws)
            flow, dilation, _ = fit.evaluate(x, eps, self.tau)
            f = self._along(flow, dilation).reshape(m, n, 2, self.draws // 2)
            held.append(f.square().mean((2, 3)).numpy())
            centred.append((f - f.mean((1, 2, 3), keepdim=True)).square().mean((2, 3)).numpy())
            s = torch.from_numpy(np.exp(self.tau))[:, None]
            square, dim = eps.square().sum(1), eps.shape[1]
            g = self._along((square - dim).expand(len(s), -1), dim - square - (x * eps).sum(1) / s).reshape(f.shape)
            cross.append(conditional_covariance(f, g).numpy())
            own_flow, own_dilation, _ = fit.evaluate(*fit.draw(self.own_draws, fold), self.tau)
            own.append(self._along(own_flow, own_dilation).square().numpy())
        (e, e_se), (c, c_se), (u, u_se) = (_mean(np.concatenate(part, 1)) for part in (held, cross, own))
        v, v_se = _mean(np.concatenate(centred, 1))
        # The fit varies with its rows as the held-out figure does with its own.
        inside, outside = self.folds[0]
        v_se = v_se * np.sqrt(1 + 2 * len(outside) / len(inside))
        positive = c > 0
        safe = np.where(positive, c, 1.0)
        log_cross = np.where(positive, np.log(0.5 * safe), -np.inf)
        return Tested(
            np.stack([np.log(v / u), np.hypot(v_se / v, u_se / u)], 1),
            np.stack([2 * log_cross - np.log(0.5 * e), np.hypot(2 * c_se / safe, e_se / e)], 1),
            np.stack([log_cross, np.where(positive, c_se / safe, np.inf)], 1),
        )

    def _fit(self, candidate: Candidate, fold: int, inside: Rows) -> Fit:
        key = (candidate, fold)
        if key not in self.fits:
            self.fits[key] = fit_candidate(self.rows[inside], self.sample.counts[inside], candidate, self.plan)
        return self.fits[key]

    def _along(self, flow: Tensor, dilation: Tensor) -> Tensor:
        """f = dtau F - dlog(alpha) q at the anchors; only its direction matters where alpha ends at 0."""
        infinite = ~np.isfinite(self.pairs.dtau)
        dtau = np.where(infinite, 1.0, self.pairs.dtau)
        dlog = np.where(infinite, -1.0, self.pairs.dlog_alpha)
        return torch.from_numpy(dtau)[:, None] * flow - torch.from_numpy(dlog)[:, None] * dilation

    def _heldout(self, outside: Rows, fold: int, draws: int) -> tuple[Tensor, Tensor, int]:
        """Rows, each ``draws`` times, and noise: first half of the draws, then their negatives."""
        rows = outside[: max(50, min(HELDOUT_ROWS, HELDOUT_SIZE // (draws * self.sample.rank)))]
        shape = (len(rows), draws // 2, self.sample.rank)
        noise = stream(HELDOUT_STREAM, self.seed, fold).standard_normal(shape)
        eps = torch.from_numpy(np.concatenate([noise, -noise], 1)).flatten(0, 1)
        return torch.from_numpy(self.rows[rows]).repeat_interleave(draws, 0), eps, len(rows)


def _mean(values: Array) -> tuple[Array, Array]:
    """Mean over the second axis and its standard error."""
    return values.mean(1), values.std(1) / values.shape[1] ** 0.5
