"""The user's files as arrays: array files, and folders of images with labels and captions."""

__all__ = ["ARRAY_SUFFIXES", "read_array_file", "read_image_folder"]

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from difficulty.errors import InputError, first_line

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
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


def read_image_folder(path: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64] | None, list[str] | None]:
    """Images below a folder, (n, C, H, W) in [-1, 1]; labels from its subfolders, captions from metadata.jsonl.

    The latter holds a line ``{"file_name": ..., "text": ...}`` for each image.

    Raises:
        InputError: if there are no images, one cannot be read or differs in size, or a caption is missing.
    """
    from PIL import Image, UnidentifiedImageError

    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    images, first = [], None
    for file in files:
        try:
            with Image.open(file) as image:
                if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
                    pixels = np.asarray(image, dtype=np.float32) / 257
                else:
                    pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"{file} cannot be read as an image ({error}); mend or remove it") from None
        first = first or (file, pixels.shape)
        if pixels.shape != first[1]:
            raise InputError(
                f"images differ in size: {first[0]} has (height, width, channels) {first[1]}, {file} has "
                f"{pixels.shape}; resize them to one size"
            )
        images.append(pixels)
    stacked = np.stack(images).astype(np.float32) / 127.5 - 1.0
    stacked = stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
    folders = [file.parent.relative_to(path).as_posix() for file in files]
    classes = sorted(set(folders))
    labels = np.array([classes.index(f) for f in folders]) if len(classes) > 1 else None
    return stacked, labels, _captions(path, files)


def _captions(path: Path, files: list[Path]) -> list[str] | None:
    metadata = path / "metadata.jsonl"
    if not metadata.exists():
        return None
    texts: dict[str, str] = {}
    for number, line in enumerate(metadata.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            texts[entry["file_name"]] = entry["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise InputError(f"{metadata} line {number} is not an object with file_name and text") from None
    names = [file.relative_to(path).as_posix() for file in files]
    missing = [name for name in names if name not in texts]
    if missing:
        raise InputError(f"{metadata} has no caption for {missing[0]} ({len(missing)} image(s) in all)")
    return [texts[name] for name in names]
