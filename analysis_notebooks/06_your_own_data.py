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
# # Your own data, in ten lines
#
# An array whose first axis counts samples is all that is needed. This notebook makes one up (a spiral in three
# dimensions), measures which of its denoising tasks are hard, makes a curriculum of it and trains with it: everything
# that the command lines do, at a budget of seconds. Put your own `.npy` in place of `spiral.npy`, and larger numbers in
# place of the small ones, before you believe anything.

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch

torch.set_num_threads(1)  # of a network this small more threads only wait for each other
folder = tempfile.TemporaryDirectory()
work = Path(folder.name)
rng = np.random.default_rng(0)
angle = 3 * np.pi * np.sqrt(rng.random(1500))
spiral = np.stack([angle * np.cos(angle), angle * np.sin(angle), 2 * rng.random(1500)], 1) / 6
np.save(work / "spiral.npy", spiral + 0.05 * rng.standard_normal(spiral.shape))

# %% [markdown]
# ## The ten lines

# %%
from difficulty import ExpertPlan, get_process, load_dataset, measure
from training import TrainPlan, make_curriculum
from training.run import train

data, process = load_dataset(work / "spiral.npy"), get_process("vp-linear")
plan = ExpertPlan(network="mlp:width=64", seeds=(0, 1), budget=200, heldout_draws=256)
found = measure(data, process, out=work / "measured", tasks=10, grid="log-snr", measures=["convergence"], plan=plan)
curriculum = make_curriculum(found.ranking, method="kmeans", k=4)
curriculum.save(work / "curriculum.json")
settings = TrainPlan(steps=1200, network="mlp", prediction="v", lr=3e-3)
run = train(data, process, settings, work / "run", curriculum)

# %% [markdown]
# ## What was found

# %%
print(found.ranking.verdict[0])

# %% [markdown]
# Difficulty (`excess_nats`) peaks where the noise is as large as the structure that it hides, the distance between the
# arms of the spiral, and falls off on both sides. Bars are 90 % intervals from two experts per task; hollow markers are
# bounds, because the floor of unknown data is only the best loss that any run reached. More seeds and a larger budget
# shorten the bars.

# %%
from difficulty.plots import difficulty_figure

difficulty_figure(work / "measured");

# %%
from training.plots_curriculum import clusters_figure

clusters_figure({"easy to hard": curriculum});

# %% [markdown]
# ## What was trained
#
# Each timestep as often as the stages ask for, and samples beside the data.

# %%
from training.plots import coverage

coverage(work / "run");

# %%
import matplotlib.pyplot as plt

from training.sampling import draw_samples

samples = draw_samples(run.ema, 600, data.shape, seed=0, method="heun", steps=30)
figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.6), sharex=True, sharey=True, layout="constrained")
for ax, points, title in zip(axes, (data.heldout, samples), ("held-out data", "samples"), strict=True):
    ax.scatter(points[:, 0], points[:, 1], s=4, color="#0072B2")
    ax.set_title(title)
    ax.set_aspect("equal")

# %% [markdown]
# How near are they? Every metric with its interval, beside what as many data in their place show, which is as near as
# one can get. The first two cannot tell these samples from data, precision can: a metric that shows no difference may
# be blind.

# %%
import pandas as pd

from training.metrics import SampleJudge

judged = SampleJudge(data.train, ("fd-pixels", "kid-pixels", "sw-pixels", "precision-pixels", "recall-pixels"))
columns = ["value", "ci_low", "ci_high", "of_data", "better"]
pd.DataFrame({name: vars(value) for name, value in judged.evaluate(samples).items()}).T[columns]

# %% [markdown]
# ## The same from the command line
#
#     difficulty measure mydata.npy --process vp-linear --tasks 20 --grid log-snr --out runs/measured
#     training cluster runs/measured --method kmeans -k 5 -o curriculum.json
#     training run mydata.npy --curriculum curriculum.json --steps 20000 --out runs/trained
#     training compare mydata.npy --curriculum curriculum.json --arms vanilla vanilla-again curriculum --out compared
#
# The last line answers whether the curriculum helped; without it nobody knows.
