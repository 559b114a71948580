"""The learned log-variance against the closed form of its optimum, and as a part of training."""

import numpy as np
import pytest
import torch

from difficulty.errors import InputError
from difficulty.process import get_process
from training.checkpoint import load_latest, save_checkpoint
from training.trainer import Trainer, TrainPlan
from training.uncertainty import LogVariance, split_weight
from training.weights import loss_weights

PLAN = TrainPlan(steps=40, batch=16, network="mlp:width=16,depth=2", warmup=5, weight="min-snr+uncertainty", lr=1e-2)


def test_before_anything_is_learned_the_objective_is_the_weighted_loss():
    losses, log_snr = torch.rand(5), torch.tensor([float("inf"), 12.0, 0.0, -3.0, float("-inf")])
    assert torch.equal(LogVariance().objective(losses, log_snr), losses)


def test_at_the_minimum_exp_u_is_the_expected_loss_and_the_objective_its_mean_log_plus_one():
    # Loss of eps for isotropic data of variance v: v SNR / (1 + v SNR), from 4e-5 to 1; draws scatter around it.
    log_snr = torch.linspace(-10, 9, 400, dtype=torch.float64)
    expected = 0.25 * log_snr.exp() / (1 + 0.25 * log_snr.exp())
    scatter = 1 + 0.9 * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    model = LogVariance().double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def objective():
        return torch.stack([model.objective(expected * factor, log_snr).mean() for factor in scatter]).mean()

    def closure():
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)
    assert torch.allclose(model(log_snr).exp(), expected, rtol=0.03)
    assert float(objective().detach()) == pytest.approx(float(expected.log().mean()) + 1, abs=1e-3)


def test_the_networks_gradient_is_that_of_the_weight_divided_by_exp_u(gaussian, process):
    plain, learned = (Trainer(gaussian, process, TrainPlan(**(vars(PLAN) | {"weight": w, "clip": 0})))
                      for w in ("min-snr", "min-snr+uncertainty"))  # fmt: skip
    with torch.no_grad():
        learned.uncertainty.linear.bias.fill_(-1.5)
        learned.uncertainty.linear.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
        u = learned.uncertainty(learned.denoiser.log_snr)
    plain.loss_weight = plain.loss_weight * torch.exp(-u)
    before = float(learned.step())
    plain.step()
    for a, b in zip(plain.denoiser.network.parameters(), learned.denoiser.network.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7)
    # What is reported is the weighted loss, which compares with that of other runs.
    assert before == float(Trainer(gaussian, process, TrainPlan(**(vars(PLAN) | {"weight": "min-snr"}))).step())


def test_training_learns_the_loss_of_every_noise_level(gaussian):
    # An isotropic Gaussian is denoised exactly from the start, so that its loss is known and does not change.
    process = get_process("vp-linear")
    plan = TrainPlan(steps=600, batch=256, network="mlp:width=8,depth=2", weight="uncertainty", lr=1e-2, warmup=0)
    trainer = Trainer(gaussian, process, plan)
    for _ in range(plan.steps):
        trainer.step()
    t = torch.arange(100, 901, 100)  # at t = 1000 the network's own noise is as large as the loss
    snr = np.exp(process.log_snr(t.numpy()))
    exact = 0.25 * snr / (1 + 0.25 * snr)
    learned = trainer.uncertainty(trainer.denoiser.log_snr[t]).exp().detach().numpy()
    assert np.allclose(np.log(learned), np.log(exact), atol=0.25)


def test_a_resumed_run_continues_bit_identically(gaussian, process, curriculum, tmp_path):
    whole, first, second = (Trainer(gaussian, process, PLAN, curriculum) for _ in range(3))
    losses = [float(whole.step()) for _ in range(40)]
    for _ in range(13):
        first.step()
    save_checkpoint(tmp_path, first.state_dict(), keep=1)
    second.load_state_dict(load_latest(tmp_path)[0])
    assert losses[13:] == [float(second.step()) for _ in range(27)]
    for a, b in zip(whole.trained, second.trained, strict=True):
        assert torch.equal(a, b)
    assert len(whole.trained) == len(list(whole.denoiser.network.parameters())) + 2
    assert (whole.uncertainty.linear.bias != 0).all()


def test_a_weight_is_split_from_its_learned_factor():
    assert split_weight("uncertainty") == ("constant", True)
    assert split_weight("min-snr:gamma=3+uncertainty") == ("min-snr:gamma=3", True)
    assert split_weight("p2") == ("p2", False)
    with pytest.raises(InputError, match="unknown loss weight"):
        loss_weights(split_weight("best+uncertainty")[0], get_process("vp-linear"), "eps")
