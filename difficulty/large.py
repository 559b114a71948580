"""Data sets larger than memory: images in folders, tar shards or tables, of which those are read that are asked for.

    FOLDER        images at any depth, in the order of their names; subfolders are classes, and a metadata.jsonl with a
                  line {"file_name": ..., "text": ...} for each image holds captions
    wds:PATTERN   uncompressed tar files as webdataset writes them: the members of a sample share their name up to the
                  first dot; .png/.jpg/.jpeg/.webp/.bmp or .npy holds the image, .cls a label, .txt a caption, .json an
                  object with label and text. PATTERN may hold * and {000..009}
    hf:NAME       a data set of the `datasets` library: a name on the hub, or a folder of ``save_to_disk``, of parquet
                  files or of images; its first image column, and its columns label and text

Samples are read by number, in any order, so that a batch is a function of seed and step for these data as for others.
Labels and captions are read once, when the data set is opened. Images are scaled to [-1, 1], arrays taken as they are.
"""

__all__ = ["DataLost", "ImageFolder", "Large", "Rows", "open_large"]

import functools
import io
import json
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from difficulty.errors import InputError, first_line
from difficulty.records import fingerprint_array

if TYPE_CHECKING:
    from PIL import Image

IMAGE_MEMBERS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SAMPLE_MEMBERS = (*IMAGE_MEMBERS, ".npy")
# Samples, spread over all of them, whose content is part of a fingerprint.
LOOKED_AT = 64
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")

Pixels = npt.NDArray[np.float32]


class DataLost(InputError):
    """A sample that was there when the data set was opened can no longer be read."""


class Rows(Protocol):
    """Samples by number.

    Attributes:
        labels: class of each, if known.
        captions: caption of each, if known.
        fingerprint: tells one collection of files or table from another.
        value_range: (low, high) of image values, None for arrays.
    """

    labels: npt.NDArray[np.int64] | None
    captions: list[str] | None
    fingerprint: str
    value_range: tuple[float, float] | None

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Pixels:
        """One sample, shape (D,) or (C, H, W)."""

    def place(self, row: int) -> str:
        """Where a sample is, for a reader."""


