"""The whole path on a small exact data set, through the command line."""

import pandas as pd
import pytest

from difficulty.commandline import run_cli
from difficulty.ranking import Ranking
from training.cli import SUBCOMMANDS
from training.curriculum import Curriculum

SMALL = [
    "--process", "vp-linear:T=60", "--tasks", "6", "--expert-seeds", "2", "--expert-budget", "30",
    "--compare-seeds", "2", "--steps", "30", "--network", "mlp:width=16", "--workers", "1",
]  # fmt: skip


def run(*args):
    return run_cli(dict(SUBCOMMANDS), "training", "", [str(arg) for arg in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("a path with spaces") / "quick"
    assert run("quickstart", "grid-2d:n=300", "--out", out, *SMALL) == 0
    return out


def test_every_station_leaves_its_file(folder):
    ranking = Ranking.load(folder / "measurement")
    curriculum = Curriculum.load(folder / "curriculum.json")
    assert sorted(task for cluster in curriculum.clusters for task in cluster.tasks) == list(range(6))
    assert curriculum.process == ranking.process
    effects = pd.read_csv(folder / "comparison" / "effects.csv")
    assert set(effects["arm"]) == {"vanilla-again", "curriculum", "anti"}
    assert {"nats", "loss", "fd-pca"} <= set(effects["metric"])
    for figures in ("measurement", "comparison"):
        assert list((folder / figures / "figures").glob("*.png"))


def test_the_curriculum_trains_what_was_measured_easiest_first(folder):
    measure = Ranking.load(folder / "measurement").measures["excess_nats"]
    clusters = Curriculum.load(folder / "curriculum.json").clusters
    hardest = [max(measure.rank[task] for task in cluster.tasks) for cluster in clusters]
    assert hardest == sorted(hardest)


def test_the_summary_says_what_was_found_in_about_a_dozen_lines(folder):
    lines = (folder / "summary.txt").read_text().splitlines()
    assert 10 <= len(lines) <= 16
    text = "\n".join(lines)
    for phrase in ("Hardest to learn", "Do the two agree?", "paired seeds", "curriculum: nats", "Figures:"):
        assert phrase in text


def test_two_tasks_and_one_seed_have_a_summary_too(tmp_path):
    few = ["--tasks", "2", "--expert-seeds", "1", "--compare-seeds", "1", "--process", "vp-linear:T=20"]
    few += ["--expert-budget", "20", "--steps", "20", "--network", "mlp:width=16", "--workers", "1"]
    assert run("quickstart", "grid-2d:n=300", "--out", tmp_path / "few", *few) == 0
    text = (tmp_path / "few" / "summary.txt").read_text()
    assert "Do the two agree? excess_nats is not compared with" in text
    assert "[?, ?]" in text


def test_a_second_call_gives_the_same_summary(folder):
    before = (folder / "summary.txt").read_text()
    assert run("quickstart", "grid-2d:n=300", "--out", folder, *SMALL) == 0
    assert (folder / "summary.txt").read_text() == before
