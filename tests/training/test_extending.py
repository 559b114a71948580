"""Every block of docs/extending.md is run, and what it adds is used by name."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from difficulty import kl
from difficulty.datasets import DATASETS, load_dataset
from difficulty.networks import build_network
from difficulty.process import PROCESSES, get_process
from difficulty.relative_entropy.estimators import ESTIMATORS
from training.features import FEATURES
from training.metrics import DISTANCES, METRICS, SampleJudge
from training.sampling import draw_samples
from training.trainer import Trainer, TrainPlan

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
BLOCKS = {
    part.partition("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.S)
    for part in re.split(r"^## ", PAGE, flags=re.M)[1:]
}
TINY = TrainPlan(steps=10, batch=8, network="mlp:width=8,depth=2", prediction="v")


@pytest.fixture(autouse=True)
def registries():
    """The dictionaries as they were, after every test."""
    kept = [(known, dict(known)) for known in (PROCESSES, DATASETS, ESTIMATORS, FEATURES, DISTANCES, METRICS)]
    yield
    for known, content in kept:
        known.clear()
        known.update(content)


def run(heading):
    names: dict = {}
    exec(BLOCKS[heading][0], names)
    return names


def process(tmp_path):
    run("A process")
    made = get_process("sigmoid:T=200")
    assert made.T == 200
    assert np.allclose(made.alpha**2 + made.sigma**2, 1)
    assert (np.diff(made.log_snr(np.arange(1, 201))) < 0).all()
    trainer = Trainer(load_dataset("gaussian:dim=2,n=100"), made, TINY)
    trainer.step()
    assert draw_samples(trainer.ema, 4, (2,), seed=0, steps=5).shape == (4, 2)


def data_set(tmp_path):
    run("A data set")
    made = load_dataset("moons:n=200")
    assert made.shape == (2,)
    assert set(made.labels.tolist()) == {0, 1}


def network(tmp_path):
    (tmp_path / "mynet.py").write_text(BLOCKS["A network"][0])
    made = build_network(f"{tmp_path / 'mynet.py'}:make", (1, 8, 8), 0)
    assert (made(torch.randn(3, 1, 8, 8), torch.tensor([0.0, -np.inf, np.inf])) == 0).all()


def estimator(tmp_path):
    run("An estimator of the relative entropy")
    pairs = [2, 50, 500]
    found = kl("gaussian:dim=4,var=0.25,n=4000", "vp-linear", estimator="isotropic", pairs=pairs)
    exact = kl("gaussian:dim=4,var=0.25,n=4000", "vp-linear", estimator="exact", pairs=pairs)
    assert found["valid"].all()
    assert np.allclose(found["kl"], exact["kl"], rtol=0.1)
    assert ((found["ci_low"] <= found["kl"]) & (found["kl"] <= found["ci_high"])).all()
    refused = kl("ring-16d:n=1000", "vp-linear", estimator="isotropic", pairs=pairs)
    assert not refused["valid"].any()
    assert (refused["reason"] == "the variance differs between directions").all()


def arm(tmp_path):
    effects = run("An arm of a comparison")["effects"]
    assert set(effects["arm"]) == {"low-noise"}
    assert (tmp_path / "compared" / "effects.csv").exists()


def metric(tmp_path):
    run("A metric of samples")
    images = load_dataset("digits").train
    found = SampleJudge(images[:300], ("shift-spectrum",)).evaluate(images[300:600])["shift-spectrum"]
    noise = SampleJudge(images[:300], ("shift-spectrum",)).evaluate(torch.randn(300, 1, 8, 8))["shift-spectrum"]
    assert found.ci_high < noise.ci_low


SECTIONS = {
    "A process": process,
    "A data set": data_set,
    "A network": network,
    "An estimator of the relative entropy": estimator,
    "An arm of a comparison": arm,
    "A metric of samples": metric,
}


@pytest.mark.parametrize("heading", SECTIONS)
def test_block_runs_and_what_it_adds_is_used_by_name(heading, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    SECTIONS[heading](tmp_path)


def test_every_section_of_the_page_is_tested():
    assert set(SECTIONS) == set(BLOCKS)
    assert all(len(blocks) == 1 for blocks in BLOCKS.values())