@dataclass(frozen=True, eq=False)
class Large:
    """The train samples of a data set that does not fit in memory.

    Args:
        rows: all samples.
        order: numbers of the train samples in ``rows``.
        shape: of one sample.
    """

    rows: Rows
    order: npt.NDArray[np.int64]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> torch.Tensor:
        """One train sample.

        Raises:
            DataLost: if it can no longer be read.
            InputError: if it has another shape than the first, or is not finite.
        """
        row = int(self.order[number])
        sample, place = self.rows[row], self.rows.place(row)
        if sample.shape != self.shape:
            raise InputError(
                f"samples differ in size: {self.rows.place(0)} has shape {self.shape}, {place} has {sample.shape}; "
                "resize them to one size"
            )
        if not np.isfinite(sample).all():
            raise InputError(f"{place} has NaN or infinite values; remove it")
        return torch.from_numpy(sample)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What tells these data from others: the files, and the content of ``LOOKED_AT`` samples spread over them.

        Raises:
            DataLost: if one of those can no longer be read.
        """
        spread = np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).astype(int))
        content = fingerprint_array(self.read(spread.tolist()).numpy())["sha256"]
        return {"samples": len(self), "sha256": self.rows.fingerprint, "spread_sha256": content}

    def read(self, numbers: Sequence[int]) -> torch.Tensor:
        """Train samples by number, (n, *shape)."""
        return torch.stack([self[number] for number in numbers])

    @property
    def labels(self) -> torch.Tensor | None:
        """Class of each train sample, if known."""
        return None if self.rows.labels is None else torch.from_numpy(self.rows.labels[self.order])

    @property
    def captions(self) -> tuple[str, ...] | None:
        """Caption of each train sample, if known."""
        captions = self.rows.captions
        return None if captions is None else tuple(captions[i] for i in self.order)


class ImageFolder:
    """Images below a folder, read from their files whenever they are asked for.

    Raises:
        InputError: if there are no images, or a caption is missing.
    """

    value_range: tuple[float, float] | None = (-1.0, 1.0)

    def __init__(self, folder: Path) -> None:
        self.files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_MEMBERS)
        if not self.files:
            raise InputError(f"{folder} holds no images ({', '.join(IMAGE_MEMBERS)})")
        names = [file.relative_to(folder).as_posix() for file in self.files]
        folders = [name.rpartition("/")[0] for name in names]
        classes = sorted(set(folders))
        self.labels = np.array([classes.index(name) for name in folders]) if len(classes) > 1 else None
        self.captions = _captions(folder / "metadata.jsonl", names)
        sizes = [file.stat().st_size for file in self.files]
        self.fingerprint = _hash(json.dumps([names, sizes, self.captions]))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Pixels:
        file = self.files[row]
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataLost(f"{file} can no longer be read ({error.strerror or error})") from None
        return _decoded(content, ".png", self.place(row))

    def place(self, row: int) -> str:
        return str(self.files[row])


class TarShards:
    """Samples of ``wds:PATTERN``, read at their place in the tar file whenever they are asked for.

    Raises:
        InputError: if no file fits the pattern, or a file or sample is not as described at the head of the module.
    """

    def __init__(self, pattern: str) -> None:
        self.paths = _matching(pattern)
        self.places: list[tuple[int, int, int, str]] = []  # shard, offset, length, suffix
        labels: list[int | None] = []
        captions: list[str | None] = []
        facts: list[tuple[str, int, str]] = []
        for shard, path in enumerate(self.paths):
            for key, members in _samples_of(path).items():
                kind = next((suffix for suffix in SAMPLE_MEMBERS if suffix in members), None)
                if kind is None:
                    raise InputError(f"sample {key} of {path} has no image or array ({', '.join(SAMPLE_MEMBERS)})")
                member = members[kind]
                self.places.append((shard, member.offset_data, member.size, kind))
                label, caption = self._described(path, key, members)
                labels.append(label)
                captions.append(caption)
                facts.append((key, member.size, f"{label} {caption}"))
        self.labels = None if None in labels else np.array(labels, dtype=np.int64)
        self.captions = None if None in captions else [str(caption) for caption in captions]
        self.value_range = (-1.0, 1.0) if all(kind != ".npy" for *_, kind in self.places) else None
        self.fingerprint = _hash(json.dumps(facts))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> Pixels:
        shard, offset, length, kind = self.places[row]
        return _decoded(self._read(self.paths[shard], offset, length), kind, self.place(row))

    def place(self, row: int) -> str:
        return f"sample {row} of {self.paths[self.places[row][0]]}"

    def _read(self, path: Path, offset: int, length: int) -> bytes:
        # Opened anew each time: a mapped file that is cut short would kill the process instead of being named.
        try:
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(length)
        except OSError as error:
            raise DataLost(f"{path} can no longer be read ({error.strerror or error})") from None
        if len(content) < length:
            raise DataLost(f"{path} can no longer be read (it is shorter than when it was opened)")
        return content

    def _described(
        self, path: Path, key: str, members: Mapping[str, tarfile.TarInfo]
    ) -> tuple[int | None, str | None]:
        """Label and caption of a sample, as far as it has them."""

        def text(suffix: str) -> str | None:
            member = members.get(suffix)
            return None if member is None else self._read(path, member.offset_data, member.size).decode().strip()

        try:
            described = json.loads(text(".json") or "{}")
            label, caption = text(".cls") or described.get("label"), text(".txt")
            caption = described.get("text") if caption is None else caption
            if not isinstance(caption, str | None):
                raise ValueError
            return None if label is None else int(label), caption
        except (ValueError, AttributeError, UnicodeDecodeError):
            raise InputError(
                f"sample {key} of {path} has a .cls that is no whole number, or a .json that is no object or has a "
                "text that is none"
            ) from None


class Table:
    """Samples of ``hf:NAME``, read from the table whenever they are asked for.

    Raises:
        InputError: if the `datasets` library is missing, cannot load it, or finds no image column.
    """

    value_range: tuple[float, float] | None = (-1.0, 1.0)

    def __init__(self, name: str) -> None:
        try:
            import datasets
        except ImportError:
            raise InputError(f"hf:{name} needs the `datasets` library; install denoising-difficulty[hub]") from None
        folder = Path(name).expanduser()
        try:
            if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
                table: Any = datasets.load_from_disk(str(folder))
                table = table["train"] if isinstance(table, datasets.DatasetDict) else table
            else:
                table = datasets.load_dataset(name, split="train")
        except Exception as error:  # the library raises many kinds, down to connection errors
            reason = first_line(error)
            raise InputError(f"cannot load hf:{name} ({reason})") from None
        columns = [key for key, feature in table.features.items() if isinstance(feature, datasets.Image)]
        if not columns:
            raise InputError(f"hf:{name} has no image column; its columns are {', '.join(table.features)}")
        self.name, self.column = name, columns[0]
        # Undecoded, so that a picture is read as everywhere else; other columns are not touched.
        self.table = table.select_columns(columns[:1]).cast_column(columns[0], datasets.Image(decode=False))
        known = table.features
        self.labels = whole_labels(np.asarray(table["label"]), f"hf:{name}") if "label" in known else None
        texts = list(table["text"]) if "text" in known else [None]
        self.captions = None if None in texts else [str(text) for text in texts]
        self.fingerprint = str(table._fingerprint)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Pixels:
        try:
            entry = self.table[row][self.column]
            content = entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()
        except Exception as error:  # pyarrow has its own errors beside OSError
            raise DataLost(f"{self.place(row)} can no longer be read ({error})") from None
        return _decoded(content, ".png", self.place(row))

    def place(self, row: int) -> str:
        return f"row {row} of hf:{self.name}"


KINDS: Mapping[str, Callable[[str], Rows]] = {"wds": TarShards, "hf": Table}


def open_large(spec: str) -> Rows | None:
    """The samples of ``wds:PATTERN`` or ``hf:NAME``; None if ``spec`` is neither."""
    kind, colon, rest = spec.partition(":")
    return KINDS[kind](rest) if colon and kind in KINDS else None


def _captions(metadata: Path, names: list[str]) -> list[str] | None:
    if not metadata.exists():
        return None
    texts: dict[str, str] = {}
    # Not by splitlines(), which ends lines at characters that a caption may hold.
    for number, line in enumerate(metadata.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            entry = json.loads(line)
            texts[entry["file_name"]] = entry["text"]
            if not isinstance(entry["text"], str):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError):
            raise InputError(f"{metadata} line {number} is not an object with file_name and text") from None
    missing = [name for name in names if name not in texts]
    if missing:
        raise InputError(f"{metadata} has no caption for {missing[0]} ({len(missing)} image(s) in all)")
    return [texts[name] for name in names]


def _matching(pattern: str) -> list[Path]:
    if "://" in pattern or pattern.startswith("pipe:"):
        raise InputError(f"wds:{pattern} is not on this machine; copy the shards and name them by their path")
    names = [pattern]
    while any(BRACES.search(name) for name in names):
        names = [
            name[: found.start()] + str(i).zfill(len(found[1])) + name[found.end() :] if found else name
            for name in names
            for found in [BRACES.search(name)]
            for i in (range(int(found[1]), int(found[2]) + 1) if found else (0,))
        ]
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        paths += sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise InputError(f"wds:{pattern} names {missing[0] if missing else 'no file'}, which does not exist")
    return paths


def _samples_of(path: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Members of a shard by sample and suffix, in the order of the file."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                folder, _, name = member.name.rpartition("/")
                key, dot, suffix = name.partition(".")
                if member.isfile() and dot and key:
                    found.setdefault(f"{folder}/{key}", {})[f".{suffix.lower()}"] = member
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{path} cannot be read as an uncompressed tar file ({error})") from None
    return found


def _decoded(content: bytes, kind: str, name: str) -> Pixels:
    """An array as it is, or an image as (C, H, W) in [-1, 1]."""
    if kind == ".npy":
        try:
            return np.load(io.BytesIO(content), allow_pickle=False).astype(np.float32)
        except ValueError as error:
            raise InputError(f"{name} is no array of numbers ({error})") from None
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
                pixels = np.asarray(image, dtype=np.float32) / 257
            else:
                pixels = np.asarray(_on_white(image).convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{name} cannot be read as an image ({error}); mend or remove it") from None
    scaled = pixels.astype(np.float32) / 127.5 - 1.0
    return scaled[None] if scaled.ndim == 2 else np.ascontiguousarray(scaled.transpose(2, 0, 1))


def _on_white(image: "Image.Image") -> "Image.Image":
    """An image without transparency: pixels that do not show would count with a colour that nobody sees."""
    if not image.has_transparency_data:
        return image
    from PIL import Image

    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)


def whole_labels(labels: npt.NDArray[Any], name: str) -> npt.NDArray[np.int64]:
    """Labels as int64.

    Raises:
        InputError: if they are no whole numbers.
    """
    if labels.dtype.kind not in "biu":
        raise InputError(f"{name} has labels of type {labels.dtype}; they must be whole numbers, one per sample")
    return labels.astype(np.int64)


def _hash(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()
