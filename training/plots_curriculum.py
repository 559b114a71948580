"""Figures of curricula, drawn from their files; axes and colours as in `difficulty/plots.py`."""

__all__ = ["clusters_figure", "stages_figure"]

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from difficulty.plots import LOG_SNR_LABEL, PAGE_WIDTH, add_t_axis
from difficulty.process import Array
from difficulty.tasks import runs
from training.curriculum import Curriculum, known_process
from training.density import finite_log_snr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def clusters_figure(curricula: Mapping[str, Curriculum]) -> "Figure":
    """Where on the noise axis the clusters of each curriculum lie; the number is that of the stage that adds them.

    Args:
        curricula: by name, all for one process.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(PAGE_WIDTH, 1.1 + 0.42 * len(curricula)), layout="constrained")
    for row, curriculum in enumerate(curricula.values()):
        last = max(len(curriculum.clusters) - 1, 1)
        for stage, cluster in enumerate(curriculum.clusters):
            colour = plt.get_cmap("cividis")(stage / last)
            for first, end in runs(cluster.tasks):
                left, right = _edge(curriculum, first), _edge(curriculum, end + 1)
                axes.barh(row, right - left, left=left, height=0.8, color=colour, edgecolor="white", linewidth=0.6)
                if abs(right - left) > 0.35:  # narrower than its number
                    axes.text((left + right) / 2, row, str(stage + 1), ha="center", va="center", fontsize=8,
                              color="white" if stage / last < 0.6 else "black")  # fmt: skip
    axes.set_yticks(range(len(curricula)), list(curricula))
    axes.set_ylim(len(curricula) - 0.4, -0.6)
    _log_snr_axis(axes, next(iter(curricula.values())))
    return figure


def stages_figure(curriculum: Curriculum) -> "Figure":
    """How often each t is drawn in every stage under the first base density, 1 being uniform over all t."""
    import matplotlib.pyplot as plt

    process = known_process(curriculum.process, "the curriculum")
    (_, base), stages = curriculum.base_densities(process)[0], curriculum.stages()
    log_snr = finite_log_snr(process)
    figure, axes = plt.subplots(figsize=(PAGE_WIDTH, 3.2), layout="constrained")
    for stage, tasks in enumerate(stages):
        density = np.zeros_like(base)
        for task in (curriculum.tasks[index] for index in tasks):
            density[task.t_first : task.t_last + 1] = base[task.t_first : task.t_last + 1]
        colour = plt.get_cmap("cividis")(0.9 * stage / max(len(stages) - 1, 1))
        axes.step(log_snr, process.T * density[1:] / density.sum(), where="mid", color=colour, lw=1.8,
                  label=f"stage {stage + 1}")  # fmt: skip
    axes.axhline(1, color="0.5", lw=0.8, ls=":")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("times as often as\nuniformly over all t")
    axes.legend(fontsize=8, frameon=False, ncols=2)
    axes.grid(alpha=0.3)
    _log_snr_axis(axes, curriculum)
    return figure


def _edge(curriculum: Curriculum, task: int) -> float:
    """log-SNR between a task and the cleaner one before it; at the ends that of t = 1 and of the last finite t."""
    log_snr = _log_snr(curriculum)
    if task == 0:
        return float(log_snr[0])
    t_last = curriculum.tasks[task - 1].t_last
    return float(log_snr[-1] if t_last == len(log_snr) else 0.5 * (log_snr[t_last - 1] + log_snr[t_last]))


def _log_snr(curriculum: Curriculum) -> Array:
    return finite_log_snr(known_process(curriculum.process, "the curriculum"))


def _log_snr_axis(axes: "Axes", curriculum: Curriculum) -> None:
    log_snr = _log_snr(curriculum)
    axes.set_xlabel(LOG_SNR_LABEL)
    add_t_axis(axes, np.arange(1, len(log_snr) + 1, dtype=np.float64), log_snr)
