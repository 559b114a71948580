"""``training export``: a run as a diffusers folder."""

__all__ = ["export"]

from pathlib import Path

from training.commands.arguments import File, warn
from training.export import export_run


def export(folder: File, out: Path, vae: str | None = None) -> None:
    """Write the averaged weights of a run as a folder that diffusers loads and samples from.

    Example: training export runs/digits --out runs/digits-diffusers

    Args:
        folder: Folder of `training run --network diffusers:...`, with an unconditional UNet2DModel, or with a
            DiTTransformer2DModel and --vae.
        out: Folder to make.
        vae: Where the run's autoencoder is now, if it was moved.
    """
    pipeline, clamped = export_run(folder, out, vae, warn)
    print(f"{out}: load it with diffusers.{pipeline}.from_pretrained({str(out)!r})")
    if clamped:
        print("note: the pipeline clamps its pictures to [-1, 1], which need not be the range of the data")
