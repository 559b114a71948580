"""Existing checkpoints judged on fixed draws: against exact answers, and from folders alone."""

import json
import re
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from difficulty.commandline import run_cli
from difficulty.datasets import load_dataset
from difficulty.denoiser import Denoiser
from difficulty.errors import InputError
from difficulty.heldout import task_draws
from difficulty.laws import gaussian
from difficulty.models import TrainedModel, load_denoiser, load_model, save_denoiser
from difficulty.networks import build_network
from difficulty.probe import Prober, probe
from difficulty.process import get_process
from difficulty.schedulers import process_from_scheduler

PROCESS = get_process("vp-linear")
WEIGHTS = "diffusion_pytorch_model.safetensors"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")


def exact_model(law, factor=1.0):
    """The posterior mean of eps, times a factor."""

    def eps(x_t, t):
        rows = [
            law.posterior_eps(x[None].double(), float(PROCESS.alpha[step]), float(PROCESS.sigma[step]))
            for x, step in zip(x_t, t.tolist(), strict=True)
        ]
        return factor * torch.cat(rows).float()

    return TrainedModel("exact", PROCESS, eps)


def test_the_exact_denoiser_has_no_excess(tmp_path):
    data = load_dataset("gaussian:dim=3,var=0.25,n=200")
    found = probe(exact_model(data.law), data, out=tmp_path / "p", tasks=5, draws=60)
    np.testing.assert_allclose(found.table["excess_nats"], 0, atol=1e-5)
    assert (found.table["floor_kind"] == "exact").all()
    assert not found.table["untrained"].any()
    assert "0 of 4 neighbours" in found.ranking.verdict[0]  # rounding is no difficulty


def test_the_zero_function_loses_the_whole_noise_and_is_called_untrained(tmp_path):
    data = load_dataset("gaussian:dim=3,var=0.25,n=200")
    found = probe(exact_model(gaussian(3, 0.25), 0.0), data, out=tmp_path / "p", tasks=5, draws=400)
    np.testing.assert_allclose(found.table["heldout_loss"], 3, rtol=0.15)
    assert found.table["untrained"].iloc[-1]
    assert "hardly trained there" in found.ranking.verdict[-1]


def test_the_model_always_gets_groups_of_one_size_and_every_draw_counts_once(tmp_path):
    data = load_dataset("digits")
    model = Denoiser(build_network("unet:width=8", data.shape, 0), PROCESS, "v", 0.7)
    sizes = []

    def eps(x, t):
        sizes.append(len(x))
        return model.eps(x, t)

    prober = Prober(data, PROCESS, 3, draws=50)
    table = prober.table(prober(TrainedModel("own", PROCESS, eps)))
    assert set(sizes) == {16}
    for task, loss in zip(prober.tasks, table["heldout_loss"], strict=True):
        draws = task_draws(data, task, 50)
        t = draws.t
        tables = (torch.as_tensor(a, dtype=torch.float32) for a in (PROCESS.alpha, PROCESS.sigma))
        alpha, sigma = (scales[t][:, None, None, None] for scales in tables)
        with torch.no_grad():
            found = model.eps(alpha * draws.x0 + sigma * draws.eps, t)
        assert float((found - draws.eps).square().sum((1, 2, 3)).mean()) == pytest.approx(loss, rel=1e-5)


class Stopped(Exception):
    pass


def stop_after_two(done, total):
    if done == 2:
        raise Stopped


