"""Figures of a measurement, drawn from its files only.

The horizontal axis is log-SNR everywhere, clean data on the left and noise on the right (log-SNR falls to the right),
with the timestep t on the opposite edge. Colours are Okabe and Ito's, told apart by colour-blind readers; series also
differ in marker. Every estimate carries its 90 % interval; hollow markers are flagged (censored or not valid), and one
on the upper edge is a task that could not be learned and has no value.
"""

__all__ = ["FIGURES", "PALETTE", "add_t_axis", "plot_folder", "quality_panel", "save_figure"]

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from difficulty.measurement_folder import check_config, read_tables
from difficulty.process import Array
from difficulty.ranking import MeasureRanking, Ranking
from difficulty.records import read_run, read_table, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PAGE_WIDTH = 7.2  # inches
SHOWN_MEASURES = (
    "excess_nats", "log_regret", "paper_style", "sample_quality", "relative_entropy",
    "relative_entropy_per_dlogsnr2",
)  # fmt: skip
LOG_SNR_LABEL = "log-SNR  (clean data left, noise right)"


def save_figure(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG, atomically, and close it."""
    import matplotlib.pyplot as plt

    paths = []
    for suffix in ("png", "svg"):
        buffer = io.BytesIO()
        # A fixed date and hash salt make the same figure the same file.
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        with plt.rc_context({"svg.hashsalt": name}):
            figure.savefig(buffer, format=suffix, dpi=150, bbox_inches="tight", metadata=metadata)
        paths.append(folder / f"{name}.{suffix}")
        write_bytes(paths[-1], buffer.getvalue())
    plt.close(figure)
    return paths


def add_t_axis(axes: "Axes", t: Array, log_snr: Array, ticks: int = 7) -> None:
    """Point log-SNR to the right as noise grows and mark t on the upper edge.

    Args:
        axes: with log-SNR on its horizontal axis.
        t, log_snr: finite points of the process, any number.
    """
    axes.set_xlim(float(np.max(log_snr)) + 0.3, float(np.min(log_snr)) - 0.3)
    upper = axes.twiny()
    upper.set_xlim(axes.get_xlim())
    wanted = np.linspace(-log_snr.max(), -log_snr.min(), ticks)
    chosen = np.unique(np.searchsorted(-log_snr, wanted).clip(0, len(t) - 1))
    upper.set_xticks(log_snr[chosen], [f"{t[i]:.0f}" for i in chosen])
    upper.set_xlabel("timestep t")
    upper.grid(False)


def _shown(ranking: Ranking) -> dict[str, MeasureRanking]:
    """The measures that a figure has room for; the others stand in the files and in the notebooks."""
    return {name: measure for name, measure in ranking.measures.items() if name in SHOWN_MEASURES}


def _middles(ranking: Ranking) -> tuple[Array, Array]:
    """Log-SNR and t at the middle of every task; a task that ends at -inf is drawn one unit below its upper end."""
    high = np.array([task.log_snr_high for task in ranking.tasks])
    low = np.array([task.log_snr_high - 2 if task.log_snr_low is None else task.log_snr_low for task in ranking.tasks])
    t = np.array([0.5 * (task.t_first + task.t_last) for task in ranking.tasks])
    return 0.5 * (high + low), t


def difficulty_figure(folder: Path) -> "Figure":
    """Difficulty of every task by every measure, one panel each."""
    import matplotlib.pyplot as plt

    ranking = Ranking.load(folder)
    x, t = _middles(ranking)
    measures = _shown(ranking)
    count = len(measures)
    figure, panels = plt.subplots(
        count, 1, figsize=(PAGE_WIDTH, 1.0 + 1.7 * count), sharex=True, squeeze=False, layout="constrained"
    )
    for index, (axes, (name, measure)) in enumerate(zip(panels[:, 0], measures.items(), strict=True)):
        _series(axes, x, measure, PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)])
        label = f"{name}\n[{measure.unit}]"
        axes.text(0.99, 0.94, label, transform=axes.transAxes, ha="right", va="top", fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_ylabel("harder →", fontsize=8)
    add_t_axis(panels[0, 0], t, x)
    for axes in panels[1:, 0]:
        axes.set_xlim(panels[0, 0].get_xlim())
    panels[-1, 0].set_xlabel(LOG_SNR_LABEL)
    if any(any(measure.flagged) for measure in measures.values()):
        figure.supxlabel("hollow: a bound, not valid or not learned; on the upper edge: no value", fontsize=8)
    return figure


def _series(axes: "Axes", x: Array, measure: MeasureRanking, colour: str, marker: str) -> None:
    value, low, high = (np.array(v, dtype=np.float64) for v in (measure.value, measure.ci_low, measure.ci_high))
    flagged = np.array(measure.flagged)
    shown = np.isfinite(value)
    # Intervals that reach below 0 need a linear axis, and so do logarithms.
    ends = np.concatenate([value[shown], low[shown & np.isfinite(low)]])
    if len(ends) and ends.min() > 0 and ends.max() > ends.min() and not measure.unit.startswith("log "):
        axes.set_yscale("log")
    axes.plot(x, value, color=colour, linewidth=1, alpha=0.5)
    # An open end has no bar; NaN would take the line of the other one away as well.
    errors = np.nan_to_num(np.abs(np.stack([value - low, high - value])))
    if not shown.any():
        axes.text(0.5, 0.4, "no task has a value", transform=axes.transAxes, ha="center", fontsize=9)
        axes.set_yticks([])
    for rows, face in ((~flagged, colour), (flagged, "white")):
        axes.errorbar(
            x[rows], value[rows], yerr=errors[:, rows], fmt=marker, color=colour, markerfacecolor=face,
            markersize=5, capsize=2, linewidth=1,
        )  # fmt: skip
    unlearned = x[~shown & np.isfinite(np.array(measure.rank, dtype=np.float64))]
    if len(unlearned):  # an empty line that is not clipped would leave the layout no room
        axes.plot(
            unlearned, np.ones(len(unlearned)), marker, color=colour, markerfacecolor="white", markersize=5,
            transform=axes.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip


def rank_figure(folder: Path) -> "Figure":
    """Rank of every task by every measure with its interval: where two measures part, and which ranks are sure."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    ranking = Ranking.load(folder)
    log_snr, t = _middles(ranking)
    measures = _shown(ranking)
    count = len(measures)
    figure, axes = plt.subplots(figsize=(PAGE_WIDTH, 4.4), layout="constrained")
    # One slot per task, so that the measures stand side by side; tasks run from clean to noisy like every axis here.
    slot = np.arange(len(t), dtype=np.float64)
    for index, (name, measure) in enumerate(measures.items()):
        rank, low, high = (np.array(v, dtype=np.float64) for v in (measure.rank, measure.rank_low, measure.rank_high))
        shift = 0.64 * (index / max(count - 1, 1) - 0.5)
        colour, flagged = PALETTE[index % len(PALETTE)], np.array(measure.flagged)
        errors = np.abs(np.stack([rank - low, high - rank]))
        for rows, face in ((~flagged, colour), (flagged, "white")):
            axes.errorbar(
                (slot + shift)[rows], rank[rows], yerr=errors[:, rows], fmt=MARKERS[index % len(MARKERS)],
                color=colour, markerfacecolor=face, markersize=4, capsize=2, linewidth=1,
                label="_" if face == "white" else name,
            )  # fmt: skip
    shown = slot[:: max(1, len(slot) // 10)].astype(int)
    axes.set_xticks(shown, [f"{round(log_snr[i], 1) + 0.0:.1f}" for i in shown])  # not -0.0
    upper = axes.secondary_xaxis("top")
    upper.set_xticks(shown, [f"{t[i]:.0f}" for i in shown])
    upper.set_xlabel("timestep t in the middle of the task")
    for edge in slot[1:] - 0.5:
        axes.axvline(edge, color="0.9", linewidth=0.6, zorder=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0.5, len(t) + 0.5)
    axes.set_ylabel("rank  (1 = easiest, top = hardest)")
    axes.set_xlabel("one slot per task, labelled by its log-SNR  (clean data left, noise right)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    return figure


def learning_figure(folder: Path) -> "Figure":
    """Excess over the floor against iterations, one line per task; bands span the seeds."""
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    ranking = Ranking.load(folder)
    x, _ = _middles(ranking)
    losses = read_table(folder / "losses.csv", ["task", "seed", "iteration", "excess_nats", "floor_kind"])
    budget = read_run(folder, "measure")["config"]["plan"]["budget"]
    figure, axes = plt.subplots(figsize=(PAGE_WIDTH, 4.0), layout="constrained")
    colours = ScalarMappable(Normalize(x.min(), x.max()), "cividis")
    drawn = (losses["excess_nats"] > 0) & np.isfinite(losses["excess_nats"])  # what a log axis can show
    positive = losses[(losses["iteration"] > 0) & drawn]
    for _, part in positive.groupby("task"):
        spread = part.groupby("iteration")["excess_nats"].agg(["mean", "min", "max"])
        colour = colours.to_rgba(x[part["task"].iloc[0]])
        axes.plot(spread.index, spread["mean"], color=colour, linewidth=1.2)
        axes.fill_between(spread.index, spread["min"], spread["max"], color=colour, alpha=0.2, linewidth=0)
    axes.axvline(budget, color="0.3", linestyle="--", linewidth=1)
    axes.annotate("budget", (budget, 1.01), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    axes.set_xscale("log")
    if len(positive):
        axes.set_yscale("log")
    else:
        finite = np.isfinite(losses["excess_nats"]).any()
        said = "no expert has an excess above zero" if finite else "all experts diverged"
        axes.text(0.03, 0.94, said, transform=axes.transAxes, va="top", fontsize=9)
        axes.set_yticks([])
    axes.set_xlabel("iterations of each expert")
    kind = "Bayes loss" if (losses["floor_kind"] == "exact").all() else "best known loss"
    axes.set_ylabel(f"excess over the {kind}\n[nats per unit log-SNR]")
    axes.grid(alpha=0.3)
    figure.colorbar(colours, ax=axes, label="log-SNR of the task (high = clean)")
    return figure


def quality_panel(axes: "Axes", part: pd.DataFrame, log_snr: Array, colours: "ScalarMappable") -> None:
    """One metric of sample_quality.csv against iterations: lines are tasks, bands span the seeds.

    Distances are relative to those of the shared network of the same seed, whose samples start from the same noise, so
    that the bands show what the expert changes.

    Args:
        axes: to draw into.
        part: rows of one metric.
        log_snr: of every task, which ``colours`` maps.
        colours: of the lines.
    """
    part = part.assign(ratio=part["value"] / part["shared"])
    for task, rows in part.groupby("task"):
        spread = rows.groupby("iteration")["ratio"].agg(["mean", "min", "max"])
        colour = colours.to_rgba(log_snr[int(str(task))])
        axes.plot(spread.index, spread["mean"], color=colour, linewidth=1.3)
        axes.fill_between(spread.index, spread["min"], spread["max"], color=colour, alpha=0.15, linewidth=0)
    axes.axhline(1.0, color="black", linestyle="--", linewidth=1, label="shared network alone")
    perfect = (part["perfect"] / part["shared"]).mean()
    axes.axhline(perfect, color="black", linestyle=":", linewidth=1, label="perfect sampler")
    axes.set_xscale("log")
    axes.grid(alpha=0.3)


def sample_quality_figure(folder: Path) -> "Figure":
    """Distance of samples to the data against the iterations of one expert, one line per task, as ``quality_panel``."""
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    x, _ = _middles(Ranking.load(folder))
    columns = ["task", "seed", "iteration", "metric", "value", "shared", "perfect"]
    table = read_table(folder / "sample_quality.csv", columns)
    table = table[table["iteration"] > 0]
    names = list(dict.fromkeys(table["metric"]))
    figure, panels = plt.subplots(1, len(names), figsize=(PAGE_WIDTH, 3.6), squeeze=False, layout="constrained")
    colours = ScalarMappable(Normalize(x.min(), x.max()), "cividis")
    for axes, name in zip(panels[0], names, strict=True):
        quality_panel(axes, table[table["metric"] == name], x, colours)
        axes.set_xlabel("iterations of the expert")
        axes.set_title(f"{name}  (lower is better)", fontsize=9)
    panels[0, 0].set_ylabel("distance of samples to the data,\nrelative to the shared network's")
    panels[0, 0].legend(fontsize=7, frameon=False, loc="upper right")
    figure.colorbar(colours, ax=list(panels[0]), label="log-SNR of the expert's task (high = clean)")
    return figure


def relative_entropy_figure(folder: Path) -> "Figure":
    """KL between consecutive marginals against log-SNR, per step and per (d log-SNR)^2, with intervals."""
    import matplotlib.pyplot as plt

    columns = ["t", "log_snr", "kl", "ci_low", "ci_high", "per_dlogsnr2", "valid"]
    table = read_table(folder / "relative_entropy.csv", columns)
    table = table[np.isfinite(table["log_snr"])].sort_values("t")
    figure, panels = plt.subplots(2, 1, figsize=(PAGE_WIDTH, 5.2), sharex=True, layout="constrained")
    step = table["kl"] / table["per_dlogsnr2"]
    titles = ("per step: KL(p_{t-1} || p_t)   [nats]", "per (d log-SNR)²: free of the step length   [nats]")
    for axes, scale, title, colour in zip(panels, (1.0, step), titles, PALETTE, strict=False):
        curves = pd.DataFrame({name: table[name] / scale for name in ("kl", "ci_low", "ci_high")})
        valid = table["valid"].astype(bool).to_numpy()
        shown = curves[valid].reindex(curves.index)
        axes.plot(table["log_snr"], shown["kl"], color=colour, linewidth=1.4, label="valid")
        axes.fill_between(table["log_snr"], shown["ci_low"], shown["ci_high"], color=colour, alpha=0.25, linewidth=0)
        if not valid.all():
            axes.plot(table["log_snr"], curves["kl"].where(~valid), color="0.6", linestyle=":", label="not valid")
            axes.legend(fontsize=8, frameon=False)
        axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(alpha=0.3)
    add_t_axis(panels[0], table["t"].to_numpy(), table["log_snr"].to_numpy())
    panels[1].set_xlim(panels[0].get_xlim())
    panels[1].set_xlabel(LOG_SNR_LABEL)
    return figure


def agreement_figure(folder: Path) -> "Figure":
    """Kendall's tau between every two measures, with its interval."""
    import matplotlib.pyplot as plt
    import seaborn

    ranking = Ranking.load(folder)
    names = list(ranking.measures)
    tau = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
    text = pd.DataFrame("", index=names, columns=names)
    for pair in ranking.kendall_tau:
        known = pair.tau is not None
        for a, b in ((pair.first, pair.second), (pair.second, pair.first)):
            tau.loc[a, b] = pair.tau if known else np.nan
            text.loc[a, b] = f"{pair.tau:+.2f}\n[{pair.ci_low:+.2f}, {pair.ci_high:+.2f}]" if known else ""
    side = 2.8 + 0.72 * len(names)  # the names, and cells wide enough for an interval
    figure, axes = plt.subplots(figsize=(side + 1.0, side), layout="constrained")
    seaborn.heatmap(
        tau, annot=text, fmt="", vmin=-1, vmax=1, cmap="PuOr", square=True, linewidths=0.5, ax=axes,
        annot_kws={"fontsize": 6}, cbar_kws={"label": "Kendall's tau over the tasks  (1 = same order)"},
    )  # fmt: skip
    axes.tick_params(axis="x", rotation=45)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
    if any(pair.tau is None for pair in ranking.kendall_tau):
        axes.set_facecolor("0.85")
        axes.set_title("grey: fewer than 3 tasks have a value in both, or one ties them all", loc="left", fontsize=8)
    return figure


FIGURES: Mapping[str, tuple[Callable[[Path], "Figure"], str]] = {
    "difficulty": (difficulty_figure, "ranking.json"),
    "ranks": (rank_figure, "ranking.json"),
    "agreement": (agreement_figure, "ranking.json"),
    "learning_curves": (learning_figure, "losses.csv"),
    "sample_quality": (sample_quality_figure, "sample_quality.csv"),
    "relative_entropy": (relative_entropy_figure, "relative_entropy.csv"),
}


def plot_folder(folder: Path) -> list[Path]:
    """Draw every figure whose table a finished measurement holds, into its ``figures/``; returns the files.

    Raises:
        InputError: if the folder is not a finished measurement, or a table of it is missing or incomplete.
    """
    read_tables(folder, check_config(read_run(folder, "measure"), folder))
    written = []
    for name, (draw, source) in FIGURES.items():
        if (folder / source).exists():
            written += save_figure(draw(folder), folder / "figures", name)
    return written
