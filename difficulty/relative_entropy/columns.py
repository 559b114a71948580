"""Columns of few values among continuous ones: counts, labels, flags.

Where noise does not hide its steps such a column has the relative entropy of a law of atoms. A fit whose components do
not resolve the atoms lacks that, and no test of its own time score shows a term that is missing from it. But the law of
the column alone is known: what the fit lacks is the relative entropy of that law less that of the fit's own marginal on
the column. This is exact where the column is independent of the rest, and where there is so little noise that the noisy
column tells its value; in between it is an approximation.

Columns that determine each other span fewer directions than they are. A column counts by the squared length of its
projection onto the axes with variance, which adds up to the number of directions.
"""

__all__ = ["lacking_columns", "lacking_columns_rates"]

import numpy as np
import numpy.typing as npt

from difficulty.relative_entropy.fits import Fit, Measured, ProductBlock
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.sample import FewValues

Array = npt.NDArray[np.float64]

# Error of what is added for a column, as a share of it: where its values lie so many standard deviations of the noise
# apart that it tells them, and where it does not.
APART, DOUBT_APART, DOUBT = 6.0, 0.1, 0.3


def lacking_columns(fit: Fit, columns: tuple[FewValues, ...], pairs: Pairs) -> Measured:
    """Relative entropies that the fit lacks at m pairs for want of the atoms of these columns, nats, (m,) each."""
    kl, kl_reverse, error = np.zeros((3, len(pairs)))
    noise = np.exp(pairs.tau)
    for column in columns:
        near = np.flatnonzero(noise < column.step)
        if len(near):
            atoms, marginal = (block.measure(pairs.take(near), 0, 0) for block in _laws(fit, column))
            lacking = column.share * (atoms.kl - marginal.kl)
            kl[near] += lacking
            kl_reverse[near] += column.share * (atoms.kl_reverse - marginal.kl_reverse)
            error[near] += np.where(APART * noise[near] < column.step, DOUBT_APART, DOUBT) * np.abs(lacking)
    return Measured(kl, kl_reverse, error)


def lacking_columns_rates(fit: Fit, columns: tuple[FewValues, ...], tau: Array) -> tuple[Array, Array]:
    """The same for A, B, C, I_min of F5, shape (m, 4), and for the mmse, (m,), at m levels of log noise scale."""
    rates, mmse = np.zeros((len(tau), 4)), np.zeros(len(tau))
    for column in columns:
        near = np.flatnonzero(np.exp(tau) < column.step)
        if len(near):
            atoms, marginal = _laws(fit, column)
            rates[near] += column.share * (atoms.profile(tau[near], 0, 0) - marginal.profile(tau[near], 0, 0))
            mmse[near] += column.share * (atoms.mmse(tau[near], 0, 0) - marginal.mmse(tau[near], 0, 0))
    return rates, mmse


def _laws(fit: Fit, column: FewValues) -> tuple[ProductBlock, ProductBlock]:
    """The column's law of atoms and the marginal of the fit on it."""
    one = np.ones((1, 1))
    atoms = ProductBlock(one, column.weights[None], column.values[None], np.zeros((1, len(column.values))))
    return atoms, ProductBlock(one, *(part[None] for part in fit.marginal(column.direction)))
