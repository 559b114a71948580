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
# # From a ranking to a curriculum
#
# A ranking says which denoising tasks are hard. A curriculum groups them into clusters, orders the clusters and says
# when the next one joins the training. This notebook makes curricula from the committed measurement of the digits,
# shows how much the method of clustering decides, and writes the file that any training loop can read.

# %%
import json
import random
import tempfile
from pathlib import Path

import pandas as pd

from difficulty.ranking import Ranking
from training.clusters import INTERVAL_METHODS, METHODS
from training.curriculum import Curriculum
from training.curriculum_builders import make_curriculum
from training.plots_curriculum import clusters_figure, stages_figure

RESULTS = Path("..") / "results" / "quickstart-digits"
ranking = Ranking.load(RESULTS / "measurement")
measure = ranking.measures["excess_nats"]
pd.DataFrame(
    {
        "t": [f"{task.t_first}..{task.t_last}" for task in ranking.tasks],
        "excess_nats": measure.value,
        "90 % interval": [f"[{a:.2g}, {b:.2g}]" for a, b in zip(measure.ci_low, measure.ci_high, strict=True)],
        "rank (1 = easiest)": measure.rank,
    }
).round(4)

# %% [markdown]
# ## The method decides
#
# Five clusters by every method, easy to hard: the number is the stage at which a cluster joins. The first five methods
# group the twenty measured tasks by their difficulty; `snr` and `log-snr` cut the timesteps anew by noise level alone,
# as the paper does without saying which of the two. Raw SNR puts most timesteps into the first cluster.

# %%
curricula = {method: make_curriculum(ranking, method=method, k=5) for method in (*METHODS, *INTERVAL_METHODS)}
clusters_figure(curricula);

# %%
T = ranking.process["T"]
share = {}
for method, curriculum in curricula.items():
    tasks = [[curriculum.tasks[i] for i in cluster.tasks] for cluster in curriculum.clusters]
    share[method] = [sum(task.t_last - task.t_first + 1 for task in members) / T for members in tasks]
pd.DataFrame(share, index=[f"cluster {n}" for n in range(1, 6)]).T.map("{:.1%} of t".format)

# %% [markdown]
# Another measure gives other clusters, even where it agrees on the order, because a cluster depends on the values and
# not on the ranks. `power_law`, the speed at which the rest still shrinks, is the one that does not follow the noise
# here, and its clusters are several separate runs of t; `contiguous` would forbid that.

# %%
clusters_figure(
    {name: make_curriculum(ranking, method="kmeans", k=5, measure=name) for name in ranking.measures}
);

# %% [markdown]
# ## What a stage trains
#
# Accumulating, each stage draws t from all clusters so far, so that what joined first is drawn most over the whole run.
# The base density under the curriculum is a choice of its own: uniform, even in log-SNR, or in part proportional to the
# measured difficulty.

# %%
curriculum = make_curriculum(ranking, method="kmeans", k=5, pacing="fraction", pacing_options={"share": 0.1})
stages_figure(curriculum);

# %%
stages_figure(make_curriculum(ranking, method="kmeans", k=5, base_density="measured:power=1,uniform_share=0.5"));

# %% [markdown]
# ## The file
#
# One JSON file holds tasks, clusters in training order, pacing, density and the fingerprint of the process with its
# direction of t. `docs/curriculum-json.md` explains every field; `training validate` checks a file that was edited.

# %%
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "curriculum.json"
curriculum.save(path)
assert Curriculum.load(path) == curriculum
plan = json.loads(path.read_text())
{key: plan[key] for key in ("format", "clusters", "accumulate", "pacing")}

# %% [markdown]
# A reader needs nothing but `json`:

# %%
def timesteps(stage):
    clusters = plan["clusters"][: stage + 1] if plan["accumulate"] else [plan["clusters"][stage]]
    tasks = [plan["tasks"][index] for cluster in clusters for index in cluster["tasks"]]
    return [t for task in tasks for t in range(task["t_first"], task["t_last"] + 1)]


random.seed(0)
{f"stage {stage + 1}": sorted(random.choices(timesteps(stage), k=8)) for stage in range(5)}

# %% [markdown]
# The same from the command line, and a training with it:
#
#     training cluster results/quickstart-digits/measurement --method kmeans -k 5 -o curriculum.json
#     training run digits --curriculum curriculum.json --out runs/digits
#
# In a training loop of your own the file becomes draws of t through an adapter (`docs/adapters.md`).
