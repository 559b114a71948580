"""Numbers in the text files under results/ are those of the tables beside them."""

import json
import math
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from training.plots_comparison import COMPARISON_FIGURES
from training.report import write_report

RESULTS = Path(__file__).parents[1] / "results"
COMPARISON = RESULTS / "comparison"
TEXT = (COMPARISON / "README.md").read_text()
# The chosen design of the recipe by its own name.
CHOSEN = "root-long"


def rows_below(heading):
    """Cells of the table whose first line starts with a heading."""
    lines = TEXT.split(f"\n| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def verdicts(*stages):
    table = pd.read_csv(COMPARISON / "verdicts.csv")
    return table[table["stage"].isin(stages)]


def interval(row):
    change, low, high = (100 * math.expm1(row[name]) for name in ("log_ratio", "ci_low", "ci_high"))
    return f"{change:+.1f} % [{low:+.1f}, {high:+.1f}]"


def test_the_runs_that_are_listed_are_those_that_were_made():
    listed = rows_below("setting | stage")
    folders = {path.parent.relative_to(COMPARISON).as_posix() for path in COMPARISON.glob("*/*/run.json")}
    assert {f"{setting}/{stage}" for setting, stage, *_ in listed} == folders
    for setting, stage, *facts in listed:
        run = json.loads((COMPARISON / setting / stage / "run.json").read_text())
        config = run["config"]
        arms, seeds, steps = len(config["arms"]), len(config["seeds"]), config["plan"]["steps"]
        minutes = f"{run['wall_seconds'] / 60:.1f}"
        assert facts == [str(arms), str(seeds), str(steps), " and ".join(config["lr_schedules"]), minutes], setting


def test_the_recipe_against_its_aim_is_that_of_the_verdicts():
    table = verdicts("judge").query("lr_schedule == 'cosine'")
    for setting, design, iterations, nats, frechet, wasserstein, aim in rows_below("setting | design"):
        arm = "measured" if design == CHOSEN else f"measured:{design}"
        found = table[(table["setting"] == setting) & (table["arm"] == arm)].set_index("metric")
        assert [nats, frechet, wasserstein] == [
            interval(found.loc[name]) for name in ("nats", "fd-pixels", "sw-pixels")
        ], (setting, design)
        row = found.loc["nats"]
        if row["reached"] < row["seeds"]:
            assert iterations == f"not reached ({row['reached']:.0f} of {row['seeds']:.0f})"
        else:
            share, low, high = (100 * row[name] for name in ("share", "share_low", "share_high"))
            assert iterations == f"{share:.1f} % ({low:.0f} to {high:.0f} %)"
        fast = row["reached"] == row["seeds"] and row["share"] <= 0.5
        # 95 % intervals of the change of sample quality below +5 %.
        good = all(math.expm1(found.loc[name, "ci_high"]) < 0.05 for name in ("fd-pixels", "sw-pixels"))
        assert aim == {(1, 1): "met", (1, 0): "iterations only", (0, 1): "quality only", (0, 0): "missed"}[fast, good]


def test_the_orders_are_those_of_the_verdicts():
    table = verdicts("judge", "controls").query("metric == 'nats' and lr_schedule == 'cosine'")
    for arm, *cells in rows_below("arm | linear, eps"):
        for setting, cell in zip(("digits-mixture-linear-eps", "digits-mixture-cosine-v"), cells, strict=True):
            both = table[(table["setting"] == setting) & (table["arm"] == arm)]
            assert cell in [interval(row) for row in both.to_dict("records")], (arm, setting)


def test_the_rivals_are_those_of_the_table():
    table = pd.read_csv(COMPARISON / "rivals.csv").set_index(["setting", "metric", "arm"])
    rows = rows_below("setting | metric")
    assert len(rows) == len(table) / 2
    for setting, metric, rival, *cells in rows:
        for arm, cell in zip(("measured", "measured:ordered"), cells, strict=True):
            row = table.loc[(setting, metric, arm)]
            shown = "" if row["p_holm"] < 0.05 else ", not shown"
            assert (rival, cell) == (row["rival"], f"{interval(row)}{shown}")


def test_the_earlier_findings_are_those_of_the_tables():
    text = " ".join(TEXT.split("## Earlier findings")[1].split())
    table = verdicts("constant", "noise", "long", "judge").set_index(["stage", "setting", "arm", "metric"])

    def said(stage, setting, arm, metric):
        return interval(table.loc[(stage, f"digits-mixture-{setting}", arm, metric)])

    stages = ("constant", "noise", "long", "judge")
    short, noise, long, _ = (said(stage, "cosine-v", "curriculum", "loss") for stage in stages)
    first = f"noisiest first {noise}, at 6000 iterations {long}"
    assert f"measured order {short}; {first} | not reproduced |" in text
    short, noise, long, annealed = (said(stage, "linear-eps", "curriculum", "loss") for stage in stages)
    first = f"noisiest first {noise}, at 6000 iterations {long}"
    assert f"constant: {short}; {first}; annealed: {annealed} | reversed: it helps" in text
    p2 = [said(stage, s, "p2", "fd-pixels") for s in ("linear-eps", "cosine-v") for stage in ("constant", "judge")]
    assert f"linear, eps: constant {p2[0]}, annealed {p2[1]}; cosine, v: {p2[2]}, {p2[3]}" in text
    clock = pd.read_csv(RESULTS / "comparison-checks" / "clock.csv").set_index(["rule", "network"])["in_units"]
    learning, still = ([f"{v:.2f}" for v in clock["patience", name]] for name in ("learning", "not learning"))
    assert f"{', '.join(learning)} tau with learning, {', '.join(still)} without, for tau = 10, 30, 100" in text


def test_every_committed_report_is_what_its_folder_says(tmp_path):
    reports = sorted(COMPARISON.glob("*/*/report.md"))
    assert len(reports) > 30
    for number, report in enumerate(reports):
        copy = tmp_path / str(number)
        shutil.copytree(report.parent, copy)
        write_report(copy)
        assert (copy / "report.md").read_text() == report.read_text(), report


def test_every_committed_figure_of_a_comparison_is_drawn_from_its_folder():
    figures = sorted(COMPARISON.glob("*/*/figures/*.png"))
    assert len(figures) == 32
    for path in figures:
        figure = COMPARISON_FIGURES[path.stem](path.parents[1])
        assert figure is not None
        plt.close(figure)


def test_the_gain_over_one_thread_is_that_of_the_table():
    table = pd.read_csv(RESULTS / "experts-speed" / "table.csv").set_index(["network", "threads", "contender"])
    text = " ".join((RESULTS / "experts-speed" / "README.md").read_text().split())
    across, within = [], []
    for network in ("MLP 2-D", "MLP 64-D"):
        ms = table.loc[network]["ms"]
        across.append(f"{ms[1]['plain loop'] / ms[2].min():.1f}")
        within.append(f"{table.loc[network]['ratio'][2].max():.1f}")
    assert f"is {across[0]} and {across[1]} times as fast instead of {within[0]} and {within[1]}" in text
    reached = [
        f"{table.loc[(network, 1, engine), 'gflops']:.0f} of {table.loc[(network, 1, engine), 'gflops_matrix']:.0f}"
        for network, engine in (
            ("MLP 2-D", "batched"), ("MLP 64-D", "batched"), ("small UNet 8x8", "loop"), ("tiny DiT 8x8", "batched"),
        )
    ]  # fmt: skip
    assert f"{', '.join(reached[:3])} and {reached[3]} GFLOP/s" in text
    peaks = table.xs(1, level="threads")["gflops_matrix"]
    assert f"between {peaks.min():.0f} and {peaks.max():.0f} GFLOP/s on one thread" in text
    engines = table[~table.index.get_level_values("contender").str.startswith("plain")]
    compiled = engines.index.get_level_values("contender").str.contains("compiled")
    for threads, words in ((1, "{} times the loop instead of {}, median and range"), (2, "({} instead of {})")):
        best = [
            part.loc[("tiny DiT 8x8", threads)].sort_values("ratio").iloc[-1]
            for part in (engines[compiled], engines[~compiled])
        ]
        said = [f"{row['ratio']:.1f} [{row['ratio_low']:.1f}, {row['ratio_high']:.1f}]" for row in best]
        assert words.format(*said) in text
    assert f"it reaches {engines[compiled].loc[('tiny DiT 8x8', 1), 'gflops'].max():.0f}." in text


def coverage_sentence(table):
    """How often the intervals of `auto`, by process, and of the other estimators hold the truth."""
    table = table[table["law"] == "(all)"]
    shares = [
        f"{row['coverage']:.0%} [{row['coverage_low']:.0%}, {row['coverage_high']:.0%}]" for _, row in table.iterrows()
    ]
    by_process, others = [], []
    for share, name, process in zip(shares, table["estimator"], table["process"], strict=True):
        if name == "auto":
            by_process.append(f"{share} under `{process}`")
        else:
            others.append(f"`{name}` in {share}")
    return (
        f"Of intervals of nominal 90%, those of `auto` hold the truth in {', '.join(by_process)}; those of "
        f"{', '.join(others)}."
    )


def test_the_accuracy_in_words_is_that_of_the_tables():
    folder = RESULTS / "relative-entropy-accuracy"
    text = " ".join((folder / "README.md").read_text().split())
    table = pd.read_csv(folder / "accuracy.csv")
    pairs = pd.read_csv(folder / "pairs.csv", keep_default_na=False).query("valid")
    worst = (pairs["kl"] / pairs["truth"] - 1).abs().groupby(pairs["estimator"]).max()
    assert f"Of {len(pairs)} pairs marked valid none is off by more than {100 * worst.max():.0f} %" in text
    assert worst.max() < 0.3
    assert f"of `auto` by more than {100 * worst['auto']:.0f} %" in text
    assert coverage_sentence(table) in text
