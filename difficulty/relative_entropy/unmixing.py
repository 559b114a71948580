"""Independent components: orthogonal axes along which data are a product of laws that are not Gaussian.

Three contrasts find them. log cosh, the usual one, is even and hardly sees a component that is skewed more than
peaked, such as half a Gaussian; with a cubic part it does. Both are blind to laws of several narrow modes whose low
moments are a Gaussian's. A bump exp(-u^2/(2 BUMP^2)) is not. Another one than log cosh is taken where its components
have surely less entropy together, which is what independent components have least of (Hyvarinen and Oja 2000, Neural
Networks 13, 411).
"""

__all__ = ["LOCAL", "LOGCOSH", "contrast_of_axes", "independent_axes", "look_gaussian", "principal", "quiet_unmixing"]

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import differential_entropy

Array = npt.NDArray[np.float64]

# Of all squares together, and of the cube of one component with another one, in standard errors. (The axes are turned
# so that odd functions of one hardly covary with another: of thousands of pairs of right axes none comes near.)
LARGEST_COVARIANCE, LARGEST_CUBIC = 3.5, 3.5
# Width of the bump in standard deviations of the component, and what its mean and standard deviation are under a
# Gaussian.
BUMP = 0.5
BUMP_MEAN = (1 + BUMP**-2) ** -0.5
BUMP_SD = ((1 + 2 * BUMP**-2) ** -0.5 - BUMP_MEAN**2) ** 0.5
# Share of u^2 beside tanh(u), the slopes of the cubic part and of log cosh.
CUBIC = 0.2
# Entropy that the components of another contrast must have less, in units of sqrt(d/n). A bump is soon found in chance
# clusters; the cubic part finds the axes of log cosh again where nothing is skewed.
LESS_ENTROPY, LESS_ENTROPY_SKEWED = 5.0, 1.0
LOGCOSH, LOCAL, SKEWED = "logcosh", "local", "skewed"


def contrast_of_axes(rows: Array, counts: Array, seed: int) -> str | None:
    """Contrast by which orthogonal axes are found along which rows (n, d) are independent and not Gaussian, or None."""
    n, d = rows.shape
    if d == 1:
        return LOGCOSH
    found = {}
    for contrast in (LOGCOSH, SKEWED, LOCAL):
        mixing, sources = _unmix(rows, counts, seed, contrast)
        with np.errstate(divide="ignore", invalid="ignore"):  # values that repeat have an entropy of -inf
            entropy = differential_entropy(sources).sum()
        _, kurtosis, bump = np.abs(_figures(sources)).max(1)
        stands_out = bump > _surely(d) or (contrast != LOCAL and kurtosis > 3)
        found[contrast] = entropy, stands_out and _are_independent(mixing, sources)
    usual, good = found[LOGCOSH]
    for contrast, least in ((LOCAL, LESS_ENTROPY), (SKEWED, LESS_ENTROPY_SKEWED)):
        other, other_good = found[contrast]
        surely_less = usual - other > least * np.sqrt(d / n)
        if other_good and (surely_less or (contrast == SKEWED and not good)):
            return contrast
    return LOGCOSH if good else None


def _are_independent(mixing: Array, sources: Array) -> bool:
    """Whether the columns (d, d) are orthogonal and components (n, d) show no dependence, up to sampling error."""
    n, d = sources.shape
    # Distance of the axes from orthogonality, against what the error of an estimated axis explains: an error e of the
    # search makes it e (r - 1/r), r the ratio of their lengths.
    length = np.linalg.norm(mixing, axis=0)
    ratio = length[:, None] / length
    tolerance = max(0.25, 4 * np.sqrt(d / n)) * np.maximum(1.0, np.abs(ratio - 1 / ratio))
    unit = mixing / length
    orthogonal = (np.abs(unit.T @ unit - np.eye(d)) < tolerance).all()
    # Squares of independent components do not covary. On a sphere, and under radial heavy tails, they do, whatever
    # axes.
    square = sources**2
    spread = square.var(0)
    covariance = square.sum(1).var() - spread.sum()
    error = 2 * np.sqrt((spread.sum() ** 2 - (spread**2).sum()) / 2 / n)
    # Curved laws have axes whose squares do not covary.
    cubic = (sources**3).T @ sources / n
    cubic_error = np.sqrt(((sources**6).T @ square / n - cubic**2) / n)
    np.fill_diagonal(cubic, 0.0)
    curved = (np.abs(cubic) > LARGEST_CUBIC * cubic_error).any()
    return bool(orthogonal and np.abs(covariance) < LARGEST_COVARIANCE * error and not curved)


