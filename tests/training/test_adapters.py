"""Adapters against the real hosts where they are installed, else against the call that the host makes.

diffusers and accelerate: real, if installed. flow_matching, torchcfm and Lightning: real, if installed, and their call
in any case. guided-diffusion, k-diffusion, SiT and lucidrains' packages need torchvision or are not on a package index:
their calls only, written down here.
"""

import json
import pickle

import numpy as np
import pytest
import torch

from difficulty.errors import InputError
from difficulty.process import get_process
from training.adapters import Draws, EDMLoss, lightning_callback, matches_ddpm, matches_flow, schedule_sampler
from training.curriculum_builders import interval_curriculum
from training.timesteps import TimestepSampler

T = 1000


def _draws(process_name="vp-linear", pacing="fraction", options=None, budget=100, **place):
    process = get_process(process_name)
    curriculum = interval_curriculum(process, k=4, pacing=pacing, pacing_options=options)
    return Draws(TimestepSampler(process, curriculum, budget=budget, seed=0), process, **place)


def _reference(process_name="vp-linear", n=64, step=0):
    """What every axis must agree with: t of the first draw."""
    draws = _draws(process_name)
    return draws.sampler.sample(n, step=step)[0]


def test_every_axis_names_the_same_timesteps():
    t = _reference()
    assert torch.equal(_draws().indices(64), t - 1)
    assert torch.allclose(_draws().times(64), t / T)
    assert torch.allclose(_draws().data_times(64), 1 - t / T)
    s = get_process("vp-linear").sigma[t] / get_process("vp-linear").alpha[t]
    assert np.allclose(_draws().sigmas([64]), s, rtol=1e-6)


def test_first_stage_is_noise_on_every_axis_and_not_data():
    # The confusion that reversed published curricula: easy means much noise.
    assert _draws().indices(500).min() > 500
    assert _draws().times(500).min() > 0.5
    assert _draws().data_times(500).max() < 0.5
    assert _draws().sigmas([500]).min() > 1
    assert _draws("flow-matching").scheduler_u(500).max() < 0.5


def test_times_of_a_host_with_its_own_schedule_have_our_log_snr():
    # lucidrains' continuous-time diffusion: -log(expm1(1e-4 + 10 t^2))
    def host(time):
        return -torch.log(torch.expm1(1e-4 + 10 * time**2))

    t = _reference()
    ours = get_process("vp-linear").log_snr(t.numpy())
    times = _draws().times(64, log_snr=host)
    reached = np.maximum(ours, float(host(torch.ones(()))))  # the host ends a little before us
    assert np.allclose(host(times.double()), reached, atol=1e-3)


def test_two_ranks_draw_the_two_halves_of_one_batch():
    whole = _draws().indices(32)
    halves = [_draws(rank=rank, world=2).indices(16) for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole)


def test_micro_steps_are_counted_and_resumed():
    whole = _draws(pacing="patience", options={"tau": 3})
    expected = []
    for step in range(40):
        expected.append(whole.indices(4))
        whole.update(torch.tensor(float(step % 7)))
    first = _draws(pacing="patience", options={"tau": 3})
    for step in range(17):
        first.indices(4)
        first.update(torch.tensor(float(step % 7)))
    second = _draws(pacing="patience", options={"tau": 3})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(17, 40):
        assert torch.equal(second.indices(4), expected[step])
        second.update(torch.tensor(float(step % 7)))


class _HostSampler:
    """The part of guided-diffusion's LossAwareSampler that its training loop relies on."""

    def update_with_local_losses(self, local_ts, local_losses):
        self.update_with_all_losses(local_ts.tolist(), local_losses.tolist())


def test_guided_diffusion_loop_draws_from_its_own_kind_of_sampler_and_reports_losses():
    draws = _draws(pacing="patience", options={"tau": 2})
    sampler = schedule_sampler(draws, _HostSampler)
    for _ in range(20):
        t, weights = sampler.sample(8, "cpu")
        assert isinstance(sampler, _HostSampler)  # else their loop reports no loss
        assert t.dtype == torch.int64
        assert t.min() >= 0
        assert t.max() < T
        assert weights.shape == (8,)
        sampler.update_with_local_losses(t, torch.ones(8))
    assert draws.sampler.stage == 3  # constant loss: a stage every three iterations
    assert sampler.weights().shape == (T,)
    assert sampler.weights().sum() == pytest.approx(1)


def test_k_diffusion_call_gives_sigmas_of_the_shape_and_type_asked_for():
    sample_density = _draws("edm").sigmas
    sigma = sample_density([16], device="cpu")
    assert sigma.shape == (16,)
    assert sigma.dtype == torch.float32
    assert sample_density([4, 3], device="cpu", dtype=torch.float64).dtype == torch.float64
    with pytest.raises(InputError, match="infinite"):
        _draws("flow-matching").sigmas([4000])


