import inspect
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from difficulty.convergence import DEFINITIONS
from difficulty.ranking import RankingTask
from difficulty.relative_entropy import COLUMNS
from difficulty.relative_entropy.estimators import ESTIMATORS
from training.arms import ARMS
from training.cli import SUBCOMMANDS
from training.curriculum import Curriculum, DensityField, PacingField
from training.features import FEATURES
from training.metrics import DISTANCES
from training.pacing import PACINGS, make_pacing

PAGE = (Path(__file__).parents[2] / "docs" / "curriculum-json.md").read_text()


def test_every_field_of_the_curriculum_is_explained():
    table = re.findall(r"^\| (.*?) \|", PAGE, re.M)
    explained = set(re.findall(r"`(?:\w+(?:\[\])?\.)?(\w+)`", " ".join(table)))
    for model in (Curriculum, RankingTask, PacingField, DensityField):
        assert set(model.model_fields) - {"index", "pacing", "density"} <= explained


@pytest.mark.parametrize("rule", PACINGS)
def test_stated_defaults_of_every_pacing_rule_are_those_of_the_code(rule):
    row = re.search(rf"^\| `{rule}` \| (.*?) \|", PAGE, re.M)
    stated = dict(re.findall(r"`(\w+)` \(([\d.]+)", row[1]))
    pacing = make_pacing(rule, {}, 3, 100)
    assert stated
    for name, value in stated.items():
        assert getattr(pacing, name) == float(value)


@pytest.mark.parametrize("accumulate", [True, False])
def test_documented_reader_finds_the_timesteps_of_every_stage_with_json_alone(
    accumulate, curriculum, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    curriculum = curriculum.with_clusters(curriculum.clusters, accumulate=accumulate)
    curriculum.save("curriculum.json")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.S)[1], names)
    assert names["plan"] == json.loads(Path("curriculum.json").read_text())
    for stage, tasks in enumerate(curriculum.stages()):
        expected = [t for i in tasks for t in range(curriculum.tasks[i].t_first, curriculum.tasks[i].t_last + 1)]
        assert sorted(names["timesteps"](stage)) == expected


TRAINING = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
COMMANDS = re.findall(r"^training .*$", TRAINING, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command_has_only_options_that_exist(command):
    _, name, *words = command.split()
    parameters = inspect.signature(SUBCOMMANDS[name]).parameters
    for option in (word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")):
        assert option in parameters


def test_documented_arms_are_those_that_exist():
    table = TRAINING[TRAINING.index("| arm |") : TRAINING.index("`effects.csv`")]
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(.*?)`", row)]
    assert set(named) == set(ARMS)


MEASURES = (Path(__file__).parents[2] / "docs" / "measures.md").read_text()


def test_every_measure_that_exists_is_defined_and_no_other():
    cells = re.findall(r"^\| (`.*?`) \|", MEASURES, re.M)
    rows = {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}
    columns = set(COLUMNS) - {"t_from", "t", "log_snr", "se", "ci_low", "ci_high", "estimator", "valid", "reason"}
    assert rows == {*DEFINITIONS, *columns, "nats", "loss", *DISTANCES, *FEATURES}
    for estimator in ESTIMATORS:
        assert f"`{estimator}`" in MEASURES


SCALING = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
RESULTS = Path(__file__).parents[2] / "results"


def test_stated_costs_are_those_of_the_committed_table():
    table = pd.read_csv(RESULTS / "cost" / "cost.csv")
    stated = re.findall(r"^\| `([\w-]+)` \| (\d+) \| `(\S+)` \| (\d+) \| (\d+) \| (.*?) \|$", SCALING, re.M)
    assert len(stated) == len(table)
    for (data, dimensions, network, parameters, tasks, costs), row in zip(stated, table.itertuples(), strict=True):
        assert (data, network) == (row.data, row.network)
        assert (int(dimensions), int(parameters), int(tasks)) == (row.dimensions, row.parameters, row.tasks)
        own = (row.expert_ms_per_iteration, row.expert_s_evaluations, row.run_ms_per_step, row.run_s_judging)
        assert costs.split(" | ") == [f"{value:.2g}" for value in own]
    digits = table[table["data"] == "digits"].set_index(["network", "tasks"])
    small, large = digits.loc[("mlp", 5)], digits.loc[("mlp:width=512", 5)]
    others = digits.loc[[("unet:width=16", 2), ("dit:width=32", 2)]].mean(numeric_only=True)
    words = {8: "eight", 9: "nine", 12: "twelve", 17: "seventeen"}
    size, cost = (words[round(large[name] / small[name])] for name in ("parameters", "expert_ms_per_iteration"))
    run, expert = (words[round(others[name] / small[name])] for name in ("run_ms_per_step", "expert_ms_per_iteration"))
    said = " ".join(SCALING.split())
    assert f"{size} times the parameters cost an expert about {cost} times as much" in said
    assert f"about {run} times an MLP of the same size per step of a run, and {expert} times as an expert" in said
