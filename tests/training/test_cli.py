import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from difficulty.process import get_process
from difficulty.process_file import write_process
from difficulty.ranking import RankingTask
from difficulty.tasks import make_tasks
from training.cli import SUBCOMMANDS, main
from training.curriculum import Curriculum
from training.plots_comparison import forest, learning_curves, task_curves, task_differences

DATA = "gaussian:dim=4,var=0.25,n=400"
SMALL = ["--batch", "8", "--network", "mlp:width=8,depth=2"]
TWICE = ["--steps", "40", "--evaluate-every", "20"]


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["training", *map(str, args)])
        try:
            code = main()
        except SystemExit as exit_:
            code = exit_.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help_with_an_example(name, call):
    code, out, _ = call(name, "--help")
    assert code == 0
    assert f"Example: training {name}" in " ".join(out.split())


def test_the_recipe_becomes_a_curriculum_that_a_run_trains_with(call, ranking, tmp_path):
    ranking.save(tmp_path / "ranking.json")
    file = tmp_path / "m.json"
    code, text, _ = call("recipe", tmp_path, "--design", "root-long", "--output", file)
    assert (code, "2 densities of t" in text) == (0, True)
    assert call("run", DATA, "--curriculum", file, "--out", tmp_path / "run", "--steps", "20", *SMALL)[0] == 0
    stages = (tmp_path / "run" / "stages.csv").read_text()
    assert "base density 2 of 2 takes over" in stages


def test_a_run_of_a_process_from_a_file_needs_the_file_no_more_and_other_data_are_said_to_be_others(call, tmp_path):
    u = np.linspace(0.02, 0.98, 40)
    file, out = tmp_path / "mine.npz", tmp_path / "run"
    np.savez(file, alpha=1 - u, sigma=u)
    begun = ["run", DATA, "--process", file, "--out", out, "--steps", "10", *SMALL]
    assert call(*begun)[0] == 0
    (out / "process.csv").unlink()  # as a kill right after run.json leaves the folder
    assert call(*begun)[0] == 0
    file.unlink()
    assert call("sample", out, "--count", "5", "--steps", "5")[0] == 0
    for data, other in ((DATA, False), ("gaussian:dim=4,var=0.5,n=400", True)):
        code, _, errors = call("evaluate", out, data, "--samples", "100", "--metrics", "sw-pixels")
        assert (code, "is not the data that" in errors) == (0, other)
    (out / "process.csv").write_text("t,alpha\n1,0.5\n")
    code, _, errors = call("sample", out, "--count", "5", "--steps", "5")
    assert (code, "process.csv" in errors) == (2, True)


@pytest.mark.parametrize("command", [("cluster", "-k", "2"), ("recipe",)])
def test_a_ranking_of_a_process_from_a_file_becomes_a_curriculum(call, ranking, tmp_path, command):
    u = np.linspace(0.02, 0.98, 80)
    file, folder = tmp_path / "mine.npz", tmp_path / "measured"
    np.savez(file, alpha=1 - u, sigma=u)
    process = get_process(str(file))
    tasks = [RankingTask.of(task, process) for task in make_tasks(process, 8)]
    folder.mkdir()
    ranking.model_copy(update={"process": process.fingerprint, "tasks": tasks}).save(folder / "ranking.json")
    written = tmp_path / "written.json"
    code, _, errors = call(*command, folder, "--output", written)
    assert (code, "give the process itself" in errors, written.exists()) == (2, True, False)
    assert call(*command, folder, "--output", written, "--process", file)[0] == 0
    code, _, errors = call(*command, folder, "--output", tmp_path / "other.json", "--process", "vp-linear:T=80")
    assert (code, "noise levels differ" in errors, (tmp_path / "other.json").exists()) == (2, True, False)
    write_process(folder, process)
    for given in (folder, folder / "ranking.json"):
        assert call(*command, given, "--output", tmp_path / "again.json")[0] == 0
        again = Curriculum.load(tmp_path / "again.json")
        again.validate_for(process)  # process.csv holds ten digits of the scales
        assert again.clusters == Curriculum.load(written).clusters


def test_a_name_that_samples_cannot_have_is_refused_before_anything_is_read(call, tmp_path):
    code, _, errors = call("sample", tmp_path / "nothing", "-o", tmp_path / "x.txt")
    assert (code, "should end in .npz" in errors) == (2, True)


