import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from difficulty.datasets import load_dataset
from difficulty.errors import InputError
from difficulty.networks import build_network
from difficulty.process import PROCESSES, get_process
from difficulty.ranking import RankingTask
from difficulty.tasks import make_tasks
from training.curriculum import tasks_of
from training.curriculum_builders import make_curriculum
from training.heldout import HeldOut
from training.plan import LR_SCHEDULES, TrainPlan
from training.trainer import Diverged, Trainer

PLAN = TrainPlan(steps=40, batch=16, network="mlp:width=16,depth=2", warmup=5)


def _train(data, process, plan, curriculum=None, **options):
    torch.set_num_threads(1)
    trainer = Trainer(data, process, plan, curriculum, **options)
    losses = [float(trainer.step()) for _ in range(plan.steps)]
    return trainer, losses


def _finish(trainer, steps):
    for _ in range(steps):
        trainer.step()


def _weights(trainer):
    state = trainer.state_dict()
    return [*state["model"].values(), *state["ema"].values()]


@pytest.mark.parametrize("stratified", [False, True])
def test_one_cluster_of_all_tasks_trains_bit_identically_to_no_curriculum(gaussian, process, one_cluster, stratified):
    plan = TrainPlan(**(vars(PLAN) | {"stratified": stratified}))
    plain, plain_losses = _train(gaussian, process, plan)
    clustered, clustered_losses = _train(gaussian, process, plan, one_cluster)
    assert plain_losses == clustered_losses
    assert all(torch.equal(a, b) for a, b in zip(_weights(plain), _weights(clustered), strict=True))


def test_last_stage_of_a_curriculum_sees_the_batches_that_plain_training_sees(gaussian, process, curriculum):
    # The curriculum changes t in its stages and nothing else, so the draws agree from the last stage on.
    plain, staged = (Trainer(gaussian, process, PLAN, c) for c in (None, curriculum))
    for step in range(40):
        a, b = plain.sampler.sample(16, step=step)[0], staged.sampler.sample(16, step=step)[0]
        assert torch.equal(a, b) == (step >= 4)


def test_a_run_depends_on_its_seed_and_on_nothing_else(gaussian, process):
    first, losses = _train(gaussian, process, PLAN)
    torch.rand(7)
    np.random.rand(7)  # noqa: NPY002 - global state is what must not matter
    second, again = _train(gaussian, process, PLAN)
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(_weights(first), _weights(second), strict=True))
    assert losses != _train(gaussian, process, TrainPlan(**(vars(PLAN) | {"seed": 1})))[1]


@pytest.mark.parametrize("name", PROCESSES)
def test_heldout_nats_of_the_exact_denoiser_are_those_of_the_gaussian_formula(name):
    # An untrained network predicts 0, so the denoiser is its linear baseline: exact for an isotropic Gaussian.
    process, gaussian = get_process(name), load_dataset("gaussian:dim=4,var=0.25,n=100000")
    prediction = "velocity" if name == "flow-matching" else "v"
    trainer = Trainer(gaussian, process, TrainPlan(prediction=prediction, network="mlp:width=8"))
    heldout = HeldOut(gaussian, process, tasks_of(None, process), draws=20000)
    measured = heldout.evaluate(trainer.ema)
    # 1/2 int 4 snr/4 / (1 + snr/4) dlambda from the noisiest timestep to the first, four dimensions of variance 1/4.
    noisiest, first = np.log1p(0.25 * np.exp(process.log_snr([process.noisiest, 1])))
    assert measured.nats == pytest.approx(2 * (first - noisiest), abs=4 * heldout.nats_error(measured))
    assert heldout.nats_error(measured) < 0.01 * measured.nats


