from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from difficulty.datasets import load_dataset
from difficulty.denoiser import Denoiser
from difficulty.networks import build_network
from difficulty.process import PROCESSES, get_process
from difficulty.ranking import RankingTask
from difficulty.tasks import make_tasks
from training.curriculum import tasks_of
from training.curriculum_builders import make_curriculum
from training.heldout import HeldOut
from training.plan import TrainPlan
from training.trainer import Trainer


@pytest.mark.parametrize("name", PROCESSES)
def test_one_denoiser_has_the_same_nats_whatever_the_tasks_are(name, gaussian):
    process = get_process(name)
    denoiser = Denoiser(build_network("mlp:width=8", gaussian.shape, 0), process, "v", 0.5)
    noisiest, first = process.log_snr([process.noisiest, 1])
    exact = np.log1p(np.exp(first)) - np.log1p(np.exp(noisiest))  # of the density 1 / (1 + e^-lambda)
    found = []
    for k in (1, 3, 4, 7, 25):
        tasks = [RankingTask.of(task, process) for task in make_tasks(process, k)]
        heldout = HeldOut(gaussian, process, tasks)
        logistic = heldout.integral(2 / (1 + np.exp(-process.log_snr(heldout.t.numpy()))))
        assert logistic.shape == (k,)
        assert logistic.sum() == pytest.approx(exact, rel=1e-3)
        measured = heldout.evaluate(denoiser)
        found.append((measured.nats, heldout.nats_error(measured), measured.loss))
    assert np.allclose(found, found[0], rtol=1e-12)


def test_losses_per_task_are_means_over_timesteps_and_over_log_snr(gaussian):
    process = get_process("flow-matching:T=40")
    tasks = [SimpleNamespace(t_first=a, t_last=b) for a, b in ((1, 25), (26, 39), (40, 40))]
    heldout = HeldOut(gaussian, process, tasks, draws=500)
    measured = heldout.evaluate(Denoiser(build_network("mlp:width=8", gaussian.shape, 0), process, "velocity", 0.5))
    log_snr = process.log_snr(np.arange(1, 40))
    edges = np.concatenate([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])
    widths = np.array([edges[0] - edges[25], edges[25] - edges[39]])
    assert (measured.nats_per_task[:2] * widths).sum() == pytest.approx(measured.nats)
    assert measured.nats_per_task[2] == 0.0  # pure noise alone
    assert (measured.loss_per_task * [25, 14, 1]).sum() / 40 == pytest.approx(measured.loss)


def test_one_timestep_with_signal_counts_as_a_unit_of_log_snr(gaussian):
    process = get_process("flow-matching:T=2")
    heldout = HeldOut(gaussian, process, [SimpleNamespace(t_first=1, t_last=2)])
    measured = heldout.evaluate(Denoiser(build_network("mlp:width=8", gaussian.shape, 0), process, "velocity", 0.5))
    assert measured.nats == pytest.approx(measured.nats_per_task[0])
    assert measured.nats > 0


def test_standard_error_of_the_nats_is_their_deviation_over_fresh_draws(gaussian, process, monkeypatch):
    torch.set_num_threads(1)
    denoiser = Denoiser(build_network("mlp:width=8", gaussian.shape, 0), process, "eps", 0.5)
    tasks = [RankingTask.of(task, process) for task in make_tasks(process, 5)]
    nats, errors = [], []
    for seed in range(80):
        monkeypatch.setattr("training.heldout.HELDOUT_SEED", seed)
        heldout = HeldOut(gaussian, process, tasks, draws=100)
        measured = heldout.evaluate(denoiser)
        nats.append(measured.nats)
        errors.append(heldout.nats_error(measured))
    # A deviation over 80 repetitions is known to 8 %.
    assert 0.75 < np.mean(errors) / np.std(nats, ddof=1) < 1.3


@pytest.mark.parametrize(("process", "dim"), [("vp-linear", 64), ("ve:T=10", 256)])
def test_standard_error_is_that_at_fixed_timesteps(process, dim, monkeypatch):
    # The errors of 64 dimensions differ far more between low and high noise than between draws.
    process, data = get_process(process), load_dataset(f"gaussian:dim={dim},var=0.25,n=1000")
    denoiser = Denoiser(build_network("mlp:width=8", data.shape, 0), process, "v", 0.5)
    nats, errors = [], []
    for seed in range(50):
        monkeypatch.setattr("training.heldout.HELDOUT_SEED", seed)
        heldout = HeldOut(data, process, tasks_of(None, process), draws=1536)
        measured = heldout.evaluate(denoiser)
        nats.append(measured.nats)
        errors.append(heldout.nats_error(measured))
    # A deviation over 50 repetitions is known to 10 %.
    assert 0.75 < np.mean(errors) / np.std(nats, ddof=1) < 1.35


