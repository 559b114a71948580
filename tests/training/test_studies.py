"""The commands behind results/comparison run at a reduced budget, and the committed files are what they make."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from difficulty.records import read_run
from training import jobs
from training.recipe import CHOSEN, DESIGNS, ORDERED
from training.verdicts import verdict_table, verdicts_in_words

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "comparison"


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    out = tmp_path_factory.mktemp("studies")
    command = ["--smoke", "--settings", "grid-2d-linear-eps", "--runs", str(out / "runs"), "--out", str(out / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["comparison_studies.py", *command])
        patch.setattr(jobs, "EVALUATIONS", 2)
        studies = script("comparison_studies")
        # with all samples of the data most of the time would go into judging
        small = replace(studies.SETTINGS["grid-2d-linear-eps"], data="grid-2d:n=400")
        patch.setitem(studies.SETTINGS, "grid-2d-linear-eps", small)
        studies.main()
    return out / "out"


def test_the_studies_run_at_a_reduced_budget_and_leave_what_is_committed(published):
    made = {str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()}
    kept = {
        str(path.relative_to(RESULTS))
        for path in RESULTS.rglob("*")
        if path.is_file() and path.relative_to(RESULTS).parts[0] in ("grid-2d-linear-eps", "designs.csv")
    }
    assert kept <= made
    assert {"verdicts.csv", "rivals.csv", "overview.png", "designs.csv"} <= made
    designs = pd.read_csv(published / "designs.csv")
    assert set(designs["arm"]) == {"log-snr", *(f"measured:{name}" for name in DESIGNS if name not in ORDERED)}
    assert designs["chosen"].fillna(False).astype(bool).sum() == 1


def test_verdicts_join_effects_and_speed_of_every_setting(published):
    folder = published / "grid-2d-linear-eps" / "confirm"
    table = verdict_table({"one": folder, "other": folder})
    effects = pd.read_csv(folder / "effects.csv")
    assert len(table) == 2 * len(effects)
    speed = pd.read_csv(folder / "speed.csv")
    own = speed[speed["arm"] == "p2"]
    row = table[(table["arm"] == "p2") & (table["setting"] == "other")].iloc[0]
    assert row["share"] == own["share"].median()
    assert row["reached"] == (~own["censored"]).sum()
    words = verdicts_in_words(table, ("nats", "loss"))
    assert list(words.columns) == ["setting", "arm", "nats", "loss", "iterations"]
    assert len(words) == 2 * effects["arm"].nunique()
    assert words["nats"].str.contains(r"[-+]\d+\.\d\d % \[").all()


def test_the_recipe_is_the_design_that_the_second_rule_chose_before_the_settings_that_judge_it():
    table = pd.read_csv(RESULTS / "second_choice.csv")
    (chosen,) = table.loc[table["chosen"].fillna(False).astype(bool), "arm"]
    assert chosen == f"measured:{CHOSEN}"
    judging = {name for name, setting in script("comparison_studies").SETTINGS.items() if setting.judging}
    assert len(judging) == 2
    assert not judging & set(table["setting"])
    for name in judging:
        assert "measured" in set(pd.read_csv(RESULTS / name / "confirm" / "comparison.csv")["arm"])


def test_what_is_claimed_confirms_an_exploration_on_seeds_of_which_nothing_was_chosen():
    settings = script("comparison_studies").SETTINGS
    for name in settings:
        config = read_run(RESULTS / name / "judge", "compare")["config"]
        assert config["confirms"] is not None
        assert config["seeds"] == list(range(300, 308))


def test_the_committed_verdicts_are_those_of_the_committed_comparisons():
    table = pd.read_csv(RESULTS / "verdicts.csv")
    assert set(table["stage"]) == {path.name for path in RESULTS.glob("*/*") if (path / "effects.csv").exists()}
    for stage, rows in table.groupby("stage"):
        _compare_verdicts(rows, {path.parent.name: path for path in RESULTS.glob(f"*/{stage}")})


def _compare_verdicts(rows, folders):
    expected = verdict_table(folders).set_index(["setting", "arm", "lr_schedule", "metric"])
    found = rows.set_index(["setting", "arm", "lr_schedule", "metric"])
    assert len(found) == len(expected)
    for name in ("log_ratio", "ci_low", "ci_high", "share"):
        assert found.loc[expected.index, name].to_numpy() == pytest.approx(expected[name].to_numpy(), rel=1e-6)


def test_no_committed_comparison_judges_on_a_seed_that_was_explored():
    seeds = {stage: set() for stage in ("explore", "confirm", "fresh", "judge")}
    for stage, own in seeds.items():
        for path in RESULTS.glob(f"*/{stage}/comparison.csv"):
            own |= set(pd.read_csv(path)["seed"])
    assert len(seeds["confirm"]) >= 8
    assert not seeds["explore"] & seeds["confirm"]
    assert not seeds["fresh"] & (seeds["explore"] | seeds["confirm"])
    assert not seeds["judge"] & (seeds["explore"] | seeds["confirm"] | seeds["fresh"])


def test_the_checks_of_the_comparison_run_at_a_reduced_budget(tmp_path, monkeypatch):
    checks = script("comparison_checks")
    monkeypatch.setattr(checks, "PAIRS", 8)
    monkeypatch.setattr(checks, "SEEDS_OF_A_COMPARISON", (4, 8))
    monkeypatch.setattr(checks, "ANEW", 3)
    monkeypatch.setattr(checks, "DATA", "grid-2d:n=400")
    monkeypatch.setattr(jobs, "EVALUATIONS", 2)
    noise = checks.noise(tmp_path / "noise", share=0.05)
    assert list(noise["comparisons"]) == [2, 1, 3]
    assert list(noise["pairing"]) == ["as trained", "as trained", "anew"]
    clock = checks.clock(share=0.05)
    assert set(clock["network"]) == {"learning", "not learning"}
    assert clock["share_of_stages_ended"].between(0, 1).all()


def test_committed_checks_claim_no_more_than_stated_and_patience_ends_as_early_when_nothing_is_learned():
    folder = ROOT / "results" / "comparison-checks"
    noise = pd.read_csv(folder / "noise.csv")
    assert noise["seeds"].max() == 40
    # The nominal rate is 5 % per comparison; the shares of a finite number of them scatter by three standard errors.
    share, comparisons = noise["share_of_claims"], noise["comparisons"]
    assert (share <= 0.05 + 3 * (0.05 * 0.95 / comparisons) ** 0.5).all()
    clock = pd.read_csv(folder / "clock.csv")
    patience = clock[clock["rule"] == "patience"].pivot(index="unit", columns="network", values="in_units")
    # on stationary noise 1.78 units
    assert patience["not learning"].between(1.3, 2.3).all()
    assert (patience["learning"] < 2 * patience["not learning"]).all()