@pytest.mark.parametrize("data", ["gaussian:dim=3,var=0.25,n=200", "digits"])
def test_an_interrupted_probe_goes_on_at_the_next_task(tmp_path, data):
    asked = []

    def eps(x_t, t):
        asked.append(int(t.max()))
        return 0.5 * x_t

    model = TrainedModel("half", PROCESS, eps)
    whole = probe(model, data, out=tmp_path / "whole", tasks=4, draws=40)
    with pytest.raises(Stopped):
        probe(model, data, out=tmp_path / "p", tasks=4, draws=40, progress=stop_after_two)
    asked.clear()
    found = probe(model, data, out=tmp_path / "p", tasks=4, draws=40)
    # Of the tasks that were done some draws only, to see that the model is fit to be probed, and the same.
    assert [t > 500 for t in asked].count(False) == 4
    pd.testing.assert_frame_equal(found.table, whole.table)
    assert not list((tmp_path / "p").glob("*.partial*"))
    for name in ("probe.csv", *(["floor.npy"] if data == "digits" else [])):
        assert (tmp_path / "p" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_interrupted_probe_does_not_go_on_with_another_model(tmp_path):
    out, arguments = tmp_path / "p", ("digits",)
    options = {"out": out, "tasks": 4, "draws": 40}
    with pytest.raises(Stopped):
        probe(TrainedModel("mine", PROCESS, lambda x, t: 0.5 * x), *arguments, **options, progress=stop_after_two)
    other = TrainedModel("mine", PROCESS, lambda x, t: 0.6 * x)
    refused("of another mine, probed in part; delete it", other, *arguments, **options)
    partial = out / "probe.partial.npy"
    partial.write_bytes(partial.read_bytes()[:100])
    refused("is not readable; delete it to start afresh", other, *arguments, **options)
    partial.unlink()
    assert probe(other, *arguments, **options).table["heldout_loss"].notna().all()


def test_a_denoiser_is_read_back_as_it_was_written(tmp_path):
    denoiser = Denoiser(build_network("mlp:width=16", (4,), 3), get_process("vp-cosine:T=50"), "v", 0.7)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1)
    save_denoiser(denoiser, tmp_path / "denoiser.safetensors", "mlp:width=16", (4,))
    again = load_model(tmp_path)
    x, t = torch.randn(5, 4), torch.tensor([1, 10, 20, 30, 50])
    assert torch.equal(again.eps(x, t), denoiser.eps(x, t))
    again.process.check_fingerprint(denoiser.process.fingerprint, "the file")
    with pytest.raises(InputError, match=r"was trained on samples of shape \(4,\), not \(2, 2\)"):
        again.eps(x.reshape(5, 2, 2), t)


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def test_a_diffusers_pipeline_folder_is_probed_from_the_folder_alone(unet_folder, tmp_path):
    out = tmp_path / "p"
    code = run_cli_probe(unet_folder, "digits", "--out", out, "--tasks", "4", "--draws", "32")
    assert code == 0
    table = pd.read_csv(out / "probe.csv")
    assert np.isfinite(table["heldout_loss"]).all()
    # An untrained network is worse than a linear denoiser wherever the noise can be seen.
    assert table["untrained"].any()


def test_a_model_and_a_scheduler_saved_beside_each_other_need_no_pipeline(unet_folder, tmp_path):
    for part in ("unet", "scheduler"):
        shutil.copytree(unet_folder / part, tmp_path / "parts" / part)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "parts").eps(x, t), load_model(unet_folder).eps(x, t))


def test_a_probe_writes_over_no_run_but_its_own(tmp_path):
    data = load_dataset("gaussian:dim=3,var=0.25,n=200")
    for content, message in (
        ({"format": "denoising-difficulty/run/1", "kind": "measure", "status": "running", "config": {}}, "interrupted"),
        ({"epochs": 3}, "not of this project"),
        ([], "not of this project"),
    ):
        (tmp_path / "run.json").write_text(json.dumps(content))
        refused(message, exact_model(data.law), data, out=tmp_path, tasks=3, draws=20)
        assert json.loads((tmp_path / "run.json").read_text()) == content
    (tmp_path / "run.json").unlink()
    for _ in range(2):  # its own again in place
        probe(exact_model(data.law), data, out=tmp_path, tasks=3, draws=20)


def test_a_diffusers_model_is_called_as_its_own_pipeline_calls_it(unet_folder):
    model = load_model(unet_folder)
    unet = diffusers.UNet2DModel.from_pretrained(unet_folder / "unet")
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        expected = unet(x, torch.tensor([0, 499, 999])).sample
        assert torch.allclose(model.eps(x, torch.tensor([1, 500, 1000])), expected, atol=1e-5)


def test_the_process_of_a_ddpm_scheduler_is_vp_linear():
    scheduled = process_from_scheduler(diffusers.DDPMScheduler())
    assert scheduled.prediction == "eps"
    np.testing.assert_allclose(scheduled.process.sigma, PROCESS.sigma, rtol=2e-6)


@pytest.mark.parametrize(("kind", "prediction"), [("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v")])
def test_prediction_types_are_translated(kind, prediction):
    assert process_from_scheduler(diffusers.DDIMScheduler(prediction_type=kind)).prediction == prediction


