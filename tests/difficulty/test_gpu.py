"""On a GPU, pretended where there is none, the experts do what they do on the CPU."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from pretended_gpu import DEVICE, pretended_gpu

from difficulty import engines, expert_crew, experts, models
from difficulty.datasets import load_dataset
from difficulty.denoiser import Denoiser
from difficulty.expert_crew import TRAIN_STREAM, Crew
from difficulty.expert_plan import ExpertPlan
from difficulty.expert_samples import SampleQuality
from difficulty.experts import choose_expert_engine, train_experts
from difficulty.models import save_denoiser
from difficulty.networks import build_network
from difficulty.probe import probe
from difficulty.process import get_process
from difficulty.tasks import make_tasks

PROCESS = get_process("vp-linear")
TASKS = make_tasks(PROCESS, 3)
PLAN = ExpertPlan(network="mlp:width=16", seeds=(0, 1), budget=20, batch=16, heldout_draws=40)


@pytest.fixture
def gpu(monkeypatch):
    """Trains on a pretended GPU; to be entered."""
    for module in (expert_crew, experts):
        monkeypatch.setattr(module, "training_device", lambda: DEVICE)
    monkeypatch.setattr(engines, "free_bytes", lambda device: 2**34)
    return pretended_gpu(monkeypatch)


def trained(data, plan, **options):
    return train_experts(load_dataset(data), PROCESS, TASKS, plan, processes=1, **options)


def test_a_pretended_gpu_refuses_what_a_gpu_would(monkeypatch):
    with pretended_gpu(monkeypatch):
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices"):
            there + here
        with pytest.raises(RuntimeError, match="two devices"):
            torch.stack([there, here])
        with pytest.raises(RuntimeError, match="two devices"):
            here[torch.tensor([0, 1], device=DEVICE)]
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        assert (there + here.to(DEVICE)).cpu().tolist() == [2, 2, 2]
        assert float(there.sum()) == 3


@pytest.mark.parametrize(
    ("network", "engine"),
    [("mlp:width=16", "batched"), ("unet:width=8", "vmap"), ("dit:width=16,depth=2", "batched")],
)
def test_experts_take_the_same_steps_on_a_gpu(gpu, monkeypatch, network, engine):
    dataset, plan = load_dataset("digits"), dataclasses.replace(PLAN, network=network)

    def weights_after_two_steps():
        choice = choose_expert_engine(dataset, PROCESS, TASKS, plan, processes=1)
        crew = Crew(dataset, PROCESS, TASKS, plan, choice, [(0, 0), (0, 2), (1, 1)], {})
        for step in range(2):
            crew.step(TRAIN_STREAM, step)
        return choice, {name: value.cpu() for name, value in crew.bank.weights(1).items()}

    with gpu:
        choice, there = weights_after_two_steps()
    assert choice.engine == engine
    assert choice.block == len(TASKS) * len(plan.seeds)
    monkeypatch.undo()
    _, here = weights_after_two_steps()
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=2e-3, atol=1e-5)


def test_experts_are_judged_on_a_gpu(gpu, monkeypatch):
    with gpu:
        there = trained("grid-2d:n=200", PLAN)
    monkeypatch.undo()
    here = trained("grid-2d:n=200", PLAN)
    for name in ("losses", "excess", "zero", "zero_excess"):
        np.testing.assert_allclose(getattr(there, name), getattr(here, name), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["shared", "neighbour"])
def test_experts_start_warm_and_resume_on_a_gpu(gpu, tmp_path, start):
    plan = dataclasses.replace(PLAN, start=start)

    class Stopped(Exception):
        pass

    def stop(done, total):
        if done == total // 2:
            raise Stopped

    with gpu:
        whole = trained("grid-2d:n=200", plan)
        with pytest.raises(Stopped):
            trained("grid-2d:n=200", plan, resume_from=tmp_path / "state.safetensors", progress=stop)
        resumed = trained("grid-2d:n=200", plan, resume_from=tmp_path / "state.safetensors")
    np.testing.assert_array_equal(resumed.losses, whole.losses)


def test_samples_of_experts_are_judged_on_a_gpu(gpu, monkeypatch):
    plan = dataclasses.replace(PLAN, seeds=(0,))

    def judged():
        watch = SampleQuality(load_dataset("digits"), PROCESS, TASKS, plan)
        trained("digits", plan, watch=watch)
        return watch.table

    with gpu:
        there = judged()
    monkeypatch.undo()
    here = judged()
    np.testing.assert_allclose(there["value"], here["value"], rtol=1e-3)


def probed_in_both_places(gpu, model, folder):
    here = probe(model, "digits", out=folder / "here", tasks=2, draws=20)
    with gpu:
        there = probe(model, "digits", out=folder / "there", tasks=2, draws=20, device=DEVICE.type)
    np.testing.assert_allclose(there.table["heldout_loss"], here.table["heldout_loss"], rtol=1e-4)


def test_a_denoiser_is_probed_on_a_gpu(gpu, tmp_path):
    shape = load_dataset("digits").shape
    denoiser = Denoiser(build_network("unet:width=8", shape, 0), PROCESS, "v", 0.7)
    save_denoiser(denoiser, tmp_path / "denoiser.safetensors", "unet:width=8", shape)
    probed_in_both_places(gpu, tmp_path / "denoiser.safetensors", tmp_path)


def test_a_diffusers_folder_is_probed_on_a_gpu(gpu, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    network.save_pretrained(tmp_path)
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    # diffusers reads weights by way of the device whose name is borrowed.
    parts = {name: models.load_component(tmp_path, name) for name in ("config.json", "scheduler_config.json")}
    monkeypatch.setattr(models, "load_component", lambda folder, name: copy.deepcopy(parts[name]))
    probed_in_both_places(gpu, tmp_path, tmp_path)
