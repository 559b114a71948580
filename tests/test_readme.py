"""Numbers in the README are those of the committed results, and its figure and commands exist."""

import re
from pathlib import Path

import pandas as pd
import pytest

from difficulty.cli import SUBCOMMANDS as DIFFICULTY
from training.cli import SUBCOMMANDS as TRAINING
from training.report import percent
from training.verdicts import verdicts_in_words

ROOT = Path(__file__).parents[1]
SHOWN_ARMS = ("curriculum", "measured", "measured:ordered")
README = (ROOT / "README.md").read_text()
COMPARISON = ROOT / "results" / "comparison"


def accuracy_sentence():
    table = pd.read_csv(ROOT / "results" / "relative-entropy-accuracy" / "accuracy.csv")
    table = table[(table["process"] == "vp-linear") & (table["estimator"] == "auto")]
    row, laws = table[table["law"] == "(all)"].iloc[0], (table["law"] != "(all)").sum()
    return (
        f"{row['pairs']:.0f} pairs of {laws} laws under VP-linear, estimator {row['estimator']}: "
        f"{row['valid']:.0%} valid ({row['valid_65_651']:.0%} [{row['valid_65_651_low']:.0%}, "
        f"{row['valid_65_651_high']:.0%}] of those with 65 <= t <= 651); of the valid ones the median error is "
        f"{row['median_error']:.1%}, the worst {row['worst_error']:.0%}, "
        f"{row['beyond_30_percent']:.0f} are off by more than 30%, and the 90% intervals hold the truth in "
        f"{row['coverage']:.0%} [{row['coverage_low']:.0%}, {row['coverage_high']:.0%}]."
    )


def heavy_tails_sentence():
    """The shares of valid pairs of the laws with power-law tails and of the others."""
    table = pd.read_csv(ROOT / "results" / "relative-entropy-accuracy" / "pairs.csv", keep_default_na=False)
    table = table[(table["process"] == "vp-linear") & (table["estimator"] == "auto") & table["t"].between(65, 651)]
    heavy = table["law"].str.contains("student")
    return (
        f"Of the {table.loc[heavy, 'law'].nunique()} laws with power-law tails "
        f"{table.loc[heavy, 'valid'].mean():.0%} of the "
        f"pairs with 65 <= t <= 651 are valid, of the others {table.loc[~heavy, 'valid'].mean():.0%}."
    )


def deceiving_sentence():
    """How often laws that were made to deceive the estimators do."""
    table = pd.read_csv(ROOT / "results" / "relative-entropy-accuracy" / "deceiving.csv")
    row, laws = table[table["law"] == "(all)"].iloc[0], table[table["law"] != "(all)"]
    wrong = laws[laws["beyond_30_percent"] > 0]
    counts = ", ".join(
        f"`{name}` {count:.0f}" for name, count in zip(wrong["law"], wrong["beyond_30_percent"], strict=True)
    )
    valid = (laws["valid"] * laws["pairs"]).sum()
    return (
        f"Of {len(laws)} laws that were made to deceive (`DECEIVING` in `benchmarks/known_laws.py`) "
        f"{valid:.0f} of {row['pairs']:.0f} pairs are valid and {row['beyond_30_percent']:.0f} of these off by more "
        f"than 30%: {counts}."
    )


def digits_sentence():
    """What a denoiser finds of the digits against the mixture that is refused."""
    folder = ROOT / "results" / "relative-entropy-digits"
    auto, score = (pd.read_csv(folder / name / "relative_entropy.csv").set_index("t") for name in ("auto", "score"))
    found = score[["kl", "ci_low", "ci_high"]].div(auto["kl"], axis=0)
    assert not auto.loc[[65, 100, 150], "valid"].any()
    assert auto.loc[[250, 350], "valid"].all()
    said = ", ".join(
        f"{found['kl'][t]:.2f} [{found['ci_low'][t]:.2f}, {found['ci_high'][t]:.2f}] at t = {t}"
        for t in (65, 100, 150, 250, 350)
    )
    unsure = ", ".join(str(t) for t in (65, 100, 150, 250, 350) if not score.loc[t, "valid"])
    return (
        "The mixture of the digits is refused at low t: it lacks their fourth cumulants, or its errors add up to too "
        "much. A small denoiser (`--estimator score`) finds so many times its value, with its own 90% intervals: "
        f"{said}. At t = {unsure} its errors add up to too much, too."
    )


