"""Figures of a study of convergence, drawn from its tables only (`benchmarks/convergence_study.py` says which).

Colours tell predictions, processes or data sets apart as the legends say; log-SNR runs from clean data on the left to
noise on the right, as in `plots.py`.
"""

__all__ = [
    "definitions_figure",
    "learning_curves_figure",
    "lower_t_figure",
    "networks_figure",
    "pairs_figure",
    "processes_figure",
    "samples_figure",
]

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from difficulty.plots import LOG_SNR_LABEL, MARKERS, PAGE_WIDTH, PALETTE, quality_panel
from difficulty.process import Array
from difficulty.records import read_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUESTIONS = {
    "predictions": "other prediction", "seeds": "other seed", "processes": "other process", "grids": "other task grid",
}  # fmt: skip
SHORTEST = 0.05  # tasks of the log-SNR axis narrower than this are single steps at the clipped end of a schedule


def _cells(folder: Path, **wanted: object) -> pd.DataFrame:
    """The cells of a study that have the wanted facts, in their order."""
    cells = read_table(folder / "cells.csv", ["cell", "data", "process", "prediction", "grid", "kind"])
    for column, value in wanted.items():
        cells = cells[cells[column] == value]
    return cells


def _middles(folder: Path, cell: str) -> Array:
    """Log-SNR in the middle of the tasks of a cell; a task that ends at -inf is drawn below its upper end."""
    tasks = read_table(folder / "tasks.csv", ["cell", "task", "log_snr_high", "log_snr_low"])
    tasks = tasks[tasks["cell"] == cell].sort_values("task")
    low = tasks["log_snr_low"].fillna(tasks["log_snr_high"] - 2)
    return (0.5 * (tasks["log_snr_high"] + low)).to_numpy(dtype=np.float64)


def _panels(rows: int, columns: int, height: float) -> "tuple[Figure, list[list[Axes]]]":
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        rows, columns, figsize=(PAGE_WIDTH * 1.2, height), squeeze=False, sharex="col", layout="constrained"
    )
    return figure, panels.tolist()