def test_a_ranking_becomes_a_curriculum_a_run_samples_and_an_evaluation(call, ranking, tmp_path):
    ranking.save(tmp_path / "ranking.json")
    curriculum, out = tmp_path / "c.json", tmp_path / "run"
    assert call("cluster", tmp_path, "-k", "3", "-o", curriculum)[0] == 0
    code, text, _ = call("validate", curriculum)
    assert code == 0
    assert "cluster 3" in text
    code, text, _ = call("run", DATA, "--curriculum", curriculum, "--out", out, *TWICE, *SMALL, "--json")
    assert code == 0
    assert json.loads(text)["steps"] == 40
    assert {path.name for path in (out / "figures").glob("*.png")} == {
        "curve.png", "loss_heat_map.png", "stages.png", "coverage.png", "samples.png"
    }  # fmt: skip
    code, text, _ = call("sample", out, "--count", "10", "--method", "heun", "--steps", "10")
    assert code == 0
    assert np.load(out / "samples.npz")["data"].shape == (10, 4)
    code, text, _ = call("evaluate", out, DATA, "--samples", "100", "--seed", "3", "--device", "cpu", "--json")
    assert code == 0
    report = json.loads(text)
    assert json.loads((out / "evaluation.json").read_text()) == report
    assert report["sampling"] == {"method": "ddim", "steps": 50, "guidance": 1.0, "seed": 3, "device": "cpu"}
    assert (report["step"], report["samples"]) == (40, 100)
    assert report["command"].startswith(f"training evaluate {out} ")
    assert set(report["metrics"]) == {"fd-pca", "kid-pca", "sw-pixels", "precision-pca", "recall-pca"}
    for metric in report["metrics"].values():
        assert metric["ci_low"] <= metric["value"] <= metric["ci_high"]
        assert metric["of_data"] is not None
    assert 0 < report["nats_se"] < report["nats"]
    assert call("plot", out)[0] == 0


def test_the_static_copy_of_a_run_draws_its_histogram_and_first_then_all_has_two_stages(call, ranking, tmp_path):
    ranking.save(tmp_path / "ranking.json")
    curriculum, copy, out = tmp_path / "c.json", tmp_path / "static.json", tmp_path / "run"
    code, _, errors = call("cluster", tmp_path, "--first-then-all", "--no-accumulate", "-o", curriculum)
    assert (code, "leave out --no-accumulate" in errors, curriculum.exists()) == (2, True, False)
    code, text, _ = call("cluster", tmp_path, "-k", "3", "--first-then-all", "-o", curriculum)
    assert (code, "2 clusters, the first of 3 and all others together" in text) == (0, True)
    assert len(Curriculum.load(curriculum).stages()) == 2
    assert call("run", DATA, "--curriculum", curriculum, "--out", out, "--steps", "40", *SMALL)[0] == 0
    finished = (out / "run.json").read_text()
    (out / "run.json").write_text(finished.replace('"finished"', '"running"'))
    code, _, errors = call("static", out, "-o", copy)
    assert (code, "is incomplete (status 'running')" in errors, copy.exists()) == (2, True, False)
    (out / "run.json").write_text(finished)
    assert call("static", out, "-o", copy)[0] == 0
    assert call("run", DATA, "--curriculum", copy, "--out", tmp_path / "copy", "--steps", "40", *SMALL)[0] == 0
    first, second = (pd.read_csv(path / "coverage.csv") for path in (out, tmp_path / "copy"))
    assert first["expected"].max() > 1.05 * first["expected"].min()
    assert np.allclose(first["expected"], second["expected"])
    assert len(pd.read_csv(tmp_path / "copy" / "stages.csv")) == 1
    uneven = tmp_path / "uneven.json"
    assert call("cluster", tmp_path, "--density", "log-snr", "-o", uneven)[0] == 0
    assert call("run", DATA, "--curriculum", uneven, "--out", tmp_path / "uneven", "--steps", "5", *SMALL)[0] == 0
    code, _, errors = call("static", tmp_path / "uneven", "-o", tmp_path / "no.json")
    assert (code, "drawn unevenly inside task" in errors, (tmp_path / "no.json").exists()) == (2, True, False)
    plain = tmp_path / "plain"
    assert call("run", DATA, "--out", plain, "--steps", "5", *SMALL)[0] == 0
    assert {path.stem for path in (plain / "figures").iterdir()} == {"curve", "stages", "coverage", "samples"}
    code, _, errors = call("static", plain, "-o", tmp_path / "no.json")
    assert (code, "was trained without a curriculum" in errors, (tmp_path / "no.json").exists()) == (2, True, False)