def test_a_curriculum_that_is_a_mapping_is_checked_like_a_file():
    content = interval_curriculum(get_process("edm"), k=4).model_dump()
    assert EDMLoss(content, 100).draws is not None
    with pytest.raises(InputError, match="the mapping given states no format"):
        EDMLoss({}, 100)
    with pytest.raises(InputError, match="the mapping given is not a valid curriculum: clusters"):
        EDMLoss(content | {"clusters": 3}, 100)


def _edm_loss(tmp_path, pacing="fraction", options=None, **arguments):
    curriculum = interval_curriculum(get_process("edm"), k=4, pacing=pacing, pacing_options=options)
    curriculum.save(tmp_path / "c.json")
    return EDMLoss(tmp_path / "c.json", 100, **arguments)


def test_edm_loss_of_the_best_linear_denoiser_is_one_at_every_sigma(tmp_path):
    # With data N(0, sd^2), D(x) = sd^2/(sigma^2 + sd^2) x has squared error sigma^2 sd^2/(sigma^2 + sd^2) = 1/lambda.
    loss_fn, seen = _edm_loss(tmp_path, start=99), []

    def net(x, sigma, labels, augment_labels):
        assert sigma.shape == (len(x), 1, 1, 1)
        assert labels is None
        assert augment_labels is None
        seen.append(sigma)
        return 0.25 / (sigma**2 + 0.25) * x

    torch.manual_seed(0)
    loss = loss_fn(net=net, images=0.5 * torch.randn(400, 3, 16, 16), labels=None, augment_pipe=None)
    assert loss.shape == (400, 3, 16, 16)
    per_image = loss.mean((1, 2, 3))
    for part in seen[0].flatten().argsort().chunk(4):  # from the cleanest quarter to the noisiest
        assert float(per_image[part].mean()) == pytest.approx(1, abs=0.02)


def test_edm_loss_draws_sigma_from_the_curriculum_and_survives_a_pickle(tmp_path):
    seen = []

    def net(x, sigma, labels, augment_labels):
        seen.append(sigma.flatten())
        return x

    def augment(images):
        return images.flip(-1), torch.zeros(len(images), 9)

    loss_fn = _edm_loss(tmp_path, "patience", {"tau": 2})
    images = torch.randn(8, 3, 4, 4)
    loss_fn(net=net, images=images, labels=torch.zeros(8, 2), augment_pipe=augment)
    expected = _draws("edm", pacing="patience", options={"tau": 2}).sigmas([8])
    assert torch.equal(seen[0], expected)
    for _ in range(20):
        loss_fn(net=lambda x, *_, **__: torch.zeros_like(x), images=torch.zeros_like(images))  # a constant loss of 0
    assert loss_fn.draws.sampler.stage == 3
    (tmp_path / "c.json").unlink()  # snapshots are read elsewhere
    copied = pickle.loads(pickle.dumps(loss_fn))
    loss_fn(net=net, images=images)
    copied(net=net, images=images)
    assert torch.equal(seen[-1], seen[-2])


def test_edm_loss_of_a_process_from_a_file_is_unpickled_without_it(tmp_path):
    edm = get_process("edm")
    np.savez(tmp_path / "p.npz", alpha=edm.alpha[1:], sigma=edm.sigma[1:])
    interval_curriculum(get_process(tmp_path / "p.npz"), k=4).save(tmp_path / "c.json")
    pickled = pickle.dumps(EDMLoss(tmp_path / "c.json", 100, process=str(tmp_path / "p.npz")))
    for name in ("p.npz", "c.json"):
        (tmp_path / name).unlink()
    assert pickle.loads(pickled).draws.sigmas([8]).isfinite().all()


def test_edm_loss_refuses_a_curriculum_of_other_noise_levels(tmp_path):
    interval_curriculum(get_process("vp-linear"), k=4).save(tmp_path / "vp.json")
    with pytest.raises(InputError, match="noise levels differ"):
        EDMLoss(tmp_path / "vp.json", 100)


def test_sit_transport_with_its_method_replaced_draws_from_the_curriculum():
    class Transport:
        def sample(self, x1):
            t = torch.rand((x1.shape[0],))
            return t, torch.randn_like(x1), x1

    draws = _draws("flow-matching")

    class CurriculumTransport(Transport):
        def sample(self, x1):
            _, x0, x1 = super().sample(x1)
            return draws.data_times(len(x1)).to(x1), x0, x1

    t, _, _ = CurriculumTransport().sample(torch.zeros(64, 2))
    assert torch.allclose(t, 1 - _reference("flow-matching") / T)


