"""Data sets: built in, exact, or the user's own, by name or path.

A data set is split once into train and held-out samples; the split depends on the data and a seed only and is recorded
with the fingerprint. Built-in images are scaled to [-1, 1]; the user's arrays are taken as they are; image folders are
scaled to [-1, 1] like the built-in images.

Exact laws (``law`` is set) are sampled: their train and held-out parts are independent draws.
"""

__all__ = ["DATASETS", "Dataset", "load_dataset"]

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from difficulty.errors import InputError
from difficulty.files import ARRAY_SUFFIXES, read_array_file
from difficulty.large import ImageFolder, Large, Rows, open_large, whole_labels
from difficulty.laws import GaussianMixture, Law, Ring
from difficulty.laws import gaussian as gaussian_law
from difficulty.records import fingerprint_array
from difficulty.specs import build, parse_spec

SPLIT_SEED = 20240314  # the same split in every run, whatever the run's own seed
HELDOUT_SHARE = 0.2
LEAST_SAMPLES = 20
MOST_HELDOUT = 5000  # of data that are read by number
RESIDENT_BYTES = 2**30


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples of one data law.

    Args:
        name: the name or path it was loaded by.
        train, heldout: float32 tensors, (n, D) for vectors or (n, C, H, W) for images.
        labels: class of each train sample, int64 (n,), if known.
        heldout_labels: class of each held-out sample, if known.
        captions: caption of each train sample, if known.
        heldout_captions: caption of each held-out sample, if known.
        unseen_captions: captions that no sample has, each with the class that it names, to ask a model for.
        law: the exact law that the samples were drawn from, if known; its points are the flattened samples.
        value_range: (low, high) of image values, None for vectors; for latents that of the images they stand for.
        large: all train samples, if they do not fit in memory; ``train`` and what belongs to it are some of them.
        latents: how the samples were made of images, if they are latents of an autoencoder.
    """

    name: str
    train: torch.Tensor
    heldout: torch.Tensor
    labels: torch.Tensor | None = None
    heldout_labels: torch.Tensor | None = None
    captions: tuple[str, ...] | None = None
    heldout_captions: tuple[str, ...] | None = None
    unseen_captions: tuple[tuple[str, int], ...] = ()
    law: Law | None = None
    value_range: tuple[float, float] | None = None
    large: Large | None = None
    latents: Mapping[str, Any] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.train.shape[1:])

    @property
    def dim(self) -> int:
        """Number of dimensions D of one sample."""
        return self.train[0].numel()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Shapes, split and hash of the samples."""
        found = {
            "name": self.name,
            "train": fingerprint_array(self.train.numpy()),
            "heldout": fingerprint_array(self.heldout.numpy()),
            "exact_law": type(self.law).__name__ if self.law else None,
        }
        if self.large is not None:
            found["large"] = self.large.fingerprint
        return found

    @property
    def provenance(self) -> dict[str, Any]:
        """What a run should say of the data beside their fingerprint: how latents were made, nothing of others."""
        return {"latents": dict(self.latents)} if self.latents else {}

    @property
    def trained_labels(self) -> torch.Tensor | None:
        """Class of each sample to train on, in memory or not."""
        return self.labels if self.large is None else self.large.labels

    @property
    def classes(self) -> int:
        """Number of classes C, the labels being 0..C-1.

        Raises:
            InputError: if there are no labels, or not every class has a sample to train on.
        """
        trained = self.trained_labels
        if trained is None or self.heldout_labels is None:
            raise InputError(f"data set {self.name!r} has no labels, which say of which class a sample is")
        known, every = trained.unique(), torch.cat([trained, self.heldout_labels]).unique()
        untrained = every[~torch.isin(every, known)].tolist()
        if untrained:
            raise InputError(
                f"class {untrained[0]} of data set {self.name!r} has held-out samples alone and cannot be learned; "
                "give more samples of it or leave it out"
            )
        low, high, count = int(every[0]), int(every[-1]), len(every)
        # An embedding has a row per label up to the greatest, so a gap would be a class that nothing ever trains.
        if (low, high) != (0, count - 1):
            raise InputError(
                f"data set {self.name!r} has {count} classes labelled {low} to {high} instead of 0 to {count - 1}; "
                "renumber them, as np.unique(labels, return_inverse=True)[1] does"
            )
        return count

    @property
    def trained_captions(self) -> tuple[str, ...] | None:
        """Caption of each sample to train on, in memory or not."""
        return self.captions if self.large is None else self.large.captions


