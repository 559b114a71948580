"""Models made by others: folders of ``save_pretrained``, by path or by name on the hub.

Weights are read from safetensors only; nothing is unpickled and no code that comes with a model is run. What a folder
holds is known by the SHA-256 of its files, wherever it is.
"""

__all__ = ["find_part", "fingerprint_folders", "model_files", "root_folder", "weights_variant"]

import hashlib
from collections.abc import Collection
from pathlib import Path

from difficulty.errors import InputError, first_line
from difficulty.records import digest

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


def root_folder(spec: str, parts: Collection[str]) -> Path:
    """The folder of a model or pipeline.

    Args:
        spec: a path, or a name on the hub, whose files are downloaded if the hub's cache does not hold them.
        parts: folders of a pipeline that may be needed.

    Raises:
        InputError: if neither exists.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"{spec} is no folder, and names on the hub need the extra [text] or [diffusers]") from None
    try:
        return Path(snapshot_download(spec, allow_patterns=[*MODEL_FILES, *(f"{part}/*" for part in parts)]))
    except Exception as error:  # no such name, not a name at all, no connection
        raise InputError(f"{spec} is no folder, and not found on the hub either ({first_line(error)})") from None


def find_part(root: Path, part: str, config: str, weights: bool = True) -> Path:
    """The folder of one model of a pipeline, or the root if it is that model itself.

    Raises:
        InputError: if it lacks its config, or weights as safetensors.
    """
    folder = root / part if (root / part).is_dir() else root
    if not (folder / config).exists():
        raise InputError(f"{folder} holds no {config}; give the folder of a saved {part.replace('_', ' ')}")
    if weights and not list(folder.glob("*.safetensors")):
        raise InputError(f"{folder} holds no weights as .safetensors; other formats are not read")
    return folder


def model_files(folder: Path) -> list[Path]:
    """Configuration, weights and vocabulary in a folder, sorted; a file is its own only one."""
    if folder.is_file():
        return [folder]
    return sorted(file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file())


def fingerprint_folders(*folders: Path) -> str:
    """SHA-256 of the names and contents of the files of models, whatever folders they are in."""
    contents = set()
    for folder in folders:
        for file in model_files(folder):
            with file.open("rb") as handle:
                contents.add((file.name, hashlib.file_digest(handle, "sha256").hexdigest()))
    return digest({"files": sorted(contents)})


def weights_variant(folder: Path) -> str | None:
    """The variant, such as fp16, of the weights of a diffusers model in a folder; None if there are weights of none."""
    # NAME.safetensors or NAME.fp16.safetensors; in parts by NAME.safetensors.index.json or ...index.fp16.json.
    names = [path.name.split(".") for path in folder.glob(f"{DIFFUSERS_WEIGHTS}.*")]
    if any(rest in (["safetensors"], ["safetensors", "index", "json"]) for _, *rest in names):
        return None
    whole = {rest[0] for _, *rest in names if len(rest) == 2 and rest[1] == "safetensors"}
    parts = {rest[2] for _, *rest in names if len(rest) == 4 and rest[:2] == ["safetensors", "index"]}
    return min(whole | parts, default=None)