def _legend(figure: "Figure", axes: "Axes", columns: int = 4) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def learning_curves_figure(folder: Path, data: str) -> "Figure":
    """Excess over the floor against iterations, one line per task, one panel per prediction; bands span the seeds."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    curves = read_table(folder / "curves.csv", ["cell", "task", "iteration", "mean", "min", "max"])
    cells = _cells(folder, data=data, grid="t", kind="experts")
    figure, panels = _panels(1, len(cells), 3.4)
    x = _middles(folder, cells["cell"].iloc[0])
    colours = ScalarMappable(Normalize(x.min(), x.max()), "cividis")
    for axes, (_, cell) in zip(panels[0], cells.iterrows(), strict=True):
        part = curves[(curves["cell"] == cell["cell"]) & (curves["iteration"] > 0) & (curves["mean"] > 0)]
        for task, rows in part.groupby("task"):
            colour = colours.to_rgba(x[int(str(task))])
            axes.plot(rows["iteration"], rows["mean"], color=colour, linewidth=1.1)
            low = rows["min"].where(rows["min"] > 0, rows["mean"])
            axes.fill_between(rows["iteration"], low, rows["max"], color=colour, alpha=0.2, linewidth=0)
        axes.axvline(cell["iterations"], color="0.3", linestyle="--", linewidth=1)
        axes.annotate(
            "budget", (cell["iterations"], 1.01), xycoords=("data", "axes fraction"), ha="center", va="bottom",
            fontsize=7,
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.sharey(panels[0][0])
        axes.set_title(f"{cell['prediction']}-prediction", fontsize=9)
        axes.set_xlabel("iterations of each expert")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"{data}: excess [nats per unit log-SNR]", fontsize=9)
    figure.colorbar(colours, ax=panels[0], label="log-SNR of the task (high = clean)")
    return figure


def definitions_figure(folder: Path, data: str) -> "Figure":
    """Rank of every task by every definition, one panel each, with its interval; hollow markers are censored."""
    needed = ["cell", "task", "definition", "rank", "rank_low", "rank_high", "censored"]
    values = read_table(folder / "difficulty.csv", needed)
    cells = _cells(folder, data=data, grid="t", kind="experts")
    names = list(dict.fromkeys(values.loc[values["cell"].isin(cells["cell"]), "definition"]))
    columns = 4
    figure, panels = _panels(-(-len(names) // columns), columns, 4.6)
    flat = [axes for row in panels for axes in row]
    for axes, name in zip(flat, names, strict=False):
        for index, (_, cell) in enumerate(cells.iterrows()):
            rows = values[(values["cell"] == cell["cell"]) & (values["definition"] == name)].sort_values("task")
            rank = rows["rank"].to_numpy(dtype=np.float64)
            errors = np.abs(np.stack([rank - rows["rank_low"], rows["rank_high"] - rank]))
            slot, censored = np.arange(len(rank)) + 0.22 * (index - 1), rows["censored"].to_numpy(dtype=bool)
            for chosen, face in ((~censored, PALETTE[index]), (censored, "white")):
                axes.errorbar(
                    slot[chosen], rank[chosen], yerr=errors[:, chosen], fmt=MARKERS[index], markersize=3,
                    markeredgewidth=0.7, linewidth=0.8, color=PALETTE[index], markerfacecolor=face,
                    label="_" if face == "white" else f"{cell['prediction']}-prediction",
                )  # fmt: skip
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    for axes in flat[len(names) :]:
        axes.set_axis_off()
    for row in panels:
        row[0].set_ylabel("rank  (top = hardest)", fontsize=8)
    for axes in flat[max(0, len(names) - columns) : len(names)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("task  (clean left, noise right)", fontsize=8)
    _legend(figure, flat[0])
    return figure


def lower_t_figure(folder: Path) -> "Figure":
    """Kendall's tau between each definition's order and "lower t is harder", one panel per data set."""
    columns = ["cell", "first", "second", "kendall", "kendall_low", "kendall_high"]
    table = read_table(folder / "definitions.csv", columns)
    table = table[table["second"] == "lower t"]
    cells = _cells(folder, grid="t", kind="experts")
    data = list(dict.fromkeys(cells["data"]))
    names = list(dict.fromkeys(table["first"]))
    figure, panels = _panels(1, len(data), 3.4)
    for axes, name in zip(panels[0], data, strict=True):
        for index, (_, cell) in enumerate(cells[cells["data"] == name].iterrows()):
            rows = table[table["cell"] == cell["cell"]].set_index("first").loc[names]
            errors = np.abs(
                np.stack([rows["kendall"] - rows["kendall_low"], rows["kendall_high"] - rows["kendall"]])
            )
            axes.errorbar(
                rows["kendall"], np.arange(len(names)) + 0.2 * (index - 1), xerr=errors, fmt=MARKERS[index],
                color=PALETTE[index], markersize=4, linewidth=1, label=f"{cell['prediction']}-prediction",
            )  # fmt: skip
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlim(-1.05, 1.05)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names if axes is panels[0][0] else [""] * len(names))
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("tau with 'lower t is harder'", fontsize=8)
        axes.grid(alpha=0.3)
    _legend(figure, panels[0][0])
    return figure


def pairs_figure(folder: Path) -> "Figure":
    """Spearman's rho of every pair that differs in one thing only, by definition; the dashed line is 0.95."""
    table = read_table(folder / "agreement.csv", ["question", "data", "measure", "spearman"])
    names = list(dict.fromkeys(table["measure"]))
    data = list(dict.fromkeys(table["data"]))
    asked = [question for question in QUESTIONS if question in set(table["question"])]
    figure, panels = _panels(1, len(asked), 3.6)
    for axes, question in zip(panels[0], asked, strict=True):
        rows = table[table["question"] == question]
        for index, name in enumerate(data):
            part = rows[rows["data"] == name]
            height = np.array([names.index(m) for m in part["measure"]]) + 0.24 * (index - 0.5 * (len(data) - 1))
            axes.plot(
                part["spearman"], height, MARKERS[index], color=PALETTE[index], markersize=3.5, alpha=0.55,
                markeredgewidth=0, label=name,
            )  # fmt: skip
        axes.axvline(0.95, color="0.3", linestyle="--", linewidth=1)
        axes.set_xlim(min(-0.3, float(table["spearman"].min()) - 0.05), 1.05)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names if axes is panels[0][0] else [""] * len(names))
        axes.set_title(QUESTIONS[question], fontsize=9)
        axes.set_xlabel("Spearman's rho", fontsize=8)
        axes.grid(alpha=0.3)
    _legend(figure, panels[0][0])
    return figure


