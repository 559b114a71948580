"""The user's files of arrays."""

__all__ = ["ARRAY_SUFFIXES", "read_array_file"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from difficulty.errors import InputError, first_line

ARRAY_SUFFIXES = (".npy", ".npz", ".pt", ".safetensors")

Samples = tuple[npt.NDArray[Any], npt.NDArray[Any] | None]


def read_array_file(path: Path) -> Samples:
    """Samples of an array file, first axis n, and their labels (n,) if it holds any.

    Raises:
        InputError: if it is of no known kind, cannot be read, or its labels do not fit.
    """
    readers = {".npy": _read_npy, ".npz": _read_npz, ".pt": _read_pt, ".safetensors": _read_safetensors}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} is no known kind of array file; known are {', '.join(ARRAY_SUFFIXES)}")
    try:
        samples, labels = reader(path)
    except InputError:
        raise
    except Exception as error:  # each library has its own errors for a truncated or foreign file
        raise InputError(
            f"cannot read {path} ({first_line(error)}); it may be truncated or of another format"
        ) from None
    if labels is not None and (labels.shape != samples.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise InputError(f"{path}: labels must be whole numbers, one per sample, got {labels.dtype} {labels.shape}")
    return samples, labels


def _pick(path: Path, arrays: Mapping[str, Any]) -> Samples:
    """The samples and labels among named arrays: the only one, or the one called data, x, images or samples."""
    named = {key.lower(): np.asarray(value) for key, value in arrays.items()}
    labels = next((named.pop(key) for key in ("labels", "label", "y") if key in named), None)
    for key in ("data", "x", "images", "samples"):
        if key in named:
            return named[key], labels
    if len(named) == 1:
        return next(iter(named.values())), labels
    raise InputError(f"{path} holds the arrays {', '.join(named) or 'none'}; name the samples 'data'")


def _read_npy(path: Path) -> Samples:
    return np.load(path, allow_pickle=False), None


def _read_npz(path: Path) -> Samples:
    with np.load(path, allow_pickle=False) as arrays:
        return _pick(path, dict(arrays))


def _read_pt(path: Path) -> Samples:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, torch.Tensor):
        return _to_numpy(content), None
    if isinstance(content, dict):
        return _pick(path, {key: _to_numpy(v) for key, v in content.items() if isinstance(v, torch.Tensor)})
    raise InputError(f"{path} holds a {type(content).__name__}; a tensor, or a dict of tensors, is needed")


def _read_safetensors(path: Path) -> Samples:
    from safetensors.torch import load_file

    return _pick(path, {key: _to_numpy(value) for key, value in load_file(path).items()})


def _to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    tensor = tensor.detach()
    # numpy has no bfloat16
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