def load_dataset(spec: "str | Path | Dataset", resident: int | None = None) -> Dataset:
    """A data set by built-in name with options, by path, as ``hf:NAME`` or ``wds:PATTERN``; a ``Dataset`` as it is.

    Args:
        spec: a name in ``DATASETS`` (``gaussian:dim=64,var=0.25``); a .npy, .npz, .pt or .safetensors file whose first
            axis counts samples; a folder of images; or ``hf:NAME`` or ``wds:PATTERN``, see `large.py`.
        resident: train samples of the latter three that are kept in memory; by default as many as fill a gibibyte. If
            there are more, ``large`` has all of them.

    Raises:
        InputError: if the name is unknown, the data cannot be used or are not float32, or ``resident`` is negative.
    """
    if resident is not None and resident < 0:
        raise InputError(f"the number of samples that are kept in memory must not be negative, got {resident}")
    if isinstance(spec, Dataset):
        if spec.train.dtype != torch.float32 or spec.heldout.dtype != torch.float32:
            raise InputError(f"the samples of {spec.name} are {spec.train.dtype}; convert them by .float()")
        return spec
    text = str(spec)
    rows = open_large(text)
    if rows is not None:
        return _from_large(text, rows, resident)
    path = Path(text).expanduser()
    if parse_spec(text)[0] not in DATASETS if ":" in text else text not in DATASETS:
        if path.is_dir():
            return _from_large(text, ImageFolder(path), resident)
        if path.suffix.lower() in ARRAY_SUFFIXES or path.is_file():
            return _from_array_file(path)
    return build("dataset", text, DATASETS)


def split_samples(name: str, samples: npt.NDArray[Any], **facts: Any) -> Dataset:
    """Check an array of samples and split it into train and held-out parts.

    Args:
        name: how files and figures call it.
        samples: shape (n, D) or (n, C, H, W); n >= 20, finite. One axis is read as D = 1.
        facts: further fields of ``Dataset``; ``labels`` and ``captions`` are split along.

    Raises:
        InputError: if the array is not numeric, has another rank, too few samples, or NaN or infinity, or the labels
            are no whole numbers.
    """
    samples = check_samples(name, samples)
    # Rows are put in an order of their own before they are dealt, so that a shuffled file gives the same split.
    flat = np.ascontiguousarray(samples.reshape(len(samples), -1))
    canonical = np.lexsort(flat.T[::-1]) if flat.shape[1] <= 64 else np.argsort([row.tobytes() for row in flat])
    order = canonical[np.random.default_rng(SPLIT_SEED).permutation(len(samples))]
    held = max(round(HELDOUT_SHARE * len(samples)), 1)
    train, heldout = order[held:], order[:held]
    labels, captions = facts.pop("labels", None), facts.pop("captions", None)
    labels = None if labels is None else whole_labels(np.asarray(labels), name)
    tensor = torch.from_numpy(samples)
    return Dataset(
        name,
        tensor[train],
        tensor[heldout],
        labels=None if labels is None else torch.from_numpy(labels[train]),
        heldout_labels=None if labels is None else torch.from_numpy(labels[heldout]),
        captions=None if captions is None else tuple(captions[i] for i in train),
        heldout_captions=None if captions is None else tuple(captions[i] for i in heldout),
        **facts,
    )