def test_the_process_of_a_cosine_scheduler_is_vp_cosine():
    scheduled = process_from_scheduler(diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    np.testing.assert_allclose(scheduled.process.sigma, get_process("vp-cosine").sigma, rtol=1e-4)


def test_the_process_of_a_flow_scheduler_is_flow_matching_with_its_shift():
    plain = process_from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler())
    np.testing.assert_allclose(plain.process.sigma, get_process("flow-matching").sigma, atol=1e-6)
    assert plain.prediction == "velocity"
    shifted = process_from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)).process
    u = np.arange(1, 1001) / 1000
    np.testing.assert_allclose(shifted.sigma[1:], 3 * u / (1 + 2 * u), rtol=1e-4)


def test_the_process_of_an_edm_scheduler_is_edm():
    scheduled = process_from_scheduler(diffusers.EDMEulerScheduler())
    expected = get_process(f"edm:T={scheduled.process.T}").sigma[1:]
    np.testing.assert_allclose(scheduled.process.sigma[1:], expected, rtol=1e-4)
    np.testing.assert_allclose(scheduled.model_timesteps[1:], 0.25 * np.log(scheduled.process.sigma[1:]), atol=1e-5)
    assert scheduled.prediction == "edm:sigma_data=0.5"
    assert process_from_scheduler(diffusers.EDMEulerScheduler(sigma_data=1.0)).prediction == "edm:sigma_data=1.0"


def test_an_edm_folder_with_another_standard_deviation_is_called_as_its_scheduler_says(tmp_path):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(sigma_data=1.2)
    unet.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    model = load_model(tmp_path)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([400])
    sigma = torch.tensor(float(model.process.sigma[400]))
    output = unet(scheduler.precondition_inputs(x, sigma), 0.25 * sigma.log()).sample
    denoised = scheduler.precondition_outputs(x, output, sigma)
    torch.testing.assert_close(model.eps(x, t), (x - denoised) / sigma, rtol=1e-4, atol=1e-4)


def test_a_zero_terminal_snr_ends_in_pure_noise():
    process = process_from_scheduler(diffusers.DDIMScheduler(rescale_betas_zero_snr=True)).process
    assert (process.alpha[-1], process.noisiest) == (0.0, process.T - 1)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (lambda: diffusers.CogVideoXDDIMScheduler(), "changes its alphas_cumprod after its betas"),
        (
            lambda: diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "gives its model continuous timesteps",
        ),
    ],
)
def test_schedulers_that_mean_something_else_by_their_betas_or_timesteps_are_refused(scheduler, said):
    with pytest.raises(InputError, match=said):
        process_from_scheduler(scheduler())


def test_a_flow_matching_transformer_is_probed_from_its_folder(tmp_path):
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=8,
    )  # fmt: skip
    transformer.save_pretrained(tmp_path / "sd3" / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "sd3" / "scheduler")
    (tmp_path / "sd3" / "model_index.json").write_text("{}")
    found = probe(tmp_path / "sd3", "digits", out=tmp_path / "p", tasks=3, draws=16)
    assert np.isfinite(found.table["heldout_loss"]).all()


def save_unet(folder, seed=0, variant=None, **changes):
    torch.manual_seed(seed)
    network = diffusers.UNet2DModel(**{
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4,
        "layers_per_block": 1, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
        **changes,
    })  # fmt: skip
    network.save_pretrained(folder, variant=variant)
    diffusers.DDPMScheduler().save_pretrained(folder)
    return network


def test_weights_of_half_precision_in_a_file_of_their_own_are_found(tmp_path):
    network = save_unet(tmp_path / "half", variant="fp16")
    assert [path.name for path in (tmp_path / "half").glob("*.safetensors")] == [WEIGHTS.replace(".s", ".fp16.s")]
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "half").eps(x, t), network(x, t - 1).sample)


def test_a_second_half_of_the_channels_is_the_variance_and_nothing_else_is_cut(tmp_path):
    save_unet(tmp_path / "two", out_channels=2)
    assert probe(tmp_path / "two", "digits", out=tmp_path / "p", tasks=2, draws=16).table["heldout_loss"].notna().all()
    save_unet(tmp_path / "three", out_channels=3)
    refused("maps .* or a network with as many channels out as in", tmp_path / "three", "digits", out=tmp_path / "q")


