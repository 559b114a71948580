import errno
import os

import pytest
import torch

from difficulty.errors import InputError
from training.checkpoint import list_checkpoints, load_latest, save_checkpoint
from training.trainer import Trainer, TrainPlan

PLAN = TrainPlan(steps=20, batch=8, network="mlp:width=8,depth=2")
FILES = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.fixture
def trainer(gaussian, process, curriculum):
    trainer = Trainer(gaussian, process, PLAN, curriculum)
    for _ in range(3):
        trainer.step()
    return trainer


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a == b


def test_checkpoint_is_read_back_bit_for_bit(trainer, tmp_path):
    state = trainer.state_dict()
    save_checkpoint(tmp_path, state, keep=3)
    found, passed = load_latest(tmp_path)
    assert not passed
    assert _equal(dict(found), state)


def test_weights_are_plain_safetensors_of_the_network(trainer, tmp_path):
    from safetensors.torch import load_file

    path = save_checkpoint(tmp_path, trainer.state_dict(), keep=3)
    assert _equal(load_file(path / "model.safetensors"), dict(trainer.denoiser.network.state_dict()))


def test_only_the_last_checkpoints_are_kept(trainer, tmp_path):
    for _ in range(5):
        trainer.step()
        save_checkpoint(tmp_path, trainer.state_dict(), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000007", "step-00000008"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_damaged_checkpoint_falls_back_to_the_one_before_with_a_message(trainer, tmp_path, name, damage):
    save_checkpoint(tmp_path, trainer.state_dict(), keep=3)
    trainer.step()
    file = save_checkpoint(tmp_path, trainer.state_dict(), keep=3) / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    state, passed = load_latest(tmp_path)
    assert state["step"] == 3
    assert len(passed) == 1
    assert "step-00000004" in passed[0]
    assert "the checkpoint before it is used" in passed[0]


@pytest.mark.parametrize("manifest", ["{}", "[]", "null", '{"state.json": 3}', "[" * 100_000])
def test_manifest_that_names_no_files_is_damage(trainer, tmp_path, manifest):
    save_checkpoint(tmp_path, trainer.state_dict(), keep=3)
    trainer.step()
    (save_checkpoint(tmp_path, trainer.state_dict(), keep=3) / "manifest.json").write_text(manifest)
    state, passed = load_latest(tmp_path)
    assert state["step"] == 3
    assert "step-00000004" in passed[0]


def test_full_disk_is_said_in_one_sentence_and_leaves_the_last_good_checkpoint(trainer, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, trainer.state_dict(), keep=3)
    trainer.step()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device; the last good one is .*step-00000003"):
        save_checkpoint(tmp_path, trainer.state_dict(), keep=3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    assert load_latest(tmp_path)[0]["step"] == 3


def test_folder_of_a_killed_write_is_never_read_and_is_removed(trainer, tmp_path):
    (tmp_path / ".step-00000009.abc").mkdir(parents=True)
    assert load_latest(tmp_path) == (None, [])
    save_checkpoint(tmp_path, trainer.state_dict(), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_damaged_checkpoints_of_later_steps_do_not_push_out_the_one_just_written(trainer, tmp_path):
    for _ in range(2):
        (save_checkpoint(tmp_path, trainer.state_dict(), keep=3) / "ema.safetensors").write_bytes(b"")
        trainer.step()
    early = trainer.state_dict() | {"step": 1}
    written = save_checkpoint(tmp_path, early, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == [written.name]
    assert load_latest(tmp_path)[0]["step"] == 1


def test_a_heldout_loss_that_is_not_finite_is_kept_as_null(trainer, tmp_path):
    save_checkpoint(tmp_path, trainer.state_dict() | {"log": {"curve": [[1, float("nan"), float("inf")]]}}, keep=1)
    assert load_latest(tmp_path)[0]["log"] == {"curve": [[1, None, None]]}
