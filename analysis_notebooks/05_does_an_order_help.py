# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does an order of the denoising tasks help?
#
# Every number below is read from `results/comparison`, which `python benchmarks/comparison_studies.py` makes. Small
# networks were trained on several data sets, every arm with the same eight seeds. Runs of one seed share their initial
# weights, batches, noise, the uniform number behind every t and the noise of the sampler, so that what is left between
# two arms is the arm. What is claimed is claimed from the stage `judge`, whose seeds nothing was chosen on. The recipe
# `measured` was chosen before, on other seeds of six of the settings; `digits-mixture-edm` and `digits-cosine-v` took
# part in no choice.
#
# Negative is better everywhere. A verdict follows p after Holm's correction over all arms and metrics of a comparison;
# *no difference shown* does not mean that there is none.

# %%
from pathlib import Path

import pandas as pd

from difficulty.records import read_run
from training.plots_comparison import forest, overview
from training.report import percent
from training.verdicts import verdicts_in_words

RESULTS = Path("..") / "results" / "comparison"
CHECKS = Path("..") / "results" / "comparison-checks"
judged = {path.parent.name: path for path in sorted(RESULTS.glob("*/judge"))}
verdicts = pd.read_csv(RESULTS / "verdicts.csv")
pd.set_option("display.max_colwidth", None, "display.max_rows", None, "display.width", 200)


def change(row):
    return f"{percent(row['log_ratio'])} [{percent(row['ci_low'])}, {percent(row['ci_high'])}] {row['verdict']}"


def settings(folder):
    run = read_run(folder, "compare")
    config, plan = run["config"], run["config"]["plan"]
    return {
        "data": config["data"]["name"],
        "process": config["process"]["name"],
        "prediction": plan["prediction"],
        "network": plan["network"],
        "iterations": plan["steps"],
        "batch": plan["batch"],
        "seeds": len(config["seeds"]),
        "minutes": round(run["wall_seconds"] / 60, 1),
    }


pd.DataFrame({name: settings(folder) for name, folder in judged.items()}).T

# %% [markdown]
# ## All settings at a glance
#
# Arms from top to bottom, settings from left to right. `curriculum` trains the five clusters of the measured difficulty
# from easy to hard over the first quarter of the run, `anti` from hard to easy, `static` has the histogram of t of
# `curriculum` without its order. `log-snr`, `logit-normal` and `log-normal` are densities of t, `min-snr` and `p2` loss
# weights. `measured` draws t by the measured difficulty for a part of the run (`training/recipe.py`), `measured-static`
# has its histogram throughout, `measured:ordered` adds the order of `curriculum`.

# %%
overview(judged, ("nats", "sw-pixels"));

# %% [markdown]
# ## The verdicts in words
#
# `iterations` is the share of plain training's iterations after which its final held-out nats were reached.

# %%
shown = verdicts[(verdicts["stage"] == "judge") & verdicts["arm"].str.contains("curriculum|measured")]
verdicts_in_words(shown, ("nats", "fd-pixels", "sw-pixels"))

# %% [markdown]
# Against the simple arm (a density or a weight) that is best by the metric on the same seeds, which favours it. p after
# Holm's correction over the table; a change is shown where it is below 0.05:

# %%
rivals = pd.read_csv(RESULTS / "rivals.csv")
rivals["change"] = [
    f"{percent(m)} [{percent(a)}, {percent(b)}]" for m, a, b in rivals[["log_ratio", "ci_low", "ci_high"]].to_numpy()
]
rivals[["setting", "metric", "rival", "arm", "change", "p_holm"]].round(3)

# %% [markdown]
# ## Every metric of one setting

# %%
forest(judged["digits-mixture-cosine-v"]);

# %% [markdown]
# ## Order or exposure?
#
# A curriculum changes two things: the order of t, and how often each t is trained in all. Against its own histogram of
# t without order, only the order is left.

# %%
tables = [pd.read_csv(folder / "order.csv").assign(setting=name) for name, folder in judged.items()]
order = pd.concat(tables, ignore_index=True)
order = order[order["metric"].isin(["nats", "sw-pixels"])].assign(change=order.apply(change, axis=1))
order.pivot(index=["arm", "setting"], columns="metric", values="change")

# %% [markdown]
# ## The designs of the recipe, on the seeds that were explored
#
# The rule was written down before any of them was trained: of the designs whose sample quality (mean log-ratio of both
# sample metrics over all settings) is worse by at most 2 %, the one that reaches plain training's final nats after the
# smallest share of the iterations; if there is none, the one with the least change of sample quality. There was none,
# so that the rule took a slow design; the fastest one was judged beside it on the confirmation seeds.

# %%
designs = pd.read_csv(RESULTS / "designs.csv")
designs[designs["setting"] == "(all)"].drop(columns="setting").round(3)

# %% [markdown]
# `measured` was therefore chosen a second time, after other seeds (`fresh`, on which `ordered`, a design with the order
# of `curriculum`, was tried beside its parts): of the designs that hurt held-out nats in no setting, the one that
# reaches plain training's nats after the smallest share of the iterations (geometric mean).

# %%
pd.read_csv(RESULTS / "second_choice.csv").round(3)

# %% [markdown]
# ## Constant and annealed learning rate
#
# Does an effect survive the annealing of the learning rate?

# %%
both = verdicts[verdicts["stage"].isin(["constant", "judge"]) & verdicts["arm"].isin(["curriculum", "anti", "p2"])]
both = both[both["metric"].isin(["nats", "loss", "fd-pixels"])].assign(change=both.apply(change, axis=1))
both = both[both["setting"].isin(both.loc[both["stage"] == "constant", "setting"])]
both.pivot(index=["setting", "arm", "metric"], columns="lr_schedule", values="change")

# %% [markdown]
# ## Can the comparison be believed?
#
# Plain training against itself with fresh seeds, 400 real pairs read as comparisons of 4, 8 and 40, and 1000
# comparisons of 40 other pairs drawn from the same 800 runs: how many would claim a difference? Nominally 5 %.

# %%
pd.read_csv(CHECKS / "noise.csv").round(3)

# %% [markdown]
# ## Patience is a clock
#
# Mean length of a stage in units of its patience, with learning and with the learning rate next to zero. A rule that
# ends its stages as early when nothing is learned does not test whether anything is.

# %%
pd.read_csv(CHECKS / "clock.csv").round(2)