def test_standard_error_allows_for_held_out_samples_that_serve_many_draws(gaussian, process, monkeypatch):
    denoiser = Denoiser(build_network("mlp:width=8", gaussian.shape, 0), process, "v", 0.5)
    nats, errors = [], []
    for seed in range(200):
        monkeypatch.setattr("training.heldout.HELDOUT_SEED", seed)
        rng = np.random.default_rng(seed)
        few = rng.standard_normal((5, 4)) * rng.choice([0.1, 2.0], (5, 1))
        data = replace(gaussian, heldout=torch.from_numpy(few).float())
        heldout = HeldOut(data, process, tasks_of(None, process), draws=400)
        measured = heldout.evaluate(denoiser)
        nats.append(measured.nats)
        errors.append(heldout.nats_error(measured))
    assert 0.75 < np.sqrt(np.mean(np.square(errors))) / np.std(nats, ddof=1) < 1.3
    alone = HeldOut(replace(gaussian, heldout=gaussian.heldout[:1]), process, tasks_of(None, process), draws=400)
    assert np.isnan(alone.nats_error(alone.evaluate(denoiser)))


def test_pure_noise_has_its_share_of_the_draws(gaussian):
    process = get_process("flow-matching:T=10")
    assert (HeldOut(gaussian, process, tasks_of(None, process), draws=1500).t == 10).sum() == 150


def test_of_many_draws_a_check_takes_an_even_part(gaussian, process):
    heldout = HeldOut(gaussian, process, tasks_of(None, process), draws=100)
    inside = heldout.t.numpy() <= process.T // 2
    thinned = heldout.select(inside, 10)[2]
    assert len(thinned) == 10
    chosen = (2 * np.arange(10) + 1) * inside.sum() // 20
    assert torch.equal(thinned, heldout.t[torch.from_numpy(np.flatnonzero(inside)[chosen])])
    # One draw is that of the middle, not of the clean end.
    assert heldout.select(np.ones(len(heldout.t), dtype=bool), 1)[2] == heldout.t[len(heldout.t) // 2]
    assert torch.equal(heldout.select(inside, 10**6)[2], heldout.t[torch.from_numpy(inside)])


@pytest.mark.parametrize(
    ("batch", "held", "first", "draws"),
    # A tenth of the steps between two checks, each of which is worth 1.5 forward passes of the batch.
    [
        (128, 800, 5, 96),
        (8, 800, 55, 66),  # five steps would pay for 6 draws
        (8, 0, 25, 30),  # there are but 30
    ],
)
def test_checks_take_their_share_of_the_computation_and_come_less_often_rather_than_blind(
    gaussian, process, ranking, batch, held, first, draws
):
    options = {"check_every": 5, "least": 5, "cost": 0.1, "cap": 1.0}
    staged = make_curriculum(ranking, k=3, pacing="held-out", pacing_options=options)
    plan = TrainPlan(steps=400, batch=batch, network="mlp:width=8")
    trainer = Trainer(gaussian, process, plan, staged)
    heldout = HeldOut(gaussian, process, staged.tasks, draws=held)
    while trainer.sampler.pacing.before is None and trainer.done < first:
        trainer.step()
        trainer.report_heldout(heldout)
    assert (trainer.done, len(trainer.sampler.pacing.before)) == (first, draws)


@pytest.mark.parametrize("draws", [0, 4])  # 30 of the stage, and 31, which two processes cannot share equally
def test_every_process_computes_its_part_of_a_check_and_is_told_the_whole(
    gaussian, process, ranking, draws, monkeypatch
):
    torch.set_num_threads(1)
    staged = make_curriculum(ranking, k=3, pacing="held-out", pacing_options={"check_every": 5, "cost": 1.0})
    heldout = HeldOut(gaussian, process, staged.tasks, draws=draws)
    plan = TrainPlan(steps=100, batch=8, network="mlp:width=8")

    def check(rank, world, gather):
        trainer = Trainer(gaussian, process, plan, staged, rank=rank, world=world)
        monkeypatch.setattr(trainer.parallel, "gather", gather)
        trainer.done = 5
        trainer.report_heldout(heldout)
        return trainer.sampler.pacing.before

    alone = check(0, 1, lambda part: part)
    parts = []
    for rank in (0, 1):
        check(rank, 2, lambda part: parts.append(part) or torch.cat([part, part]))
    assert [len(part) for part in parts] == [(len(alone) + 1) // 2] * 2
    assert check(0, 2, lambda part: torch.cat(parts)) == pytest.approx(alone, rel=1e-5)


class Broken(torch.nn.Module):
    def forward(self, x, log_snr):
        return torch.where(torch.arange(len(x))[:, None] % 4 == 0, torch.nan, x)


@pytest.mark.parametrize("process", ["vp-linear:T=50", "flow-matching:T=50"])
def test_a_network_that_returns_nan_has_no_nats(gaussian, process):
    process = get_process(process)
    heldout = HeldOut(gaussian, process, tasks_of(None, process), draws=100)
    assert np.isnan(heldout.evaluate(Denoiser(Broken(), process, "eps", 0.5)).nats)
    sound = heldout.evaluate(Denoiser(build_network("mlp:width=8", gaussian.shape, 0), process, "x0", 0.5))
    assert np.isfinite(sound.nats)  # where alpha is 0 eps cannot be read from x0, and nothing is lost by that