def check_samples(name: str, samples: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Samples as float32 of shape (n, D) or (n, C, H, W), or an InputError that says what is wrong."""
    if samples.dtype == object or not (np.issubdtype(samples.dtype, np.number) or samples.dtype == bool):
        raise InputError(f"{name} holds {samples.dtype} values; an array of numbers is needed")
    if np.iscomplexobj(samples):
        raise InputError(f"{name} holds complex numbers; an array of real numbers is needed")
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim not in (2, 4):
        raise InputError(
            f"{name} has shape {samples.shape}; needed are vectors (n, D) or images (n, channels, height, width)"
        )
    if len(samples) < LEAST_SAMPLES:
        raise InputError(f"{name} has {len(samples)} samples; at least {LEAST_SAMPLES} are needed")
    if samples[0].size == 0:
        raise InputError(f"{name} has samples of size zero (shape {samples.shape})")
    with np.errstate(over="ignore"):
        samples = np.ascontiguousarray(samples, dtype=np.float32)
    if not np.isfinite(samples).all():
        rows = int((~np.isfinite(samples.reshape(len(samples), -1)).all(axis=1)).sum())
        raise InputError(f"{name} has NaN, infinite or float32-overflowing values in {rows} sample(s); remove them")
    return samples


def _sampled(name: str, law: Law, n: int, seed: int, shape: tuple[int, ...] | None = None) -> Dataset:
    if not isinstance(n, int) or n < LEAST_SAMPLES:
        raise InputError(f"dataset {name!r} needs a whole number n >= {LEAST_SAMPLES} of samples, got n = {n}")
    held = max(round(HELDOUT_SHARE * n), 1)
    draws = law.sample(n + held, torch.Generator().manual_seed(seed)).float().reshape(n + held, *(shape or (law.dim,)))
    return Dataset(name, draws[:n], draws[n:], law=law)


def digits() -> Dataset:
    """scikit-learn's 1797 handwritten digits, 1 x 8 x 8, with labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    scaled = (images / 8.0 - 1.0).astype(np.float32).reshape(-1, 1, 8, 8)
    return split_samples("digits", scaled, labels=labels, value_range=(-1.0, 1.0))


NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# What samples are described by, and what is kept for asking a trained model.
SEEN_PHRASINGS = (
    "a handwritten {word}",
    "the digit {word}",
    "the number {word}, written by hand",
    "a scan of the numeral {word}",
    "{word}",
    "a small picture of a {word}",
    "handwriting: {figure}",
    "the digit {figure}",
)
UNSEEN_PHRASINGS = (
    "a scan of a handwritten {word}",
    "a picture of the digit {word}",
    "somebody wrote the number {word}",
    "a small handwritten {figure}",
)


def captioned_digits() -> Dataset:
    """The digits, each described by one of eight phrasings; four more phrasings are kept for evaluation."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    scaled = (images / 8.0 - 1.0).astype(np.float32).reshape(-1, 1, 8, 8)
    phrasings = np.random.default_rng(SPLIT_SEED).integers(0, len(SEEN_PHRASINGS), len(labels))
    captions = [_phrase(SEEN_PHRASINGS[p], label) for p, label in zip(phrasings, labels, strict=True)]
    unseen = tuple((_phrase(phrasing, label), label) for phrasing in UNSEEN_PHRASINGS for label in range(10))
    return split_samples(
        "captioned-digits", scaled, labels=labels, captions=captions, unseen_captions=unseen, value_range=(-1.0, 1.0)
    )


def _phrase(phrasing: str, label: int) -> str:
    return phrasing.format(word=NUMERALS[label], figure=label)


@lru_cache(maxsize=1)
def digits_mixture_law() -> GaussianMixture:
    """Ten full-covariance Gaussians fitted to the digits; covariance floor 0.01, below one grey level (0.125^2)."""
    from sklearn.datasets import load_digits
    from sklearn.mixture import GaussianMixture as Fit

    images = load_digits().data / 8.0 - 1.0
    fit = Fit(10, covariance_type="full", reg_covar=0.01, random_state=0, n_init=1).fit(images)
    return GaussianMixture(fit.weights_, fit.means_, fit.covariances_)


def digits_mixture(n: int = 8000, seed: int = 0) -> Dataset:
    """The standard exact test bed: samples of ten Gaussians fitted to the digits, 64 dimensions.

    Samples are multiples of 2^-16, a thousandth of the least standard deviation or less, so that they and their
    fingerprint are the same on machines whose fits and products differ in the last digits.
    """
    exact = _sampled("digits-mixture", digits_mixture_law(), n, seed)
    train, heldout = ((part * 2**16).round() / 2**16 for part in (exact.train, exact.heldout))
    return replace(exact, train=train, heldout=heldout)


def grid_2d(n: int = 8000, seed: int = 0, std: float = 0.05) -> Dataset:
    """25 equal modes on a 5 x 5 grid over [-1, 1]^2, each of the given standard deviation."""
    axis = np.linspace(-1.0, 1.0, 5)
    means = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    law = GaussianMixture(np.ones(25), means, np.broadcast_to(std**2 * np.eye(2), (25, 2, 2)))
    return _sampled("grid-2d", law, n, seed)


def ring(dim: int = 16, radius: float = 1.0, n: int = 8000, seed: int = 0) -> Dataset:
    """A circle in the first two of ``dim`` dimensions: data on a curve."""
    return _sampled(f"ring-{dim}d", Ring(dim, radius), n, seed)


def gaussian(dim: int = 64, var: float = 1.0, n: int = 8000, seed: int = 0) -> Dataset:
    """An isotropic Gaussian of the given dimension and variance."""
    if not isinstance(dim, int) or dim < 1 or var < 0:
        raise InputError(f"dataset 'gaussian' needs a whole dim >= 1 and var >= 0, got dim = {dim}, var = {var}")
    return _sampled(f"gaussian:dim={dim},var={var}", gaussian_law(dim, var), n, seed)


def photo_patches(size: int, n: int = 6000, seed: int = 0) -> Dataset:
    """RGB crops of the two photographs that scikit-learn ships, 3 x size x size.

    Held-out crops come from the right fifth of each photograph and train crops from the rest, so that no pixel is in
    both.
    """
    from sklearn.datasets import load_sample_images

    if not isinstance(n, int) or n < LEAST_SAMPLES:
        raise InputError(f"photo patches need a whole number n >= {LEAST_SAMPLES} of samples, got n = {n}")
    rng = np.random.default_rng(seed)
    parts: dict[str, list[npt.NDArray[np.float32]]] = {"train": [], "heldout": []}
    for photo in load_sample_images().images:
        scaled = (photo.astype(np.float32) / 127.5 - 1.0).transpose(2, 0, 1)
        border = int(scaled.shape[2] * (1 - HELDOUT_SHARE))
        for part, region, count in (
            ("train", scaled[:, :, :border], n // 2),
            ("heldout", scaled[:, :, border:], max(round(HELDOUT_SHARE * n / 2), 1)),
        ):
            top = rng.integers(0, region.shape[1] - size + 1, count)
            left = rng.integers(0, region.shape[2] - size + 1, count)
            parts[part] += [region[:, i : i + size, j : j + size] for i, j in zip(top, left, strict=True)]
    train, heldout = (torch.from_numpy(np.stack(parts[part])) for part in ("train", "heldout"))
    return Dataset(f"photo-patches-{size}", train, heldout, value_range=(-1.0, 1.0))


def _photo_patches(size: int) -> Callable[..., Dataset]:
    def load(n: int = 6000, seed: int = 0) -> Dataset:
        return photo_patches(size, n, seed)

    load.__doc__ = f"RGB crops of two photographs, 3 x {size} x {size}; held-out crops from disjoint regions."
    return load


DATASETS: Mapping[str, Callable[..., Dataset]] = {
    "digits": digits,
    "digits-mixture": digits_mixture,
    "captioned-digits": captioned_digits,
    "photo-patches-8": _photo_patches(8),
    "photo-patches-16": _photo_patches(16),
    "photo-patches-32": _photo_patches(32),
    "grid-2d": grid_2d,
    "ring-16d": ring,
    "gaussian": gaussian,
}


def _from_array_file(path: Path) -> Dataset:
    if not path.is_file():
        raise InputError(f"{path} does not exist; built-in data sets are {', '.join(DATASETS)}")
    samples, labels = read_array_file(path)
    return split_samples(str(path), samples, labels=labels)


def _from_large(name: str, rows: Rows, resident: int | None) -> Dataset:
    """Split samples that are read by number; the split depends on how many there are."""
    if len(rows) < LEAST_SAMPLES:
        raise InputError(f"{name} has {len(rows)} samples; at least {LEAST_SAMPLES} are needed")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    held = min(round(HELDOUT_SHARE * len(rows)), MOST_HELDOUT)
    shape = rows[0].shape
    if len(shape) not in (1, 3) or 0 in shape:
        raise InputError(f"{name} has samples of shape {shape}; needed are vectors (D,) or images (C, H, W)")
    train, heldout = Large(rows, order[held:], shape), Large(rows, order[:held], shape)
    most = RESIDENT_BYTES // (4 * max(math.prod(shape), 1)) if resident is None else resident
    kept = Large(rows, train.order[: max(most, LEAST_SAMPLES)], shape)
    return Dataset(
        name,
        kept.read(range(len(kept))),
        heldout.read(range(len(heldout))),
        labels=kept.labels,
        heldout_labels=heldout.labels,
        captions=kept.captions,
        heldout_captions=heldout.captions,
        value_range=rows.value_range,
        large=train if len(kept) < len(train) else None,
    )
