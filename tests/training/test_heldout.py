import numpy as np
import torch

from difficulty.denoiser import Denoiser
from difficulty.networks import build_network
from difficulty.ranking import RankingTask
from difficulty.tasks import make_tasks
from training.heldout import HeldOut


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
