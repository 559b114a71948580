"""Tensors that are computed once and kept: latents of images, embeddings of captions.

A file is named by the SHA-256 of the facts that determine its content (the fingerprints of model and data, and how they
were used) and holds those facts and the SHA-256 of the content. A file that is damaged, foreign or of other facts is
never read as the answer: a sentence says so and the tensors are computed again.

The folder is that of the environment variable DENOISING_DIFFICULTY_CACHE, or else denoising-difficulty in the user's
cache folder (XDG_CACHE_HOME or ~/.cache). Deleting it costs time and nothing else.
"""

__all__ = ["cache_folder", "cached_tensors"]

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from difficulty.errors import first_line
from difficulty.records import digest, write_bytes

CACHE_FORMAT = "denoising-difficulty/cache/1"
CACHE_VARIABLE = "DENOISING_DIFFICULTY_CACHE"


def cache_folder() -> Path:
    """Where computed tensors are kept; it need not exist."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "denoising-difficulty"


def cached_tensors(
    kind: str,
    facts: Mapping[str, Any],
    compute: Callable[[], Mapping[str, Tensor]],
    tell: Callable[[str], None] = lambda message: None,
) -> dict[str, Tensor]:
    """The tensors of these facts, from the cache or computed and cached.

    Args:
        kind: first part of the file's name.
        facts: everything that determines the tensors, as JSON values.
        compute: makes the tensors.
        tell: called with a sentence if a file of that name cannot be used.

    Raises:
        InputError: if the cache folder cannot be written.
    """
    path = cache_folder() / f"{kind}-{digest(facts)[:24]}.safetensors"
    if path.exists():
        found, trouble = _read(path, facts)
        if found is not None:
            return found
        tell(f"{path} {trouble}; it is computed again")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
    metadata = {"format": CACHE_FORMAT, "facts": json.dumps(facts, sort_keys=True), "sha256": _content_digest(tensors)}
    write_bytes(path, save(tensors, metadata))
    return tensors


def _read(path: Path, facts: Mapping[str, Any]) -> tuple[dict[str, Tensor] | None, str]:
    """The tensors, or None and what is wrong with the file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        return None, f"cannot be read ({first_line(error)})"
    if metadata.get("format") != CACHE_FORMAT:
        return None, "is no file of this version's cache"
    if metadata.get("facts") != json.dumps(facts, sort_keys=True):
        return None, "was computed from other data or by another model"
    if metadata.get("sha256") != _content_digest(tensors):
        return None, "is damaged: its content is not what was written"
    return tensors, ""


def _content_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.numpy().data)
    return total.hexdigest()
