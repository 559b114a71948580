"""Forward processes: how much signal and how much noise a timestep carries.

    x_t = alpha_t x0 + sigma_t eps,    eps ~ N(0, I)

``t`` counts 1..T and noise increases with it; t = 0 is clean data (alpha = 1, sigma = 0). Between the grid points t may
be any real number in [1, T]; u = t/T lies in [0, 1]. What is compared between processes is the log-SNR,
lambda = log(alpha^2 / sigma^2), which falls as t grows; tau = log(sigma / alpha) = -lambda/2 is the log noise scale.

A process is two float64 tables, alpha[0..T] and sigma[0..T], and optionally the closed form behind them. Every process
below is one function that fills them; a new one is one function and one line in ``PROCESSES``, or a file of its tables.
"""

__all__ = ["PROCESSES", "Process", "from_arrays", "get_process"]

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from scipy.interpolate import PchipInterpolator

from difficulty.errors import InputError
from difficulty.specs import build

Array = npt.NDArray[np.float64]
ClosedForm = Callable[[Array], tuple[Array, Array]]

# The log-SNR of a process is stored at this many points of t, so that another program can compare without a hash.
FINGERPRINT_POINTS = 11


@dataclass(frozen=True, eq=False)
class Process:
    """A forward process on the grid t = 0..T.

    Args:
        name: as in ``PROCESSES``, or the user's own.
        alpha: signal scale, shape (T+1,), alpha[0] = 1.
        sigma: noise scale, shape (T+1,), sigma[0] = 0, log(sigma/alpha) strictly increasing.
        closed_form: (alpha, sigma) at real t in [1, T]; without it the tables are interpolated monotonically.
    """

    name: str
    alpha: Array
    sigma: Array
    closed_form: ClosedForm | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        alpha, sigma = (np.asarray(a, dtype=np.float64) for a in (self.alpha, self.sigma))
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "sigma", sigma)
        if alpha.ndim != 1 or alpha.shape != sigma.shape or len(alpha) < 3:
            raise InputError(
                f"process {self.name!r}: alpha and sigma must be one-dimensional and equally long with T >= 2, "
                f"got shapes {alpha.shape} and {sigma.shape}"
            )
        if not (np.isfinite(alpha).all() and np.isfinite(sigma).all()):
            raise InputError(f"process {self.name!r}: alpha or sigma holds NaN or infinity")
        if alpha[0] != 1 or sigma[0] != 0:
            raise InputError(f"process {self.name!r}: at t = 0 the data must be clean (alpha = 1, sigma = 0)")
        if (alpha < 0).any() or (alpha[:-1] == 0).any() or (sigma[1:] <= 0).any():
            raise InputError(f"process {self.name!r}: alpha and sigma must be positive (alpha may end at 0)")
        # Compared as an angle, which stays finite where alpha = 0.
        if (np.diff(np.arctan2(sigma, alpha)) <= 0).any():
            raise InputError(f"process {self.name!r}: noise must increase with t, that is log-SNR must fall strictly")

    @property
    def T(self) -> int:
        """Number of timesteps."""
        return len(self.alpha) - 1

    @property
    def noisiest(self) -> int:
        """The last timestep that still has signal: T, or T - 1 where alpha ends at 0 and T is pure noise."""
        return self.T if self.alpha[-1] > 0 else self.T - 1

    def alpha_sigma(self, t: npt.ArrayLike) -> tuple[Array, Array]:
        """Signal and noise scale at t, exact on the grid.

        Args:
            t: timesteps, any shape, real numbers in [1, T], or 0 for clean data.

        Raises:
            InputError: if t lies outside.
        """
        t = np.asarray(t, dtype=np.float64)
        if not (((t >= 1) & (t <= self.T)) | (t == 0)).all():
            raise InputError(f"timesteps of process {self.name!r} lie in [1, {self.T}] (or are 0 for clean data)")
        index = np.rint(t).astype(np.int64)
        if (index == t).all():
            return self.alpha[index], self.sigma[index]
        between = np.clip(t, 1, self.T)
        alpha, sigma = self.closed_form(between) if self.closed_form else self._interpolate(between)
        on_grid = index == t
        return np.where(on_grid, self.alpha[index], alpha), np.where(on_grid, self.sigma[index], sigma)

    def tau(self, t: npt.ArrayLike) -> Array:
        """Log noise-to-signal scale log(sigma_t / alpha_t); +inf where alpha = 0."""
        alpha, sigma = self.alpha_sigma(t)
        with np.errstate(divide="ignore"):
            return np.log(sigma) - np.log(alpha)

    def log_snr(self, t: npt.ArrayLike) -> Array:
        """Log signal-to-noise ratio log(alpha_t^2 / sigma_t^2); falls with t, +inf at t = 0, -inf where alpha = 0."""
        return -2.0 * self.tau(t)

    def t_at(self, log_snr: npt.ArrayLike) -> Array:
        """The real t in [1, T] at which the process has this log-SNR (the inverse of ``log_snr``).

        Raises:
            InputError: if the process does not reach that log-SNR.
        """
        target = np.asarray(log_snr, dtype=np.float64)
        highest, lowest = float(self.log_snr(1)), float(self.log_snr(self.T))
        slack = 1e-9 * max(1.0, abs(highest))
        if ((target > highest + slack) | (target < lowest - slack)).any():
            raise InputError(
                f"process {self.name!r} covers log-SNR from {highest:.4g} (t = 1) to {lowest:.4g} (t = {self.T}); "
                f"asked for {float(target.min()):.4g} to {float(target.max()):.4g}"
            )
        low, high = np.full(target.shape, 1.0), np.full(target.shape, float(self.T))
        # Bisection, because the tables may hold any monotone schedule; 60 halvings of [1, T] reach float64 resolution.
        for _ in range(60):
            middle = 0.5 * (low + high)
            too_clean = self.log_snr(middle) > target
            low, high = np.where(too_clean, middle, low), np.where(too_clean, high, middle)
        return 0.5 * (low + high)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the process in a file, independent of its name: T, direction, and its log-SNR and scale."""
        points = np.unique(np.rint(np.linspace(1, self.T, FINGERPRINT_POINTS)).astype(int))
        angle = np.arctan2(self.sigma, self.alpha)
        # Rounded before hashing, so that the last bit of another platform's log does not make another process.
        rounded = np.round(np.stack([angle, np.hypot(self.alpha, self.sigma)]), 9) + 0.0  # no negative zero
        digest = hashlib.sha256(rounded.tobytes()).hexdigest()
        return {
            "name": self.name,
            "T": self.T,
            "t_direction": "noise increases with t",
            "t": points.tolist(),
            "alpha": self.alpha[points].tolist(),
            "sigma": self.sigma[points].tolist(),
            "sha256": digest,
        }

    def check_fingerprint(self, fingerprint: Mapping[str, Any], source: str) -> None:
        """Refuse a file that was made for another process.

        Raises:
            InputError: if T, the direction of t, or the scales (relative tolerance 1e-6) differ.
        """
        try:
            T, direction = int(fingerprint["T"]), fingerprint["t_direction"]
            t = np.asarray(fingerprint["t"], dtype=np.int64)
            scales = np.asarray([fingerprint["alpha"], fingerprint["sigma"]], dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source} holds no readable process fingerprint ({error})") from None
        if T != self.T:
            raise InputError(f"{source} was made for T = {T}, but process {self.name!r} has T = {self.T}")
        if direction != "noise increases with t":
            raise InputError(f"{source} counts t as {direction!r}, but here noise increases with t; convert it first")
        own = np.stack([self.alpha[t], self.sigma[t]])
        if scales.shape != own.shape or not np.allclose(scales, own, rtol=1e-6, atol=1e-9):
            options = " with other options" if fingerprint.get("name") == self.name else ""
            raise InputError(
                f"{source} was made for process {fingerprint.get('name')!r}{options}, whose noise levels differ from "
                f"those of {self.name!r}; measure again with this process"
            )

    def _interpolate(self, t: Array) -> tuple[Array, Array]:
        """Monotone interpolation of angle and radius of (alpha, sigma), which stay finite where alpha or sigma is 0."""
        angle, radius = self._interpolants
        theta, r = angle(t), radius(t)
        return r * np.cos(theta), r * np.sin(theta)

    @cached_property
    def _interpolants(self) -> tuple[PchipInterpolator, PchipInterpolator]:
        t = np.arange(1, self.T + 1)
        alpha, sigma = self.alpha[1:], self.sigma[1:]
        return PchipInterpolator(t, np.arctan2(sigma, alpha)), PchipInterpolator(t, np.hypot(alpha, sigma))


def _from_betas(name: str, beta: Array) -> Process:
    log_alpha_squared = np.concatenate([[0.0], np.cumsum(np.log1p(-beta))])
    # sigma^2 = 1 - alpha^2 by expm1: the subtraction would lose the digits of sigma at low t.
    return Process(name, np.exp(0.5 * log_alpha_squared), np.sqrt(-np.expm1(log_alpha_squared)))


def _from_closed_form(name: str, T: int, closed_form: ClosedForm) -> Process:
    alpha, sigma = closed_form(np.arange(1, T + 1, dtype=np.float64))
    return Process(name, np.concatenate([[1.0], alpha]), np.concatenate([[0.0], sigma]), closed_form)


def vp_linear(T: int = 1000, beta_first: float = 1e-4, beta_last: float = 0.02) -> Process:
    """Variance preserving, linear beta (Ho et al. 2020, arXiv 2006.11239, section 4)."""
    _at_least_two(T)
    return _from_betas("vp-linear", np.linspace(beta_first, beta_last, T))


def vp_cosine(T: int = 1000, s: float = 0.008, beta_max: float = 0.999) -> Process:
    """Variance preserving, cosine alpha^2 (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17), beta clipped."""
    _at_least_two(T)
    alpha_squared = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    return _from_betas("vp-cosine", np.minimum(1 - alpha_squared[1:] / alpha_squared[:-1], beta_max))


def edm(T: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Process:
    """Variance exploding on the grid of Karras et al. 2022 (arXiv 2206.00364, eq. 5), from clean to noisy."""
    _at_least_two(T)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _from_closed_form("edm", T, lambda t: (np.ones_like(t), (low + (t - 1) / (T - 1) * (high - low)) ** rho))


def ve(T: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Process:
    """Variance exploding, sigma spaced evenly on the log scale (Song et al. 2021, arXiv 2011.13456, eq. 30)."""
    _at_least_two(T)
    ratio = np.log(sigma_max / sigma_min)
    return _from_closed_form("ve", T, lambda t: (np.ones_like(t), sigma_min * np.exp((t - 1) / (T - 1) * ratio)))


def flow_matching(T: int = 1000) -> Process:
    """Straight line from data to noise: alpha = 1 - t/T, sigma = t/T (Lipman et al. 2023, arXiv 2210.02747)."""
    _at_least_two(T)
    return _from_closed_form("flow-matching", T, lambda t: (1 - t / T, t / T))


def _at_least_two(T: object) -> None:
    if not isinstance(T, int) or T < 2:
        raise InputError(f"a process needs a whole number of at least 2 timesteps, got T = {T}")


PROCESSES: Mapping[str, Callable[..., Process]] = {
    "vp-linear": vp_linear,
    "vp-cosine": vp_cosine,
    "edm": edm,
    "ve": ve,
    "flow-matching": flow_matching,
}


def get_process(spec: "str | Path | Process") -> Process:
    """A process by name, with options as in ``vp-linear:T=500``, or the user's own; a ``Process`` is passed through.

    Args:
        spec: a name in ``PROCESSES``; a .npz file with the arrays ``alpha`` and ``sigma`` as in ``from_arrays``, or
            with ``alphas_cumprod`` = alpha^2 of a variance-preserving process; or the folder of a diffusers scheduler.

    Raises:
        InputError: if the name or an option is unknown, or the file or folder holds no process.
    """
    if isinstance(spec, Process):
        return spec
    text = str(spec)
    name, path = text.partition(":")[0], Path(text).expanduser()
    if name in PROCESSES:
        return build("process", text, PROCESSES)
    if path.is_dir():
        # Imported here because the schedulers are built on this module.
        from difficulty.schedulers import read_scheduler

        return read_scheduler(path).process
    if path.suffix.lower() == ".npz":
        return _from_file(path)
    known = ", ".join(PROCESSES)
    raise InputError(f"unknown process {name!r}; known are {known}, FILE.npz, or the FOLDER of a diffusers scheduler")


def _from_file(path: Path) -> Process:
    try:
        with np.load(path) as content:
            arrays = {key: np.asarray(content[key], dtype=np.float64) for key in content.files}
    except FileNotFoundError:
        raise InputError(f"process file {path} does not exist") from None
    # What numpy raises for a foreign, an empty and a truncated file, and for arrays of text or objects.
    except (OSError, EOFError, TypeError, ValueError, BadZipFile) as error:
        raise InputError(f"process file {path} cannot be read as arrays of numbers ({error})") from None
    # A name that is built in would promise its noise levels to whoever reads it in a results file.
    name = path.name if path.stem in PROCESSES else path.stem
    if {"alpha", "sigma"} <= arrays.keys():
        return from_arrays(arrays["alpha"], arrays["sigma"], name)
    if "alphas_cumprod" in arrays:
        alpha_squared = arrays["alphas_cumprod"]
        if not ((alpha_squared >= 0) & (alpha_squared <= 1)).all():
            raise InputError(f"process file {path}: alphas_cumprod must lie in [0, 1]; it is alpha^2 = 1 - sigma^2")
        return from_arrays(np.sqrt(alpha_squared), np.sqrt(1 - alpha_squared), name)
    found = ", ".join(arrays) or "none"
    raise InputError(f"process file {path} holds the arrays {found}; needed are alpha and sigma, or alphas_cumprod")


def from_arrays(alpha: npt.ArrayLike, sigma: npt.ArrayLike, name: str = "custom") -> Process:
    """The user's own process from its scales at t = 1..T (or t = 0..T where it starts with alpha = 1, sigma = 0).

    Args:
        alpha: signal scales, shape (T,) or (T+1,).
        sigma: noise scales, the same shape.
        name: how files and figures call it.

    Raises:
        InputError: if the arrays do not describe a process whose noise increases with t.
    """
    alpha, sigma = (np.asarray(a, dtype=np.float64) for a in (alpha, sigma))
    if alpha.ndim == 1 and alpha.shape == sigma.shape and len(alpha) and sigma[0] != 0:
        alpha, sigma = np.concatenate([[1.0], alpha]), np.concatenate([[0.0], sigma])
    return Process(name, alpha, sigma)
