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
# # "Tasks at low t converge more slowly": by which definition, for which network, how sure?
#
# The paper *Denoising Task Difficulty-based Curriculum for Training Diffusion Models* (arXiv 2403.10348) trains one
# network per range of t, an *expert*, and observes that the loss of experts at low t converges more slowly. It does
# not say what "converges" means in a formula, shows no intervals, and uses one data set. Here the same experiment is
# done on three data sets, with seven definitions, three predictions (eps, x0, v), four processes, three seeds, two
# ways of cutting the tasks, and beside the experts one network that was trained on all t.
#
# Nothing is trained here: every number is read from `results/convergence-study`, which this command makes:
#
#     python benchmarks/convergence_study.py --out results/convergence-study
#
# The data: `digits-mixture` (64 dimensions, ten Gaussians fitted to the digits; its Bayes loss is known exactly),
# `digits` (8 x 8) and `photo-patches-8` (3 x 8 x 8 crops of two photographs). For the last two the floor is the best
# loss that any prediction, seed or shared network reached on the same draws at up to twice the budget: an upper
# bound. The networks are small MLPs and none has converged. All intervals are 90 %.

# %%
from pathlib import Path

import pandas as pd

from difficulty.convergence import DEFINITIONS
from difficulty.plots_convergence import (
    definitions_figure,
    learning_curves_figure,
    lower_t_figure,
    networks_figure,
    pairs_figure,
    processes_figure,
    samples_figure,
)
from difficulty.records import read_run

STUDY = Path("..") / "results" / "convergence-study"
run = read_run(STUDY, "convergence-study")
cells = pd.read_csv(STUDY / "cells.csv")
cells.groupby(["data", "kind", "grid"]).agg(
    cells=("cell", "size"), iterations=("iterations", lambda i: ", ".join(map(str, sorted(set(i)))))
)

# %% [markdown]
# ## Learning curves
#
# One line per task (yellow: clean, low t; dark blue: noise, high t). The vertical axis is what is left to learn: half
# the squared error of eps above the Bayes loss, in nats per unit log-SNR. In this unit a mistake means the same
# whatever the network predicts. The clean tasks have six orders of magnitude more to learn, and the order of the
# lines is the same in all three panels. The curves are far from parallel to anything: there is no single "rate".

# %%
learning_curves_figure(STUDY, "digits-mixture");

# %% [markdown]
# ## Seven definitions of difficulty
#
# - `excess_nats`: what is left at the budget, in nats per unit log-SNR;
# - `log_regret`: mean of its logarithm over log-spaced iterations, the whole curve in one number;
# - `paper_style`: iterations until 90 % of the fall to the curve's own end has happened;
# - `paper_style_floor`: the same, to the floor;
# - `normalised_area`: area under the curve scaled to fall from 1 to 0;
# - `exponential`: time constant of the best exponential; `power_law`: slope of log excess against log iterations.
#
# Hollow markers are bounds: the budget ended before the fall did, the fall was over at the first checkpoint (a
# hundredth of the budget), or the excess is below its own error. Tasks with the same bound share its ranks, as their
# intervals say; their markers stand in the order of t. The table says how many of the values are of which kind.
#
# On the mixture most agree on the clean half and lose each other in the noisy half, where their intervals are wide.

# %%
definitions_figure(STUDY, "digits-mixture");

# %%
values = pd.read_csv(STUDY / "difficulty.csv")
values = values[values["definition"].isin(DEFINITIONS) & values["cell"].isin(cells.query("kind == 'experts'")["cell"])]
kind = pd.Series("value", index=values.index)
kind[values["censored"]] = "not learned"  # without any interval
kind[values["censored"] & values["ci_low"].notna()] = "lower bound"
kind[values["censored"] & values["ci_high"].notna()] = "upper bound"
pd.crosstab(values["definition"], kind, normalize="index", colnames=["share"]).round(2).reindex(list(DEFINITIONS))

# %% [markdown]
# On photographs they do not even agree in tendency. Cleaner is harder by `excess_nats` and `log_regret`; by the rates
# (`paper_style`, `normalised_area`, `exponential`) the cleanest tasks are hard, those after them easy, and moderately
# high noise is hard again.

