"""Latent space: images encoded once by an autoencoder of diffusers, samples decoded by it.

    z = (latent - shift) scaling,      latent = mean or a draw of the encoder's posterior

with the ``scaling_factor`` and the ``shift_factor`` of the autoencoder's own configuration, as in Rombach et al. 2022
(arXiv 2112.10752, section G); decoding inverts it. An autoencoder is an AutoencoderKL by folder, a diffusers pipeline
with a folder vae, or a name on the hub. Its weights stay as they are, and it reads images in [-1, 1].

Latents are cached with the fingerprints of autoencoder and images. A latent data set is a data set like any other: its
samples have the shape of a latent, and ``Dataset.latents`` says how they were made.
"""

__all__ = ["POSTERIORS", "Autoencoder", "autoencoder_of", "check_posterior", "latent_dataset", "load_latents"]

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difficulty.cache import cached_tensors
from difficulty.datasets import Dataset, load_dataset
from difficulty.errors import InputError, choose, first_line
from difficulty.pretrained import find_part, fingerprint_folders, root_folder, weights_variant
from difficulty.randomness import normal

CHUNK = 32  # images per forward pass
BLOCK = 32 * CHUNK  # images read at a time where they do not fit in memory
PART = "vae"
POSTERIOR_STREAM = 11  # second counter of its draws, the first being 0; a run's streams have others
MOST = 1.01  # images in [-1, 1], with room for rounding
POSTERIORS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # of mean, deviation and standard normal noise
    "mean": lambda mean, std, noise: mean,
    "sample": lambda mean, std, noise: mean + std * noise,
}