def test_comparison_prints_every_effect_and_draws_its_figures(call, tmp_path):
    out = tmp_path / "compared"
    code, text, _ = call(
        "compare", DATA, "--arms", "vanilla", "min-snr", "--seeds", "2", "--budget", "20", "--samples", "64",
        "--workers", "1", "--out", out, *SMALL,
    )  # fmt: skip
    assert code == 0
    assert text.count("min-snr") >= 4
    assert "leads, no claims" in text
    assert (out / "figures" / "forest.png").exists()


def test_a_comparison_of_one_seed_is_drawn_and_reported_without_intervals(call, tmp_path):
    code, text, _ = call(
        "compare", DATA, "--arms", "vanilla", "min-snr", "--seeds", "1", "--budget", "20", "--samples", "64",
        "--workers", "1", "--out", tmp_path / "one", *SMALL,
    )  # fmt: skip
    assert (code, "nan" in text) == (0, False)
    assert "one seed, no interval" in text
    report = (tmp_path / "one" / "report.md").read_text()
    assert ("one seed, no interval" in report, "nan" in report, "paired seeds" in report) == (True, False, False)
    for figure in (forest, learning_curves, task_differences):
        title = figure(tmp_path / "one").get_suptitle()
        assert ("one seed, no intervals" in title, "95 %" in title) == (True, False)
    assert task_curves(tmp_path / "one") is None


@pytest.mark.parametrize(
    "args",
    [
        ["validate", "missing.json"],
        ["cluster", "missing"],
        ["run", "no-such-data", "--out", "x"],
        ["run", DATA, "--out", "x", "--weight", "best"],
        ["run", DATA, "--out", "x", "--process", "vp"],
        ["run", DATA, "--out", "x", "--network", "unet"],
        ["run", DATA, "--out", "x", "--steps", "0"],
        ["run", DATA, "--out", "x", "--device", "abacus"],
        ["run", DATA, "--out", "x", "--weight", "edm:sd=0"],
        ["run", DATA, "--out", "x", "--lr", "inf"],
        ["run", DATA, "--out", "x", "--weight-decay", "nan"],
        ["run", DATA, "--out", "x", "--network", "mlp:width=-3"],
        ["run", DATA, "--out", "x", "--network", "mlp:width=abc"],
        ["run", DATA, "--out", "x", "--network", "mlp:width=0"],
        ["run", DATA, "--out", "x", "--network", "mlp:depth=-1"],
        ["run", DATA, "--out", "x", "--network", "mlp:width=1.5"],
        ["run", "digits", "--out", "x", "--network", "dit:depth=0"],
        ["run", "digits", "--out", "x", "--network", "dit:patch=0"],
        ["run", "digits", "--out", "x", "--network", "unet:levels=0"],
        ["run", DATA, "--out", "x", "--posterior", "sample"],
        ["run", DATA, "--out", "x", "--floor-from", "y"],
        ["compare", DATA, "--out", "x", "--arms", "vanilla", "p2", "--samples", "0"],
        ["compare", DATA, "--out", "x", "--arms", "vanilla", "p2", "--samples", "10"],
        ["compare", DATA, "--out", "x", "--arms", "vanilla", "curriculum"],
        ["compare", DATA, "--out", "x", "--arms", "vanilla", "p2+min-snr"],
        ["sample", "missing"],
        ["evaluate", "missing", DATA],
        ["plot", "missing"],
        ["cluster", "--speed"],
        ["train"],
    ],
    ids=" ".join,
)
def test_unusable_input_ends_with_code_two_one_message_and_nothing_written(args, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*args)
    assert code == 2
    assert "Traceback" not in err
    assert err.strip()
    assert not list(tmp_path.iterdir())


def test_what_a_run_cannot_be_asked_costs_one_sentence_and_a_passed_over_checkpoint_another(call, tmp_path):
    out = tmp_path / "run"
    assert call("run", DATA, "--out", out, "--steps", "20", *SMALL, "--checkpoint-every", "10")[0] == 0
    before = sorted(tmp_path.rglob("*"))
    for args in (
        ["sample", out, "--seed", "-1"],
        ["sample", out, "--guidance", "2"],
        ["evaluate", out, DATA, "--seed", "-1"],
        ["evaluate", out, DATA, "--samples", "0"],
        ["evaluate", out, DATA, "--guidance", "2"],
    ):
        code, _, err = call(*args)
        assert (code, err.count("\n")) == (2, 1), err
    assert sorted(tmp_path.rglob("*")) == before
    (out / "checkpoints" / "step-00000020" / "ema.safetensors").write_bytes(b"cut off")
    for args in (["sample", out, "--count", "4"], ["evaluate", out, DATA, "--samples", "40", "--json"]):
        code, _, err = call(*args)
        assert code == 0
        assert "step-00000020 is damaged" in err


