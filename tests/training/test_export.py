"""An exported run is loaded by diffusers and draws the samples that the run itself draws."""

import json
from contextlib import nullcontext

import pytest
import torch
from diffusers_configs import DIT, UNET

from difficulty.datasets import load_dataset
from difficulty.errors import InputError
from difficulty.latents import Autoencoder, latent_dataset
from difficulty.process import PROCESSES, get_process
from difficulty.randomness import normal
from difficulty.schedulers import process_from_scheduler, scheduler_for
from training.export import export_run
from training.run import Cadence, train
from training.sampling import draw_samples
from training.streams import PRIOR
from training.trainer import TrainPlan

diffusers = pytest.importorskip("diffusers")


def _run(tmp_path, process, config=UNET, data=None, **options):
    torch.set_num_threads(1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = TrainPlan(steps=4, batch=8, network=f"diffusers:{tmp_path / 'config.json'}", lr=1e-2, warmup=0, **options)
    data = data or load_dataset("digits")
    return train(data, get_process(process), plan, tmp_path / "run", cadence=Cadence(sample=0, evaluate=0))


@pytest.mark.parametrize(
    ("process", "prediction", "pipeline"),
    [
        ("vp-linear:T=20", "eps", "DDIMPipeline"),
        ("vp-cosine:T=20", "v", "DDIMPipeline"),
        ("vp-cosine:T=20", "x0", "DDIMPipeline"),
        ("flow-matching:T=40", "velocity", "DDPMPipeline"),
    ],
)
def test_exported_pipeline_draws_the_samples_of_the_run(process, prediction, pipeline, tmp_path, monkeypatch):
    trainer = _run(tmp_path, process, prediction=prediction)
    (tmp_path / "config.json").unlink()  # the run has a copy
    assert export_run(tmp_path / "run", tmp_path / "out") == (pipeline, False)
    drawn = draw_samples(trainer.ema, 3, (1, 8, 8), seed=7, steps=trainer.process.T)
    start = float(trainer.process.sigma[-1]) * normal((3, 1, 8, 8), 7, PRIOR, 0, 0)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    module = "ddim.pipeline_ddim" if pipeline == "DDIMPipeline" else "ddpm.pipeline_ddpm"
    monkeypatch.setattr(f"diffusers.pipelines.{module}.randn_tensor", lambda *args, **options: start)
    theirs = loaded(batch_size=3, num_inference_steps=trainer.process.T, output_type="np").images
    expected = (drawn / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.1
    assert torch.allclose(torch.from_numpy(theirs).permute(0, 3, 1, 2), expected, atol=1e-5)


def _latents(folder):
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKL(
        1, 1, latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5, **kinds
    )
    autoencoder.save_pretrained(folder)
    return latent_dataset(load_dataset("digits"), Autoencoder(folder), "mean")


@pytest.mark.parametrize("condition", ["class", "none"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_dit_of_latents_is_exported_with_its_autoencoder_and_draws_the_pictures_of_the_run(
    guidance, condition, tmp_path, monkeypatch
):
    monkeypatch.setenv("DENOISING_DIFFICULTY_CACHE", str(tmp_path / "cache"))
    config = DIT | {"in_channels": 2, "out_channels": 4, "sample_size": 4}
    data = _latents(tmp_path / "vae")
    trainer = _run(tmp_path, "vp-cosine:T=20", config, data, prediction="v", condition=condition)
    labels = torch.tensor([3, 8, 8])
    assert export_run(tmp_path / "run", tmp_path / "out") == ("DiTPipeline", False)
    own = {"condition": labels, "guidance": guidance} if condition == "class" else {}
    drawn = draw_samples(trainer.ema, 3, data.shape, seed=7, steps=20, **own)
    start = float(trainer.process.sigma[-1]) * normal((3, 2, 4, 4), 7, PRIOR, 0, 0)
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *args, **options: start)
    theirs = loaded(
        class_labels=labels.tolist(), guidance_scale=guidance, num_inference_steps=20, output_type="np"
    ).images
    expected = (Autoencoder(tmp_path / "vae").decode(drawn) / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.02
    assert torch.allclose(torch.from_numpy(theirs).permute(0, 3, 1, 2), expected, atol=1e-4)


def test_latents_of_a_unet_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DENOISING_DIFFICULTY_CACHE", str(tmp_path / "cache"))
    config = UNET | {"in_channels": 2, "out_channels": 2, "sample_size": 4}
    _run(tmp_path, "vp-cosine:T=20", config, _latents(tmp_path / "vae"))
    with pytest.raises(InputError, match="no pipeline for a UNet2DModel of latents"):
        export_run(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "velocity", "score", "edm"])
def test_scheduler_of_a_process_reads_back_as_that_process_or_is_refused(name, prediction):
    process = get_process(name)
    possible = prediction in ("eps", "x0", "v") if name.startswith("vp") else (name, prediction) == (
        "flow-matching", "velocity"
    )  # fmt: skip
    if not possible:
        with pytest.raises(InputError, match="diffusers has no pipeline for process"):
            scheduler_for(process, prediction)
        return
    found = process_from_scheduler(scheduler_for(process, prediction))
    assert found.prediction == prediction
    assert torch.allclose(torch.from_numpy(found.process.alpha), torch.from_numpy(process.alpha), rtol=1e-4, atol=1e-6)


def test_what_diffusers_cannot_sample_is_refused_and_nothing_is_written(gaussian, process, tmp_path):
    plan = TrainPlan(steps=2, batch=8, network="mlp:width=8")
    train(gaussian, process, plan, tmp_path / "own", cadence=Cadence(sample=0))
    with pytest.raises(InputError, match="no class for network 'mlp:width=8'"):
        export_run(tmp_path / "own", tmp_path / "out")
    _run(tmp_path, "vp-linear:T=20", DIT)
    with pytest.raises(InputError, match="no pipeline for a DiTTransformer2DModel of images; it has them for"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_classes_of_a_diffusers_unet_are_trained_and_refused_by_export(tmp_path):
    trainer = _run(tmp_path, "vp-linear:T=20", UNET | {"num_class_embeds": 11}, condition="class")
    moments = trainer.optimizer.state[trainer.denoiser.network.network.model.class_embedding.weight]["exp_avg_sq"]
    assert (moments.sum(1) > 0).sum() >= 9
    with pytest.raises(InputError, match="no pipeline for a UNet2DModel of images with classes"):
        export_run(tmp_path / "run", tmp_path / "out")


def test_a_unet_with_room_for_classes_is_refused_by_export_though_it_was_told_none(tmp_path):
    _run(tmp_path, "vp-linear:T=20", UNET | {"num_class_embeds": 11})
    with pytest.raises(InputError, match="no pipeline for a UNet2DModel with class embeddings"):
        export_run(tmp_path / "run", tmp_path / "out")


def test_a_run_from_weights_that_were_exchanged_is_another(tmp_path, process):
    data, place = load_dataset("digits"), tmp_path / "unet"
    plan = TrainPlan(steps=2, batch=8, network=f"diffusers:{place}")
    config = {key: value for key, value in UNET.items() if key != "_class_name"}
    for seed, refused in ((0, False), (0, False), (1, True)):
        torch.manual_seed(seed)
        diffusers.UNet2DModel(**config).save_pretrained(place)
        with pytest.raises(InputError, match="initial_weights") if refused else nullcontext():
            train(data, process, plan, tmp_path / "run", cadence=Cadence(sample=0, evaluate=0))


def test_folder_that_holds_something_is_left_alone(tmp_path):
    _run(tmp_path, "vp-linear:T=20")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("...")
    with pytest.raises(InputError, match="not empty"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
