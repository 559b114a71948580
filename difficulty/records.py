"""Reading and writing a results folder: every file whole or not at all.

A file is written to a temporary name in the same folder, flushed to disk and renamed, so a killed run leaves either the
old file or the new one. A measurement folder is finished when its ``run.json`` says ``"status": "finished"``; that file
is written first as "running" and last as "finished", and a folder in any other state is never read as a result.
"""

__all__ = [
    "as_json",
    "changed_settings",
    "check_columns",
    "digest",
    "fingerprint_array",
    "finish_run",
    "read_array",
    "read_json",
    "read_run",
    "read_table",
    "start_run",
    "write_array",
    "write_bytes",
    "write_json",
    "write_table",
]

import hashlib
import io
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from difficulty.commandline import given_command
from difficulty.errors import InputError

# Significant digits of a number in a table, unless its writer wants fewer.
DIGITS = 10
RUN_FORMAT = "denoising-difficulty/run/1"
# What a folder holds before the first result.
HEADERS = ("run.json", "process.csv")
MOST_CHANGES = 5  # settings that a refusal names
# Kinds of numpy's dtypes that a column of a kind may have once pandas has read it; whole numbers will do as float.
KINDS: Mapping[type, str] = {int: "iu", float: "fiu", bool: "b", str: "OfTU"}


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: temporary file in the same folder, fsync, rename.

    Raises:
        InputError: if the folder cannot be written (no permission, disk full); the old file stays as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files private, which a shared results folder must not be
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; this file was not changed") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(as_json(value), indent=2, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: if it is missing, unreadable, truncated or nested too deeply.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); it may be truncated, write it again") from None


def write_table(path: Path, table: pd.DataFrame, *, digits: int = DIGITS) -> None:
    """Write a tidy CSV atomically, with so many significant digits."""
    buffer = io.StringIO()
    table.to_csv(buffer, index=False, float_format=f"%.{digits}g", lineterminator="\n")
    write_bytes(path, buffer.getvalue().encode())


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array as .npy, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_array(path: Path) -> npt.NDArray[Any]:
    """Read a .npy file.

    Raises:
        InputError: if it is missing, truncated or foreign.
    """
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; the folder is incomplete, run the measurement again") from None
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is not a readable array ({error}); run the measurement again") from None


def read_table(
    path: Path, columns: Iterable[str] | Mapping[str, type] = (), keys: Mapping[str, Iterable[Any] | None] | None = None
) -> pd.DataFrame:
    """Read a CSV and check that it has the columns asked for.

    Args:
        path: of the file.
        columns: names; with their kinds (int, float, bool or str) these are checked too.
        keys: by column the values that it must take, None for those that it has; of every combination there must be one
            row.

    Raises:
        InputError: if it is missing, empty, malformed, incomplete, or lacks a column.
    """
    try:
        table = pd.read_csv(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; the folder is incomplete, run the measurement again") from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is not a readable CSV table ({error})") from None
    check_columns(table, columns, str(path))
    for name, kind in columns.items() if isinstance(columns, Mapping) else ():
        if table[name].dtype.kind not in KINDS[kind]:
            raise InputError(f"{path} has something else than {kind.__name__} in column {name!r}; was it edited?")
    if keys is not None:
        _check_complete(table, keys, path)
    return table


def _check_complete(table: pd.DataFrame, keys: Mapping[str, Iterable[Any] | None], path: Path) -> None:
    """Raise InputError unless a table has one row for every combination of the keys' values, and no other."""
    wanted = {name: set(table[name] if values is None else values) for name, values in keys.items()}
    count = math.prod(len(values) for values in wanted.values())
    if (
        len(table) != count
        or table.duplicated(list(keys)).any()
        or any(set(table[name]) != values for name, values in wanted.items())
    ):
        raise InputError(
            f"{path} does not have one row for each {', '.join(keys)} that run.json says; it was edited or truncated, "
            "run its command again"
        )


def check_columns(table: pd.DataFrame, columns: Iterable[str], source: str) -> None:
    """Raise InputError if a table lacks one of the columns."""
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(f"{source} lacks the column(s) {', '.join(missing)}; it is foreign or of an older version")


def digest(facts: Mapping[str, Any]) -> str:
    """SHA-256 of facts that JSON can hold, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def fingerprint_array(array: npt.NDArray[Any]) -> dict[str, Any]:
    """Shape, dtype and SHA-256 of an array's values as little-endian C-ordered bytes."""
    ordered = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    values = hashlib.sha256(ordered.tobytes()).hexdigest()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": values}