def test_random_order_of_a_negative_seed_costs_one_sentence(call, ranking, tmp_path):
    ranking.save(tmp_path / "ranking.json")
    code, _, err = call("cluster", tmp_path, "-k", "3", "--order", "random", "--seed", "-1", "-o", tmp_path / "c.json")
    assert (code, err) == (2, "training: seed must not be negative, got -1\n")
    assert not (tmp_path / "c.json").exists()


def test_deeply_nested_json_costs_one_sentence(call, tmp_path):
    (tmp_path / "c.json").write_text("[" * 100_000)
    code, _, err = call("validate", tmp_path / "c.json")
    assert (code, err.count("\n")) == (2, 1)
    assert "not valid JSON" in err
    code, text, _ = call("validate", tmp_path / "c.json", "--json")
    verdict = json.loads(text)
    assert (code, verdict["valid"], "not valid JSON" in verdict["reason"]) == (2, False, True)


def test_module_and_console_command_are_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "training", "validate", str(tmp_path / "missing.json")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_importing_the_package_imports_no_plotting_library(tmp_path):
    code = "import sys, training; sys.exit(any(name in sys.modules for name in ('matplotlib', 'seaborn', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_command_in_run_json_reproduces_the_run_bit_for_bit(call, ranking, tmp_path):
    ranking.save(tmp_path / "ranking.json")
    curriculum = tmp_path / "a curriculum.json"
    assert call("cluster", tmp_path, "-k", "3", "-o", curriculum)[0] == 0
    options = ["--weight", "min-snr+uncertainty", "--lr-start", "after-curriculum", "--seed", "3", "--stratified"]
    first, second = tmp_path / "first", tmp_path / "second"
    code, _, err = call("run", DATA, "--curriculum", curriculum, "--out", first, "--steps", "30", *SMALL, *options)
    assert code == 0, err
    program, *args = shlex.split(json.loads((first / "run.json").read_text())["command"])
    assert program == "training"
    assert call(*[str(second) if arg == str(first) else arg for arg in args])[0] == 0
    for name in ("checkpoints/step-00000030/ema.safetensors", "losses.csv", "stages.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_data_set_that_vanished_costs_one_sentence_and_leaves_the_last_good_state(call, tmp_path):
    data, out = tmp_path / "data.npy", tmp_path / "run"
    np.save(data, np.random.default_rng(0).standard_normal((50, 4), dtype=np.float32))
    command = ("run", data, "--out", out, "--steps", "20", *SMALL, "--checkpoint-every", "10")
    assert call(*command)[0] == 0
    shutil.rmtree(out / "checkpoints" / "step-00000020")  # as if it had been killed after the tenth step
    before = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()}
    data.unlink()
    code, _, err = call(*command)
    assert code == 2
    assert "data.npy does not exist" in err
    assert {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()} == before


def test_tasks_without_a_sure_place_and_other_data_are_named(call, ranking, tmp_path):
    flagged = ranking.model_copy(deep=True)
    name, measure = next(iter(flagged.measures.items()))
    measure.flagged[0] = True
    flagged.save(tmp_path / "ranking.json")
    file = tmp_path / "c.json"
    _, _, said = call("cluster", tmp_path, "-k", "2", "-o", file)
    first = flagged.tasks[0]
    assert f"{name} is a bound, not valid, or of a task that was not learned at t 1..{first.t_last}" in said
    ranking.save(tmp_path / "ranking.json")
    assert "place" not in call("cluster", tmp_path, "-k", "2", "-o", file)[2]
    begun = ["--curriculum", file, "--steps", "4", *SMALL]
    code, _, said = call("run", "grid-2d:n=200", *begun, "--out", tmp_path / "a")
    assert (code, "was made on other data" in said) == (0, True)


def test_methods_of_clustering_are_all_named(call, ranking, tmp_path):
    ranking.save(tmp_path / "ranking.json")
    code, _, said = call("cluster", tmp_path, "--method", "quantiles")
    assert (code, "known are kmeans, quantile, mass, uniform, contiguous, snr, log-snr" in said) == (2, True)