def test_training_closes_most_of_the_gap_to_the_exact_loss_for_every_prediction(process):
    data = load_dataset("gaussian:dim=2,n=20000")
    # Two coordinates of different scale: the isotropic baseline is wrong and what is left to learn is known.
    stretch = torch.tensor([1.0, 0.05])
    data = replace(data, train=data.train * stretch, heldout=data.heldout * stretch, law=None)
    tasks = [RankingTask.of(task, process) for task in make_tasks(process, 4)]
    heldout = HeldOut(data, process, tasks, draws=32000)
    snr = np.exp(process.log_snr(heldout.t.numpy()))
    exact = float(heldout.integral(sum(snr * v / (1 + snr * v) for v in (1.0, 0.0025))).sum())
    for prediction in ("eps", "x0", "v"):
        # Without the weight of eps, training on x0 would leave the low-noise tasks, which decide the nats, alone.
        plan = TrainPlan(
            steps=400, batch=128, network="mlp:width=64,depth=2", prediction=prediction, weight="eps", lr=3e-3
        )
        before = heldout.evaluate(Trainer(data, process, plan).ema).nats
        after = heldout.evaluate(_train(data, process, plan)[0].ema).nats
        assert -0.1 < after - exact < 0.2 * (before - exact)


def test_average_of_the_weights_is_the_recursion_with_warmed_up_decay(gaussian, process):
    trainer = Trainer(gaussian, process, PLAN)
    expected = None
    for n in range(20):
        trainer.step()
        current = trainer.denoiser.network.last.weight.detach().double().clone()
        # n updates were made before this one; torch copies the weights at the first
        decay = min(PLAN.ema_decay, (1 + n) / (10 + n))
        expected = current if expected is None else decay * expected + (1 - decay) * current
    assert torch.allclose(trainer.averaged.module.last.weight.double(), expected, atol=1e-6)


def test_learning_rate_warms_up_and_ends_at_zero_unless_constant():
    for name in LR_SCHEDULES:
        plan = TrainPlan(steps=1000, lr=2.0, lr_schedule=name, warmup=10)
        assert plan.lr_at(0) == pytest.approx(0.2)
        assert plan.lr_at(999) == pytest.approx(2.0 if name == "constant" else 0.0, abs=3e-3)


def test_nan_in_the_data_of_a_step_stops_before_the_weights_change(gaussian, process):
    trainer, _ = _train(gaussian, process, PLAN)
    before = [w.clone() for w in _weights(trainer)]
    trainer.source.samples = torch.full_like(trainer.source.samples, float("nan"))
    with pytest.raises(Diverged, match="the loss became nan at step 40"):
        trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(trainer), strict=True))
    assert trainer.done == 40


@pytest.mark.parametrize("change", [{}, {"clip": 0.0}, {"micro_batches": 2}, {"weight": "uncertainty"}])
def test_a_gradient_of_nan_under_a_finite_loss_stops_before_the_weights_change(gaussian, process, change):
    trainer, _ = _train(gaussian, process, replace(PLAN, **change))
    before = [w.clone() for w in _weights(trainer)]
    trainer.denoiser.network.first.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(Diverged, match="the norm of the gradient became nan at step 40"):
        trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(trainer), strict=True))
    assert trainer.done == 40


def test_state_restored_into_a_new_trainer_continues_bit_identically(gaussian, process, ranking):
    for pacing in ("fraction", "patience", "held-out"):
        options = {"patience": {"tau": 4}, "held-out": {"check_every": 5, "least": 5, "cost": 0.1}}.get(pacing, {})
        staged = make_curriculum(ranking, k=3, pacing=pacing, pacing_options=options)
        heldout = HeldOut(gaussian, process, staged.tasks, draws=24)

        def advance(trainer, end, heldout=heldout):
            while trainer.done < end:
                trainer.step()
                trainer.report_heldout(heldout)

        whole, first, second = (Trainer(gaussian, process, PLAN, staged) for _ in range(3))
        advance(whole, 40)
        advance(first, 13)
        second.load_state_dict(first.state_dict())
        advance(second, 40)
        assert all(torch.equal(a, b) for a, b in zip(_weights(whole), _weights(second), strict=True))
        assert whole.sampler.state_dict() == second.sampler.state_dict()