def trainer_sentence():
    folder = ROOT / "results" / "trainer-speed"
    speed, overhead = (pd.read_csv(folder / f"{name}.csv") for name in ("speed", "overhead"))
    drawing = overhead[overhead["pacing"] != "held-out"]
    dearest, all_in = (part.loc[part["share_of_step"].idxmax()] for part in (drawing, overhead))
    each = ", ".join(
        f"{row['network']} {row['speed']:.2f}x [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"
        for _, row in speed.iterrows()
    )
    return (
        "Steps per second against the plain accelerate and diffusers loop on the same network, batch and machine "
        f"(digits, batch 128, one CPU thread, paired ratio with 95 % interval): {each}. Drawing timesteps and pacing "
        f"cost {dearest['microseconds']:.1f} [{dearest['microseconds_low']:.1f}, {dearest['microseconds_high']:.1f}] "
        f"microseconds more per step than torch.randint, {dearest['share_of_step']:.1%} of the shortest step; with the "
        f"checks of `held-out` pacing it is at most {all_in['share_of_step']:.2%} [{all_in['share_of_step_low']:.2%}, "
        f"{all_in['share_of_step_high']:.2%}] of a step."
    )


def convergence_rows():
    """The headline of the convergence study: median and least rho per definition and question."""
    table = pd.read_csv(ROOT / "results" / "convergence-study" / "summary.csv")
    table = table[table["data"] == "all"]
    rows = []
    for definition, part in table.groupby("measure", sort=False):
        found = part.set_index("question")
        asked = ("predictions", "seeds", "processes", "grids")
        cells = [f"{found['median'][question]:.2f} ({found['least'][question]:.2f})" for question in asked]
        rows.append(f"| `{definition}` | {' | '.join(cells)} |")
    return rows


def test_the_agreement_of_definitions_is_that_of_the_committed_study():
    rows = convergence_rows()
    assert len(rows) == 7
    assert [row for row in rows if row not in README.splitlines()] == []


def engine_sentence():
    table = pd.read_csv(ROOT / "results" / "experts-speed" / "table.csv")
    ours = table[(table["threads"] == 2) & ~table["contender"].str.startswith("plain")]
    best = ours.loc[ours.groupby("network", sort=False)["ratio"].idxmax()]
    speeds = [
        f"{row['network']} {row['ratio']:.1f} [{row['ratio_low']:.1f}, {row['ratio_high']:.1f}] ({row['contender']})"
        for _, row in best.iterrows()
    ]
    plain = table[(table["threads"] == 2) & table["contender"].isin(["plain loop, 2 processes", "plain loop, joblib"])]
    split = [f"{value:.1f}" for value in plain.groupby("network", sort=False)["ratio"].max()]
    return (
        "Twenty experts against the loop that one would write (one AdamW per expert), times its speed on two cores, "
        f"fastest engine, median and range of {best['rounds'].iloc[0]} paired rounds: {', '.join(speeds)}. "
        f"That loop, split over two processes by itself or by joblib, reaches {', '.join(split[:-1])} and {split[-1]}."
    )


def test_the_speed_of_the_experts_is_that_of_the_committed_table():
    assert engine_sentence() in " ".join(README.split())


def test_the_summary_is_that_of_the_committed_quickstart():
    summary = (ROOT / "results" / "quickstart-digits" / "summary.txt").read_text().rstrip()
    assert f"```\n{summary}\n```" in README


def test_the_accuracy_is_that_of_the_committed_table():
    assert accuracy_sentence() in " ".join(README.split())
    assert heavy_tails_sentence() in " ".join(README.split())
    assert deceiving_sentence() in " ".join(README.split())
    assert digits_sentence() in " ".join(README.split())


def conditional_sentence():
    folder = ROOT / "results" / "conditional-digits"
    tables = pd.concat([pd.read_csv(folder / f"{name}.csv", keep_default_na=False) for name in ("class", "text")])
    rows = tables[tables["group"] == "all"].set_index("captions")
    said = {
        kind: f"{row['accuracy']:.1%} [{row['ci_low']:.1%}, {row['ci_high']:.1%}]" for kind, row in rows.iterrows()
    }
    worst = tables[(tables["captions"] == "unseen") & (tables["group"] == "class")].sort_values("accuracy").iloc[0]
    samples, heldout = rows["samples"].unique(), rows["heldout"].unique()
    assert len(samples) == len(heldout) == 1
    return (
        f"Of {samples[0]} samples each at guidance 2, after 3000 iterations, a separate classifier (right on "
        f"{heldout[0]:.1%} of held-out digits) finds what was asked for in {said['none']} by class, {said['seen']} by "
        f"captions of training, and {said['unseen']} by phrasings that training never saw, least often for the numeral "
        f"{worst['value']} ({worst['accuracy']:.0%} [{worst['ci_low']:.0%}, {worst['ci_high']:.0%}])."
    )


