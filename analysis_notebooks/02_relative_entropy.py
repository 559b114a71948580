# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
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
# # Is the relative entropy between consecutive marginals higher at low t?
#
# The paper observes that KL(p_{t-1} || p_t) falls with t and takes that for difficulty. This notebook reads the
# atlas in `results/relative-entropy-atlas` (made by `benchmarks/relative_entropy_atlas.py`) and the accuracy table in
# `results/relative-entropy-accuracy` (made by `benchmarks/relative_entropy_accuracy.py`); it measures nothing itself.

# %%
from pathlib import Path

import pandas as pd
from IPython.display import Image, display

here = Path.cwd()
results = next(folder / "results" for folder in (here, *here.parents) if (folder / "results").is_dir())
atlas = pd.read_csv(results / "relative-entropy-atlas" / "table.csv")
accuracy = pd.read_csv(results / "relative-entropy-accuracy" / "accuracy.csv")
pd.set_option("display.width", 160)

# %% [markdown]
# ## The answer, law by law and process by process
# Rank correlation of the KL per step with t, over the valid pairs. -1 means that the observation holds exactly; an
# empty cell is a KL of zero at every t (whitened data under a variance-preserving process). The 1/k² spectrum has a
# mean variance of 1/4; under the variance-exploding processes the answer depends on that scale.

# %%
order = atlas["law"].drop_duplicates()
atlas.pivot(index="law", columns="process", values="rank_kl").loc[order].round(2)

# %% [markdown]
# Data that are known from samples only (estimated) have no valid pair where the noise is too little to tell laws apart:
# their answers hold for the valid pairs from there on (photo patches under the cosine schedule have refused ones at
# more noise too), and a peak at lower t would not be seen. The first valid pair, as a share of T:

# %%
atlas.pivot(index="law", columns="process", values="valid_from_t_over_T").loc[order].round(3)

# %% [markdown]
# Where the KL is largest among the valid pairs, as a share of T:

# %%
atlas.pivot(index="law", columns="process", values="argmax_t_over_T").loc[order].round(3)

# %% [markdown]
# It holds for variance-preserving processes and flow matching on data that are singular or strongly coloured, which
# images are. It does not hold in general: the variance-exploding processes reverse it for the same data.
#
# ## How much of it is the schedule?
# The same KL per squared step of log-SNR, and I_min, the rate that no choice of the schedule can remove (an empty cell
# is an I_min of zero: data of one variance in all directions):

# %%
columns = ["law", "process", "rank_kl", "rank_per_dlogsnr2", "rank_i_min"]
atlas[atlas["process"].isin(["vp-linear", "edm"])][columns].round(2)

# %%
display(Image(filename=str(results / "relative-entropy-atlas" / "figures" / "vp-linear.png")))

# %% [markdown]
# ## May the estimates be believed?
# Laws held back while the estimator was made (what came after a first look, the README of the folder says), given as
# samples. Of the pairs that it marks valid: relative error, and the share of 90 % intervals that hold the truth, with
# its own interval over data sets where there are enough.

# %%
shown = ["law", "pairs", "valid", "valid_65_651", "median_error", "worst_error", "beyond_30_percent"]
shown += ["coverage", "coverage_low", "coverage_high"]
accuracy[(accuracy["process"] == "vp-linear") & (accuracy["estimator"] == "auto")][shown].round(3)