def test_a_folder_is_of_one_model(tmp_path):
    options = {"out": tmp_path / "p", "tasks": 2, "draws": 16}
    save_unet(tmp_path / "unet")
    probe(tmp_path / "unet", "digits", **options)
    before = (tmp_path / "p" / "probe.csv").read_bytes()
    probe(tmp_path / "unet", "digits", **options)
    save_unet(tmp_path / "unet", seed=1)
    refused("a finished run with other settings .model_fingerprint", tmp_path / "unet", "digits", **options)
    assert (tmp_path / "p" / "probe.csv").read_bytes() == before


def test_what_a_function_prints_is_not_the_result(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def loud(x_t, t):\n    print('hello')\n    return 0 * x_t\n")
    args = [f"{tmp_path / 'mine.py'}:loud", "grid-2d:n=100", "--process", "edm", "--tasks", "3", "--draws", "16"]
    assert run_cli_probe(*args, "--json", "--out", tmp_path / "p") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["provenance"]["kind"] == "shared network"
    assert "hello" in captured.err


@pytest.mark.parametrize("name", ["hpu", "meta", "nonsense"])
def test_a_device_that_cannot_be_used_is_refused(name, unet_folder, tmp_path, capsys):
    assert run_cli_probe(unet_folder, "digits", "--device", name, "--out", tmp_path / "p") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"device '{name}' cannot be used (" in line
    assert line.endswith("choose cpu, cuda or auto")


def run_cli_probe(*args):
    from difficulty.cli import SUBCOMMANDS

    return run_cli(SUBCOMMANDS, "difficulty", "", ["probe", *map(str, args)])


def test_a_users_function_is_probed_on_the_process_it_names(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def zero(x_t, t):\n    return 0 * x_t\n")
    spec = f"{tmp_path / 'mine.py'}:zero"
    common = ["grid-2d:n=100", "--tasks", "3", "--draws", "64"]
    assert run_cli_probe(spec, *common, "--out", tmp_path / "a") == 2
    assert "name the one it was trained on" in capsys.readouterr().err
    assert run_cli_probe(spec, *common, "--process", "edm", "--json", "--out", tmp_path / "b") == 0
    ranking = json.loads(capsys.readouterr().out)
    assert ranking["provenance"]["kind"] == "shared network"


def refused(match, *args, **changes):
    with pytest.raises(InputError, match=match):
        probe(*args, **changes)


def test_models_that_cannot_be_used_cost_one_sentence(tmp_path, unet_folder):
    out = tmp_path / "out"
    refused("is no model", tmp_path, "digits", out=out)
    own = tmp_path / "own.py"
    own.write_text(
        "def nothing(x_t, t):\n    return None\n"
        "def array(x_t, t):\n    return x_t.numpy()\n"
        "def silent(x_t, t):\n    raise RuntimeError('')\n"
        "def missing(x_t, t):\n    raise KeyError('key')\n"
        "def leaving(x_t, t):\n    raise SystemExit('bye')\n"
        "def complex(x_t, t):\n    return x_t * 1j\n"
        "def chance(x_t, t):\n    import torch\n    return torch.rand_like(x_t)\n"
        "def centred(x_t, t):\n    return x_t - x_t.mean(0)\n"
        "def one(x_t, t):\n    return x_t[:1]\n"
    )
    for name, message in {
        "nothing": "returns a NoneType", "array": "returns a ndarray", "silent": "(RuntimeError)", "missing": "'key'",
        "leaving": "(bye)", "complex": "must return real numbers", "chance": "another output every time",
        "centred": "depends on its batch", "one": "must keep the shape",
    }.items():  # fmt: skip
        refused(re.escape(message), f"{own}:{name}", "digits", "vp-linear", out=out)
    refused("names no function in that file; write", own, "digits", "vp-linear", out=out)
    refused("cannot take samples|maps", unet_folder, "grid-2d:n=100", out=out)
    refused("give the folder, with its scheduler", unet_folder / "unet" / WEIGHTS, "digits", out=out)
    foreign = tmp_path / "foreign.json"
    foreign.write_text("{}")
    refused("is no model", foreign, "digits", out=out)
    refused("100000000 held-out draws for each of 1 tasks in 64 dim.* ask for fewer", unet_folder, "digits", out=out,
            draws=10**8)  # fmt: skip
    refused("leave --process out", unet_folder, "digits", "vp-cosine", out=out)
    bare = tmp_path / "bare"
    diffusers.UNet2DModel.from_pretrained(unet_folder / "unet").save_pretrained(bare)
    refused("holds no scheduler", bare, "digits", out=out)
    diffusers.DDPMScheduler().save_pretrained(bare / "scheduler")
    config = json.loads((bare / "scheduler" / "scheduler_config.json").read_text())
    (bare / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "noise"}))
    refused("prediction type of DDPMScheduler 'noise'; known are epsilon", bare, "digits", out=out)
    (bare / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    weights = bare / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:500])
    refused("cannot load UNet2DModel .* if files are truncated or missing, save it again", bare, "digits", out=out)
    assert not out.exists()