def test_micro_batches_have_the_gradient_of_the_whole_batch(gaussian, process, curriculum):
    whole, losses = _train(gaussian, process, PLAN, curriculum)
    cut, cut_losses = _train(gaussian, process, TrainPlan(**(vars(PLAN) | {"micro_batches": 4})), curriculum)
    assert np.allclose(losses, cut_losses, rtol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(_weights(whole), _weights(cut), strict=True))


def test_half_precision_follows_full_precision_and_keeps_its_weights_in_float32(gaussian, process):
    _, losses = _train(gaussian, process, PLAN)
    half, half_losses = _train(gaussian, process, TrainPlan(**(vars(PLAN) | {"precision": "bf16"})))
    assert losses != half_losses
    assert np.allclose(losses, half_losses, rtol=0.05)
    assert all(weight.dtype == torch.float32 for weight in _weights(half))


def test_batch_that_cannot_be_shared_is_refused(gaussian, process):
    with pytest.raises(InputError, match="multiple"):
        Trainer(gaussian, process, TrainPlan(batch=10, micro_batches=4))


@pytest.mark.parametrize(
    "bad", [{"precision": "fp8"}, {"steps": 0}, {"lr": -1.0}, {"lr_schedule": "step"}, {"ema_decay": 1.0}, {"clip": -1},
            {"lr": float("inf")}, {"weight_decay": float("nan")}, {"clip": float("inf")}]
)
def test_plans_that_cannot_train_are_refused(bad):
    with pytest.raises(InputError):
        TrainPlan(**bad)


DROPPING = """
import torch

class Dropping(torch.nn.Sequential):
    def __init__(self, shape):
        super().__init__(torch.nn.Linear(4, 32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 4))

    def forward(self, x, log_snr):
        return super().forward(x)
"""


def test_dropout_of_a_users_network_depends_on_seed_and_step_alone_and_is_off_in_the_average(
    gaussian, process, tmp_path
):
    (tmp_path / "own.py").write_text(DROPPING)
    plan = TrainPlan(**(vars(PLAN) | {"network": f"{tmp_path / 'own.py'}:Dropping"}))
    whole, losses = _train(gaussian, process, plan)
    torch.rand(7)
    first, second = (Trainer(gaussian, process, plan) for _ in range(2))
    for _ in range(13):
        first.step()
    second.load_state_dict(first.state_dict())
    assert losses[13:] == [float(second.step()) for _ in range(27)]
    assert all(torch.equal(a, b) for a, b in zip(_weights(whole), _weights(second), strict=True))
    x, t = torch.randn(3, 4), torch.tensor([5, 6, 7])
    assert torch.equal(whole.ema(x, t), whole.ema(x, t))
    assert not torch.equal(whole.denoiser(x, t), whole.denoiser(x, t))
    # One that comes with weights comes without its dropout, which a resumed run has, too.
    loaded = Trainer(gaussian, process, plan, network=build_network(plan.network, (4,), 0).eval())
    assert [float(loaded.step()) for _ in range(3)] == losses[:3]


def test_every_micro_batch_and_process_drops_other_units(gaussian, process, tmp_path):
    (tmp_path / "own.py").write_text(DROPPING)
    plan = TrainPlan(**(vars(PLAN) | {"network": f"{tmp_path / 'own.py'}:Dropping", "batch": 16}))
    drawn = set()
    for rank in (0, 1):
        trainer = Trainer(gaussian, process, plan, rank=rank, world=2)
        for step, micro_batch in ((0, 0), (0, 1), (1, 0)):
            with trainer._drawing(step, micro_batch):
                drawn.add(float(torch.rand(())))
    assert len(drawn) == 6


