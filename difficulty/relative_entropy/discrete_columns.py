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

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from difficulty.relative_entropy.fits import Fit, Measured, ProductBlock
from difficulty.relative_entropy.pairs import Pairs
from difficulty.relative_entropy.sample import DiscreteColumn

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Columns = tuple[DiscreteColumn, ...]

# Error of what is added for a column, as a share of it: where its values lie so many standard deviations of the noise
# apart that it tells them, and where it does not.
APART, DOUBT_APART, DOUBT = 6.0, 0.1, 0.3
# Laws of atoms whose rates are kept.
REMEMBERED = 1024


def lacking_in_columns(fit: Fit, columns: Columns, pairs: Pairs) -> Measured:
    """Relative entropies that a fit lacks at m pairs for want of the atoms of columns, nats, (m,), and their error."""
    kl, kl_reverse, error = np.zeros((3, len(pairs)))
    noise = np.exp(pairs.tau)
    for column, near, marginal_law in _where_it_matters(fit, columns, pairs.tau):
        atoms, marginal = (law.measure(pairs.take(near), 0, 0) for law in (_atoms(column), marginal_law))
        lacking = column.share * (atoms.kl - marginal.kl)
        kl[near] += lacking
        kl_reverse[near] += column.share * (atoms.kl_reverse - marginal.kl_reverse)
        error[near] += np.where(APART * noise[near] < column.step, DOUBT_APART, DOUBT) * np.abs(lacking)
    return Measured(kl, kl_reverse, error)


def rates_lacking_in_columns(fit: Fit, columns: Columns, tau: Array) -> Array:
    """The same of A, B, C, I_min (F5) at m levels of log noise scale, shape (m, 4)."""
    total = np.zeros((len(tau), 4))
    for column, near, marginal in _where_it_matters(fit, columns, tau):
        total[near] += column.share * (_rates_of_atoms(column, tuple(tau[near])) - marginal.profile(tau[near], 0, 0))
    return total


def mmse_lacking_in_columns(fit: Fit, columns: Columns, tau: Array) -> Array:
    """The same of the mmse, shape (m,); not positive, since atoms are easier to tell than what is smooth."""
    total = np.zeros(len(tau))
    for column, near, marginal in _where_it_matters(fit, columns, tau):
        total[near] += column.share * (_mmse_of_atoms(column, tuple(tau[near])) - marginal.mmse(tau[near], 0, 0))
    return total


# Asked for again with every fit, at the same levels.
@functools.lru_cache(maxsize=REMEMBERED)
def _rates_of_atoms(column: DiscreteColumn, tau: tuple[float, ...]) -> Array:
    return _atoms(column).profile(np.array(tau), 0, 0)


@functools.lru_cache(maxsize=REMEMBERED)
def _mmse_of_atoms(column: DiscreteColumn, tau: tuple[float, ...]) -> Array:
    return _atoms(column).mmse(np.array(tau), 0, 0)


def _atoms(column: DiscreteColumn) -> ProductBlock:
    return ProductBlock(np.ones((1, 1)), column.weights[None], column.values[None], np.zeros((1, len(column.values))))


def _where_it_matters(fit: Fit, columns: Columns, tau: Array) -> Iterator[tuple[DiscreteColumn, Rows, ProductBlock]]:
    """Each column with the levels whose noise shows its steps and the fit's marginal on it."""
    for column in columns:
        near = np.flatnonzero(np.exp(tau) < column.step)
        if len(near):
            marginal = ProductBlock(np.ones((1, 1)), *(part[None] for part in fit.marginal(column.direction)))
            yield column, near, marginal
