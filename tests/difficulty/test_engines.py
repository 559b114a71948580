"""Engines: the numbers do not depend on which one runs the experts, and the choice follows network, memory and work."""

import itertools
import shutil

import pytest
import torch
from torch import nn

from difficulty import engines
from difficulty.denoiser import Denoiser
from difficulty.engines import ENGINES, Bank, Block, choose_engine
from difficulty.errors import InputError
from difficulty.folding import unfoldable
from difficulty.networks import build_network
from difficulty.process import get_process

PROCESS = get_process("vp-linear")
IMAGE = (1, 8, 8)
NETWORKS = {"mlp:width=16": (5,), "mlp:width=16,depth=1": (5,), "dit:width=16,depth=1": IMAGE, "unet:width=8": IMAGE}
FOLDING = ("mlp:width=16", "dit:width=16,depth=1")


def denoiser(network, seed=0):
    found = Denoiser(build_network(network, NETWORKS[network], seed), PROCESS, "v", 0.5)
    # Away from the zeros of the last layer, behind which nothing can be told apart.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in found.parameters():
            value += 0.05 * torch.randn(value.shape, generator=generator)
    return found


def batch(network, experts, size=6):
    generator = torch.Generator().manual_seed(3)
    x, target = (torch.randn(experts, size, *NETWORKS[network], generator=generator) for _ in range(2))
    # Some noise levels come twice, and every expert meets others.
    t = torch.randint(1, 5, (experts, size), generator=generator) + 100 * torch.arange(experts)[:, None]
    return x, t, target


