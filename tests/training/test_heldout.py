import numpy as np
import pytest
import torch

from difficulty.denoiser import Denoiser
from difficulty.networks import build_network
from difficulty.process import get_process
from difficulty.ranking import RankingTask
from difficulty.tasks import make_tasks
from training.curriculum import tasks_of
from training.curriculum_builders import make_curriculum
from training.heldout import HeldOut
from training.plan import TrainPlan
from training.trainer import Trainer


def test_standard_error_of_the_nats_is_their_deviation_over_fresh_draws(gaussian, process, monkeypatch):
    torch.set_num_threads(1)
    denoiser = Denoiser(build_network("mlp:width=8", gaussian.shape, 0), process, "eps", 0.5)
    tasks = [RankingTask.of(task, process) for task in make_tasks(process, 5)]
    nats, errors = [], []
    for seed in range(80):
        monkeypatch.setattr("training.heldout.HELDOUT_SEED", seed)
        heldout = HeldOut(gaussian, process, tasks, per_task=32)
        measured = heldout.evaluate(denoiser)
        nats.append(measured.nats)
        errors.append(heldout.nats_error(measured))
    # A deviation over 80 repetitions is known to 8 %.
    assert 0.75 < np.mean(errors) / np.std(nats, ddof=1) < 1.3


def test_of_many_draws_a_check_takes_an_even_part(gaussian, process):
    heldout = HeldOut(gaussian, process, tasks_of(None, process), per_task=8)
    inside = heldout.t.numpy() <= process.T // 2
    thinned = heldout.select(inside, 10)[2]
    assert len(thinned) == 10
    chosen = (2 * np.arange(10) + 1) * inside.sum() // 20
    assert torch.equal(thinned, heldout.t[torch.from_numpy(np.flatnonzero(inside)[chosen])])
    # One draw of each task is that of its middle, not of its clean end.
    one_each = heldout.select(np.ones(len(heldout.t), dtype=bool), len(heldout.tasks))[2]
    assert torch.equal(one_each, heldout.t.reshape(-1, 8)[:, 4])
    assert torch.equal(heldout.select(inside, 10**6)[2], heldout.t[torch.from_numpy(inside)])


@pytest.mark.parametrize(
    ("batch", "per_task", "first", "draws"),
    # A tenth of the steps between two checks, each of which is worth 1.5 forward passes of the batch.
    [
        (128, 50, 5, 96),
        (8, 50, 55, 66),  # five steps would pay for 6 draws
        (8, 10, 25, 30),  # there are but 30
    ],
)
def test_checks_take_their_share_of_the_computation_and_come_less_often_rather_than_blind(
    gaussian, process, ranking, batch, per_task, first, draws
):
    options = {"check_every": 5, "least": 5, "cost": 0.1, "cap": 1.0}
    staged = make_curriculum(ranking, k=3, pacing="held-out", pacing_options=options)
    plan = TrainPlan(steps=400, batch=batch, network="mlp:width=8")
    trainer = Trainer(gaussian, process, plan, staged)
    heldout = HeldOut(gaussian, process, staged.tasks, per_task=per_task)
    while trainer.sampler.pacing.before is None and trainer.done < first:
        trainer.step()
        trainer.report_heldout(heldout)
    assert (trainer.done, len(trainer.sampler.pacing.before)) == (first, draws)


@pytest.mark.parametrize("per_task", [8, 7])  # 24 draws, and 21, which two processes cannot share equally
def test_every_process_computes_its_part_of_a_check_and_is_told_the_whole(
    gaussian, process, ranking, per_task, monkeypatch
):
    torch.set_num_threads(1)
    staged = make_curriculum(ranking, k=3, pacing="held-out", pacing_options={"check_every": 5, "cost": 1.0})
    heldout = HeldOut(gaussian, process, staged.tasks, per_task=per_task)
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
    heldout = HeldOut(gaussian, process, tasks_of(None, process), per_task=8)
    assert np.isnan(heldout.evaluate(Denoiser(Broken(), process, "eps", 0.5)).nats)
    sound = heldout.evaluate(Denoiser(build_network("mlp:width=8", gaussian.shape, 0), process, "x0", 0.5))
    assert np.isfinite(sound.nats)  # where alpha is 0 eps cannot be read from x0, and nothing is lost by that