def look_gaussian(sources: Array) -> npt.NDArray[np.bool_]:
    """Which components (n, d) of unit variance have the skewness, kurtosis and bump of a Gaussian up to error, (d,)."""
    return np.asarray((np.abs(_figures(sources)) < _surely(sources.shape[1])).all(0))


def _figures(sources: Array) -> Array:
    """How far skewness, kurtosis and the mean bump are from a Gaussian's, in its standard errors, (3, d)."""
    n = len(sources)
    return np.stack([
        (sources**3).mean(0) / np.sqrt(6 / n),
        ((sources**4).mean(0) - 3) / np.sqrt(24 / n),
        (np.exp(-(sources**2) / (2 * BUMP**2)).mean(0) - BUMP_MEAN) / BUMP_SD * np.sqrt(n),
    ])  # fmt: skip


def _surely(d: int) -> float:
    """Standard errors beyond which a component stands out: turned to do so it does by about sqrt(d) among Gaussians."""
    return math.sqrt(d) + 3


def independent_axes(rows: Array, counts: Array, seed: int, contrast: str) -> Array:
    """Orthonormal axes, shape (d, d), along which the rows are as independent as can be.

    Independent components are found after whitening; the noise is independent only along orthogonal axes, and the
    nearest such ones are returned. An error e of the search turns two directions of standard deviations s and s' by
    e s'/s and e s/s'; weighted by their variances, orthogonal ones are turned by 2 e s s'/(s^2 + s'^2) at most, since
    axes of different variance are principal ones.
    """
    if rows.shape[1] == 1:
        return np.eye(1)
    mixing, _ = _unmix(rows, counts, seed, contrast)
    left, _, right = np.linalg.svd(mixing * np.linalg.norm(mixing, axis=0))
    found = left @ right
    if contrast == LOCAL:
        return found
    # What the search took for a component by chance has left the Gaussian ones correlated.
    projected = (rows - rows.mean(0)) @ found
    gaussian = look_gaussian(projected / projected.std(0))
    found[:, gaussian] = found[:, gaussian] @ principal(projected[:, gaussian], counts)[1]
    return found


@contextmanager
def quiet_unmixing() -> Iterator[None]:
    """Without the warning of a search for independent axes that found none; ``contrast_of_axes`` judges them.

    Around all fits and not in each: the filters of warnings belong to the process, and fits run in several threads.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FastICA did not converge")
        yield


def _unmix(rows: Array, counts: Array, seed: int, contrast: str) -> tuple[Array, Array]:
    """What each independent component adds to the rows, columns (d, d), and the components (n, d), of unit variance."""
    from sklearn.decomposition import FastICA

    values, axes = principal(rows, counts)
    scale = np.sqrt(values)
    white = (rows - np.average(rows, axis=0, weights=counts)) @ axes / scale
    if contrast == LOCAL:
        # A bump sees little from afar: the principal axes are the best place to start from.
        options: dict[str, Any] = {"fun": _bump_slope, "w_init": np.eye(rows.shape[1])}
    else:
        options = {"fun": contrast if contrast == LOGCOSH else _skewed_slope}
    fit = FastICA(whiten=False, max_iter=100, tol=1e-3, random_state=seed, **options)
    sources = fit.fit_transform(white)
    mixing = (axes * scale) @ fit.components_.T
    # Narrow modes, which the bump sees, are seen too faintly along each axis to be told from a Gaussian.
    if contrast != LOCAL:
        gaussian = look_gaussian(_unit(sources))
        # Any axes of these are independent ones; those of their own covariance are orthogonal too.
        left, length, right = np.linalg.svd(mixing[:, gaussian], full_matrices=False)
        mixing[:, gaussian], sources[:, gaussian] = left * length, sources[:, gaussian] @ right.T
    return mixing, _unit(sources)


def _unit(sources: Array) -> Array:
    return sources / np.sqrt((sources**2).mean(0))


def _bump_slope(u: Array) -> tuple[Array, Array]:
    """Slope of the bump up to a factor, and the mean of its derivative over the last axis, as FastICA asks for them."""
    bump = np.exp(-(u**2) / (2 * BUMP**2))
    return u * bump, ((1 - u**2 / BUMP**2) * bump).mean(-1)


def _skewed_slope(u: Array) -> tuple[Array, Array]:
    """The same of log cosh with a cubic part."""
    slope = np.tanh(u)
    return slope + CUBIC * u**2, (1 - slope**2 + 2 * CUBIC * u).mean(-1)


def principal(rows: Array, counts: Array) -> tuple[Array, Array]:
    """Variances and principal axes (d, d), largest first."""
    centred = (rows - np.average(rows, axis=0, weights=counts)) * np.sqrt(counts / counts.sum())[:, None]
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1].copy()
    # The product squares the condition number; the variances are read off the rotated rows instead.
    return ((centred @ axes) ** 2).sum(0), axes
