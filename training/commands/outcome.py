"""The commands that look at a finished run: ``training sample``, ``training evaluate`` and ``training plot``."""

__all__ = ["evaluate", "plot", "sample"]

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from difficulty.commandline import given_command
from difficulty.datasets import load_dataset
from difficulty.devices import chosen_device
from difficulty.errors import InputError
from difficulty.latents import autoencoder_of, latent_dataset
from difficulty.records import write_bytes, write_json, write_table
from training.commands.arguments import File, Text, warn
from training.commands.condition import asked_for, obedience, sentences, summary, told_of
from training.curriculum import Curriculum, tasks_of
from training.effects import LEVEL
from training.heldout import HeldOut
from training.metrics import SampleJudge, check_enough
from training.plots import draw_folder, save_grid
from training.run import restore
from training.sampling import STEPS, draw_samples


def sample(
    folder: File,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    count: int = 64,
    method: str = "ddim",
    steps: int | None = None,
    labels: tuple[int, ...] = (),
    prompt: tuple[str, ...] = (),
    guidance: float = 1.0,
    text_encoder: str | None = None,
    vae: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Draw samples of a run with its averaged weights, as an array file and a picture.

    Example: training sample runs/digits --count 64 --method heun
    Of a run with captions: training sample runs/captions --prompt "a handwritten seven" --guidance 2

    Args:
        folder: Folder of `training run`.
        output: Array file .npz; a .png of the same name is drawn beside it. Default: samples.npz in the folder.
        count: Samples.
        method: Sampler: ddim, euler, heun, edm-heun, ancestral or dpm-solver++.
        steps: Steps of the sampler; by default 50, or T where that is less.
        labels: Wanted classes of a conditional run, repeated in turn; default: all of them.
        prompt: Wanted captions of a run with a text encoder, repeated in turn.
        guidance: Classifier-free guidance; 1 is the conditional model itself.
        text_encoder: Where the run's text encoder is now, if it was moved.
        vae: Where the run's autoencoder is now, if it was moved.
        seed: Of the noise.
        device: cpu, cuda, or auto.
    """
    import io

    import numpy as np

    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    target = output or folder / "samples.npz"
    if target.suffix != ".npz":
        raise InputError(f"{target} should end in .npz")
    denoiser, config = restore(folder, warn)
    where = chosen_device(device)
    drawn = draw_samples(
        denoiser.to(where),
        count,
        tuple(config["shape"]),
        seed=seed,
        method=method,
        steps=steps,
        condition=asked_for(folder, config, count, labels, prompt, text_encoder),
        guidance=guidance,
        device=where,
    )
    if config["latents"]:
        drawn = autoencoder_of(config["latents"], vae, where).decode(drawn)
    buffer = io.BytesIO()
    np.savez(buffer, data=drawn.numpy())
    write_bytes(target, buffer.getvalue())
    picture = target.with_suffix(".png")
    save_grid(drawn[:256], picture, tuple(config["value_range"]) if config["value_range"] else None)
    print(f"{count} samples in {target}, drawn in {picture}")


def evaluate(
    folder: File,
    data: Text,
    metrics: tuple[str, ...] = ("fd-pca", "kid-pca", "sw-pixels", "precision-pca", "recall-pca"),
    samples: int = 1000,
    method: str = "ddim",
    steps: int | None = None,
    guidance: float = 1.0,
    text_encoder: str | None = None,
    vae: str | None = None,
    seed: int = 0,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Held-out nats per task and distances of samples from the data, of a run's averaged weights.

    Example: training evaluate runs/digits digits --json

    Args:
        folder: Folder of `training run`.
        data: The data set that the run was trained on; another one of the same shape is said to be another.
        metrics: Of the samples: fd, kid, sw, precision or recall on pixels, pca, digits-cnn or inception, as in
            fd-pca. Each with its interval and its value with as many of the data in place of the samples.
        samples: Samples that are judged.
        method: Sampler: ddim, euler, heun, edm-heun, ancestral or dpm-solver++.
        steps: Steps of the sampler; by default 50, or T where that is less.
        guidance: Of a conditional run, whose samples are also judged by a separate classifier, per class and per
            caption; captions that no training sample had are asked for as well, with as many samples.
        text_encoder: Where the run's text encoder is now, if it was moved.
        vae: Where the run's autoencoder is now, if it was moved.
        seed: Of the noise.
        device: cpu, cuda, or auto.
        json: Print as JSON what evaluation.json in the folder then holds in any case.
    """
    if metrics:
        check_enough("samples", samples)
    denoiser, config = restore(folder, warn)
    where = chosen_device(device)
    denoiser.to(where)
    steps = min(STEPS, denoiser.process.T) if steps is None else steps
    pictures = dataset = load_dataset(data)
    autoencoder = autoencoder_of(config["latents"], vae, where) if config["latents"] else None
    if autoencoder:
        dataset = latent_dataset(pictures, autoencoder, config["latents"]["posterior"])
    if list(dataset.shape) != config["shape"]:
        raise InputError(f"{folder} was trained on samples of shape {config['shape']}, {data} has {dataset.shape}")
    if dataset.fingerprint != config["data"]:
        warn(f"{data} is not the data that {folder} was trained on; the figures compare the run with other data")
    chosen = Curriculum.load(folder / "curriculum.json") if config["curriculum"] else None
    tasks = tasks_of(chosen, denoiser.process)
    told = told_of(folder, config, dataset, text_encoder)
    heldout = HeldOut(dataset, denoiser.process, tasks, conditioning=told)
    measured = heldout.evaluate(denoiser)
    judge = SampleJudge(pictures.train, metrics, pictures.value_range)

    settings: dict[str, Any] = {"method": method, "steps": steps, "guidance": guidance, "seed": seed}

    def draw(**asked: Any) -> torch.Tensor:
        drawn = draw_samples(denoiser, shape=dataset.shape, device=where, **settings, **asked)
        return autoencoder.decode(drawn) if autoencoder else drawn

    drawn, obeyed = obedience(told, pictures, samples, draw)
    found = judge.evaluate(drawn)
    report: dict[str, Any] = {
        "command": given_command(),
        "step": config["step"],
        "data": dataset.fingerprint,
        "nats": measured.nats,
        "nats_se": heldout.nats_error(measured),
        "loss": measured.loss,
        "nats_per_task": measured.nats_per_task.tolist(),
        "tasks": [[task.t_first, task.t_last] for task in tasks],
        "samples": samples,
        "sampling": settings | {"device": where},
        "metrics": {name: asdict(metric) for name, metric in found.items()},
    }
    if obeyed is not None:
        report["condition"] = summary(obeyed)
        write_table(folder / "condition.csv", obeyed)
    write_json(folder / "evaluation.json", report)
    if json:
        print(jsonlib.dumps(report))
        return
    print(f"held-out nats {measured.nats:.3f} +- {report['nats_se']:.3f} (standard error), loss {measured.loss:.6f}")
    print(f"{samples} samples against {len(dataset.train)} of the data, {LEVEL:.0%} intervals:")
    for name, metric in found.items():
        print(
            f"  {name:20} {metric.value:.4f} [{metric.ci_low:.4f}, {metric.ci_high:.4f}], {metric.better} is better; "
            f"of {judge.compared(samples)} of the data in their place {metric.of_data:.4f}"
        )
    if obeyed is not None:
        print("\n".join(f"  {line}" for line in sentences(obeyed)))


def plot(folder: File) -> None:
    """Draw the figures of a run or a comparison again from its CSV files.

    Example: training plot runs/digits

    Args:
        folder: Folder of `training run` or `training compare`.
    """
    for path in draw_folder(folder):
        print(path)
