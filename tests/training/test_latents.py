"""Training in the latent space of an autoencoder that was saved as diffusers saves them."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

from difficulty.datasets import load_dataset, split_samples
from difficulty.errors import InputError
from difficulty.latents import Autoencoder, autoencoder_of, latent_dataset
from training.cli import main as training_main

diffusers = pytest.importorskip("diffusers")

CONFIG = {
    "in_channels": 1, "out_channels": 1, "latent_channels": 2, "block_out_channels": (8, 8), "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": 8,
    "scaling_factor": 0.5, "shift_factor": 0.1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _save(folder, seed=0, **changes):
    torch.manual_seed(seed)
    diffusers.AutoencoderKL(**CONFIG | changes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return _save(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="module")
def digits():
    data = load_dataset("digits")
    return split_samples("some digits", data.heldout[:100].numpy(), value_range=(-1.0, 1.0))


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["training", *map(str, args)])
        code = training_main()
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_latents_are_the_posterior_mean_shifted_and_scaled_and_decoding_inverts_that(folder, digits):
    autoencoder = Autoencoder(folder)
    data = latent_dataset(digits, autoencoder, "mean")
    assert data.train.shape == (80, 2, 4, 4)
    assert data.heldout.shape == (20, 2, 4, 4)
    with torch.no_grad():
        mean = autoencoder.model.encode(digits.train[:5]).latent_dist.mean
        assert torch.allclose(data.train[:5], (mean - 0.1) * 0.5, atol=1e-6)
        assert torch.allclose(autoencoder.decode(data.train[:5]), autoencoder.model.decode(mean).sample, atol=1e-5)


def test_autoencoder_without_a_shift_is_scaled_only(digits, tmp_path):
    autoencoder = Autoencoder(_save(tmp_path / "vae", shift_factor=None))
    with torch.no_grad():
        mean = autoencoder.model.encode(digits.heldout).latent_dist.mean
    assert torch.allclose(latent_dataset(digits, autoencoder, "mean").heldout, mean * 0.5, atol=1e-6)


def test_sampled_latents_are_draws_of_the_posterior_and_the_same_every_time(folder, digits):
    autoencoder = Autoencoder(folder)
    drawn = autoencoder.encode(digits.train, "sample")
    assert torch.equal(drawn, autoencoder.encode(digits.train, "sample"))
    assert not torch.equal(drawn[:20], autoencoder.encode(digits.train[:20], "sample", part=1))
    with torch.no_grad():
        posterior = autoencoder.model.encode(digits.train).latent_dist
    z = (drawn / 0.5 + 0.1 - posterior.mean) / posterior.std
    assert float(z.mean()) == pytest.approx(0, abs=4 / z.numel() ** 0.5)
    assert float(z.std()) == pytest.approx(1, abs=4 / (2 * z.numel()) ** 0.5)


def test_latents_are_encoded_once_and_know_what_made_them(folder, digits, tmp_path, monkeypatch):
    first = latent_dataset(digits, Autoencoder(folder), "mean")
    other = latent_dataset(digits, Autoencoder(_save(tmp_path / "other", seed=1)), "mean")
    assert not torch.allclose(first.train, other.train, atol=1e-3)
    assert first.latents["autoencoder"] != other.latents["autoencoder"]
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    monkeypatch.setattr(Autoencoder, "encode", lambda *_: pytest.fail("encoded again"))
    again = latent_dataset(digits, Autoencoder(tmp_path / "pipeline"), "mean")
    assert torch.equal(first.train, again.train)
    assert autoencoder_of(first.latents, str(tmp_path / "pipeline")).fingerprint == first.latents["autoencoder"]
    with pytest.raises(InputError, match="is not the autoencoder"):
        autoencoder_of(first.latents, str(tmp_path / "other"))


def test_run_in_latent_space_gives_pictures_and_is_judged_on_them(folder, call, tmp_path):
    out = tmp_path / "run"
    small = ["--steps", "4", "--batch", "8", "--network", "dit:width=8,depth=1,heads=2", "--json"]
    code, _, err = call("run", "digits", "--vae", folder, "--conditional", "--out", out, *small)
    assert code == 0, err
    config = json.loads((out / "run.json").read_text())["config"]
    assert config["shape"] == [2, 4, 4]
    assert config["latents"]["posterior"] == "mean"
    assert call("sample", out, "--count", "6", "--steps", "3")[0] == 0
    assert np.load(out / "samples.npz")["data"].shape == (6, 1, 8, 8)
    few = ["--samples", "60", "--steps", "3", "--metrics", "sw-pixels"]
    code, text, err = call("evaluate", out, "digits", *few, "--json")
    assert code == 0, err
    assert [row["value"] for row in json.loads(text)["condition"]["accuracy"]][1:] == [str(i) for i in range(10)]
    code, _, err = call("sample", out, "--vae", _save(tmp_path / "other", seed=1))
    assert code == 2
    assert "is not the autoencoder" in err
    code, _, err = call("run", "digits", "--vae", folder, "--posterior", "sample", "--out", out, *small)
    assert code == 2
    assert "other settings" in err


def test_images_and_autoencoders_that_do_not_go_together_are_refused(folder, digits, gaussian, tmp_path):
    autoencoder = Autoencoder(folder)
    with pytest.raises(InputError, match="takes images, 'gaussian"):
        latent_dataset(gaussian, autoencoder, "mean")
    with pytest.raises(InputError, match=r"\[-1, 1\], 'bright' has values up to 255"):
        latent_dataset(split_samples("bright", np.full((20, 1, 8, 8), 255.0)), autoencoder, "mean")
    with pytest.raises(InputError, match="cannot encode images of shape"):
        latent_dataset(split_samples("colour", np.zeros((20, 3, 8, 8))), autoencoder, "mean")
    with pytest.raises(InputError, match="whose sides it can halve"):
        latent_dataset(split_samples("odd", np.zeros((20, 1, 7, 7))), autoencoder, "mean")
    with pytest.raises(InputError, match="unknown posterior 'mode'"):
        latent_dataset(digits, autoencoder, "mode")
    with pytest.raises(InputError, match=r"no config\.json"):
        Autoencoder(tmp_path)
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="no AutoencoderKL that can be used"):
        latent_dataset(digits, Autoencoder(tmp_path / "cut"), "mean")


def test_missing_diffusers_is_said_in_a_sentence(folder, digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"install denoising-difficulty\[diffusers\]"):
        Autoencoder(folder).encode(digits.heldout, "mean")
