import sys
from types import SimpleNamespace

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


def test_a_run_that_goes_on_overwrites_the_events_after_its_checkpoint(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, loss in ((1, 100, 1.0), (61, 80, 2.0)):  # killed after 100, its last checkpoint being that of 60
        log = EventLog(tmp_path)
        for step in range(first, last + 1):
            log.iteration(SimpleNamespace(done=step, lr_at=lambda _: 0.1, sampler=SimpleNamespace(stage=0)), loss)
        log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 1.0)] + [(t, 1.0) for t in range(10, 61, 10)] + [(61, 2.0), (70, 2.0), (80, 2.0)]


def test_events_without_tensorboard_say_what_to_install_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"install denoising-difficulty\[tensorboard\]"):
        EventLog(tmp_path / "events")
    assert not list(tmp_path.iterdir())