def test_learning_rate_may_keep_its_peak_until_the_last_stage_begins(gaussian, process, curriculum, one_cluster):
    plan = TrainPlan(**(vars(PLAN) | {"lr_start": "after-curriculum", "warmup": 0, "steps": 100}))
    staged, plain = (Trainer(gaussian, process, plan, c) for c in (curriculum, one_cluster))
    rates = []
    for step in range(100):
        staged.step()
        rates.append(staged.optimizer.param_groups[0]["lr"])
        plain.step()
        assert plain.optimizer.param_groups[0]["lr"] == TrainPlan(**(vars(plan) | {"lr_start": "begin"})).lr_at(step)
    start = staged.sampler.records[-1].start
    assert start == 10
    assert rates[:11] == [plan.lr] * 11
    expected = [plan.lr * 0.5 * (1 + np.cos(np.pi * (step - 10) / 90)) for step in range(10, 100)]
    assert np.allclose(rates[10:], expected)


def test_fp16_scales_the_loss_follows_full_precision_and_resumes_bit_identically(gaussian, process):
    plan = TrainPlan(**(vars(PLAN) | {"precision": "fp16"}))
    whole, losses = _train(gaussian, process, plan)
    assert np.allclose(losses, _train(gaussian, process, PLAN)[1], rtol=0.05)
    assert all(weight.dtype == torch.float32 for weight in _weights(whole))
    first, second = (Trainer(gaussian, process, plan) for _ in range(2))
    for _ in range(13):
        first.step()
    second.load_state_dict(first.state_dict())
    assert losses[13:] == [float(second.step()) for _ in range(27)]
    assert second.state_dict()["scaler"]["_growth_tracker"] == 40


def test_an_overflowing_gradient_in_fp16_leaves_the_step_out_and_lowers_the_scale(gaussian, process):
    trainer = Trainer(gaussian, process, TrainPlan(**(vars(PLAN) | {"precision": "fp16"})))
    trainer.step()
    before = [weight.clone() for weight in trainer.denoiser.network.parameters()]
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 1e30})
    trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.denoiser.network.parameters(), strict=True))
    assert trainer.scaler.get_scale() == pytest.approx(5e29)
    trainer.denoiser.network.last.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(Diverged, match="overflow fp16 at step"):
        _finish(trainer, 200)
    assert all(torch.isfinite(weight).all() for weight in trainer.denoiser.network.parameters())


def test_a_device_that_cannot_compute_in_half_precision_is_refused(gaussian, process):
    with pytest.raises(InputError, match="device 'meta' cannot compute in fp16"):
        Trainer(gaussian, process, TrainPlan(**(vars(PLAN) | {"precision": "fp16"})), device="meta")


def test_recomputed_blocks_train_alike_and_a_network_without_blocks_is_refused(process):
    data = load_dataset("digits")
    plan = TrainPlan(steps=3, batch=8, network="dit-tiny/4", gradient_checkpointing=True)
    _, losses = _train(data, process, plan)
    assert losses == _train(data, process, replace(plan, gradient_checkpointing=False))[1]
    with pytest.raises(InputError, match="network 'mlp' has no gradient checkpointing"):
        Trainer(data, process, replace(plan, network="mlp"))


def test_a_compiled_network_trains_alike_and_has_the_same_weights_by_name(
    gaussian, process, monkeypatch
):
    # The tracing is torch's own; generating code as well takes half a minute and a C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, losses = _train(gaussian, process, replace(PLAN, steps=5))
    compiled, compiled_losses = _train(gaussian, process, replace(PLAN, steps=5, compile=True))
    assert np.allclose(losses, compiled_losses, rtol=1e-4)
    assert plain.state_dict()["model"].keys() == compiled.state_dict()["model"].keys()


def test_compiling_without_a_compiler_costs_one_sentence(gaussian, process, monkeypatch):
    def broken(function):
        raise RuntimeError("no working C++ compiler\nin a long story")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(InputError, match=r"^torch.compile does not work here \(no working C\+\+ compiler\); train"):
        Trainer(gaussian, process, replace(PLAN, compile=True))
