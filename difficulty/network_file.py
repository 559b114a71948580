"""The file that a network is made from, kept beside the weights that need it.

``FILE.py:FACTORY`` and ``diffusers:PATH`` name a file that can be edited or deleted after its network was trained. So
a run holds a copy in ``network/`` and states its SHA-256, and its weights are loaded only into a network whose file
has this hash: the original while it is as it was, else the copy.
"""

__all__ = ["fingerprint_network", "fingerprint_weights", "keep_network", "network_of"]

import hashlib
from pathlib import Path

from difficulty.diffusers_network import model_folder
from difficulty.errors import InputError
from difficulty.networks import FROM_DIFFUSERS
from difficulty.pretrained import fingerprint_folders
from difficulty.records import write_bytes

KEPT = "network"


def fingerprint_network(spec: str) -> str | None:
    """SHA-256 of the file that a network is made from; None for a network of this project.

    Args:
        spec: as ``build_network`` takes it.

    Raises:
        InputError: if the file cannot be read.
    """
    file = _file_of(spec)
    return None if file is None else hashlib.sha256(_read(file)).hexdigest()


def fingerprint_weights(spec: str) -> str | None:
    """SHA-256 of the weights that a network starts from, as by ``fingerprint_folders``; None if it starts from none.

    Args:
        spec: as ``build_network`` takes it; a folder of diffusers holds weights.
    """
    path = Path(spec.removeprefix(FROM_DIFFUSERS))
    return fingerprint_folders(model_folder(path)) if spec.startswith(FROM_DIFFUSERS) and path.is_dir() else None


def keep_network(spec: str, folder: Path) -> None:
    """Copy the file that a network is made from into a results folder.

    Raises:
        InputError: if it cannot be read or written.
    """
    file = _file_of(spec)
    if file is not None:
        copy = _file_of(_kept(spec, folder))
        assert copy is not None
        write_bytes(copy, _read(file))


def network_of(spec: str, sha256: str | None, folder: Path) -> str:
    """The network of results as ``build_network`` takes it, made from the file that the results were.

    Args:
        spec: the network as it was named.
        sha256: what ``fingerprint_network`` gave then.
        folder: of the results.

    Raises:
        InputError: if the file is gone, and so is its copy, or both were edited.
    """
    if sha256 is None:
        return spec
    for each in (spec, _kept(spec, folder)):
        file = _file_of(each)
        if file is not None and file.is_file() and fingerprint_network(each) == sha256:
            return each
    raise InputError(
        f"the file of network {spec!r} was changed or removed, and so was its copy in {folder / KEPT}; bring back the "
        "one that the weights were trained with"
    )


def _kept(spec: str, folder: Path) -> str:
    """The network as made from its copy."""
    if spec.startswith(FROM_DIFFUSERS):
        return f"{FROM_DIFFUSERS}{folder / KEPT / 'config.json'}"
    file, _, name = spec.rpartition(":")
    return f"{folder / KEPT / Path(file).name}:{name}"


def _file_of(spec: str) -> Path | None:
    if spec.startswith(FROM_DIFFUSERS):
        path = Path(spec.removeprefix(FROM_DIFFUSERS))
        return model_folder(path) / "config.json" if path.is_dir() else path
    file = spec.rpartition(":")[0]
    return Path(file) if file.endswith(".py") else None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from None