def test_a_damaged_denoiser_file_is_refused(tmp_path):
    denoiser = Denoiser(build_network("mlp:width=16", (4,), 3), PROCESS, "v", 0.7)
    path = tmp_path / "denoiser.safetensors"
    save_denoiser(denoiser, path, "mlp:width=8", (4,))
    with pytest.raises(InputError, match="does not fit network 'mlp:width=8'"):
        load_denoiser(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="not readable"):
        load_denoiser(path)


def test_a_floor_of_other_data_or_tasks_is_refused(tmp_path):
    from difficulty.expert_plan import ExpertPlan
    from difficulty.measurement import measure

    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((60, 2)).astype(np.float32))
    plan = ExpertPlan(network="mlp:width=16", seeds=(0,), budget=20, batch=8, heldout_draws=64)
    measure(tmp_path / "a.npy", PROCESS, out=tmp_path / "m", tasks=3, measures=["convergence"], plan=plan)
    model = exact_model(gaussian(2, 1.0))
    found = probe(model, tmp_path / "a.npy", out=tmp_path / "p", tasks=3, draws=64, floor_from=tmp_path / "m")
    assert (found.table["floor_kind"] == "upper_bound").all()
    experts = pd.read_csv(tmp_path / "m" / "losses.csv").groupby("task")["floor"].first()
    np.testing.assert_allclose(found.table["floor"], experts, rtol=1e-6)
    refused("other tasks", model, tmp_path / "a.npy", out=tmp_path / "q", tasks=4, floor_from=tmp_path / "m")
    refused("known exactly", model, "grid-2d:n=60", out=tmp_path / "q", tasks=3, floor_from=tmp_path / "m")
    np.save(tmp_path / "b.npy", np.random.default_rng(1).standard_normal((60, 2)).astype(np.float32))
    refused("other data", model, tmp_path / "b.npy", out=tmp_path / "q", tasks=3, floor_from=tmp_path / "m")
    refused("64 draws", model, tmp_path / "a.npy", out=tmp_path / "q", tasks=3, draws=32, floor_from=tmp_path / "m")
    (tmp_path / "m" / "floor.npy").write_bytes(b"half")
    refused("not a readable array", model, tmp_path / "a.npy", out=tmp_path / "q", tasks=3, draws=64,
            floor_from=tmp_path / "m")  # fmt: skip


def test_a_model_next_to_the_linear_denoiser_where_that_is_best_is_not_called_untrained(tmp_path):
    data, process = load_dataset("gaussian:dim=8,var=0.25,n=400"), get_process("vp-linear")
    alpha, sigma = (torch.as_tensor(a, dtype=torch.float32) for a in (process.alpha, process.sigma))

    def almost(x_t, t):
        a, s = alpha[t][:, None], sigma[t][:, None]
        return 0.99 * s / (0.25 * a**2 + s**2) * x_t

    model = TrainedModel("almost", process, almost)
    assert not probe(model, data, out=tmp_path / "p", tasks=5, draws=256).table["untrained"].any()


def test_a_model_that_returns_nan_is_said_to(tmp_path):
    model = TrainedModel("broken", get_process("vp-linear"), lambda x_t, t: x_t * float("nan"))
    found = probe(model, "gaussian:dim=2,n=60", out=tmp_path / "p", tasks=3, draws=16)
    assert found.table["untrained"].all()
    assert found.warnings[0] == "At t 1..333, 334..666, 667..1000 the model returns NaN or infinity."
