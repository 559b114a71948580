"""Every example of docs/adapters.md is short, runs, and trains the timesteps that the curriculum names.

Hosts that cannot be installed here are objects with their signatures. EDM's example runs in a process of its own, below
a folder ``training`` as EDM's repository has it.
"""

import re
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import training
from difficulty.process import get_process
from training.adapters import Draws
from training.curriculum_builders import interval_curriculum

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adapters.md").read_text()
EXAMPLES = {
    part.partition("\n")[0].strip("# "): re.findall(r"```python\n(.*?)```", part, re.S)
    for part in re.split(r"^## ", PAGE, flags=re.M)
}
START = "The timestep sampler in your own training loop"
N = 16


def draws_of(process_name):
    process = get_process(process_name)
    curriculum = interval_curriculum(process, k=4)
    return Draws(training.TimestepSampler(process, curriculum, budget=100, seed=0), process)


def t_of(process_name):
    """The timesteps 1..T that the first call must give."""
    return draws_of(process_name).draw(N)[0]


def run(heading, names):
    (example,) = EXAMPLES[heading][:1]
    exec(example, names)
    return names


def module(monkeypatch, name, **content):
    """A module of a host that is not installed, with its parents."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        made = types.ModuleType(".".join(parts[:depth]))
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), made)
    vars(made).update(content)


def guided_diffusion(monkeypatch):
    class LossAwareSampler:
        pass

    class TrainLoop:
        def __init__(self, *_, schedule_sampler):
            self.schedule_sampler = schedule_sampler

        def run_loop(self):
            assert isinstance(self.schedule_sampler, LossAwareSampler)
            seen.append(self.schedule_sampler.sample(N, "cpu")[0])

    seen = []
    module(monkeypatch, "guided_diffusion.resample", LossAwareSampler=LossAwareSampler)
    run("guided-diffusion and its descendants", {"draws": draws_of("vp-linear"), "TrainLoop": TrainLoop})
    assert torch.equal(seen[0], t_of("vp-linear") - 1)


def dit(monkeypatch):
    def training_losses(model, x, t, model_kwargs):
        seen.append(t)
        return {"loss": x.flatten(1).mean(1)}

    seen = []
    run("DiT-like loops", {
        "draws": draws_of("vp-linear"), "x": torch.zeros(N, 2), "y": torch.zeros(N), "model": None, "device": "cpu",
        "diffusion": SimpleNamespace(training_losses=training_losses),
    })  # fmt: skip
    assert torch.equal(seen[0], t_of("vp-linear") - 1)


def diffusers_ddpm(monkeypatch):
    scheduler = pytest.importorskip("diffusers").DDPMScheduler()
    names = {"noise_scheduler": scheduler, "process": get_process("vp-linear"), "draws": draws_of("vp-linear")}
    found = run("diffusers, DDPM scripts", names | {"bsz": N, "latents": torch.zeros(N)})["timesteps"]
    assert torch.equal(found, t_of("vp-linear") - 1)


def diffusers_flow(monkeypatch):
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler()
    names = {"noise_scheduler_copy": scheduler, "process": get_process("flow-matching")}
    found = run("diffusers, flow scripts", names | {"draws": draws_of("flow-matching"), "bsz": N})["indices"]
    assert torch.equal(scheduler.timesteps[found].long(), t_of("flow-matching"))


def sit(monkeypatch):
    class Transport:
        def sample(self, x1):
            return torch.rand((x1.shape[0],)), torch.randn_like(x1), x1

    names = run("SiT", {"Transport": Transport, "draws": draws_of("flow-matching")})
    t, _, _ = names["CurriculumTransport"]().sample(torch.zeros(N, 2))
    assert torch.allclose(t, 1 - t_of("flow-matching") / 1000)


def k_diffusion(monkeypatch):
    found = run("k-diffusion", {"draws": draws_of("edm"), "reals": torch.zeros(N, 3), "device": "cpu"})["sigma"]
    assert torch.allclose(found.double(), torch.from_numpy(get_process("edm").sigma)[t_of("edm")])


def lucidrains(monkeypatch):
    class Diffusion:
        @staticmethod
        def log_snr(time):
            return torch.from_numpy(get_process("vp-linear").log_snr(1 + 999 * time.numpy()))

        def __call__(self, images, times):
            seen.append(times)

    seen = []
    run("lucidrains", {"draws": draws_of("vp-linear"), "images": torch.zeros(N, 2), "diffusion": Diffusion()})
    assert torch.allclose(seen[0], (t_of("vp-linear") - 1).float() / 999, atol=1e-5)


def flows(monkeypatch):
    class FlowMatcher:  # signature of torchcfm's
        def sample_location_and_conditional_flow(self, x0, x1, t=None, return_noise=False):
            return t, None, None

    class Path:  # signature of flow_matching's
        def sample(self, x_0, x_1, t):
            return SimpleNamespace(t=t)

    names = {"draws": draws_of("flow-matching"), "x0": torch.zeros(N, 2), "x1": torch.ones(N, 2)}
    try:
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        names["FM"] = ConditionalFlowMatcher(sigma=0.0)
    except ImportError:
        names["FM"] = FlowMatcher()
    try:
        from flow_matching.path import CondOTProbPath

        names["path"] = CondOTProbPath()
    except ImportError:
        names["path"] = Path()
    run("torchcfm and flow_matching", names)
    expected = 1 - t_of("flow-matching") / 1000
    assert torch.allclose(names["t"], expected)
    assert torch.allclose(names["sample"].t, expected)


def lightning(monkeypatch):
    try:
        from lightning.pytorch import LightningModule, Trainer
    except ImportError:
        module(monkeypatch, "lightning.pytorch", Callback=type("Callback", (), {}))

        class LightningModule:
            device = "cpu"

        class Trainer:
            strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)

            def __init__(self, callbacks):
                self.callbacks = callbacks

            def fit(self, model, loader):
                for index, batch in enumerate(loader):
                    loss = model.training_step(batch, index)
                    for callback in self.callbacks:
                        callback.on_train_batch_end(self, model, {"loss": loss}, batch, index)

    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def loss(self, batch, t):
            seen.append(t)
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer.parameters(), lr=0.1)

    def quiet(callbacks):
        plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu",
                 "enable_model_summary": False, "max_epochs": 1}  # fmt: skip
        return Trainer(callbacks=callbacks, **(plain if hasattr(Trainer, "save_checkpoint") else {}))

    seen = []
    loader = torch.utils.data.DataLoader(torch.zeros(N, 2), batch_size=N)
    run("Lightning", {"draws": draws_of("vp-linear"), "LightningModule": Model, "Trainer": quiet, "loader": loader})
    assert torch.equal(seen[0], t_of("vp-linear") - 1)


def accelerate(monkeypatch):
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    process = get_process("vp-linear")
    names = run("Accelerate", {
        "Draws": Draws, "sampler": draws_of("vp-linear").sampler, "process": process, "accelerator": accelerator,
        "bsz": N, "loss": torch.tensor(1.0),
    })  # fmt: skip
    assert torch.equal(names["t"], t_of("vp-linear") - 1)
    assert names["draws"] in accelerator._custom_objects


HOSTS = {
    "guided-diffusion and its descendants": guided_diffusion,
    "DiT-like loops": dit,
    "diffusers, DDPM scripts": diffusers_ddpm,
    "diffusers, flow scripts": diffusers_flow,
    "SiT": sit,
    "k-diffusion": k_diffusion,
    "lucidrains": lucidrains,
    "torchcfm and flow_matching": flows,
    "Lightning": lightning,
    "Accelerate": accelerate,
}


@pytest.mark.parametrize("heading", HOSTS)
def test_example_trains_the_timesteps_of_the_curriculum(heading, monkeypatch):
    HOSTS[heading](monkeypatch)


def test_the_page_starts_with_the_object_that_all_examples_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interval_curriculum(get_process("vp-linear"), k=4).save("curriculum.json")
    names: dict = {}
    run(START, names)
    assert torch.equal(names["draws"].indices(N), t_of("vp-linear") - 1)


EDM_TRAIN = """
import importlib, pickle, torch
class Config(dict):
    __getattr__ = dict.__getitem__