def changed_settings(earlier: Mapping[str, Any], config: Mapping[str, Any], free: Collection[str] = ()) -> str:
    """What is set otherwise in ``config`` than in ``earlier``, as in ``plan.lr 0.01 -> 0.001``; empty if nothing is.

    Args:
        earlier, config: settings that JSON can hold; an absent one is as good as None.
        free: entries that may differ.
    """
    before, after = (_flat({key: each[key] for key in each if key not in free}) for each in (earlier, config))
    names = [name for name in before | after if before.get(name) != after.get(name)]
    said = [f"{name} {_brief(before.get(name))} -> {_brief(after.get(name))}" for name in names[:MOST_CHANGES]]
    return ", ".join(said) + (f" and {len(names) - MOST_CHANGES} more" if len(names) > MOST_CHANGES else "")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in as_json(dict(settings)).items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": each for key, each in _flat(value).items()}
        else:
            found[name] = value
    return found


def _brief(value: Any) -> str:
    """A setting in a few characters: hashes and tables are known by their beginning."""
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:8]}..."


def start_run(folder: Path, kind: str, config: dict[str, Any], free: Collection[str] = ()) -> dict[str, Any]:
    """Open a results folder: write ``run.json`` with status "running" and return its content.

    It holds the command line that was given, which given again repeats the result.

    Args:
        folder: created if missing.
        kind: which command writes it, e.g. "measure".
        config: everything that determines the result: arguments, seeds, fingerprints of data and process.
        free: entries of it that may differ from those of an earlier run in the folder, as they determine nothing.

    Raises:
        InputError: if the folder is not a results folder, so that nobody's files are mixed with ours, or holds a
            run of another kind or config, so that no result is lost and none outlives its run.json. The same config
            runs again in place, and any of its kind in the folder of a run that ended before its first result.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "run.json").exists():
        raise InputError(f"{folder} is not empty and holds no run.json; choose another output folder")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another output folder")
    config = as_json(config)
    if (folder / "run.json").exists():
        earlier = read_json(folder / "run.json")
        if not isinstance(earlier, dict) or earlier.get("format") != RUN_FORMAT:
            raise InputError(f"{folder / 'run.json'} is not of this project or version; choose another output folder")
        begun = earlier.get("status") == "finished" or any(path.name not in HEADERS for path in folder.iterdir())
        state = "a finished run" if earlier.get("status") == "finished" else "an interrupted run"
        if earlier.get("kind") != kind:
            raise InputError(f"{folder} holds {state} of {earlier.get('kind')!r}; choose another --out or delete it")
        changed = changed_settings(earlier.get("config") or {}, config, free)
        if begun and changed:
            raise InputError(
                f"{folder} holds {state} with other settings ({changed}); choose another --out or delete it"
            )
    run = {
        "format": RUN_FORMAT,
        "kind": kind,
        "command": given_command(),
        "status": "running",
        "config": config,
        "versions": _versions(),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / "run.json", run)
    return run


def finish_run(folder: Path, run: dict[str, Any], **facts: Any) -> None:
    """Mark the folder finished, adding facts such as wall_seconds; to be called after every other file is written."""
    write_json(folder / "run.json", run | {"status": "finished"} | facts)


def read_run(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """``run.json`` of a finished results folder.

    Raises:
        InputError: if the folder is missing, unfinished, of another kind or of another format version.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the --out folder of a finished run")
    if not (folder / "run.json").exists():
        raise InputError(f"{folder} holds no run.json; it is not a results folder of this project")
    run = read_json(folder / "run.json")
    found = run.get("format") if isinstance(run, dict) else None
    if found != RUN_FORMAT:
        raise InputError(f"{folder / 'run.json'} has format {found!r}, this version reads {RUN_FORMAT!r}")
    if kind is not None and run.get("kind") != kind:
        raise InputError(f"{folder} was written by {run.get('kind')!r}, but a folder of {kind!r} is needed")
    if run.get("status") != "finished":
        raise InputError(f"{folder} is incomplete (status {run.get('status')!r}); run its command again")
    return run


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("denoising-difficulty", "torch", "numpy", "scipy", "scikit-learn", "pandas"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def as_json(value: Any) -> Any:
    """The value as it is after writing it to JSON and reading it back; NaN and infinity, which JSON lacks, are None."""
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, np.generic):
        return as_json(value.item())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
