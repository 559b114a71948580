"""Numbers in the README are those of the committed results, and its figure and commands exist."""

import re
from pathlib import Path

import pandas as pd
import pytest

from difficulty.cli import SUBCOMMANDS as DIFFICULTY
from training.cli import SUBCOMMANDS as TRAINING

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def accuracy_sentence():
    table = pd.read_csv(ROOT / "results" / "relative-entropy-accuracy" / "accuracy.csv")
    table = table[(table["process"] == "vp-linear") & (table["estimator"] == "auto")]
    row, laws = table[table["law"] == "(all)"].iloc[0], (table["law"] != "(all)").sum()
    return (
        f"{row['pairs']:.0f} pairs of {laws} laws under VP-linear, estimator {row['estimator']}: "
        f"{row['valid']:.0%} valid ({row['valid_65_651']:.0%} of those with 65 <= t <= 651); of the valid ones the "
        f"median error is {row['median_error']:.1%}, the worst {row['worst_error']:.0%}, "
        f"{row['beyond_30_percent']:.0f} are off by more than 30%, and the 90% intervals hold the truth in "
        f"{row['coverage']:.0%}."
    )


def test_the_summary_is_that_of_the_committed_quickstart():
    summary = (ROOT / "results" / "quickstart-digits" / "summary.txt").read_text().rstrip()
    assert f"```\n{summary}\n```" in README


def test_the_accuracy_is_that_of_the_committed_table():
    assert accuracy_sentence() in " ".join(README.split())


def test_every_file_that_the_readme_names_exists():
    named = re.findall(r"`((?:results|docs|analysis_notebooks|difficulty|training)/[\w/.-]*)`", README)
    named += re.findall(r"\]\((results/[^)]*)\)", README)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(("program", "known"), [("difficulty", DIFFICULTY), ("training", TRAINING)])
def test_every_subcommand_that_the_readme_names_exists(program, known):
    start = r"(?:^    |`)(?:(?:\.venv/bin/)?python -m )?"
    used = set(re.findall(rf"{start}{program} ([a-z]+)", README, flags=re.MULTILINE))
    assert len(used) >= 3
    assert used <= set(known)
