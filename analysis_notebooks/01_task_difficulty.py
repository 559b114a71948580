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
# # Which denoising tasks are hard?
#
# A diffusion model learns one denoising task per noise level. This notebook draws, from the files of one measurement,
# how hard each of 20 tasks was for its own expert network, how sure that is, and whether the relative entropy between
# neighbouring noise levels says the same. Nothing is trained here: every number is read from
# `results/quickstart-digits/measurement`, which this command makes:
#
#     python -m training quickstart digits --out results/quickstart-digits
#
# Every figure has log-SNR on its horizontal axis, clean data on the left and noise on the right; the upper edge shows
# the timestep t. Bars are 90 % intervals, hollow markers are bounds rather than estimates.

# %%
from pathlib import Path

import pandas as pd

from difficulty.plots import (
    agreement_figure,
    difficulty_figure,
    learning_figure,
    rank_figure,
    relative_entropy_figure,
)
from difficulty.ranking import Ranking
from difficulty.records import read_run

RESULTS = Path("..") / "results" / "quickstart-digits" / "measurement"
run = read_run(RESULTS, "measure")
ranking = Ranking.load(RESULTS)
config = run["config"]
pd.Series(
    {
        "data": config["data"],
        "process": config["process"],
        "tasks": config["tasks"],
        "experts per task": len(config["plan"]["seeds"]),
        "network": config["plan"]["network"],
        "prediction": config["plan"]["prediction"],
        "budget [iterations]": config["plan"]["budget"],
        "wall time [s]": run["wall_seconds"],
    },
    name="the measurement",
).to_frame()

# %% [markdown]
# ## Learning curves
#
# The held-out loss of each expert, as excess over the best loss that any run reached on the same draws. All tasks start
# from the best *linear multiple of the input*; what is left is what has to be learned. An honest floor matters: the
# digits have no known Bayes loss, so the curves beyond the budget (dashed) only serve to find it.

# %%
learning_figure(RESULTS);

# %% [markdown]
# ## Difficulty by five measures
#
# `excess_nats` and `log_regret` do not depend on what the network predicts; `paper_style` (iterations until 90 % of the
# fall has happened) does. The relative entropy per step mixes the data with the step length of the schedule; per
# (d log-SNR)² it is free of it.

# %%
difficulty_figure(RESULTS);

# %% [markdown]
# ## Ranks, and how sure they are
#
# An interval is that of one task's rank; which neighbours are told apart, all at 95 % together, the verdict says.

# %%
rank_figure(RESULTS);

# %% [markdown]
# ## Do the definitions agree?

# %%
agreement_figure(RESULTS);

# %% [markdown]
# ## Relative entropy between neighbouring noise levels

# %%
relative_entropy_figure(RESULTS);

# %% [markdown]
# ## What was found, in words

# %%
for sentence in ranking.verdict:
    print("-", sentence)

# %% [markdown]
# ## The same as a table
#
# `ranking.json` holds all of it; the order of the tasks from easiest to hardest is what a curriculum is made from.

# %%
measure = ranking.measures["excess_nats"]
pd.DataFrame(
    {
        "t": [f"{task.t_first}..{task.t_last}" for task in ranking.tasks],
        "log-SNR from": [task.log_snr_high for task in ranking.tasks],
        "excess [nats]": measure.value,
        "90 % interval": [f"[{a:.2g}, {b:.2g}]" for a, b in zip(measure.ci_low, measure.ci_high, strict=True)],
        "rank (1 = easiest)": measure.rank,
        "rank interval": [f"{a}..{b}" for a, b in zip(measure.rank_low, measure.rank_high, strict=True)],
    }
).round(3)
