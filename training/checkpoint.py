"""Checkpoints: a folder per step that is there whole or not at all.

    checkpoints/step-00000200/   model.safetensors  ema.safetensors  optimizer.safetensors  state.json  manifest.json

A checkpoint is written under a temporary name, flushed to disk and renamed. ``manifest.json`` holds the length and the
SHA-256 of every other file; what does not agree with it is passed over for the checkpoint before.
"""

__all__ = ["list_checkpoints", "load_latest", "save_checkpoint"]

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from difficulty.errors import InputError
from difficulty.records import as_json

CHECKPOINT_FORMAT = "denoising-difficulty/checkpoint/1"
TENSORS = ("model", "ema", "optimizer")
FILES = (*(f"{name}.safetensors" for name in TENSORS), "state.json")


def save_checkpoint(folder: Path, state: Mapping[str, Any], keep: int) -> Path:
    """Write the state of a trainer and remove all but the last ``keep`` checkpoints.

    Args:
        folder: of all checkpoints of a run; created if missing.
        state: ``Trainer.state_dict()``, further entries being JSON.
        keep: at least 1.

    Raises:
        InputError: if the disk is full or cannot be written; the checkpoints before stay as they were.
    """
    moments, optimizer = _flatten_optimizer(state["optimizer"])
    rest = {name: value for name, value in state.items() if name not in TENSORS}
    content = {"format": CHECKPOINT_FORMAT, "optimizer": optimizer} | rest
    files = {
        "model.safetensors": save(_contiguous(state["model"])),
        "ema.safetensors": save(_contiguous(state["ema"])),
        "optimizer.safetensors": save(moments),
        # A held-out loss that is not finite is kept as null.
        "state.json": json.dumps(as_json(content), allow_nan=False).encode(),
    }
    manifest = {name: _facts(content) for name, content in files.items()}
    files["manifest.json"] = json.dumps(manifest, indent=2).encode()
    target = folder / f"step-{state['step']:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".{target.name}."))
        try:
            for name, data in files.items():
                _write_flushed(temporary / name, data)
            os.chmod(temporary, 0o755)
            shutil.rmtree(target, ignore_errors=True)  # left by a run that was continued from an earlier step
            os.replace(temporary, target)
            _flush_folder(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        kept = list_checkpoints(folder)
        last = f"the last good one is {kept[-1]}" if kept else "there is none before it"
        raise InputError(f"cannot write checkpoint {target}: {error.strerror or error}; {last}") from error
    checkpoints = list_checkpoints(folder)
    done = checkpoints.index(target) + 1
    # Those of later steps are damaged: the run was continued from before them.
    for old in checkpoints[: max(done - keep, 0)] + checkpoints[done:]:
        shutil.rmtree(old, ignore_errors=True)
    for stray in folder.glob(".step-*"):  # of a run that was killed while it wrote
        shutil.rmtree(stray, ignore_errors=True)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, without checking their content."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir()) if folder.is_dir() else []


def load_latest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The last checkpoint that is whole.

    Returns:
        The state, or None if there is none, and one sentence for every damaged checkpoint that was passed over.
    """
    passed: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return _read(path), [f"{sentence}; the checkpoint before it is used" for sentence in passed]
        except InputError as error:
            passed.append(str(error))
    return None, passed


def _read(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        files = {name: (path / name).read_bytes() for name in FILES}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"checkpoint {path} is incomplete ({type(error).__name__})") from None
    for name, content in files.items():
        if not isinstance(manifest, dict) or manifest.get(name) != _facts(content):
            raise InputError(f"checkpoint {path} is damaged: {name} is not what was written")
    state = json.loads(files["state.json"])
    if state.pop("format", None) != CHECKPOINT_FORMAT:
        raise InputError(f"checkpoint {path} is of another version")
    state["optimizer"] = _unflatten_optimizer(load(files["optimizer.safetensors"]), state["optimizer"])
    return state | {name: load(files[f"{name}.safetensors"]) for name in ("model", "ema")}


def _facts(content: bytes) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by ``parameter/name`` and everything else as JSON."""
    tensors: dict[str, Tensor] = {}
    for parameter, values in state["state"].items():
        tensors |= {f"{parameter}/{name}": value for name, value in values.items()}
    return _contiguous(tensors), {"param_groups": state["param_groups"]}


def _unflatten_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parameter, _, name = key.partition("/")
        values.setdefault(int(parameter), {})[name] = tensor
    groups = [group | {"betas": tuple(group["betas"])} for group in rest["param_groups"]]
    return {"state": values, "param_groups": groups}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory, as tied weights do; a clone each is what a reader expects.
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _write_flushed(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    """The rename itself reaches the disk only with its folder."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