def test_diffusers_ddpm_scheduler_adds_the_noise_that_the_curriculum_names():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=T)
    process = get_process("vp-linear")
    matches_ddpm(scheduler, process)
    t = _draws().indices(64)
    x0, noise = torch.randn(64, 3), torch.randn(64, 3)
    alpha, sigma = (torch.as_tensor(table[t + 1], dtype=torch.float32)[:, None] for table in
                    (process.alpha, process.sigma))  # fmt: skip
    assert torch.allclose(scheduler.add_noise(x0, noise, t), alpha * x0 + sigma * noise, atol=2e-3)


def test_diffusers_schedulers_of_other_noise_are_refused():
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(InputError, match="other noise levels"):
        matches_ddpm(diffusers.DDPMScheduler(beta_schedule="scaled_linear"), get_process("vp-linear"))
    with pytest.raises(InputError, match="T = 1000"):
        matches_ddpm(diffusers.DDPMScheduler(num_train_timesteps=500), get_process("vp-linear"))
    with pytest.raises(InputError, match="other noise levels"):
        matches_flow(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), get_process("flow-matching"))


def test_diffusers_flow_script_trains_the_timestep_that_was_drawn():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T)
    matches_flow(scheduler, get_process("flow-matching"))
    # the two lines of the scripts
    u = _draws("flow-matching").scheduler_u(500)
    indices = (u * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps[indices]
    assert torch.equal(timesteps.long(), _reference("flow-matching", 500))


def test_every_timestep_survives_the_flow_scripts_rounding():
    u = ((T - torch.arange(1, T + 1) + 0.5) / T).float()
    assert torch.equal((u * T).long(), T - torch.arange(1, T + 1))


def test_accelerate_saves_and_restores_the_draws(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    first = _draws(pacing="patience", options={"tau": 3})
    accelerator.register_for_checkpointing(first)
    for _ in range(10):
        first.indices(4)
        first.update(1.0)
    accelerator.save_state(str(tmp_path))
    expected = [first.indices(4) for _ in range(3)]
    accelerator.load_state(str(tmp_path))
    assert first.step == 10
    assert all(torch.equal(first.indices(4), value) for value in expected)


def test_torchcfm_interpolates_at_the_drawn_times():
    cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    t = _draws("flow-matching").data_times(64)
    noise, data = torch.zeros(64, 3), torch.ones(64, 3)
    used, x_t, _ = cfm.ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(noise, data, t=t)
    alpha = torch.as_tensor(get_process("flow-matching").alpha[_reference("flow-matching")], dtype=torch.float32)
    assert torch.equal(used, t)
    assert torch.allclose(x_t, alpha[:, None].expand(64, 3), atol=1e-6)


def test_flow_matching_path_has_our_signal_scale_at_the_drawn_times():
    path = pytest.importorskip("flow_matching.path")
    t = _draws("flow-matching").data_times(64)
    sample = path.CondOTProbPath().sample(x_0=torch.zeros(64, 3), x_1=torch.ones(64, 3), t=t)
    alpha = torch.as_tensor(get_process("flow-matching").alpha[_reference("flow-matching")], dtype=torch.float32)
    assert torch.allclose(sample.x_t, alpha[:, None].expand(64, 3), atol=1e-6)


def test_lightning_hooks_report_the_loss_and_carry_the_state():
    draws = _draws(pacing="patience", options={"tau": 2})
    callback = lightning_callback(draws, base=object)

    class Trainer:
        class strategy:
            @staticmethod
            def reduce(loss, reduce_op):
                return loss

    for index in range(12):
        draws.indices(4)
        callback.on_train_batch_end(Trainer, None, {"loss": torch.tensor(1.0)}, None, index)
    assert draws.sampler.stage == 3
    state = json.loads(json.dumps(callback.state_dict()))
    other = _draws(pacing="patience", options={"tau": 2})
    lightning_callback(other, base=object).load_state_dict(state)
    assert torch.equal(other.indices(4), draws.indices(4))


def test_lightning_trains_and_resumes_with_the_callback(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self, draws):
            super().__init__()
            self.layer, self.draws, self.seen = torch.nn.Linear(2, 2), draws, []

        def training_step(self, batch, index):
            t = self.draws.indices(len(batch), self.device)
            self.seen.append(t)
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(steps, resume=None):
        draws = _draws(budget=20)
        module = Module(draws)
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[lightning_callback(draws)], default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(400, 2), batch_size=4), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module.seen

    whole = fit(20)
    first = fit(8)
    rest = fit(20, resume=tmp_path / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole, first + rest, strict=True))
