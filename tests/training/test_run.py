"""A run in a folder: killed at any moment and continued, it ends as if nothing had happened."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difficulty.datasets import load_dataset
from difficulty.errors import InputError
from difficulty.models import load_denoiser
from difficulty.process import get_process
from training.curriculum_builders import make_curriculum
from training.plots import draw_folder, save_grid
from training.run import Cadence, restore, train
from training.trainer import Diverged, TrainPlan

PLAN = TrainPlan(steps=60, batch=8, network="mlp:width=8,depth=2", warmup=5)
CADENCE = Cadence(evaluate=7, checkpoint=9, sample=0, keep=2)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def staged(ranking):
    return make_curriculum(ranking, k=3, pacing="patience", pacing_options={"tau": 4})


def _result(out: Path) -> dict:
    """What must not depend on interruptions: final weights, averages, moments, and every table."""
    last = sorted((out / "checkpoints").iterdir())[-1]
    files = {path.name: path.read_bytes() for path in last.iterdir()}
    return files | {name: (out / name).read_bytes() for name in ("losses.csv", "curve.csv", "stages.csv")}


class Stop(Exception):
    pass


def _stop_at(step):
    def watch(trainer, loss):
        if trainer.done == step:
            raise Stop

    return watch


@pytest.mark.parametrize("stop", [1, 9, 10, 31, 59])
def test_interrupted_and_continued_run_equals_the_uninterrupted_one_bit_for_bit(
    stop, gaussian, process, staged, tmp_path
):
    train(gaussian, process, PLAN, tmp_path / "whole", staged, cadence=CADENCE)
    with pytest.raises(Stop):
        train(gaussian, process, PLAN, tmp_path / "cut", staged, cadence=CADENCE, watch=_stop_at(stop))
    told = []
    train(gaussian, process, PLAN, tmp_path / "cut", staged, cadence=CADENCE, tell=told.append)
    assert _result(tmp_path / "whole") == _result(tmp_path / "cut")
    assert bool(told) == (stop > 9)  # the first checkpoint follows iteration 9


def test_a_run_that_is_continued_with_another_cadence_ends_with_the_same_weights(gaussian, process, staged, tmp_path):
    with pytest.raises(Stop):
        train(gaussian, process, PLAN, tmp_path / "run", staged, cadence=CADENCE, watch=_stop_at(31))
    other = Cadence(evaluate=20, checkpoint=15, sample=3, keep=5, grid=4)
    train(gaussian, process, PLAN, tmp_path / "run", staged, cadence=other, show=save_grid)
    train(gaussian, process, PLAN, tmp_path / "whole", staged, cadence=CADENCE)
    last = Path("checkpoints", "step-00000060")
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "run" / last / name).read_bytes() == (tmp_path / "whole" / last / name).read_bytes()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["cadence"]["evaluate"] == 20


def test_finished_run_is_left_as_it_is(gaussian, process, tmp_path):
    def facts():
        return (tmp_path / "run" / "run.json").read_bytes()

    train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE)
    before = _result(tmp_path / "run"), facts()
    train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE)
    assert (_result(tmp_path / "run"), facts()) == before


def test_a_continued_run_states_the_seconds_of_all_its_parts(gaussian, process, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000_000, 1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))

    def seconds():
        return json.loads((tmp_path / "run" / "run.json").read_text())["wall_seconds"]

    with pytest.raises(Stop):
        train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE, watch=_stop_at(40))
    first = seconds()
    train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE)
    assert seconds() > first >= 4000


def test_two_runs_of_the_same_settings_write_the_same_denoiser(gaussian, process, tmp_path):
    files = []
    for name in ("a", "b"):
        train(gaussian, process, PLAN, tmp_path / name, cadence=CADENCE)
        files.append((tmp_path / name / "denoiser.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_denoiser_of_the_earlier_format_is_read(gaussian, process, tmp_path):
    trainer = train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE)
    path = tmp_path / "run" / "denoiser.safetensors"
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    del facts["format"]
    earlier = {"format": "denoising-difficulty/denoiser/1", "facts": json.dumps(facts)}
    save_file(load_file(path), path, earlier)
    x, t = torch.randn(3, 4), torch.tensor([1, 40, 80])
    assert torch.equal(load_denoiser(path).eps(x, t), trainer.ema.eps(x, t))
    save_file(load_file(path), path, {"facts": "[]"})
    with pytest.raises(InputError, match="has format None"):
        load_denoiser(path)


def test_drawing_a_folder_again_writes_the_same_figures(gaussian, process, tmp_path):
    train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE, show=save_grid)
    first, second = ({path: path.read_bytes() for path in draw_folder(tmp_path / "run")} for _ in range(2))
    assert first == second
    assert any(path.suffix == ".svg" for path in first)


KILLED = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from difficulty.datasets import load_dataset
from difficulty.process import get_process
from training.curriculum import Curriculum
from training.run import Cadence, train
from training.trainer import Trainer, TrainPlan
import os, random, signal, time

out, curriculum = Path(sys.argv[1]), Curriculum.load(sys.argv[2])
data, process = load_dataset("gaussian:dim=4,var=0.25,n=400"), get_process("vp-linear:T=80")
plan = TrainPlan(steps=800, batch=8, network="mlp:width=8,depth=2", warmup=5)
cadence = Cadence(evaluate=50, checkpoint=11, sample=0, keep=2)
Trainer(data, process, plan, curriculum)  # imports everything that training imports late, before the forks
kills = 0
rng = random.Random(0)
while True:
    child = os.fork()
    if child == 0:
        train(data, process, plan, out, curriculum, cadence=cadence)
        os._exit(0)
    if kills < 20:
        time.sleep(rng.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            continue
    else:
        _, status = os.waitpid(child, 0)
    break
print(kills, os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_twenty_kills_at_random_moments_change_nothing_in_the_end(gaussian, process, staged, tmp_path):
    staged.save(tmp_path / "c.json")
    plan = TrainPlan(steps=800, batch=8, network="mlp:width=8,depth=2", warmup=5)
    cadence = Cadence(evaluate=50, checkpoint=11, sample=0, keep=2)
    train(gaussian, process, plan, tmp_path / "whole", staged, cadence=cadence)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(tmp_path / "c.json")],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills, exit_code = map(int, done.stdout.split())
    assert exit_code == 0
    assert kills >= 10  # on a fast machine the run may end before the twentieth kill
    assert _result(tmp_path / "whole") == _result(tmp_path / "killed")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


def test_damaged_last_checkpoint_is_passed_over_with_a_message_and_changes_nothing(gaussian, process, staged, tmp_path):
    train(gaussian, process, PLAN, tmp_path / "whole", staged, cadence=CADENCE)
    with pytest.raises(Stop):
        train(gaussian, process, PLAN, tmp_path / "cut", staged, cadence=CADENCE, watch=_stop_at(40))
    last = sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1]
    (last / "ema.safetensors").write_bytes(b"cut off")
    told = []
    train(gaussian, process, PLAN, tmp_path / "cut", staged, cadence=CADENCE, tell=told.append)
    assert "damaged" in told[0]
    assert "after step 27" in told[1]
    assert _result(tmp_path / "whole") == _result(tmp_path / "cut")


def test_loss_that_becomes_nan_keeps_the_last_good_state_and_says_where(gaussian, process, tmp_path):
    def poison(trainer, loss):
        if trainer.done == 12:
            trainer.source.samples = torch.full_like(trainer.source.samples, float("nan"))

    with pytest.raises(Diverged, match=r"the loss became nan at step 12.* the last good state is checkpoint 12"):
        train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE, watch=poison)
    denoiser, _ = restore(tmp_path / "run")
    assert all(torch.isfinite(weight).all() for weight in denoiser.parameters())
    assert (tmp_path / "run" / "checkpoints" / "step-00000012").is_dir()
    # On clean data the run goes on as if nothing had happened; the draws of the failed step count once.
    train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE, resume="auto")
    train(gaussian, process, PLAN, tmp_path / "undisturbed", cadence=CADENCE)
    assert _result(tmp_path / "run") == _result(tmp_path / "undisturbed")


def test_a_state_whose_weights_have_grown_too_large_is_not_kept_as_a_good_one(gaussian, process, tmp_path):
    wild = replace(PLAN, lr=1e30, warmup=0, clip=0.0)
    with pytest.raises(Diverged, match="grown too large; there is no checkpoint; lower the learning rate"):
        train(gaussian, process, wild, tmp_path / "run", cadence=CADENCE)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_run_starts_from_the_trained_weights_of_another(gaussian, process, tmp_path):
    def poison(trainer, loss):
        if trainer.done == 12:
            trainer.source.samples = torch.full_like(trainer.source.samples, float("nan"))

    out, new = tmp_path / "run", tmp_path / "new"
    with pytest.raises(Diverged, match=f"go on from it by --init-from {out} in a new folder"):
        train(gaussian, process, PLAN, out, cadence=CADENCE, watch=poison)
    weights = load_file(out / "checkpoints" / "step-00000012" / "model.safetensors")
    still = TrainPlan(**(vars(PLAN) | {"lr": 1e-30, "steps": 4}))
    trainer = train(gaussian, process, still, new, cadence=CADENCE, init_from=out)
    for network in (trainer.denoiser.network, trainer.ema.network):
        assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert json.loads((new / "run.json").read_text())["config"]["init_from"]["step"] == 12
    train(gaussian, process, still, new, cadence=CADENCE, init_from=out)
    with pytest.raises(InputError, match=r"other settings \(init_from\.config \w{8}\.\.\. -> none"):
        train(gaussian, process, still, new, cadence=CADENCE)
    for change, said in (
        ({"network": "mlp:width=9,depth=2"}, "are of network mlp:width=8,depth=2, this run has mlp:width=9,depth=2"),
        ({"prediction": "v"}, "are of prediction eps, this run has v"),
    ):
        with pytest.raises(InputError, match=said):
            train(gaussian, process, TrainPlan(**(vars(PLAN) | change)), tmp_path / "other", init_from=out)
    plane = load_dataset("gaussian:dim=2,n=400")
    with pytest.raises(InputError, match=r"are of shape of data \[4\], this run has \[2\]"):
        train(plane, process, PLAN, tmp_path / "other", init_from=out)
    assert not (tmp_path / "other").exists()


def test_folder_of_another_run_or_another_command_is_refused(gaussian, process, one_cluster, tmp_path):
    train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE)
    for change, said in (
        ({"lr": 0.5}, r"\(plan\.lr 0\.001 -> 0\.5\)"),
        ({"seed": 1, "density": "log-snr"}, r"\(plan\.density none -> log-snr, plan\.seed 0 -> 1\)"),
    ):
        with pytest.raises(InputError, match=f"other settings {said}"):
            train(gaussian, process, TrainPlan(**(vars(PLAN) | change)), tmp_path / "run", cadence=CADENCE)
    with pytest.raises(InputError, match=rf"other settings \(curriculum none -> {one_cluster.sha256[:8]}\.\.\.\)"):
        train(gaussian, process, PLAN, tmp_path / "run", one_cluster, cadence=CADENCE)
    with pytest.raises(InputError, match="already holds a run"):
        train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE, resume="never")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(InputError, match="not empty"):
        train(gaussian, process, PLAN, tmp_path / "mine", cadence=CADENCE)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_tables_hold_every_task_at_every_evaluation_and_every_sample(gaussian, process, staged, tmp_path):
    train(gaussian, process, PLAN, tmp_path / "run", staged, cadence=CADENCE)
    losses, stages = (pd.read_csv(tmp_path / "run" / f"{name}.csv") for name in ("losses", "stages"))
    assert sorted(losses["step"].unique()) == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert (losses.groupby("step")["task"].nunique() == 8).all()
    assert losses[["nats_per_log_snr", "loss"]].gt(0).all(axis=None)
    counts = stages["samples_per_task"].str.split(expand=True).astype(int)
    assert counts.to_numpy().sum() == 60 * 8
    assert stages["end"].iloc[-1] == 60
    assert (stages["start"].iloc[1:].to_numpy() == stages["end"].iloc[:-1].to_numpy()).all()
    assert stages["reason"].str.len().gt(0).all()


def test_restored_denoiser_holds_the_averaged_weights(gaussian, process, tmp_path):
    trainer = train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE)
    denoiser, config = restore(tmp_path / "run")
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000060" / "ema.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in denoiser.network.state_dict().items())
    x, t = torch.randn(5, 4), torch.randint(1, 81, (5,))
    assert torch.equal(denoiser.eps(x, t), trainer.ema.eps(x, t))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"] | {"step": 60} == config


def test_folder_without_a_checkpoint_cannot_be_restored(tmp_path):
    with pytest.raises(InputError, match=r"no run\.json"):
        restore(tmp_path)


def test_damaged_last_checkpoint_is_said_where_a_run_is_read(gaussian, process, tmp_path):
    train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE)
    (tmp_path / "run" / "checkpoints" / "step-00000060" / "ema.safetensors").write_bytes(b"cut off")
    told = []
    restore(tmp_path / "run", told.append)
    assert len(told) == 1
    assert "step-00000060 is damaged" in told[0]


@pytest.mark.parametrize("change", [{"format": "denoising-difficulty/run/9"}, {"config": None}])
def test_run_of_another_version_cannot_be_restored(gaussian, process, tmp_path, change):
    train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE)
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="another version or damaged"):
        restore(tmp_path / "run")


def test_a_finished_run_is_probed_from_its_folder(gaussian, process, tmp_path):
    from difficulty.probe import probe

    trainer = train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE)
    found = probe(tmp_path / "run", gaussian, out=tmp_path / "probe", tasks=4, draws=32)
    assert (found.table["heldout_loss"] > 0).all()
    trained, _ = restore(tmp_path / "run")
    x, t = torch.randn(3, *gaussian.shape), torch.tensor([1, 5, process.T])
    assert torch.equal(trained.eps(x, t), trainer.ema.eps(x, t))


OWN = """
import torch