class Autoencoder:
    """An AutoencoderKL; the model is loaded when something must be encoded or decoded.

    Args:
        spec: see the head of the module.
        device: where it computes.

    Raises:
        InputError: if there is none.
    """

    def __init__(self, spec: str | Path, device: str = "cpu") -> None:
        self.spec, self.device = str(spec), device
        self.folder = find_part(root_folder(self.spec, [PART]), PART, "config.json")
        self.fingerprint = fingerprint_folders(self.folder)

    @functools.cached_property
    def model(self) -> Any:
        """The autoencoder itself, in evaluation mode."""
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise InputError(f"{self.spec} needs diffusers; install denoising-difficulty[diffusers]") from None
        try:
            found, report = AutoencoderKL.from_pretrained(
                self.folder, use_safetensors=True, variant=weights_variant(self.folder), output_loading_info=True
            )
        except Exception as error:  # diffusers raises many kinds for foreign, missing or truncated files
            raise InputError(f"{self.spec} holds no AutoencoderKL that can be used ({first_line(error)})") from None
        if report["missing_keys"]:
            raise InputError(f"{self.spec} lacks weights of its autoencoder, such as {min(report['missing_keys'])}")
        return found.eval().requires_grad_(False).to(self.device)

    @property
    def scaling(self) -> float:
        """Factor on latents, so that they have about unit variance."""
        return float(self.model.config.scaling_factor or 1.0)

    @property
    def shift(self) -> float:
        """What is taken off latents before they are scaled."""
        return float(self.model.config.shift_factor or 0.0)

    @torch.no_grad()
    def encode(self, images: Tensor, posterior: str, part: int = 0, first: int = 0) -> Tensor:
        """Scaled latents (n, c, h, w) of images (n, C, H, W) in [-1, 1].

        Args:
            images: float32.
            posterior: a name in ``POSTERIORS``.
            part: tells the noise of train and held-out images apart.
            first: number of the first image among all, a multiple of ``CHUNK``.

        Raises:
            InputError: if the autoencoder cannot take images of this shape.
        """
        pick = choose("posterior", posterior, POSTERIORS)
        latents = []
        for number, chunk in enumerate(images.split(CHUNK), first // CHUNK):
            try:
                found = self.model.encode(chunk.to(self.device)).latent_dist
            except torch.OutOfMemoryError:
                raise InputError(f"{self.spec} does not fit on the GPU with its images; use --device cpu") from None
            except RuntimeError as error:
                shape = tuple(images.shape[1:])
                raise InputError(f"{self.spec} cannot encode images of shape {shape} ({first_line(error)})") from None
            noise = normal(tuple(found.mean.shape), 0, POSTERIOR_STREAM, part, number).to(self.device)
            latents.append(((pick(found.mean, found.std, noise) - self.shift) * self.scaling).cpu())
        return torch.cat(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, C, H, W) of scaled latents (n, c, h, w), on the CPU; values may leave [-1, 1] a little."""
        unscaled = (latents / self.scaling + self.shift).split(CHUNK)
        return torch.cat([self.model.decode(chunk.to(self.device)).sample.cpu() for chunk in unscaled])


def latent_dataset(
    data: Dataset, autoencoder: Autoencoder, posterior: str, tell: Callable[[str], None] = lambda message: None
) -> Dataset:
    """A data set of images as scaled latents in memory, from the cache or encoded and cached.

    Args:
        data: images in [-1, 1].
        autoencoder: encodes them.
        posterior: a name in ``POSTERIORS``; a draw is drawn once and kept.
        tell: called with sentences for the user.

    Raises:
        InputError: if the data are no images in [-1, 1], the autoencoder cannot take them or return them, or the
            latents are not finite.
    """
    choose("posterior", posterior, POSTERIORS)
    if len(data.shape) != 3:
        raise InputError(f"an autoencoder takes images, {data.name!r} has samples of shape {data.shape}")
    extreme = float(torch.stack([part.abs().max() for part in (data.train, data.heldout)]).max())
    if extreme > MOST:
        raise InputError(f"an autoencoder takes images in [-1, 1], {data.name!r} has values up to {extreme:g} in size")

    def compute() -> dict[str, Tensor]:
        large = data.large
        if large is None:
            found = {"train": autoencoder.encode(data.train, posterior, 0)}
        else:
            blocks = (range(first, min(first + BLOCK, len(large))) for first in range(0, len(large), BLOCK))
            parts = [autoencoder.encode(large.read(block), posterior, 0, block.start) for block in blocks]
            found = {"train": torch.cat(parts)}
        found["heldout"] = autoencoder.encode(data.heldout, posterior, 1)
        if not all(torch.isfinite(latents).all() for latents in found.values()):
            raise InputError(f"latents of {autoencoder.spec} are not finite; it may need another precision")
        some, again = data.heldout[:CHUNK], autoencoder.decode(found["heldout"][:CHUNK])
        if some.shape != again.shape:
            raise InputError(
                f"{autoencoder.spec} returns images of shape {tuple(again.shape[1:])} for {tuple(some.shape[1:])}; "
                "give images whose sides it can halve as often as it does"
            )
        error = float((some - again).square().mean().sqrt())
        tell(f"encoded {data.name}: decoding {len(some)} held-out latents misses the images by {error:.3f} (rms)")
        return found

    made = {"autoencoder": autoencoder.fingerprint, "posterior": posterior}
    facts = made | {"data": data.fingerprint}
    found = cached_tensors("latents", facts, compute, tell)
    latents = made | {"spec": autoencoder.spec}
    return replace(
        data,
        train=found["train"],
        heldout=found["heldout"],
        labels=data.trained_labels,
        captions=data.trained_captions,
        large=None,
        law=None,
        latents=latents,
    )


def check_posterior(posterior: str, vae: str | None) -> None:
    """Raise InputError if a posterior is asked for without the autoencoder that has it."""
    if posterior != "mean" and vae is None:
        raise InputError(f"--posterior {posterior} is of the latents of an autoencoder; give one with --vae")


def load_latents(
    spec: str, vae: str | None, posterior: str, device: str = "cpu", tell: Callable[[str], None] = lambda message: None
) -> Dataset:
    """The data set of that name, as latents if an autoencoder is given.

    Args:
        spec: see ``load_dataset``.
        vae: see ``Autoencoder``; None leaves the data as they are.
        posterior, tell: see ``latent_dataset``.
        device: where the autoencoder computes.

    Raises:
        InputError: see ``load_dataset`` and ``latent_dataset``.
    """
    check_posterior(posterior, vae)
    data = load_dataset(spec)
    return data if vae is None else latent_dataset(data, Autoencoder(vae, device), posterior, tell)


def autoencoder_of(latents: Mapping[str, Any], moved: str | None = None, device: str = "cpu") -> Autoencoder:
    """The autoencoder that a model's latents were made by; see ``Dataset.latents``.

    Args:
        latents: how they were made; without the fingerprint of the autoencoder any that is there is taken.
        moved: where the autoencoder is now, if not where it was.
        device: where it computes.

    Raises:
        InputError: if another one is there.
    """
    found = Autoencoder(moved or latents["spec"], device)
    if latents.get("autoencoder", found.fingerprint) != found.fingerprint:
        raise InputError(f"{found.spec} is not the autoencoder that the run's latents were made by; name it by --vae")
    return found