def test_the_obeyed_conditions_are_those_of_the_committed_tables():
    assert conditional_sentence() in " ".join(README.split())


def test_the_speed_of_the_trainer_is_that_of_the_committed_table():
    assert trainer_sentence() in " ".join(README.split())


def shown_verdicts():
    """The committed verdicts that are claimed: those of the judging stage."""
    table = pd.read_csv(COMPARISON / "verdicts.csv")
    table = table[table["stage"] == "judge"]
    assert table["confirmed"].all()
    return table


def verdict_rows():
    """The README's table of verdicts: what an arm did to held-out nats, and the iterations it needed."""
    table = shown_verdicts()
    words = verdicts_in_words(table, ("nats", "sw-pixels")).set_index(["setting", "arm"])
    rows = []
    for setting in dict.fromkeys(table["setting"]):
        cells = []
        for arm in SHOWN_ARMS:
            nats, iterations = words.loc[(setting, arm), ["nats", "iterations"]]
            cells.append(f"{nats}; {iterations.split(' (')[0]}")
        rows.append("| " + " | ".join([setting, *cells]) + " |")
    return rows


def sample_quality_sentence():
    """In how many of the shown settings each arm helped or hurt the sliced Wasserstein distance of samples."""
    table = shown_verdicts().query("metric == 'sw-pixels'")
    said = []
    for arm in SHOWN_ARMS:
        words = table.loc[table["arm"] == arm, "verdict"].str.split(",").str[0]
        said.append(f"`{arm}` helps in {(words == 'helps').sum()} and hurts in {(words == 'hurts').sum()}")
    return (
        f"The sliced Wasserstein distance of samples, in {table['setting'].nunique()} settings: {'; '.join(said)}; in "
        "the others no difference is shown."
    )


def measured_sentence():
    """In how many settings `measured` helps held-out nats, and where it hurts the Frechet distance."""
    table = shown_verdicts().query("arm == 'measured'")
    nats = table[table["metric"] == "nats"]
    helped = nats["verdict"].str.startswith("helps").sum()
    hurt = table[(table["metric"] == "fd-pixels") & table["verdict"].str.startswith("hurts")]
    said = ", ".join(f"{row['setting']} {change(row)}" for _, row in hurt.iterrows())
    return (
        f"The recipe `measured` helps the held-out nats in {helped} of {len(nats)} settings; its Fréchet distance is "
        f"worse in {len(hurt)}: {said}."
    )


def order_sentence():
    """What the order alone does to held-out nats, against the same histogram of t."""
    found = {"helps": [], "hurts": [], "no difference shown": []}
    for setting in dict.fromkeys(shown_verdicts()["setting"]):
        table = pd.read_csv(COMPARISON / setting / "judge" / "order.csv").set_index(["arm", "metric"])
        row = table.loc[("curriculum", "nats")]
        found[row["verdict"].split(",")[0]].append(f"{setting} {change(row)}")
    said = "; ".join(f"{verdict} in {', '.join(rows)}" for verdict, rows in found.items() if rows)
    return f"Against the same histogram of t without order, easy to hard: {said}."


def rivals_sentence():
    """How often the recipe is better or worse than the simple arm that is best on the same seeds."""
    table = pd.read_csv(COMPARISON / "rivals.csv").query("arm == 'measured'")
    said = []
    for metric, name in (("nats", "held-out nats"), ("fd-pixels", "Fréchet"), ("sw-pixels", "sliced Wasserstein")):
        own = table[table["metric"] == metric]
        shown = own["p_holm"] < 0.05
        better, worse = (int((shown & (sign * own["log_ratio"] > 0)).sum()) for sign in (-1, 1))
        said.append(f"{name} better in {better}, worse in {worse}")
    return (
        f"Against the simple arm that is best on the same seeds, `measured` in {len(own)} settings: {'; '.join(said)}; "
        "in the others no difference is shown."
    )


def change(row):
    return f"{percent(row['log_ratio'])} [{percent(row['ci_low'])}, {percent(row['ci_high'])}]"


def test_the_verdicts_are_those_of_the_committed_comparisons():
    rows = verdict_rows()
    assert len(rows) == 8
    for sentence in (sample_quality_sentence(), measured_sentence(), order_sentence(), rivals_sentence()):
        assert sentence in " ".join(README.split())
    block = README.split("<!-- verdicts: results/comparison/verdicts.csv, stage judge -->")[1].split("\n\n")[0]
    assert block.strip().splitlines()[2:] == rows


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
