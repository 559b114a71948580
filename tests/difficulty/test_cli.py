"""The command line as a user meets it: results, refusals, exit codes."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from difficulty.cli import SUBCOMMANDS
from difficulty.commandline import run_cli
from difficulty.denoiser import Denoiser
from difficulty.models import save_denoiser
from difficulty.networks import build_network
from difficulty.process import get_process
from difficulty.records import read_json, write_json
from difficulty.relative_entropy import kl

SMALL = ["--tasks", "4", "--budget", "20", "--batch", "16", "--seeds", "2", "--network", "mlp:width=16"]


def run(*args):
    return run_cli(SUBCOMMANDS, "difficulty", "", [str(arg) for arg in args])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "with space" / "grid"
    assert run("measure", "grid-2d:n=200", "--process", "vp-linear:T=50", "--out", folder, *SMALL) == 0
    return folder


def test_a_measurement_folder_holds_tables_ranking_and_figures(measured):
    assert read_json(measured / "run.json")["status"] == "finished"
    losses = pd.read_csv(measured / "losses.csv")
    assert {"task", "seed", "iteration", "samples", "heldout_loss", "floor", "floor_kind"} <= set(losses.columns)
    assert (losses["floor_kind"] == "exact").all()
    convergence = pd.read_csv(measured / "convergence.csv")
    assert {"task", "definition", "value", "ci_low", "ci_high", "censored"} <= set(convergence.columns)
    entropy = pd.read_csv(measured / "relative_entropy.csv")
    assert entropy["t"].tolist() == list(range(2, 51))
    ranking = read_json(measured / "ranking.json")
    assert set(ranking["measures"]) >= {"excess_nats", "log_regret", "paper_style", "relative_entropy"}
    for figure in ("difficulty", "ranks", "agreement", "learning_curves", "relative_entropy"):
        assert (measured / "figures" / f"{figure}.png").stat().st_size > 5000
        assert (measured / "figures" / f"{figure}.svg").exists()
    assert not list(measured.glob("*.partial*"))
    assert not list(measured.rglob("*.tmp"))


def test_the_same_command_again_gives_the_same_files(measured):
    names = ("losses.csv", "convergence.csv", "relative_entropy.csv", "ranking.json")
    before = {name: (measured / name).read_bytes() for name in names}
    assert run("measure", "grid-2d:n=200", "--process", "vp-linear:T=50", "--out", measured, *SMALL) == 0
    assert {name: (measured / name).read_bytes() for name in names} == before


def test_rank_makes_the_same_ranking_from_the_tables_and_prints_it(measured, capsys):
    before = read_json(measured / "ranking.json")
    (measured / "ranking.json").unlink()
    assert run("rank", measured, "--json") == 0
    assert json.loads(capsys.readouterr().out) == before == read_json(measured / "ranking.json")


def test_plot_draws_the_figures_again(measured, capsys):
    (measured / "figures" / "ranks.png").unlink()
    assert run("plot", measured) == 0
    assert str(measured / "figures" / "ranks.png") in capsys.readouterr().out
    assert (measured / "figures" / "ranks.png").exists()


def test_one_measure_alone_is_enough(tmp_path):
    common = ["grid-2d:n=200", "--process", "edm:T=50", *SMALL]
    assert run("measure", *common, "--measures", "relative-entropy", "--out", tmp_path / "a") == 0
    assert set(read_json(tmp_path / "a" / "ranking.json")["measures"]) >= {"relative_entropy"}
    assert not (tmp_path / "a" / "losses.csv").exists()


@pytest.mark.parametrize("command", ["datasets", "processes"])
def test_lists_are_readable_by_people_and_machines(command, capsys):
    assert run(command) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 5
    assert run(command, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) >= 5


def refused(capsys, *args):
    """The single sentence on stderr of a command that must end with exit code 2."""
    assert run(*args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--process", "linear"], "known are vp-linear"),
        (["--prediction", "noise"], "known are eps, x0, v"),
        (["--network", "cnn"], "known are mlp, unet, dit"),
        (["--network", "unet"], "needs images"),
        (["--budget", "5"], "ends before the first checkpoints"),
        (["--tasks", "2000"], "number of tasks"),
        (["--seeds", "0"], "need at least one seed"),
        (["--estimator", "magic"], "known are"),
    ],
)
def test_arguments_that_cannot_be_used_cost_one_sentence_and_leave_nothing_behind(tmp_path, capsys, change, message):
    out = tmp_path / "out"
    assert message in refused(capsys, "measure", "grid-2d:n=200", "--out", out, *SMALL, *change)
    assert not (out / "run.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--pairs", "0"], "2..1000"),
        (["--pairs", "1001"], "2..1000"),
        (["--pairs", "-3"], "2..1000"),
        (["--tasks", "0"], "1..999"),
        (["--tasks", "1000"], "1..999"),
        (["--tasks", "-2"], "1..999"),
        (["--pairs", "5", "--tasks", "3"], "not both"),
        (["--seed", "-1"], "seed must not be negative"),
        (["--estimator", "foo"], "unknown estimator"),
        (["--estimator", "exact"], "is not known"),
        (["--model", "x"], "serves estimator 'score' only"),
        (["--model", "x", "--estimator", "score"], "is no model"),
        (["--process", "absent.npz"], "does not exist"),
    ],
)
def test_arguments_that_kl_cannot_use_cost_one_sentence_and_leave_nothing_behind(tmp_path, capsys, change, message):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((40, 2)))
    assert message in refused(capsys, "kl", tmp_path / "rows.npy", "--out", tmp_path / "out", *change)
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_process_is_refused_by_kl_before_anything_is_written(tmp_path, capsys):
    denoiser = Denoiser(build_network("mlp:width=16", (2,), 0), get_process("edm:T=50"), "eps", 1.0)
    save_denoiser(denoiser, tmp_path / "denoiser.safetensors", "mlp:width=16", (2,))
    asked = ["--process", "ve:T=50", "--estimator", "score", "--model", tmp_path / "denoiser.safetensors"]
    assert "noise levels differ" in refused(capsys, "kl", "grid-2d:n=200", "--out", tmp_path / "out", *asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--for-process", "edm", "linear"], "known are vp-linear"),
        (["--for-process", "edm", "edm"], "both be written to kl-edm.csv"),
        (["--for-process", "edm", "--experts", "0"], "number of experts must be at least 1"),
        (["--experts", "0"], "number of experts must be at least 1"),
        (["--seed", "-1"], "seed must not be negative"),
    ],
)
def test_arguments_that_profile_cannot_use_cost_one_sentence_and_leave_nothing_behind(
    tmp_path, capsys, change, message
):
    assert message in refused(capsys, "profile", "gaussian:dim=2,n=40", "--out", tmp_path / "out", *change)
    assert not (tmp_path / "out").exists()


def test_a_process_of_ones_own_is_taken_by_every_measuring_command(tmp_path):
    process, own = get_process("vp-cosine:T=30"), tmp_path / "mine.npz"
    np.savez(own, alpha=process.alpha, sigma=process.sigma)
    data = "gaussian:dim=2,var=0.25,n=200"
    assert run("kl", data, "--process", own, "--out", tmp_path / "kl") == 0
    assert run("profile", data, "--for-process", own, "--out", tmp_path / "profile") == 0
    assert run("measure", data, "--process", own, "--out", tmp_path / "measured", *SMALL) == 0
    assert run("rank", tmp_path / "measured") == 0
    found = pd.read_csv(tmp_path / "kl" / "relative_entropy.csv")
    np.testing.assert_allclose(found.kl, kl(data, process).kl, rtol=1e-9)
    assert len(pd.read_csv(tmp_path / "profile" / "kl-mine.csv")) == 29
    process.check_fingerprint(read_json(tmp_path / "measured" / "ranking.json")["process"], "the ranking")


def test_pairs_that_are_not_valid_are_named_without_the_valid_ones_between_them(tmp_path, capsys, monkeypatch):
    table = pd.DataFrame({"t": [2, 4, 8, 500, 950], "valid": [False, False, True, True, False], "reason": "too few"})
    monkeypatch.setattr("difficulty.entropy_folder.run_kl", lambda *arguments: table)
    assert run("kl", "digits", "--out", tmp_path / "out") == 0
    assert "not valid at t = 2..4, 950 (3 pairs): too few" in capsys.readouterr().out


def test_data_that_cannot_be_used_cost_one_sentence(tmp_path, capsys):
    np.save(tmp_path / "nan.npy", np.full((40, 2), np.nan))
    assert "NaN" in refused(capsys, "measure", tmp_path / "nan.npy", "--out", tmp_path / "out", *SMALL)
    np.save(tmp_path / "zero.npy", np.zeros((40, 2)))
    assert "all zero" in refused(capsys, "measure", tmp_path / "zero.npy", "--out", tmp_path / "out", *SMALL)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_finished_measurement_are_refused(tmp_path, capsys, measured):
    assert "is not a folder" in refused(capsys, "rank", tmp_path / "absent")
    assert "no run.json" in refused(capsys, "plot", tmp_path)
    run_json = read_json(measured / "run.json")
    write_json(tmp_path / "run.json", run_json | {"status": "running"})
    assert "incomplete" in refused(capsys, "rank", tmp_path)
    write_json(tmp_path / "run.json", run_json | {"format": "denoising-difficulty/run/0"})
    assert "this version reads" in refused(capsys, "rank", tmp_path)
    write_json(tmp_path / "run.json", run_json)
    assert "process.csv does not exist" in refused(capsys, "rank", tmp_path)


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
@pytest.mark.parametrize("command", [["training", "--help"], ["difficulty", "processes"]])
def test_output_that_nobody_reads_on_ends_a_command_quietly(command, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, *unbuffered, "-m", *command], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_warning_is_one_line_without_its_place_in_the_code():
    code = (
        "import sys, warnings; from difficulty.commandline import run_cli\n"
        "def one():\n    'One.'\n    warnings.warn('stage 2 had no iterations')\n"
        "sys.exit(run_cli({'one': one, 'two': one}, 'difficulty', '', ['one']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "warning: stage 2 had no iterations\n")


def test_a_broken_pipe_that_is_not_the_output_keeps_its_traceback():
    def broken():
        """Talk to a process that has gone."""
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_cli({"broken": broken, "other": broken}, "difficulty", "", ["broken"])


def test_results_are_never_overwritten_by_another_measurement(capsys, measured):
    before = (measured / "losses.csv").read_bytes()
    message = refused(capsys, "measure", "ring-16d:n=200", "--process", "vp-linear:T=50", "--out", measured, *SMALL)
    assert "finished run with other settings" in message
    assert (measured / "losses.csv").read_bytes() == before


def test_a_folder_in_which_nothing_was_found_is_free_for_another_run(tmp_path, capsys):
    function, out = tmp_path / "model.py", tmp_path / "out"
    function.write_text(
        "calls = []\ndef eps(x, t):\n    calls.append(0)\n    assert len(calls) < 4, 'tired'\n    return 0 * x\n"
    )
    model, data = f"{function}:eps", "gaussian:dim=4,var=0.25,n=400"
    probed = ["probe", model, data, "--process", "vp-linear", "--out", out, "--tasks", "4", "--draws"]
    assert run(*probed, "64") == 2
    assert "tired" in capsys.readouterr().err.splitlines()[-1]
    assert not (out / "probe.csv").exists()
    function.write_text("def eps(x, t):\n    return 0 * x\n")
    assert run(*probed, "128") == 0
    capsys.readouterr()
    assert "finished run with other settings" in refused(capsys, *probed, "64")


def test_somebody_elses_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("important")
    assert "choose another" in refused(capsys, "measure", "grid-2d:n=200", "--out", tmp_path, *SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_importing_the_package_takes_no_plotting_library():
    code = "import sys, difficulty; sys.exit(bool({'matplotlib', 'seaborn', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_every_subcommand_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        run(command, "--help")
    assert ended.value.code == 0
    assert f"Example: difficulty {command}" in " ".join(capsys.readouterr().out.split())
