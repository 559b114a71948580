import numpy as np
import torch

from difficulty.denoiser import Denoiser
from difficulty.networks import build_network
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
    assert torch.equal(thinned, heldout.t[torch.from_numpy(np.flatnonzero(inside)[np.arange(10) * inside.sum() // 10])])
    assert torch.equal(heldout.select(inside, 10**6)[2], heldout.t[torch.from_numpy(inside)])


def test_checks_of_the_trainer_stay_within_their_share_of_the_computation(gaussian, process, ranking):
    options = {"check_every": 5, "least": 5, "cost": 0.1}
    staged = make_curriculum(ranking, k=3, pacing="held-out", pacing_options=options)
    plan = TrainPlan(steps=40, batch=8, network="mlp:width=8")
    trainer = Trainer(gaussian, process, plan, staged)
    heldout = HeldOut(gaussian, process, staged.tasks, per_task=50)
    for _ in range(5):
        trainer.step()
        trainer.report_heldout(heldout)
    # A tenth of five steps, each of which is worth three forward passes of 8 samples.
    assert len(trainer.sampler.pacing.before) == 12
