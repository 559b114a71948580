"""Columns of few values, such as counts, labels and flags, among continuous ones or others of their kind.

Where noise does not hide its steps such a column has the relative entropy of a law of atoms. A fit whose components do
not resolve the atoms lacks that, and no test of its own time score shows a term that is missing from it. But the law of
the column alone is known: what the fit lacks is the relative entropy of that law less that of the fit's own marginal on
the column. This is exact where the column is independent of the rest, and where there is so little noise that the noisy
column tells its value; in between it is an approximation.

Columns that determine each other span fewer directions than they are. A column counts by the squared length of its
projection onto the axes with variance, which adds up to the number of directions.

The columns are those of the data as given: after a rotation none is discrete, and none is seen.
"""

__all__ = ["lacking_in_columns", "mmse_lacking_in_columns", "rates_lacking_in_columns"]

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from difficulty.relative_entropy.fits import Fit, Measured, ProductBlock
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.sample import DiscreteColumn

Array = npt.NDArray[np.float64]
Columns = tuple[DiscreteColumn, ...]

# Error of what is added for a column, as a share of it: where its values lie so many standard deviations of the noise
# apart that it tells them, and where it does not.
APART, DOUBT_APART, DOUBT = 6.0, 0.1, 0.3


def lacking_in_columns(fit: Fit, columns: Columns, pairs: Pairs) -> Measured:
    """Relative entropies that a fit lacks at m pairs for want of the atoms of columns, nats, (m,), and their error."""
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


def rates_lacking_in_columns(fit: Fit, columns: Columns, tau: Array) -> Array:
    """The same of A, B, C, I_min (F5) at m levels of log noise scale, shape (m, 4)."""
    return _lacking(np.zeros((len(tau), 4)), fit, columns, tau, lambda block, at: block.profile(at, 0, 0))


def mmse_lacking_in_columns(fit: Fit, columns: Columns, tau: Array) -> Array:
    """The same of the mmse, shape (m,); not positive, since atoms are easier to tell than what is smooth."""
    return _lacking(np.zeros(len(tau)), fit, columns, tau, lambda block, at: block.mmse(at, 0, 0))


def _lacking(
    total: Array, fit: Fit, columns: Columns, tau: Array, measure: Callable[[ProductBlock, Array], Array]
) -> Array:
    """Add to ``total`` what a fit lacks of a quantity at levels of log noise scale."""
    for column in columns:
        near = np.flatnonzero(np.exp(tau) < column.step)
        if len(near):
            atoms, marginal = (measure(block, tau[near]) for block in _laws(fit, column))
            total[near] += column.share * (atoms - marginal)
    return total


def _laws(fit: Fit, column: DiscreteColumn) -> tuple[ProductBlock, ProductBlock]:
    """The column's law of atoms and the marginal of the fit on it."""
    one = np.ones((1, 1))
    atoms = ProductBlock(one, column.weights[None], column.values[None], np.zeros((1, len(column.values))))
    return atoms, ProductBlock(one, *(part[None] for part in fit.marginal(column.direction)))
