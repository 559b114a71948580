"""A trained network as a diffusers folder, which ``from_pretrained`` loads and samples from.

    network                            data      process         pipeline
    UNet2DModel, unconditional         images    VP              DDIMPipeline
    UNet2DModel, unconditional         images    flow matching   DDPMPipeline with Euler's scheduler
    DiTTransformer2DModel              latents   VP              DiTPipeline, with the autoencoder

DiTPipeline guides by the label 1000, whatever the model's number of classes, so the exported one has so many: what it
learned as "no class" stands there, and at every label that it does not know.
The folder holds the averaged weights, and the process and the prediction as a scheduler.
"""

__all__ = ["export_run"]

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from difficulty.diffusers_network import DiffusersNetwork
from difficulty.errors import InputError
from difficulty.latents import autoencoder_of
from difficulty.schedulers import scheduler_for
from training.run import Tell, restore, silent

# The label of "no class" in diffusers' DiTPipeline.
NO_CLASS = 1000


def export_run(folder: Path, out: Path, vae: str | None = None, tell: Tell = silent) -> tuple[str, bool]:
    """Write the averaged weights of a run as a diffusers pipeline.

    Args:
        folder: of ``training run``; see the table above.
        out: folder to make; it must not exist, or be empty.
        vae: where the run's autoencoder is now, if it was moved.
        tell: called with a sentence for every damaged checkpoint that was passed over.

    Returns:
        Name of the pipeline's class, and whether its pictures, which it clamps to [-1, 1], may lose something by that.

    Raises:
        InputError: if diffusers has no pipeline for the network, process or prediction, or ``out`` is not empty.
    """
    denoiser, config = restore(folder, tell)
    spec = config["plan"]["network"]
    network = getattr(denoiser.network, "network", denoiser.network)  # without the condition around it
    if not isinstance(network, DiffusersNetwork):
        raise InputError(f"diffusers has no class for network {spec!r}; train with --network diffusers:CONFIG.json")
    scheduler = scheduler_for(denoiser.process, denoiser.prediction)
    name = type(network.model).__name__
    if name == "UNet2DModel" and not config["condition"] and not config["latents"]:
        pipeline = _unconditional(network.model, scheduler, config)
    elif name == "DiTTransformer2DModel" and config["latents"] and (config["condition"] or {}).get("kind") != "text":
        pipeline = _latent_dit(network.model, scheduler, config, vae)
    else:
        told = {None: "", "class": " with classes", "text": " with text"}[(config["condition"] or {}).get("kind")]
        raise InputError(
            f"diffusers has no pipeline for a {name} of {'latents' if config['latents'] else 'images'}{told}; it has "
            "them for an unconditional UNet2DModel of images and a DiTTransformer2DModel of latents"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; choose another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            pipeline.save_pretrained(temporary)
            os.chmod(temporary, 0o755)
            os.replace(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; nothing was changed") from error
    return type(pipeline).__name__, not config["latents"] and config["value_range"] != [-1.0, 1.0]


def _unconditional(model: Any, scheduler: Any, config: Mapping[str, Any]) -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

    if model.class_embedding is not None:
        raise InputError("diffusers has no pipeline for a UNet2DModel with class embeddings; train one without")
    # The pipeline draws noise of the size that the configuration states.
    model.register_to_config(sample_size=tuple(config["shape"][1:]))
    return (DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline)(unet=model, scheduler=scheduler)


def _latent_dit(model: Any, scheduler: Any, config: Mapping[str, Any], vae: str | None) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline

    _, height, width = config["shape"]
    autoencoder = autoencoder_of(config["latents"], vae)
    if not isinstance(scheduler, DDIMScheduler) or autoencoder.shift or height != width:
        raise InputError("DiTPipeline of diffusers samples square latents without a shift, under VP only")
    model = _with_pipeline_labels(model, config["condition"]["network"]["classes"] if config["condition"] else 0)
    model.register_to_config(sample_size=height)
    return DiTPipeline(transformer=model, vae=autoencoder.model, scheduler=scheduler)


def _with_pipeline_labels(model: Any, classes: int) -> Any:
    """A DiT that knows the labels 0..classes - 1 as before, and takes all others up to ``NO_CLASS`` for no class."""
    null = model.config.num_embeds_ada_norm
    if null > NO_CLASS:
        raise InputError(f"DiTPipeline of diffusers takes label {NO_CLASS} for no class; this model has {null} classes")
    padded = type(model).from_config({**model.config, "num_embeds_ada_norm": NO_CLASS})
    weights = model.state_dict()
    for name, table in weights.items():
        if name.endswith("class_embedder.embedding_table.weight"):
            weights[name] = torch.cat([table[:classes], table[null].expand(NO_CLASS + 1 - classes, -1)])
    padded.load_state_dict(weights)
    return padded.eval()