class Own(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(5, width), torch.nn.Linear(width, 4)

    def forward(self, x, log_snr):
        return self.outer(self.inner(torch.cat([x, log_snr.clamp(-9, 9)[:, None]], 1)).tanh())

def make(shape):
    return Own({width})
"""


def test_a_run_is_that_of_its_network_file_and_outlives_it(gaussian, process, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file, out = Path("own.py"), tmp_path / "run"
    file.write_text(OWN.replace("{width}", "8"))
    plan = TrainPlan(**(vars(PLAN) | {"network": "own.py:make", "steps": 10}))
    trainer = train(gaussian, process, plan, out, cadence=CADENCE)
    x, t = torch.randn(3, 4), torch.tensor([1, 40, 80])
    expected = trainer.ema.eps(x, t)

    def read():
        return restore(out)[0].eps(x, t), load_denoiser(out / "denoiser.safetensors").eps(x, t)

    assert all(torch.equal(found, expected) for found in read())
    file.write_text(OWN.replace("{width}", "9"))
    with pytest.raises(InputError, match=r"other settings \(network_file \w{8}\.\.\. -> \w{8}\.\.\.\)"):
        train(gaussian, process, plan, out, cadence=CADENCE)
    assert all(torch.equal(found, expected) for found in read())
    file.unlink()
    monkeypatch.chdir(tmp_path)
    assert all(torch.equal(found, expected) for found in read())
    (out / "network" / "own.py").write_text(OWN.replace("{width}", "9"))
    for load in (restore, lambda folder: load_denoiser(folder / "denoiser.safetensors")):
        with pytest.raises(InputError, match=r"'own\.py:make' was changed or removed, and so was its copy"):
            load(out)


def test_weights_that_do_not_fit_the_network_of_a_run_cost_one_sentence(gaussian, process, tmp_path):
    train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE)
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace("mlp:width=8,depth=2", "mlp:width=16,depth=2"))
    with pytest.raises(InputError, match="do not fit network 'mlp:width=16,depth=2'"):
        restore(tmp_path / "run")


def test_task_that_was_never_trained_is_said(gaussian, process, staged, tmp_path):
    told = []
    plan = TrainPlan(**(vars(PLAN) | {"steps": 2}))  # patience keeps the first cluster longer than that
    train(gaussian, process, plan, tmp_path / "short", staged, cadence=CADENCE, tell=told.append)
    assert sum("was never trained" in sentence for sentence in told) == 5
    told.clear()
    train(gaussian, process, PLAN, tmp_path / "long", staged, cadence=CADENCE, tell=told.append)
    assert not told
    narrow = TrainPlan(**(vars(PLAN) | {"density": "log-normal:mean=-1.2,std=0.05"}))
    train(gaussian, process, narrow, tmp_path / "narrow", cadence=CADENCE, tell=told.append)
    assert told
    assert all("so choose a wider density" in sentence for sentence in told)


def test_stages_that_never_had_an_iteration_are_said(gaussian, process, ranking, staged, tmp_path, recwarn):
    told: list[str] = []
    plan = TrainPlan(steps=20, batch=8, network="mlp:width=8,depth=2")
    brief = make_curriculum(ranking, method="uniform", k=8)
    train(gaussian, process, plan, tmp_path / "brief", brief, cadence=CADENCE, tell=told.append)
    assert sum("had no iterations" in sentence for sentence in told) == 3
    waiting = staged.with_clusters(staged.clusters, pacing={"rule": "patience", "options": {"tau": 1000}})
    train(gaussian, process, plan, tmp_path / "waiting", waiting, cadence=CADENCE, tell=told.append)
    assert any("budget of 20 iterations is spent in stage 1 of 3" in sentence for sentence in told)
    assert not recwarn.list


def test_a_run_whose_checkpoints_are_all_damaged_says_that_it_starts_anew(gaussian, process, tmp_path):
    train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"")
    told = []
    train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE, tell=told.append)
    assert "starting anew" in told[-1]
    assert not any("before it is used" in sentence for sentence in told)


def test_data_whose_squares_overflow_are_refused_before_anything_is_written(gaussian, process, tmp_path):
    huge = replace(gaussian, train=gaussian.train * 1e30, heldout=gaussian.heldout * 1e30)
    with pytest.raises(InputError, match=r"data_std must be below 1e\+15, got .*: squares of the data overflow"):
        train(huge, process, PLAN, tmp_path / "run", cadence=CADENCE)
    assert not (tmp_path / "run").exists()


def test_disk_that_fills_up_at_the_start_is_said_of_the_file_that_it_concerns(gaussian, process, tmp_path, monkeypatch):
    def full(handle):
        if list((tmp_path / "run").glob("run.json")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"process\.csv: No space left on device; this file was not changed"):
        train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    monkeypatch.undo()
    train(gaussian, process, PLAN, tmp_path / "run", cadence=CADENCE)


def test_disk_that_fills_up_costs_one_sentence_and_the_run_goes_on_once_there_is_room(
    gaussian, process, staged, tmp_path, monkeypatch
):
    train(gaussian, process, PLAN, tmp_path / "whole", staged, cadence=CADENCE)
    room, fsync = [40], os.fsync

    def limited(handle):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", limited)
    with pytest.raises(InputError, match="No space left on device"):
        train(gaussian, process, PLAN, tmp_path / "full", staged, cadence=CADENCE)
    denoiser, _ = restore(tmp_path / "full")
    assert all(torch.isfinite(weight).all() for weight in denoiser.parameters())
    monkeypatch.undo()
    train(gaussian, process, PLAN, tmp_path / "full", staged, cadence=CADENCE)
    assert _result(tmp_path / "whole") == _result(tmp_path / "full")


@pytest.mark.parametrize(
    ("process", "tasks"), [("vp-linear:T=5", 5), ("flow-matching:T=5", 4), ("flow-matching:T=2", 1)]
)
def test_a_process_of_few_timesteps_is_trained_in_as_many_tasks(process, tasks, gaussian, tmp_path):
    train(gaussian, get_process(process), PLAN, tmp_path / "run", cadence=CADENCE)
    assert pd.read_csv(tmp_path / "run" / "losses.csv")["task"].nunique() == tasks


@pytest.mark.parametrize("spec", ["vp-linear:T=60,beta_last=0.05", "edm:T=60,rho=3.0"])
def test_a_run_of_a_built_in_process_with_options_is_read_back(spec, gaussian, tmp_path):
    process = get_process(spec)
    train(gaussian, process, replace(PLAN, steps=3), tmp_path / "run", cadence=CADENCE)
    denoiser, _ = restore(tmp_path / "run")
    assert denoiser.process.fingerprint == process.fingerprint
