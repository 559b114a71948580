"""Two processes under torchrun against one, with whole weights in each and with weights cut in two."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from training import parallel
from training.curriculum_builders import make_curriculum
from training.parallel import Replicated
from training.run import Cadence, train
from training.trainer import TrainPlan

CADENCE = Cadence(evaluate=20, checkpoint=20, sample=0)

OWN = """
import torch

class Own(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, log_snr):
        if self.training:
            self.calls += 1
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x + 0.01 * self.calls
"""

TWO = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from difficulty.datasets import load_dataset
from difficulty.process import get_process
from training.curriculum import Curriculum
from training.parallel import join_processes
from training.run import Cadence, train
from training.trainer import TrainPlan

folder, network = Path(sys.argv[1]), sys.argv[2]
join_processes("cpu")
plan = TrainPlan(steps=60, batch=16, network=network, weight="min-snr+uncertainty")
data, process = load_dataset("gaussian:dim=4,var=0.25,n=400"), get_process("vp-linear:T=80")
curriculum = Curriculum.load(folder / "c.json")
for name, parallel in (("ddp", "ddp"), ("fsdp", "fsdp"), ("continued-one", "fsdp")):
    cadence = Cadence(evaluate=20, checkpoint=20, sample=0, watch=30)
    def watch(trainer, loss):
        if trainer.done == 30:  # neither evaluated nor kept
            size = sum(value.abs().sum() for value in trainer.ema.network.state_dict().values())
            (folder / f"{name}.txt").write_text(str(float(size)))
            cut = [type(block).__name__ for block in getattr(trainer.denoiser.network, "blocks", [])]
            assert cut == ["FSDPLinear" if parallel == "fsdp" else "Linear"] * len(cut), cut
    train(data, process, plan, folder / name, curriculum, cadence=cadence, parallel=parallel, watch=watch)
"""


def _without_the_last_checkpoint(source, target):
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step-00000060")


def _same_trajectory(one, two):
    for name in ("model", "ema", "optimizer"):
        whole, other = (load_file(out / "checkpoints" / "step-00000060" / f"{name}.safetensors") for out in (one, two))
        assert whole.keys() == other.keys()
        assert all(np.allclose(whole[key], other[key], atol=1e-4) for key in whole)
    # stage decisions and the counted samples are those of the whole batch, on every process
    stages = [pd.read_csv(out / "stages.csv") for out in (one, two)]
    assert stages[0].equals(stages[1])
    losses = [pd.read_csv(out / "losses.csv")["nats_per_log_snr"] for out in (one, two)]
    assert np.allclose(*losses, rtol=1e-3)


PACINGS = {
    "patience": {"tau": 4},
    "held-out": {"check_every": 5, "least": 5, "cost": 0.505},  # 121 draws, which two cannot share equally
}


@pytest.mark.parametrize("pacing", PACINGS)
@pytest.mark.skipif(sys.platform != "linux", reason="gloo rendezvous on the loopback")
def test_two_processes_train_as_one_does_however_they_share_the_weights(
    gaussian, process, ranking, pacing, tmp_path
):
    torch.set_num_threads(1)
    curriculum = make_curriculum(ranking, k=3, pacing=pacing, pacing_options=PACINGS[pacing])
    curriculum.save(tmp_path / "c.json")
    (tmp_path / "own.py").write_text(OWN)
    # A network with blocks that are put together one at a time and a buffer that every process has.
    network = "mlp:width=8,depth=2" if pacing == "patience" else f"{tmp_path / 'own.py'}:Own"
    plan = TrainPlan(steps=60, batch=16, network=network, weight="min-snr+uncertainty")
    train(gaussian, process, plan, tmp_path / "one", curriculum, cadence=CADENCE)
    _without_the_last_checkpoint(tmp_path / "one", tmp_path / "continued-one")
    (tmp_path / "two.py").write_text(TWO)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "two.py"), str(tmp_path), network],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # What watches a run sees the averaged weights of that moment, cut or not.
    watched = [float((tmp_path / f"{name}.txt").read_text()) for name in ("ddp", "fsdp")]
    np.testing.assert_allclose(*watched, rtol=1e-5)
    # A checkpoint of cut weights is whole: one process goes on with it.
    _without_the_last_checkpoint(tmp_path / "fsdp", tmp_path / "continued-fsdp")
    train(gaussian, process, plan, tmp_path / "continued-fsdp", curriculum, cadence=CADENCE)
    for name in ("ddp", "fsdp", "continued-one", "continued-fsdp"):
        _same_trajectory(tmp_path / "one", tmp_path / name)


def test_processes_whose_networks_left_out_other_layers_sum_what_they_have(monkeypatch):
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    for parameter, gradient in zip(parameters, (1.0, None, 2.0, None), strict=True):
        parameter.grad = None if gradient is None else torch.full((2,), gradient)
    # The other process has a loss of 5, and gradients of the first two.
    other = torch.tensor([5.0, 1, 1, 0, 0, 10, 10, 20, 20, 0, 0, 0, 0])
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda message: message.add_(other))
    total = torch.tensor(3.0)
    Replicated(2, torch.device("cpu")).reduce(total, parameters)
    assert total == 8
    assert [parameter.grad.tolist() for parameter in parameters[:3]] == [[11.0, 11.0], [20.0, 20.0], [2.0, 2.0]]
    assert parameters[3].grad is None
