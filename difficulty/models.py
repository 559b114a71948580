"""Trained denoisers from files: this project's own, diffusers folders, and the user's functions, in one form.

A ``TrainedModel`` estimates eps at (x_t, t) for integer t of its own process. Weights are read from safetensors only;
nothing is unpickled. A conditional network is asked without its condition: class networks are given their null class,
text networks zeros as embeddings.
"""

__all__ = ["DENOISER_FILE", "TrainedModel", "load_denoiser", "load_model", "on_cpu", "save_denoiser"]

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from difficulty.denoiser import Denoiser
from difficulty.diffusers_network import BACKBONES, DiffusersNetwork, load_component, model_folder
from difficulty.errors import InputError, first_line
from difficulty.network_file import fingerprint_network, network_of
from difficulty.networks import build_network, own_function
from difficulty.prediction import sigma_data_of, to_eps
from difficulty.pretrained import fingerprint_folders
from difficulty.process import Process, from_arrays
from difficulty.records import read_json, write_bytes
from difficulty.schedulers import ScheduledProcess, process_from_scheduler

DENOISER_FILE = "denoiser.safetensors"
DENOISER_FORMAT = "denoising-difficulty/denoiser/2"
EARLIER_FORMAT = "denoising-difficulty/denoiser/1"  # the same facts, in a metadata entry beside the format


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A denoiser to be judged.

    Args:
        name: where it came from.
        process: its forward process; None for a function that works with the process it is probed on.
        eps: estimate of eps at x_t (B, *) and integer t (B,), of the shape of x_t. It is given tensors of the CPU,
            wherever its network is (``on_cpu``).
        shape: of the samples that it takes, with None where any size will do; None if that is not known.
        latents: how its latents are made of images, if it takes latents; see ``Dataset.latents``.
        fingerprint: SHA-256 of its weights, or of the file of a function; None if it was made in Python.
    """

    name: str
    process: Process | None
    eps: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int | None, ...] | None = None
    latents: Mapping[str, Any] | None = None
    fingerprint: str | None = None

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether samples may have this shape, as far as is known."""
        if self.shape is None:
            return True
        return len(shape) == len(self.shape) and all(
            own in (None, size) for own, size in zip(self.shape, shape, strict=True)
        )


def on_cpu(eps: Callable[[Tensor, Tensor], Tensor], device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of tensors on a device as one of tensors on the CPU."""
    return lambda x_t, t: eps(x_t.to(device), t.to(device)).cpu()


def save_denoiser(
    denoiser: Denoiser, path: Path, network: str, shape: tuple[int, ...], network_file: str | None = None
) -> None:
    """Write a denoiser with all that is needed to use it: weights, network, process, prediction, scales.

    Args:
        denoiser: to be written.
        path: of the safetensors file.
        network: how ``build_network`` makes the network.
        shape: of one sample.
        network_file: what ``fingerprint_network`` says of the network.
    """
    facts = {
        "format": DENOISER_FORMAT,
        "network": network,
        "network_file": network_file,
        "shape": list(shape),
        "prediction": denoiser.prediction,
        "data_std": denoiser.data_std,
        "baseline": denoiser.baseline,
        "process": denoiser.process.name,
    }
    weights = denoiser.network.state_dict()
    tensors = {f"network/{key}": value.detach().cpu().contiguous() for key, value in weights.items()}
    tensors["alpha"], tensors["sigma"] = (torch.from_numpy(a) for a in (denoiser.process.alpha, denoiser.process.sigma))
    # One entry: safetensors writes several in an order that changes from run to run.
    write_bytes(path, save(tensors, {"facts": json.dumps(facts)}))


def load_denoiser(path: Path) -> Denoiser:
    """Read what ``save_denoiser`` wrote.

    Raises:
        InputError: if the file is missing, truncated, foreign or of another version.
    """
    return _read_denoiser(path)[0]


def _read_denoiser(path: Path) -> tuple[Denoiser, tuple[int, ...]]:
    """The denoiser and the shape of its samples."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not readable ({error}); it may be truncated") from None
    try:
        facts = {"format": metadata.get("format"), **json.loads(metadata.get("facts", "{}"))}
    except (ValueError, TypeError):
        facts = {"format": None}
    if facts["format"] not in (DENOISER_FORMAT, EARLIER_FORMAT):
        hint = "; of a diffusers model give the folder, with its scheduler" if facts["format"] == "pt" else ""
        raise InputError(f"{path} has format {facts['format']!r}; this version reads {DENOISER_FORMAT!r}{hint}")
    process = from_arrays(tensors.pop("alpha").numpy(), tensors.pop("sigma").numpy(), facts["process"])
    spec = network_of(facts["network"], facts.get("network_file"), path.parent)
    shape = tuple(facts["shape"])
    network = build_network(spec, shape, 0)
    try:
        network.load_state_dict({key.removeprefix("network/"): value for key, value in tensors.items()})
    except RuntimeError as error:
        raise InputError(f"{path} does not fit network {facts['network']!r} ({first_line(error)})") from None
    return Denoiser(network, process, facts["prediction"], facts["data_std"], baseline=facts["baseline"]).eval(), shape


