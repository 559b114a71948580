"""Two processes under torchrun against one."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from training.curriculum import make_curriculum

DATA = "gaussian:dim=4,var=0.25,n=400"


def _run(tmp_path, name, curriculum, launcher):
    out = tmp_path / name
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "training", "run", DATA, "--curriculum", str(curriculum), "--out", str(out),
         "--steps", "60", "--batch", "16", "--network", "mlp:width=8,depth=2", "--evaluate-every", "20",
         "--checkpoint-every", "20", "--sample-every", "0", "--device", "cpu", "--json"],
        capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.skipif(sys.platform != "linux", reason="gloo rendezvous on the loopback")
def test_two_processes_train_as_one_does_at_the_same_global_batch(ranking, tmp_path):
    curriculum = make_curriculum(ranking, k=3, pacing="patience", pacing_options={"tau": 4})
    curriculum.save(tmp_path / "c.json")
    one = _run(tmp_path, "one", tmp_path / "c.json", [])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = _run(tmp_path, "two", tmp_path / "c.json", launcher)
    weights = [load_file(out / "checkpoints" / "step-00000060" / "model.safetensors") for out in (one, two)]
    assert all(np.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])
    # stage decisions and the counted samples are those of the whole batch, on every process
    stages = [pd.read_csv(out / "stages.csv") for out in (one, two)]
    assert stages[0].equals(stages[1])
    losses = [pd.read_csv(out / "losses.csv")["nats_per_log_snr"] for out in (one, two)]
    assert np.allclose(*losses, rtol=1e-3)