def _excess_line(axes: "Axes", folder: Path, values: pd.DataFrame, cell: str, index: int, label: str) -> None:
    rows = values[(values["cell"] == cell) & (values["definition"] == "excess_nats")].sort_values("task")
    x = _middles(folder, cell)
    shown = np.append(np.abs(np.diff(x)) > SHORTEST, True) & (rows["value"] > 0).to_numpy()
    value = rows["value"].to_numpy(dtype=np.float64)
    low = rows["ci_low"].clip(lower=0.3 * rows["value"]).to_numpy(dtype=np.float64)  # an interval may reach below 0
    errors = np.abs(np.stack([value - low, rows["ci_high"] - value]))
    axes.errorbar(
        x[shown], value[shown], yerr=errors[:, shown], color=PALETTE[index], marker=MARKERS[index], markersize=3.5,
        linewidth=1, capsize=1.5, label=label,
    )  # fmt: skip


def _excess_panels(folder: Path, data: Sequence[str]) -> "tuple[Figure, list[Axes], pd.DataFrame]":
    values = read_table(folder / "difficulty.csv", ["cell", "task", "definition", "value", "ci_low", "ci_high"])
    figure, panels = _panels(1, len(data), 3.4)
    for axes, name in zip(panels[0], data, strict=True):
        axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(LOG_SNR_LABEL, fontsize=8)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("excess [nats per unit log-SNR]", fontsize=9)
    return figure, panels[0], values


def processes_figure(folder: Path, prediction: str) -> "Figure":
    """Excess in nats against log-SNR under every process, one panel per data set."""
    cells = _cells(folder, prediction=prediction, grid="log-snr", kind="experts")
    data = list(dict.fromkeys(cells["data"]))
    figure, panels, values = _excess_panels(folder, data)
    for axes, name in zip(panels, data, strict=True):
        for index, (_, cell) in enumerate(cells[cells["data"] == name].iterrows()):
            _excess_line(axes, folder, values, cell["cell"], index, cell["process"])
        axes.invert_xaxis()
    _legend(figure, panels[0])
    return figure


def networks_figure(folder: Path, prediction: str) -> "Figure":
    """Excess in nats against log-SNR of the experts and of networks trained on all t, one panel per data set."""
    experts = _cells(folder, prediction=prediction, grid="t", kind="experts")
    shared = _cells(folder, prediction=prediction, kind="shared network")
    data = list(dict.fromkeys(experts["data"]))
    figure, panels, values = _excess_panels(folder, data)
    for axes, name in zip(panels, data, strict=True):
        _excess_line(axes, folder, values, experts[experts["data"] == name]["cell"].iloc[0], 0, "one expert per task")
        for iterations, group in shared[shared["data"] == name].groupby("iterations"):
            longer = iterations != shared["iterations"].min()
            for number, cell in enumerate(group["cell"]):
                label = f"one network, {iterations} iterations" if number == 0 else "_"
                _excess_line(axes, folder, values, cell, 2 if longer else 1, label)
        axes.invert_xaxis()
    _legend(figure, panels[0])
    return figure


def samples_figure(folder: Path, prediction: str) -> "Figure":
    """Distance of samples to the data against the iterations of the one expert, data sets by metrics."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    columns = ["data", "prediction", "task", "seed", "iteration", "metric", "value", "shared", "perfect", "log_snr"]
    table = read_table(folder / "sample_quality.csv", columns)
    table = table[(table["iteration"] > 0) & (table["prediction"] == prediction)]
    data, metrics = (list(dict.fromkeys(table[name])) for name in ("data", "metric"))
    colours = ScalarMappable(Normalize(table["log_snr"].min(), table["log_snr"].max()), "cividis")
    figure, panels = _panels(len(data), len(metrics), 0.8 + 2.8 * len(data))
    for row, name in zip(panels, data, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            part = table[(table["data"] == name) & (table["metric"] == metric)]
            quality_panel(axes, part, part.groupby("task")["log_snr"].first().to_numpy(), colours)
            axes.set_title(f"{name}, {metric}  (lower is better)", fontsize=9)
        row[0].set_ylabel("distance of samples to the data,\nrelative to the shared network's", fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("iterations of the expert")
    panels[0][0].legend(fontsize=7, frameon=False, loc="upper right")
    figure.colorbar(colours, ax=[axes for row in panels for axes in row], label="log-SNR of the expert's task")
    return figure