@pytest.mark.parametrize(
    ("network", "engine"),
    [*itertools.product(FOLDING, ENGINES), ("unet:width=8", "vmap"), ("unet:width=8", "loop")],
)
def test_predictions_and_gradients_are_those_of_every_denoiser_alone(network, engine):
    members = [denoiser(network, seed) for seed in range(3)]
    x, t, target = batch(network, 3)
    bank = Bank(members, engine, 1 if engine == "loop" else 2)
    predicted = bank.predict(x, t)
    for block, own in bank.slices():
        block.backward(x[own], t[own], target[own])
        for index, one in enumerate(members[own]):
            alone = one(x[own][index], t[own][index])
            torch.testing.assert_close(predicted[own][index], alone, rtol=1e-4, atol=1e-5)
            one.zero_grad()
            (alone - target[own][index]).square().mean().backward()
            for name, value in one.named_parameters():
                torch.testing.assert_close(block.parameters[name].grad[index], value.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("network", FOLDING)
@pytest.mark.parametrize("engine", ["batched", "vmap"])
def test_a_diverged_expert_does_not_touch_the_others(network, engine):
    members = [denoiser(network, seed) for seed in range(3)]
    x, t, target = batch(network, 3)
    healthy = Block(members, engine)
    healthy.backward(x, t, target)
    with torch.no_grad():
        for value in members[1].parameters():
            value.fill_(float("nan"))
    sick = Block(members, engine)
    sick.backward(x, t, target)
    for name, value in sick.parameters.items():
        assert value.grad[1].isnan().all()
        torch.testing.assert_close(value.grad[[0, 2]], healthy.parameters[name].grad[[0, 2]])


def test_weights_come_back_as_they_went_in():
    members = [denoiser("mlp:width=16", seed) for seed in range(5)]
    bank = Bank(members, "batched", 2)
    for index, one in enumerate(members):
        weights = bank.weights(index)
        assert all(torch.equal(weights[name], value) for name, value in one.named_parameters())
    with pytest.raises(IndexError):
        bank.weights(5)


class Rows(nn.Module):
    """Takes the mean over the batch, which a folded batch would take over all experts."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, log_snr):
        return self.layer(x - x.mean(0))


class Tied(nn.Module):
    """One layer used twice keeps one set of weights per expert."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)

    def forward(self, x, log_snr):
        return self.second(self.norm(self.first(x)).tanh())


def test_networks_that_cannot_be_folded_are_found_out():
    x, t = torch.randn(4, 4), torch.ones(4)
    assert unfoldable(Tied(), x, t) is None
    assert "depend on one another" in unfoldable(Rows(), x, t)
    assert "Conv2d" in unfoldable(denoiser("unet:width=8"), torch.randn(4, *IMAGE), torch.ones(4, dtype=torch.long))


def chosen(network, **changes):
    asked = {"batch": 32, "experts": 20, "iterations": 100} | changes
    return choose_engine(denoiser(network), NETWORKS[network], **asked)


def test_small_linear_networks_are_batched_and_convolutions_are_not():
    assert chosen("mlp:width=16").engine == chosen("dit:width=16,depth=1").engine == "batched"
    found = chosen("unet:width=8")
    assert (found.engine, found.block) == (("loop", 1) if not torch.cuda.is_available() else ("vmap", found.block))
    assert "Conv2d" in found.reason


def test_an_engine_can_be_asked_for_unless_it_does_not_fit():
    assert chosen("mlp:width=16", engine="loop").block == 1
    assert chosen("unet:width=8", engine="vmap").engine == "vmap"
    with pytest.raises(InputError, match=r"does not fit this network: .*Conv2d.*; use vmap, loop or auto"):
        chosen("unet:width=8", engine="batched")
    with pytest.raises(InputError, match="known are batched, vmap, loop"):
        chosen("mlp:width=16", engine="magic")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes them all in one process")
def test_processes_are_started_only_for_work_that_is_worth_it(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert chosen("mlp:width=16").processes == 1
    long = chosen("unet:width=8", iterations=10**7)
    assert (long.processes, long.at_once) == (3, 7)
    assert chosen("unet:width=8", iterations=10**7, processes=2).processes == 2
    with pytest.raises(InputError, match="can be shared by 1 to 20 processes"):
        chosen("mlp:width=16", processes=0)


def test_experts_that_do_not_fit_in_memory_wait_for_their_turn(monkeypatch):
    state = 16 * sum(value.numel() for value in denoiser("mlp:width=16").parameters())
    monkeypatch.setattr(engines, "free_bytes", lambda device: int(4.5 * state / engines.MEMORY_SHARE))
    found = chosen("mlp:width=16", batch=1)
    assert found.at_once == 4
    assert found.block <= 4
    monkeypatch.setattr(engines, "free_bytes", lambda device: state // 2)
    with pytest.raises(InputError, match="use a smaller batch"):
        chosen("mlp:width=16")


def test_the_largest_block_keeps_a_layer_in_the_cache(monkeypatch):
    whole = chosen("mlp:width=16", experts=6).block
    # The largest tensor kept for the backward pass: 32 Fourier features of 32 samples in float32.
    monkeypatch.setattr(engines, "CACHE_BYTES", 2 * 32 * 32 * 4)
    assert (whole, chosen("mlp:width=16", experts=6).block) == (6, 2)


def test_compiling_without_a_compiler_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match="needs a C\\+\\+ compiler, and g\\+\\+ or clang\\+\\+ or c\\+\\+"):
        chosen("mlp:width=16", compiled=True)


def test_compiling_below_a_path_with_a_space_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "g++")
    monkeypatch.setattr(torch, "__file__", "/a folder/torch/__init__.py")
    with pytest.raises(InputError, match="has a space in it"):
        chosen("mlp:width=16", compiled=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.skipif(" " in torch.__file__, reason="torch hands its own folder to the compiler unquoted")
def test_a_compiled_program_gives_the_same_numbers():
    network = "mlp:width=16,depth=1"
    members = [denoiser(network, seed) for seed in range(2)]
    x, t, target = batch(network, 2)
    plain, fast = (Bank(members, "batched", 2, compiled=compiled) for compiled in (False, True))
    for bank in (plain, fast):
        bank.blocks[0].backward(x, t, target)
    for name, value in fast.blocks[0].parameters.items():
        torch.testing.assert_close(value.grad, plain.blocks[0].parameters[name].grad, rtol=1e-3, atol=1e-6)


class OfOne(nn.Module):
    """A linear layer on (4,) with one thing more, which ``forward`` applies to its output."""

    def __init__(self, more=None):
        super().__init__()
        self.layer, self.more = nn.Linear(4, 4), more or nn.Identity()

    def forward(self, x, log_snr):
        return self.more(self.layer(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parameters_stay_as_they_are(engine):
    members = [Denoiser(OfOne(), PROCESS, "eps", 1.0) for _ in range(1 if engine == "loop" else 2)]
    for member in members:
        member.network.layer.weight.requires_grad_(False)
    bank = Bank(members, engine, len(members))
    optimizer = torch.optim.AdamW(bank.leaves, lr=0.1, weight_decay=0.0, fused=True)
    x, t = torch.randn(len(members), 3, 4), torch.ones(len(members), 3, dtype=torch.long)
    bank.blocks[0].backward(x, t, torch.zeros_like(x))
    optimizer.step()
    for index, member in enumerate(members):
        weights = bank.weights(index)
        assert torch.equal(weights["network.layer.weight"], member.network.layer.weight)
        assert not torch.equal(weights["network.layer.bias"], member.network.layer.bias)


@pytest.mark.parametrize(
    ("more", "message"), [(nn.Dropout(0.2), "random in training"), (nn.BatchNorm1d(4), "rest of its batch")]
)
def test_networks_whose_rows_are_not_their_own_are_refused(more, message):
    with pytest.raises(InputError, match=message):
        choose_engine(Denoiser(OfOne(more), PROCESS, "eps", 1.0), (4,), batch=8, experts=2, iterations=10)


class Broken(nn.Module):
    def forward(self, x):
        return x * float("nan")


def test_a_network_that_gives_nan_is_not_folded_and_not_refused():
    network = Denoiser(OfOne(Broken()), PROCESS, "eps", 1.0)
    choice = choose_engine(network, (4,), batch=8, experts=2, iterations=10)
    assert "not finite" in choice.reason