def load_model(spec: str | Path, device: str = "cpu") -> TrainedModel:
    """A trained model by name.

    Args:
        spec: a ``denoiser.safetensors`` file or a training run's folder that holds one; a diffusers pipeline or model
            folder with its scheduler; or ``FILE.py:FUNCTION`` with ``FUNCTION(x_t, t) -> eps`` (the file is executed).
        device: where the network is to run. A function chooses for itself.

    Raises:
        InputError: if nothing usable is there.
    """
    text = str(spec)
    file, _, name = text.rpartition(":")
    if file.endswith(".py"):
        return TrainedModel(text, None, own_function(Path(file), name), fingerprint=fingerprint_network(text))
    path = Path(text)
    if path.suffix == ".py":
        raise InputError(f"{text} names no function in that file; write {text}:FUNCTION")
    if path.is_dir() and (path / DENOISER_FILE).exists():
        path = path / DENOISER_FILE
    if path.is_file() and path.suffix == ".safetensors":
        denoiser, shape = _read_denoiser(path)
        denoiser.to(device)

        def eps(x_t: Tensor, t: Tensor) -> Tensor:
            # Some networks flatten their samples, and would take those of another layout for their own.
            if tuple(x_t.shape[1:]) != shape:
                raise InputError(f"{text} was trained on samples of shape {shape}, not {tuple(x_t.shape[1:])}")
            return denoiser.eps(x_t, t)

        own, latents = on_cpu(eps, device), _latents_of_run(path.parent)
        return TrainedModel(text, denoiser.process, own, shape, latents, fingerprint_folders(path))
    if any((path / name / "config.json").exists() for name in (".", *BACKBONES)):
        return _from_diffusers(path, device)
    raise InputError(
        f"{text} is no model: give a {DENOISER_FILE}, a finished unconditional run's folder, a diffusers folder, or "
        "FILE.py:FUNCTION"
    )


def _from_diffusers(folder: Path, device: str) -> TrainedModel:
    schedules = [folder / "scheduler", folder, folder.parent / "scheduler"]
    schedule = next((place for place in schedules if (place / "scheduler_config.json").exists()), None)
    if schedule is None:
        raise InputError(f"{folder} holds no scheduler; save it beside the model with scheduler.save_pretrained")
    network = DiffusersNetwork(load_component(model_folder(folder), "config.json")).eval().to(device)
    scheduled = process_from_scheduler(load_component(schedule, "scheduler_config.json"))
    eps = on_cpu(_eps_of(network, scheduled, device), device)
    shape, latents = (network.model.config.in_channels, None, None), None
    if (folder / "vae" / "config.json").exists():
        latents = {"spec": str(folder), "posterior": "mean"}
        images = read_json(folder / "vae" / "config.json").get("in_channels", 3)
        size = network.model.config.get("sample_size")
        if images == shape[0] and size is not None:
            # Images have as many channels as latents: their sides tell them apart.
            shape = (shape[0], *((size, size) if isinstance(size, int) else size))
    fingerprint = fingerprint_folders(model_folder(folder), schedule)
    return TrainedModel(str(folder), scheduled.process, eps, shape, latents, fingerprint)


def _latents_of_run(folder: Path) -> Mapping[str, Any] | None:
    """How the latents of a training run were made, if that folder holds one and it was of latents."""
    if not (folder / "run.json").exists():
        return None
    run = read_json(folder / "run.json")
    config = run.get("config") if isinstance(run, dict) else None
    return config.get("latents") if isinstance(config, dict) else None


def _eps_of(network: DiffusersNetwork, scheduled: ScheduledProcess, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The network's estimate of eps as a function of (x_t, t), all of it on the device."""
    process, sigma_data = scheduled.process, sigma_data_of(scheduled.prediction)
    alphas, sigmas, timesteps = (
        torch.as_tensor(a, dtype=torch.float32, device=device)
        for a in (process.alpha, process.sigma, scheduled.model_timesteps)
    )

    def eps(x_t: Tensor, t: Tensor) -> Tensor:
        shape = (-1, *(1,) * (x_t.ndim - 1))
        alpha, sigma = alphas[t].reshape(shape), sigmas[t].reshape(shape)
        scale = (alpha.square() * sigma_data**2 + sigma.square()).rsqrt() if scheduled.unit_input else 1.0
        output = network(x_t * scale, timesteps[t])
        if output.shape != x_t.shape:
            raise InputError(
                f"the network maps {tuple(x_t.shape)} to {tuple(output.shape)}; give data of its size, or a network "
                "with as many channels out as in"
            )
        return to_eps(scheduled.prediction, output, x_t, alpha, sigma)

    return eps
