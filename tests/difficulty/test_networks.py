"""Networks keep the shape, start at zero, depend on nothing but their seed; denoisers add the linear baseline."""

import pytest
import torch

from difficulty.datasets import load_dataset
from difficulty.denoiser import Denoiser
from difficulty.errors import InputError
from difficulty.expert_plan import ExpertPlan
from difficulty.experts import train_experts
from difficulty.laws import gaussian
from difficulty.networks import DIT_SIZES, NETWORKS, DiT, build_network
from difficulty.prediction import PREDICTIONS
from difficulty.process import PROCESSES, get_process
from difficulty.tasks import make_tasks

SHAPES = [(1, 8, 8), (3, 16, 16)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_network_starts_by_predicting_zero_at_every_noise_level(name, shape):
    network = build_network(name, shape, 0)
    log_snr = torch.tensor([float("inf"), 14.0, 0.0, -14.0, float("-inf")])
    output = network(torch.randn(5, *shape), log_snr)
    assert output.shape == (5, *shape)
    assert (output == 0).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_weights_depend_on_the_seed_alone(name):
    torch.manual_seed(1)
    first = build_network(name, (1, 8, 8), 0).state_dict()
    torch.manual_seed(2)
    again, other = (build_network(name, (1, 8, 8), seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_building_a_network_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_network("mlp", (3,), 0)
    assert torch.rand(1) == expected


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_baseline_is_the_posterior_mean_of_isotropic_gaussian_data(process, prediction):
    std, process = 0.7, get_process(process)
    denoiser = Denoiser(build_network("mlp", (4,), 0), process, prediction, std)
    law = gaussian(4, var=std**2)
    generator = torch.Generator().manual_seed(0)
    for t in (1, 100, 500, 900):
        alpha, sigma = float(process.alpha[t]), float(process.sigma[t])
        x_t = law.noisy_sample(6, alpha, sigma, generator)
        when = torch.full((6,), t)
        estimate = denoiser.x0(x_t.float(), when).double()
        exact = law.posterior_mean(x_t, alpha, sigma)
        # float32: the weaker of signal and noise is known to their ratio times 1e-7.
        torch.testing.assert_close(alpha * estimate, alpha * exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("prediction", ["v", "velocity", "edm"])
def test_pure_noise_at_the_end_of_flow_matching_gives_finite_numbers(prediction):
    denoiser = Denoiser(build_network("mlp", (4,), 0), get_process("flow-matching"), prediction, 1.0)
    t = torch.tensor([1000])
    assert torch.isfinite(denoiser.x0(torch.randn(1, 4), t)).all()
    assert torch.isfinite(denoiser.losses(torch.randn(1, 4), torch.randn(1, 4), t)).all()


OWN = """
import torch

class Good(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.layer = torch.nn.Linear(shape[0] + 1, shape[0])

    def forward(self, x, log_snr):
        return self.layer(torch.cat([x, log_snr[:, None] / 10], 1))

class Wide(Good):
    def forward(self, x, log_snr):
        return torch.cat([x, x], 1)

class Eager(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()

    def forward(self, x):
        return x

class Still(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()

    def forward(self, x, log_snr):
        return x

class Lost(Good):
    def forward(self, x, log_snr):
        raise KeyError("mine")

def number(shape):
    return 3

def without():
    return Good((2,))
"""


def test_a_users_own_network_is_trained_like_ours(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    process = get_process("vp-linear")
    plan = ExpertPlan(network=f"{tmp_path / 'own.py'}:Good", seeds=(0,), budget=20, batch=8, heldout_draws=20)
    curves = train_experts(load_dataset("grid-2d:n=100"), process, make_tasks(process, 3), plan)
    assert (curves.losses[0, :, -1] != curves.losses[0, :, 0]).any()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own.py:Wide", "must keep the shape"),
        ("own.py:Eager", "cannot take x"),
        ("own.py:number", "torch.nn.Module is needed"),
        ("own.py:Still", "nothing to train"),
        ("own.py:Lost", r"cannot take x .* \('mine'\)"),
        ("own.py:without", "is called with the shape alone"),
        ("wrong.py:Good", "does not run .SyntaxError"),
        ("leaves.py:Good", "does not run .SystemExit"),
        ("own.py:Absent", "defines no function or class"),
        ("absent.py:Good", "does not exist"),
        ("unet", "needs images"),
        ("mlp:wide=3", "its options are: width, depth"),
    ],
)
def test_networks_that_do_not_fit_cost_one_sentence(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "wrong.py").write_text("def (")
    (tmp_path / "leaves.py").write_text("raise SystemExit")
    with pytest.raises(InputError, match=message):
        build_network(spec, (2,), 0)


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        ("dit:patch=3", (1, 8, 8), "patches of 3"),
        ("dit:width=30", (1, 8, 8), "cannot be split over 4 heads"),
        ("dit:size=huge", (1, 8, 8), "known are tiny, S, B, L, XL"),
        ("dit-huge/2", (1, 8, 8), "unknown size of a dit 'huge'; known are tiny, S, B, L, XL"),
        ("dit-s", (1, 8, 8), "how large its patches are; write dit-s/2"),
        ("dit-s:depth=1", (1, 8, 8), "how large its patches are"),
        ("dit-s/x", (1, 8, 8), "'patch' of network 'dit' must be a whole number, got 'x'"),
        ("dit-s/3", (1, 8, 8), "patches of 3"),
        ("unet:levels=3", (1, 6, 6), "divisible by 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(network, shape, message):
    with pytest.raises(InputError, match=message):
        build_network(network, shape, 0)


# Peebles & Xie 2023, table 4: millions of parameters on 4x32x32 latents, with 1000 classes and the null class.
PAPER = {
    "s/2": 33, "s/4": 33, "s/8": 33, "b/2": 130, "b/4": 130, "b/8": 131,
    "l/2": 458, "l/4": 458, "l/8": 459, "xl/2": 675, "xl/4": 675, "xl/8": 676,
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_dit_sizes_have_the_parameter_counts_of_the_paper(name):
    size, _, patch = name.partition("/")
    with torch.device("meta"):
        network = DiT((4, 32, 32), size=size.upper(), patch=int(patch))
        classes = torch.nn.Embedding(1001, DIT_SIZES[size.upper()][0])
    count = sum(p.numel() for module in (network, classes) for p in module.parameters())
    assert count / 1e6 == pytest.approx(PAPER[name], rel=0.01, abs=0.6)


def test_a_dit_by_the_papers_name_is_the_one_of_that_size_and_patch():
    short, plain = (build_network(spec, (1, 8, 8), 0) for spec in ("DiT-tiny/4", "dit:size=tiny,patch=4"))
    assert all(torch.equal(a, b) for a, b in zip(short.parameters(), plain.parameters(), strict=True))
    assert short.patch == 4
    assert len(build_network("dit-s/4:depth=1,width=48", (1, 8, 8), 0).blocks) == 1


def test_recomputed_blocks_have_the_gradient_of_stored_ones():
    network, x = build_network("dit", (1, 8, 8), 0), torch.randn(4, 1, 8, 8)
    torch.nn.init.normal_(network.last.weight)
    gradients = []
    for network.recompute in (False, True):
        network.zero_grad()
        network(x, torch.zeros(4)).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