c = Config(loss_kwargs={"class_name": "training.loss.EDMLoss"})
%s
import training.loss
assert training.loss.THEIRS
where, _, name = c.loss_kwargs.pop("class_name").rpartition(".")
loss_fn = getattr(importlib.import_module(where), name)(**c.loss_kwargs)
loss = loss_fn(net=lambda x, s, l, augment_labels: x, images=torch.zeros(16, 3, 4, 4), labels=None, augment_pipe=None)
assert loss.shape == (16, 3, 4, 4)
pickle.loads(pickle.dumps(loss_fn))
print("trained")
"""


def test_example_for_edm_runs_where_another_folder_is_called_training(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("")
    (tmp_path / "training" / "loss.py").write_text("THEIRS = True\n")
    interval_curriculum(get_process("edm"), k=4).save(tmp_path / "curriculum.json")
    (tmp_path / "train.py").write_text(EDM_TRAIN % EXAMPLES["EDM"][0])
    path = f"import sys; sys.path.append({str(ROOT)!r}); sys.argv = ['train.py']; sys.path.insert(0, '.'); "
    code = path + "exec(open('train.py').read())"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "trained\n", done.stderr


def test_no_module_of_ours_hides_one_of_edms_folder():
    theirs = {"augment", "dataset", "loss", "networks", "training_loop"}
    assert not theirs & {path.stem for path in (ROOT / "training").iterdir()}


def test_every_example_is_run_and_has_at_most_fifteen_lines():
    assert set(HOSTS) | {START, "EDM"} == set(EXAMPLES)
    for examples in EXAMPLES.values():
        assert len(examples) == 1
        assert len([line for line in examples[0].splitlines() if line.strip()]) <= 15
