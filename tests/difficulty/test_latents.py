"""Difficulty in latent space: measured on latents of images, and probed through a model's own autoencoder."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from difficulty.cli import SUBCOMMANDS
from difficulty.commandline import run_cli
from difficulty.datasets import load_dataset, split_samples
from difficulty.denoiser import Denoiser
from difficulty.errors import InputError
from difficulty.latents import Autoencoder, latent_dataset
from difficulty.models import save_denoiser
from difficulty.networks import build_network
from difficulty.probe import probe
from difficulty.process import get_process

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 4)


def save_autoencoder(folder, seed, latent_channels=2, variant=None):
    torch.manual_seed(seed)
    diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=latent_channels, block_out_channels=(8, 8), norm_num_groups=4,
        sample_size=8, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5,
    ).save_pretrained(folder, variant=variant)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder"), 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A file of some digits in [-1, 1]."""
    path = tmp_path_factory.mktemp("data") / "digits.npy"
    np.save(path, load_dataset("digits").heldout[:120].numpy())
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DENOISING_DIFFICULTY_CACHE", str(tmp_path_factory.getbasetemp() / "latents"))


def call(*args):
    return run_cli(SUBCOMMANDS, "difficulty", "", [str(arg) for arg in args])


def test_measure_kl_and_profile_take_images_as_latents(tmp_path, images, vae):
    common = [images, "--vae", vae]
    assert call("kl", *common, "--estimator", "gaussian", "--pairs", 100, 500, "--out", tmp_path / "kl") == 0
    assert call("profile", *common, "--posterior", "sample", "--out", tmp_path / "profile") == 0
    assert call(
        "measure", *common, "--measures", "convergence", "--network", "mlp:width=8", "--tasks", 2, "--seeds", 1,
        "--budget", 20, "--out", tmp_path / "measured",
    ) == 0  # fmt: skip
    latents = latent_dataset(load_dataset(images), Autoencoder(vae), "mean")
    for name in ("kl", "measured"):
        config = json.loads((tmp_path / name / "run.json").read_text())["config"]
        assert config["latents"] == {"spec": str(vae), "autoencoder": Autoencoder(vae).fingerprint, "posterior": "mean"}
    fingerprint = json.loads((tmp_path / "measured" / "run.json").read_text())["config"]["dataset_fingerprint"]
    assert fingerprint["train"]["shape"] == [len(latents.train), *SHAPE]
    assert fingerprint == latents.fingerprint


def test_a_posterior_without_an_autoencoder_is_refused(tmp_path, images, capsys):
    assert call("kl", images, "--posterior", "sample", "--out", tmp_path / "kl") == 2
    assert "give one with --vae" in capsys.readouterr().err
    assert not (tmp_path / "kl").exists()


def probed(model, data, out, **options):
    return probe(model, data, out=out, tasks=2, draws=20, **options).table


def test_a_run_in_latent_space_is_probed_on_images_through_its_own_autoencoder(tmp_path, images, vae):
    latents = latent_dataset(load_dataset(images), Autoencoder(vae), "mean")
    network = build_network("mlp:width=8", SHAPE, 0)
    denoiser, run = Denoiser(network, get_process("vp-linear"), "v", 1.0), tmp_path / "run"
    save_denoiser(denoiser, run / "denoiser.safetensors", "mlp:width=8", SHAPE)
    (run / "run.json").write_text(json.dumps({"config": {"latents": dict(latents.latents)}}))
    directly = probed(run, latents, tmp_path / "a")
    pd.testing.assert_frame_equal(probed(run, images, tmp_path / "b"), directly)
    config = json.loads((tmp_path / "b" / "run.json").read_text())["config"]
    assert config["latents"]["autoencoder"] == Autoencoder(vae).fingerprint
    other = save_autoencoder(tmp_path / "other", 1)
    with pytest.raises(InputError, match="is not the autoencoder"):
        probed(run, images, tmp_path / "c", vae=str(other))


def test_a_latent_pipeline_is_probed_on_images_from_its_folder_alone(tmp_path, images):
    torch.manual_seed(0)
    folder = tmp_path / "pipeline"
    diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=2, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=4,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    save_autoencoder(folder / "vae", 2)
    (folder / "model_index.json").write_text("{}")
    table = probed(folder, images, tmp_path / "p")
    assert np.isfinite(table["heldout_loss"]).all()
    latents = latent_dataset(load_dataset(images), Autoencoder(folder), "mean")
    pd.testing.assert_frame_equal(probed(folder, latents, tmp_path / "q"), table)
    # As many channels as the network takes: they are latents already.
    ready = split_samples("latents", latents.train.numpy())
    assert probed(folder, ready, tmp_path / "r")["heldout_loss"].notna().all()


def test_images_with_as_many_channels_as_latents_are_told_apart_by_their_sides(tmp_path, images, capsys):
    folder = tmp_path / "pipeline"
    torch.manual_seed(0)
    diffusers.UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).save_pretrained(folder / "unet")  # fmt: skip
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text("{}")
    save_autoencoder(folder / "vae", 3, latent_channels=1)
    assert call("probe", folder, images, "--tasks", 2, "--draws", 16, "--out", tmp_path / "p") == 0
    assert "encoded" in capsys.readouterr().err
    assert "latents" in json.loads((tmp_path / "p" / "run.json").read_text())["config"]
    np.save(tmp_path / "ready.npy", np.random.default_rng(0).standard_normal((60, 1, 4, 4)).astype(np.float32))
    assert call("probe", folder, tmp_path / "ready.npy", "--tasks", 2, "--draws", 16, "--out", tmp_path / "q") == 0
    assert "has the shape of latents, and is taken for such" in capsys.readouterr().err


def test_an_autoencoder_saved_as_a_variant_is_found(tmp_path, images):
    plain, half = (
        Autoencoder(save_autoencoder(tmp_path / str(variant), 0, variant=variant)) for variant in (None, "fp16")
    )
    data = load_dataset(images)
    assert torch.equal(latent_dataset(data, half, "mean").train, latent_dataset(data, plain, "mean").train)
