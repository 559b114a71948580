"""A trained network as a diffusers folder, which ``from_pretrained`` loads and samples from.

    model_index.json   DDIMPipeline for VP, DDPMPipeline with Euler's scheduler for flow matching
    unet/              the averaged weights
    scheduler/         the process and the prediction of the run
"""

__all__ = ["export_run"]

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from difficulty.diffusers_network import DiffusersNetwork
from difficulty.errors import InputError
from difficulty.schedulers import scheduler_for
from training.run import restore


def export_run(folder: Path, out: Path) -> tuple[str, bool]:
    """Write the averaged weights of a run as a diffusers pipeline.

    Args:
        folder: of ``training run`` with an unconditional UNet2DModel.
        out: folder to make; it must not exist, or be empty.

    Returns:
        Name of the pipeline's class, and whether its pictures, which it clamps to [-1, 1], may lose something by that.

    Raises:
        InputError: if diffusers has no pipeline for the network, process or prediction, or ``out`` is not empty.
    """
    denoiser, config = restore(folder)
    spec, network = config["plan"]["network"], denoiser.network
    if config["condition"]:
        kind_of = {"class": "classes", "text": "captions of any encoder"}[config["condition"]["kind"]]
        raise InputError(f"{folder} was trained with {kind_of}; diffusers has no pipeline that gives them to a network")
    if not isinstance(network, DiffusersNetwork):
        raise InputError(f"diffusers has no class for network {spec!r}; train with --network diffusers:CONFIG.json")
    name = type(network.model).__name__
    if name != "UNet2DModel":
        raise InputError(f"diffusers samples a {name} only together with other models; a UNet2DModel can be exported")
    scheduler = scheduler_for(denoiser.process, denoiser.prediction)
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

    kind: Any = DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline
    # The pipeline draws noise of the size that the configuration states.
    network.model.register_to_config(sample_size=tuple(config["shape"][1:]))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; choose another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            kind(unet=network.model, scheduler=scheduler).save_pretrained(temporary)
            os.chmod(temporary, 0o755)
            os.replace(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; nothing was changed") from error
    return kind.__name__, config["value_range"] != [-1.0, 1.0]