# %%
definitions_figure(STUDY, "photo-patches-8");

# %% [markdown]
# ## Is lower t harder?
#
# Kendall's tau with the order of t: +1 says that every task is harder than all noisier ones. By the excess it holds
# for all data and predictions, though the very cleanest task need not be the hardest (mixture, rank 18 of 20). By the
# rate that the paper speaks of it holds on digits and hardly on photographs. The data decide, and the definition.

# %%
lower_t_figure(STUDY)
lower_t = pd.read_csv(STUDY / "definitions.csv").query("second == 'lower t'").merge(cells, on="cell")
lower_t.query("grid == 't'").pivot_table(index=["data", "prediction"], columns="first", values="kendall").round(2)

# %% [markdown]
# ## What may be changed without changing the answer
#
# Every marker is a pair of measurements that differ in one thing only: what the network predicts, the seed, the process
# (compared over the log-SNR that both cover), or the grid of the tasks. The dashed line is 0.95. A definition that a
# change of prediction or seed moves says something about the parameterisation or the run, not about the task. The grid
# moves all of them: the first twentieth of t covers log-SNR 9 to 3 and hides what happens there.

# %%
pairs_figure(STUDY)
summary = pd.read_csv(STUDY / "summary.csv").query("data == 'all'")
summary.pivot(index="measure", columns="question", values="median").round(3).rename_axis("median of rho")

# %%
summary.pivot(index="measure", columns="question", values="least").round(3).rename_axis("least rho")

# %% [markdown]
# ## The same log-SNR under another process
#
# With tasks cut in log-SNR the processes can be laid over each other (250 iterations): they give one curve. It is not
# monotone. Difficulty peaks at log-SNR 2 to 5, depending on the data, and falls again towards clean data, so that
# "lower t is harder", almost exactly true of tasks equally long in t, is a tendency at best for tasks equally long in
# log-SNR. The table has Kendall's tau with the order of t on this grid; the paper's rate sees no such peak.

# %%
processes_figure(STUDY, "v")
lower_t.query("grid == 'log-snr' and first in ['excess_nats', 'log_regret', 'paper_style']").pivot_table(
    index=["process", "prediction"], columns="first", values="kendall"
).round(2)

# %% [markdown]
# ## One expert per task, or one network for all?
#
# The experts have their whole budget for one task; the shared network divides it. It loses most at high noise, where
# experts go on to 1e-5 nats and the shared network stays at 1e-3: its errors there are those of sharing, and its
# order of these tasks is not that of the experts. Which of the two a ranking comes from must be said.

# %%
networks_figure(STUDY, "eps")
networks = pd.read_csv(STUDY / "agreement.csv")
networks = networks[networks["question"].str.startswith("networks")]
networks[["first", "second", "kendall", "kendall_low", "kendall_high", "spearman", "verdict"]].round(2)

# %% [markdown]
# ## Sample quality: the paper's second curve
#
# Samples in which one expert (v-prediction, mixture) denoises its own task and a network on all t, trained ten times as
# long, the rest. Shown is their distance to the data over that of the samples which the shared network makes alone from
# the same noise, against the iterations of the expert. An untrained expert does most harm in the middle of the noise
# levels, and next to none in the noisy half, where a linear denoiser is already good; the cleanest task, which has much
# to learn in nats, matters little to the Frechet distance and more to the pixels. How hard a task is to learn and how
# much the samples depend on it are two things.

# %%
samples_figure(STUDY, "v");

# %% [markdown]
# ## What remains
#
# - Rank by `excess_nats`: the order survives another prediction, seed and process. `log_regret` does nearly as well.
# - Rates (`paper_style`, `normalised_area`, `exponential`, `power_law`) are properties of the curve *and* of what the
#   network predicts and of the seed. In the noisy half, where there is next to nothing to learn, they are mostly noise.
# - A rate says nothing about how much there is to learn, an excess nothing about how fast, and the samples depend on
#   yet other tasks: these are different questions, and on photographs they have different answers.
# - The cut decides whether "lower t is harder" holds.
# - All of this is for small MLPs that have not converged; the budgets are stated above.
