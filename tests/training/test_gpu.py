"""On a GPU, pretended where there is none, runs do what they do on the CPU."""

import json
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from pretended_gpu import DEVICE, pretended_gpu

from difficulty.datasets import load_dataset
from training import jobs
from training.batched import Stacked
from training.checkpoint import load_latest, save_checkpoint
from training.compare import compare
from training.curriculum_builders import make_curriculum
from training.heldout import HeldOut
from training.plan import TrainPlan
from training.sampling import draw_samples
from training.trainer import Trainer

# Said of torch's device without data, whose name is borrowed.
pytestmark = pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
DIGITS = load_dataset("digits")


@pytest.fixture
def places(monkeypatch):
    """The CPU, and a pretended GPU: contexts to work in, with their devices."""
    return [(nullcontext(), "cpu"), (pretended_gpu(monkeypatch), DEVICE.type)]


def close(here, there):
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"network": "mlp:width=16", "weight": "min-snr:gamma=5", "clip": 0.01},
        {"network": "unet:width=8", "micro_batches": 2, "stratified": True},
        {"network": "dit:width=16,depth=2", "weight": "uncertainty", "condition": "class", "condition_dropout": 0.5},
    ],
)
def test_a_run_takes_the_same_steps_and_gives_the_same_samples(places, tmp_path, process, ranking, options):
    plan = TrainPlan(steps=4, batch=8, **options)
    wanted = {"condition": torch.tensor([3, 7, 7]), "guidance": 2.0} if "condition" in options else {}
    found = []
    for context, device in places:
        with context:
            trainer = Trainer(DIGITS, process, plan, make_curriculum(ranking, k=3), device=device)
            losses = [float(trainer.step()) for _ in range(2)]
            save_checkpoint(tmp_path / device, trainer.state_dict(), keep=1)
            again = Trainer(DIGITS, process, plan, make_curriculum(ranking, k=3), device=device)
            again.load_state_dict(load_latest(tmp_path / device)[0])
            losses += [float(again.step()) for _ in range(2)]
            held = HeldOut(DIGITS, process, ranking.tasks, draws=50, conditioning=again.conditioning)
            samples = draw_samples(again.ema, 3, DIGITS.shape, seed=0, steps=3, device=device, **wanted)
            found.append((losses, held.evaluate(again.ema).per_draw, samples.numpy()))
    for here, there in zip(*found, strict=True):
        close(here, there)


def test_stacked_runs_take_the_same_steps(places, process):
    found = []
    for context, device in places:
        with context:
            plans = [TrainPlan(steps=4, batch=8, network="mlp:width=16", seed=seed, clip=0.01) for seed in (0, 1)]
            runs = Stacked([Trainer(DIGITS, process, plan, device=device) for plan in plans])
            for _ in range(3):
                runs.step()
            found.append([value.detach().cpu().numpy() for value in runs.averaged])
    for here, there in zip(*found, strict=True):
        close(here, there)


@pytest.mark.parametrize("network", ["mlp:width=8", "unet:width=8"])
def test_a_comparison_finds_the_same_and_may_go_on_elsewhere(places, tmp_path, process, ranking, network, monkeypatch):
    monkeypatch.setattr(jobs, "EVALUATIONS", 2)
    arms = ["vanilla", "curriculum", "static", "vanilla+uncertainty"]
    given = {"steps": 4, "batch": 8, "network": network, "samples": 64, "metrics": ["sw-pixels"], "ranking": ranking}
    found = []
    for context, device in places:
        with context:
            compare(DIGITS, process, arms, seeds=[0, 1], out=tmp_path / device, device=device, **given)
        found.append(pd.read_csv(tmp_path / device / "comparison.csv"))
        assert json.loads((tmp_path / device / "run.json").read_text())["config"]["device"] == device
    assert found[0].drop(columns="value").equals(found[1].drop(columns="value"))
    np.testing.assert_allclose(found[1]["value"], found[0]["value"], rtol=1e-3)
    compare(DIGITS, process, arms, seeds=[0, 1], out=tmp_path / DEVICE.type, **given)
