import sys

import numpy as np
import pytest
import torch

from difficulty.errors import InputError
from difficulty.records import read_table
from training.cli import main
from training.events import EventLog

ARGUMENTS = [
    "training", "run", "gaussian:dim=4,var=0.25,n=400", "--steps", "40", "--evaluate-every", "20",
    "--sample-every", "20",
    "--checkpoint-every", "20", "--batch", "8", "--network", "mlp:width=8,depth=2", "--json", "--tensorboard",
]  # fmt: skip


def test_events_hold_what_the_tables_hold(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", [*ARGUMENTS, "--out", str(tmp_path / "run")])
    assert main() == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    curve = read_table(tmp_path / "run" / "curve.csv")
    losses = read_table(tmp_path / "run" / "losses.csv")
    found = [(event.step, event.value) for event in events.Scalars("heldout/nats")]
    assert np.allclose(found, curve[["step", "nats"]].to_numpy(), rtol=1e-5)
    task = losses[losses["task"] == 7]
    found = [(event.step, event.value) for event in events.Scalars("task_nats_per_log_snr/07")]
    assert np.allclose(found, task[["step", "nats_per_log_snr"]].to_numpy(), rtol=1e-5)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 10, 20, 30, 40]
    assert {event.value for event in events.Scalars("train/stage")} == {0.0}
    assert [event.step for event in events.Images("samples")] == [20, 40]
    assert len([tag for tag in events.Tags()["scalars"] if tag.startswith("task_loss/")]) == 20


def test_events_without_tensorboard_say_what_to_install_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"install denoising-difficulty\[tensorboard\]"):
        EventLog(tmp_path / "events")
    assert not list(tmp_path.iterdir())
