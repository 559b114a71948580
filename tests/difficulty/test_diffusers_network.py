"""Models of diffusers are called as diffusers' own pipelines call them."""

import json

import numpy as np
import pytest
import torch
from diffusers_configs import DIT, TEXT, UNET

from difficulty.datasets import load_dataset
from difficulty.denoiser import Denoiser
from difficulty.diffusers_network import DiffusersNetwork
from difficulty.engines import choose_engine
from difficulty.errors import InputError
from difficulty.heldout import heldout_draws, zero_losses
from difficulty.network_file import fingerprint_weights
from difficulty.networks import build_network
from difficulty.pretrained import fingerprint_folders
from difficulty.process import get_process
from difficulty.schedulers import process_from_scheduler
from difficulty.tasks import make_tasks

diffusers = pytest.importorskip("diffusers")


def spec_of(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return f"diffusers:{tmp_path / 'config.json'}"


@pytest.mark.parametrize("config", [UNET, DIT, TEXT], ids=lambda config: config["_class_name"])
def test_a_config_becomes_a_network_whose_weights_depend_on_the_seed_alone(config, tmp_path):
    spec = spec_of(tmp_path, config)
    first, again, other = (build_network(spec, (1, 8, 8), seed) for seed in (0, 0, 1))
    assert type(first.model).__name__ == config["_class_name"]
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_a_saved_folder_becomes_a_network_with_its_weights(tmp_path):
    config = {key: value for key, value in UNET.items() if key != "_class_name"}
    model = diffusers.UNet2DModel(**config)
    model.save_pretrained(tmp_path / "unet")
    for folder in (tmp_path, tmp_path / "unet"):
        network = build_network(f"diffusers:{folder}", (1, 8, 8), 5)
        assert network.model.training
        assert fingerprint_weights(f"diffusers:{folder}") == fingerprint_folders(tmp_path / "unet")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), network.parameters(), strict=True))


SCHEDULERS = {
    "vp-linear": lambda T: diffusers.DDPMScheduler(T, 1e-4, 0.02, "linear"),
    "flow-matching": lambda T: diffusers.FlowMatchEulerDiscreteScheduler(T),
    "edm": lambda T: diffusers.EDMEulerScheduler(num_train_timesteps=T),
    "edm-unit": lambda T: diffusers.EDMEulerScheduler(num_train_timesteps=T, sigma_data=1.0),
}
PREDICTION = {"vp-linear": "eps", "flow-matching": "velocity", "edm": "edm", "edm-unit": "edm:sigma_data=1"}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("T", [100, 1000])
def test_the_model_is_given_the_timesteps_and_the_scaled_input_of_diffusers_own_scheduler(name, T):
    scheduler = SCHEDULERS[name](T)
    expected = process_from_scheduler(scheduler)
    model = diffusers.UNet2DModel(**{key: value for key, value in UNET.items() if key != "_class_name"})
    given = []
    model.register_forward_hook(lambda module, args, kwargs, out: given.append((args[0], kwargs)), with_kwargs=True)
    process = expected.process
    denoiser = Denoiser(DiffusersNetwork(model), process, PREDICTION[name], 0.7)
    t = torch.tensor([1, T // 2, T])
    x = torch.randn(3, 1, 8, 8)
    output = denoiser(x, t)
    np.testing.assert_allclose(given[0][1]["timestep"], expected.model_timesteps[t], rtol=1e-5, atol=1e-4)
    if name.startswith("edm"):
        scaled = torch.stack([scheduler.precondition_inputs(x[i], process.sigma[t[i]]) for i in range(3)])
        sigma = torch.from_numpy(process.sigma[t])
        estimate = [scheduler.precondition_outputs(x[i], output[i], sigma[i]) for i in range(3)]
        torch.testing.assert_close(denoiser.x0(x, t), torch.stack(estimate).float(), rtol=1e-4, atol=1e-5)
    else:
        scaled = x
    torch.testing.assert_close(given[0][0], scaled.float())
    # What the network returns is the prediction: nothing is added to it.
    torch.testing.assert_close(output, model(given[0][0], given[0][1]["timestep"]).sample)


def test_labels_of_a_dit_are_dropped_by_the_trainer_alone(tmp_path):
    network = build_network(spec_of(tmp_path, DIT), (1, 8, 8), 0).train()
    x, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 50.0), torch.arange(4)
    torch.nn.init.normal_(network.model.proj_out_2.weight)
    torch.nn.init.normal_(network.model.transformer_blocks[0].norm1.linear.weight)
    first = network(x, t, labels)
    assert all(torch.equal(network(x, t, labels), first) for _ in range(20))
    assert not torch.allclose(network(x, t), first)
    assert torch.equal(network(x, t), network(x, t, torch.full((4,), network.null_label)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "UNet9DModel"}, "names 'UNet9DModel'"),
        ({"_class_name": "__version__"}, "names '__version__'"),
        (UNET | {"block_out_channels": [8]}, "makes no UNet2DModel"),
        (UNET | {"in_channels": 3}, "cannot take x of shape"),
    ],
)
def test_a_config_that_makes_no_fitting_network_costs_one_sentence(config, message, tmp_path):
    with pytest.raises(InputError, match=message):
        build_network(spec_of(tmp_path, config), (1, 8, 8), 0)
    with pytest.raises(InputError, match="does not exist"):
        build_network(f"diffusers:{tmp_path / 'absent.json'}", (1, 8, 8), 0)


def test_a_model_without_classes_names_the_setting_that_gives_it_some(tmp_path):
    network = build_network(spec_of(tmp_path, UNET), (1, 8, 8), 0)
    with pytest.raises(InputError, match="set num_class_embeds"):
        _ = network.null_label


def test_zero_is_judged_as_such_a_model_is_without_a_baseline(tmp_path):
    process, data = get_process("vp-linear"), load_dataset("digits")
    draws = heldout_draws(data, make_tasks(process, 3), 64)
    network = build_network(spec_of(tmp_path, UNET), (1, 8, 8), 0)
    losses, _ = zero_losses(Denoiser(network, process, "eps", 0.7), draws, None)
    np.testing.assert_allclose(losses, draws.eps.square().flatten(2).sum(2), rtol=1e-5)


def test_a_model_that_cannot_be_vectorised_is_refused_before_anything_is_trained(tmp_path):
    denoiser = Denoiser(build_network(spec_of(tmp_path, UNET), (1, 8, 8), 0), get_process("vp-linear"), "eps", 0.7)
    with pytest.raises(InputError, match=r"engine 'vmap' does not fit this network: .*; use loop or auto"):
        choose_engine(denoiser, (1, 8, 8), batch=8, experts=2, iterations=10, engine="vmap")
