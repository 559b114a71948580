import copy
import json

import pytest
import torch

from training.batched import OneByOne, RunDiverged, Stacked, can_be_stacked, train_together
from training.checkpoint import load_latest, save_checkpoint
from training.curriculum_builders import make_curriculum
from training.heldout import HeldOut
from training.plan import TrainPlan
from training.sampling import draw_samples
from training.trainer import Trainer

STEPS = 60
PLAN = {"steps": STEPS, "batch": 16, "network": "mlp:width=16,depth=2", "lr": 3e-3, "warmup": 5, "weight_decay": 0.01}


def make_runs(data, process, ranking):
    """Runs that differ in everything that may differ: seed, density, weight, order, pacing."""
    patience = make_curriculum(ranking, k=3, pacing="patience", pacing_options={"tau": 4})
    often = {"check_every": 5, "least": 5, "cost": 0.1}
    tested = make_curriculum(ranking, k=3, pacing="held-out", pacing_options=often)
    changes = [
        ({"seed": 0}, None),
        ({"seed": 1}, None),
        ({"seed": 0, "weight": "p2"}, None),
        ({"seed": 1, "density": "log-snr"}, None),
        ({"seed": 0}, patience),
        ({"seed": 2}, patience),
        ({"seed": 1}, tested),
    ]
    return [Trainer(data, process, TrainPlan(**PLAN, **own), order) for own, order in changes]


def train(together, heldout, steps=STEPS):
    for _ in range(steps):
        together.step()
        for trainer in together.trainers:
            trainer.report_heldout(heldout)


@pytest.fixture
def heldout(gaussian, process, ranking):
    return HeldOut(gaussian, process, ranking.tasks, draws=100)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_stacked_runs_are_those_trained_one_by_one(gaussian, process, ranking, heldout, prediction, monkeypatch):
    monkeypatch.setitem(PLAN, "prediction", prediction)
    together, alone = Stacked(make_runs(gaussian, process, ranking)), OneByOne(make_runs(gaussian, process, ranking))
    start = copy.deepcopy(alone.trainers[0].denoiser.network.state_dict())
    for runs in (together, alone):
        train(runs, heldout)
    for one, other in zip(together.trainers, alone.trainers, strict=True):
        assert one.sampler.log() == other.sampler.log()
        assert one.done == other.done == STEPS
        for network in ("denoiser", "ema"):
            for a, b in zip(getattr(one, network).parameters(), getattr(other, network).parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)
        assert heldout.evaluate(one.ema).nats == pytest.approx(heldout.evaluate(other.ema).nats, rel=1e-4)
        drawn = [draw_samples(trainer.ema, 8, gaussian.shape, seed=3, steps=5) for trainer in (one, other)]
        torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-4)
    # it trained, and the stages that a loss decides were not all one length
    moved = together.trainers[0].denoiser.network.state_dict()
    assert not torch.allclose(moved["hidden.0.weight"], start["hidden.0.weight"], atol=1e-3)
    assert len({tuple(r.start for r in trainer.sampler.log()) for trainer in together.trainers[4:]}) == 3


def test_a_large_gradient_of_one_run_does_not_touch_its_neighbours(gaussian, process):
    def runs(weight):
        return [Trainer(gaussian, process, TrainPlan(**PLAN, weight=w, seed=0)) for w in ("constant", weight)]

    calm, loud = Stacked(runs("constant")), Stacked(runs("x0"))
    for _ in range(5):
        calm.step()
        loud.step()
    for a, b in zip(calm.trainers[0].ema.parameters(), loud.trainers[0].ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_stacked_runs_continue_from_a_checkpoint_as_if_never_stopped(gaussian, process, ranking, heldout, tmp_path):
    whole = Stacked(make_runs(gaussian, process, ranking))
    train(whole, heldout)
    first = Stacked(make_runs(gaussian, process, ranking))
    train(first, heldout, 23)
    save_checkpoint(tmp_path, first.state_dict(), keep=1)
    second = Stacked(make_runs(gaussian, process, ranking))
    second.load_state_dict(load_latest(tmp_path)[0])
    train(second, heldout, STEPS - 23)
    for a, b in zip(whole.trainers, second.trainers, strict=True):
        assert a.sampler.log() == b.sampler.log()
        for x, y in zip(a.ema.parameters(), b.ema.parameters(), strict=True):
            assert torch.equal(x, y)


def test_run_whose_loss_is_not_finite_is_named_and_nothing_has_moved(gaussian, process):
    together = Stacked([Trainer(gaussian, process, TrainPlan(**PLAN, seed=seed)) for seed in range(3)])
    together.step()
    before = json.dumps([p.tolist() for p in together.trainers[2].denoiser.parameters()])
    together.loss_weight[1] = float("inf")
    with pytest.raises(RunDiverged, match="at step 1") as caught:
        together.step()
    assert caught.value.index == 1
    assert json.dumps([p.tolist() for p in together.trainers[2].denoiser.parameters()]) == before


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_run_whose_gradient_is_not_finite_is_named_and_nothing_has_moved(gaussian, process, clip):
    together = Stacked([Trainer(gaussian, process, TrainPlan(**PLAN, clip=clip, seed=seed)) for seed in range(3)])
    together.step()
    before = json.dumps([p.tolist() for p in together.trainers[1].denoiser.parameters()])
    of_one = torch.tensor([1.0, float("nan"), 1.0])
    together.current[0].register_hook(lambda gradient: gradient * of_one.reshape(-1, *[1] * (gradient.ndim - 1)))
    with pytest.raises(RunDiverged, match="the norm of the gradient became nan at step 1") as caught:
        together.step()
    assert caught.value.index == 1
    assert json.dumps([p.tolist() for p in together.trainers[1].denoiser.parameters()]) == before


def test_runs_of_unlike_plans_are_not_stacked(gaussian, process):
    trainers = [Trainer(gaussian, process, TrainPlan(**PLAN | {"lr": lr})) for lr in (1e-3, 1e-2)]
    with pytest.raises(ValueError, match="seed, density and weight only"):
        Stacked(trainers)
    assert can_be_stacked(TrainPlan(**PLAN))
    assert not can_be_stacked(TrainPlan(micro_batches=2))
    assert not can_be_stacked(TrainPlan(network="unet"))
    assert not can_be_stacked(TrainPlan(weight="p2+uncertainty"))
    assert isinstance(train_together(trainers[:1]), OneByOne)
