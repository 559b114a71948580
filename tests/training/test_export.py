"""An exported run is loaded by diffusers and draws the samples that the run itself draws."""

import json

import pytest
import torch
from diffusers_configs import DIT, UNET

from difficulty.datasets import load_dataset
from difficulty.errors import InputError
from difficulty.process import PROCESSES, get_process
from difficulty.randomness import normal
from difficulty.schedulers import process_from_scheduler, scheduler_for
from training.export import export_run
from training.run import Cadence, train
from training.sampling import draw_samples
from training.streams import PRIOR
from training.trainer import TrainPlan

diffusers = pytest.importorskip("diffusers")


def _run(tmp_path, process, config=UNET, **options):
    torch.set_num_threads(1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = TrainPlan(steps=4, batch=8, network=f"diffusers:{tmp_path / 'config.json'}", lr=1e-2, warmup=0, **options)
    data = load_dataset("digits")
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
    with pytest.raises(InputError, match="DiTTransformer2DModel only together"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_classes_of_a_diffusers_unet_are_trained_and_refused_by_export(tmp_path):
    trainer = _run(tmp_path, "vp-linear:T=20", UNET | {"num_class_embeds": 11}, condition="class")
    moments = trainer.optimizer.state[trainer.denoiser.network.network.model.class_embedding.weight]["exp_avg_sq"]
    assert (moments.sum(1) > 0).sum() >= 9
    with pytest.raises(InputError, match="trained with classes"):
        export_run(tmp_path / "run", tmp_path / "out")


def test_folder_that_holds_something_is_left_alone(tmp_path):
    _run(tmp_path, "vp-linear:T=20")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("...")
    with pytest.raises(InputError, match="not empty"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
