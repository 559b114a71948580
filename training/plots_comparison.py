"""Figures of a comparison, each drawn from the CSV files of its folder. Intervals are always shown."""

__all__ = ["COMPARISON_FIGURES", "forest", "overview"]

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from difficulty.records import read_json, read_table
from training.effects import arms_again, paired_intervals
from training.jobs import run_file
from training.plot_style import (
    BETTER,
    COLOURS,
    METRIC_NAMES,
    NEUTRAL,
    WORSE,
    grid,
    is_picture,
    log_snr_axis,
    mosaic,
    scatter,
    stage_panel,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"constant": "o", "cosine": "s", "linear": "^"}
PANELS = 4  # panels side by side in a figure of one panel per arm
SHOWN_LINES = 8  # more lines than colours cannot be told apart
LARGEST_CHANGE = 150.0  # %; one arm that ruins a metric would make points of all others
TITLE_WIDTH = 12  # letters of a column's title in a line


def percent_change(log_ratio: npt.ArrayLike) -> np.ndarray:
    """Log-ratios as changes in percent."""
    return 100 * np.expm1(np.asarray(log_ratio, dtype=float))


def forest(folder: Path) -> "Figure":
    """Effect of every arm on every metric with its 95 % interval; the interval of the A/A arm as a grey band."""
    table = read_table(
        folder / "effects.csv", ("arm", "lr_schedule", "metric", "log_ratio", "ci_low", "ci_high", "verdict")
    )
    metrics, schedules = list(dict.fromkeys(table["metric"])), list(dict.fromkeys(table["lr_schedule"]))
    arms = list(dict.fromkeys(table["arm"]))
    height = 1.4 + (0.20 + 0.14 * len(schedules)) * len(arms)
    figure, axes = grid(1, len(metrics), height)
    for column, (ax, metric) in enumerate(zip(axes[0], metrics, strict=True)):
        own = table[table["metric"] == metric]
        _fit(ax, own, _again(folder))
        for row in own.itertuples():
            within = schedules.index(row.lr_schedule) - (len(schedules) - 1) / 2
            _effect(ax, arms.index(row.arm) + 0.34 * within, row, MARKERS.get(str(row.lr_schedule), "D"))
        ax.axvline(0, color="black", lw=0.8)
        ax.set_yticks(range(len(arms)), arms if column == 0 else [""] * len(arms))
        ax.set_ylim(len(arms) - 0.5, -0.5)
        for y in np.arange(len(arms) - 1) + 0.5:
            ax.axhline(y, color="#dddddd", lw=0.6)
        ax.set_title(METRIC_NAMES.get(metric, metric), fontsize=9)
        ax.set_xlabel("change, %", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", alpha=0.3)
    _schedule_legend(figure, schedules)
    band, seeds = "; grey band: A/A" if _again(folder) else "", table["seeds"].iloc[0]
    against = f"Against {_baseline(folder)}, "
    if seeds > 1:
        against += f"{seeds} paired seeds, 95 % intervals: left of 0 is better\n"
        against += f"filled: significant after Holm (blue helps, orange hurts); open: no difference shown{band}"
    else:
        against += "one seed, no intervals: left of 0 is lower, by chance or not"
    figure.suptitle(f"{against}; arrow: beyond", fontsize=9)
    return figure


def _effect(ax: "Axes", y: float, row: Any, marker: str) -> None:
    low, middle, high = percent_change([row.ci_low, row.log_ratio, row.ci_high])
    verdict = str(row.verdict)
    if "A/A" in verdict:
        ax.axvspan(low, high, color="#888888", alpha=0.15, lw=0, zorder=0)
    colour = BETTER if verdict.startswith("helps") else WORSE if verdict.startswith("hurts") else NEUTRAL
    ax.plot([low, high], [y, y], color=colour, lw=1.8, solid_capstyle="butt")
    left, right = ax.get_xlim()
    if not left <= middle <= right:
        marker, middle = ("<", left) if middle < left else (">", right)
    ax.plot(
        [middle], [y], marker, ms=4.5, color=colour, mfc=colour if colour != NEUTRAL else "white", clip_on=False
    )


def overview(folders: Mapping[str, Path], metrics: Sequence[str], schedule: str = "cosine") -> "Figure":
    """Effects of several comparisons side by side: a column per comparison, a row per metric.

    Args:
        folders: finished comparisons by the name of their setting.
        metrics: which metrics.
        schedule: learning-rate schedule.
    """
    columns = ("arm", "lr_schedule", "metric", "log_ratio", "ci_low", "ci_high", "verdict")
    tables = {name: read_table(folder / "effects.csv", columns) for name, folder in folders.items()}
    arms = list(dict.fromkeys(arm for table in tables.values() for arm in table["arm"]))
    figure, axes = grid(len(metrics), len(folders), 1.0 + len(metrics) * (0.5 + 0.17 * len(arms)))
    for across, (name, table) in enumerate(tables.items()):
        for down, metric in enumerate(metrics):
            ax = axes[down, across]
            own = table[(table["metric"] == metric) & (table["lr_schedule"] == schedule)]
            _fit(ax, own, _again(folders[name]))
            for row in own.itertuples():
                _effect(ax, arms.index(str(row.arm)), row, MARKERS.get(schedule, "D"))
            ax.axvline(0, color="black", lw=0.8)
            ax.set_yticks(range(len(arms)), arms if across == 0 else [""] * len(arms))
            ax.set_ylim(len(arms) - 0.5, -0.5)
            ax.tick_params(labelsize=7)
            ax.grid(axis="x", alpha=0.3)
            ax.set_xlabel("change, %", fontsize=8)
            if across == 0:
                ax.set_ylabel(METRIC_NAMES.get(metric, metric), fontsize=8)
        lines = textwrap.wrap(name.replace("-", "- "), TITLE_WIDTH)
        axes[0, across].set_title("\n".join(lines).replace("- ", "-"), fontsize=8)
    figure.suptitle(
        f"Change against plain training, learning rate {schedule}: left of 0 is better, 95 % intervals\n"
        "blue helps, orange hurts (after Holm), open: no difference shown; grey band: A/A; arrow: beyond the axis",
        fontsize=9,
    )
    return figure


def _fit(ax: "Axes", effects: pd.DataFrame, again: Sequence[str]) -> None:
    """Limits by the arms that are judged and ruin nothing: the A/A band may reach far beyond the effects."""
    # With one seed there is a change and no interval.
    shown = ~effects["arm"].isin(again) & (effects["log_ratio"] < np.log1p(LARGEST_CHANGE / 100))
    ends = effects.loc[shown, ["ci_low", "log_ratio", "ci_high"]].to_numpy(float)
    low, high = percent_change([min(np.nanmin(ends), 0), max(np.nanmax(ends), 0)]) if ends.size else (-1, 1)
    ax.set_xlim(low - 0.08 * (high - low) - 1e-9, high + 0.08 * (high - low) + 1e-9)


def _schedule_legend(figure: "Figure", schedules: list[str]) -> None:
    from matplotlib.lines import Line2D

    if len(schedules) > 1:
        handles = [
            Line2D([], [], color=NEUTRAL, marker=MARKERS.get(name, "D"), ls="", label=f"learning rate {name}")
            for name in schedules
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)


def learning_curves(folder: Path) -> "Figure":
    """Held-out nats and loss over training as % of the baseline at the same iteration: mean and interval of seeds."""
    table = read_table(folder / "curves.csv", ("arm", "lr_schedule", "seed", "step", "metric", "value"))
    table = table[table["metric"].isin(["nats", "loss"])].assign(value=np.log(table["value"]))
    baseline, again, bands = _baseline(folder), *_bands(folder, table)
    schedules = list(dict.fromkeys(table["lr_schedule"]))
    figure, axes = grid(len(schedules), 2, 0.9 + 2.6 * len(schedules))
    for row, schedule in zip(axes, schedules, strict=True):
        for ax, metric in zip(row, ("nats", "loss"), strict=True):
            own = table[(table["metric"] == metric) & (table["lr_schedule"] == schedule)]
            wide = own.pivot(index=["step", "seed"], columns="arm", values="value")
            least, most = 0.0, 0.0
            for arm, colour, line in _lines(_arms(table, without=baseline), again):
                found = paired_intervals((wide[arm] - wide[baseline]).unstack("seed"))
                low, middle, high = (percent_change(found[name]) for name in ("ci_low", "difference", "ci_high"))
                ax.fill_between(found.index, low, high, color=colour, alpha=0.2, lw=0)
                if arm not in again:
                    ax.plot(found.index, middle, color=colour, ls=line, label=arm, lw=1.4)
                # The first evaluations, inside the first stages, would set the scale of everything after them.
                later = np.concatenate([values[len(found) // 4 :] for values in (low, middle, high)])
                least, most = min(least, float(np.nanmin(later))), max(most, float(np.nanmax(later)))
            ax.axhline(0, color="black", lw=0.8)
            ax.set_xlabel("iteration")
            ax.set_ylabel(f"{METRIC_NAMES[metric]}\n% from {baseline}", fontsize=9)
            ax.set_title(f"learning rate {schedule}", fontsize=9)
            ax.grid(alpha=0.3)
            if most > least:
                ax.set_ylim(least - 0.1 * (most - least), most + 0.1 * (most - least))
    _legend(figure, axes[0, 0], again)
    figure.suptitle(f"Against the baseline at the same iteration; {bands}", fontsize=9)
    return figure


def task_differences(folder: Path) -> "Figure":
    """Final nats per unit log-SNR of every task minus the baseline's; the area under a line is its change in nats."""
    table = read_table(folder / "tasks.csv", ("arm", "lr_schedule", "seed", "task", "nats_per_log_snr"))
    bounds = _bounds(folder)
    baseline, again, bands = _baseline(folder), *_bands(folder, table)
    schedules = list(dict.fromkeys(table["lr_schedule"]))
    middle = _middle(bounds)
    figure, axes = grid(len(schedules), 1, 1.2 + 2.6 * len(schedules))
    for ax, schedule in zip(axes[:, 0], schedules, strict=True):
        own = table[table["lr_schedule"] == schedule]
        wide = own.pivot(index=["task", "seed"], columns="arm", values="nats_per_log_snr")
        for arm, colour, line in _lines(_arms(table, without=baseline), again):
            found = paired_intervals((wide[arm] - wide[baseline]).unstack("seed"))
            ax.fill_between(middle, found["ci_low"], found["ci_high"], color=colour, alpha=0.2, lw=0)
            if arm not in again:
                ax.plot(middle, found["difference"], color=colour, ls=line, label=arm, lw=1.3, marker="o", ms=2.5)
        ax.axhline(0, color="black", lw=0.8)
        ax.set_ylabel(f"nats per unit log-SNR\nminus those of {baseline}", fontsize=9)
        log_snr_axis(ax, middle, bounds[["t_first", "t_last"]].mean(axis=1).to_numpy())
        ax.text(0.99, 0.95, f"learning rate {schedule}", transform=ax.transAxes, ha="right", va="top", fontsize=8)
        ax.grid(alpha=0.3)
    _legend(figure, axes[0, 0], again)
    figure.suptitle(f"Where on the noise axis the arms differ: below 0 is better; {bands}", fontsize=9)
    return figure


def task_curves(folder: Path) -> "Figure | None":
    """Difference to the baseline of every task over training, one panel per arm; blank where none is shown.

    None of one seed, of which nothing is shown.
    """
    from matplotlib.colors import SymLogNorm

    table = read_table(
        folder / "task_curves.csv", ("arm", "lr_schedule", "step", "task", "difference", "ci_low", "ci_high")
    )
    if table["ci_low"].isna().all():
        return None
    bounds, schedule = _bounds(folder), table["lr_schedule"].iloc[-1]
    table = table[table["lr_schedule"] == schedule]
    arms = list(dict.fromkeys(table["arm"]))
    figure, axes = _panels(arms, 1.2, 1.7, sharex=True, sharey=True)
    shown = table.assign(difference=table["difference"].where((table["ci_low"] > 0) | (table["ci_high"] < 0)))
    largest = max(float(shown["difference"].abs().quantile(0.99)) if shown["difference"].notna().any() else 0.0, 1e-9)
    norm = SymLogNorm(largest / 30, vmin=-largest, vmax=largest)
    edges = _edges(bounds)
    for ax, arm in zip(axes, arms, strict=True):
        wide = shown[shown["arm"] == arm].pivot(index="task", columns="step", values="difference")
        steps = np.concatenate([[0], wide.columns.to_numpy()])
        image = ax.pcolormesh(steps, edges, wide, cmap="RdBu_r", norm=norm)
    figure.supxlabel("iteration", fontsize=9)
    figure.supylabel("log-SNR (noise grows downwards)", fontsize=9)
    bar = figure.colorbar(image, ax=axes, label="nats per unit log-SNR", shrink=0.8)
    # The scale is linear around 0, where ticks of its own choice would lie on each other.
    bar.set_ticks([-largest, -largest / 10, 0.0, largest / 10, largest])
    bar.ax.set_yticklabels([f"{value:.2g}" for value in (-largest, -largest / 10, 0.0, largest / 10, largest)])
    bar.ax.minorticks_off()
    figure.suptitle(
        f"Difference to {_baseline(folder)} per task over training, learning rate {schedule}: blue is better, "
        "blank: 95 % interval holds 0",
        fontsize=9,
    )
    return figure


def exposure(folder: Path) -> "Figure":
    """How often each t was trained over the whole run, against uniform, one panel per arm; mean over the seeds."""
    table = read_table(folder / "exposure.csv", ("arm", "lr_schedule", "t_first", "t_last", "share"))
    table = table[table["lr_schedule"] == table["lr_schedule"].iloc[-1]]
    length = table["t_last"] - table["t_first"] + 1
    table = table.assign(relative=table["share"] / (length / table["t_last"].max()))
    arms = list(dict.fromkeys(table["arm"]))
    figure, axes = _panels(arms, 1.0, 1.4, sharex=True, sharey=True)
    for ax, arm in zip(axes, arms, strict=True):
        own = table[table["arm"] == arm]
        edges = np.append(own["t_first"] - 1, own["t_last"].iloc[-1])
        ax.stairs(own["relative"], edges, fill=True, color=COLOURS[0], alpha=0.7)
        ax.axhline(1, color="black", lw=0.8)
    floor, top = float(table.loc[table["relative"] > 0, "relative"].min()), float(table["relative"].max())
    if top < 4 * floor:  # a range without two ticks on a logarithmic axis
        axes[0].set_ylim(0, 1.1 * top)
    else:
        axes[0].set_yscale("log")
        axes[0].set_ylim(max(0.8 * floor, 0.02), 1.3 * top)
    figure.supxlabel("t (noise grows to the right)", fontsize=9)
    figure.supylabel("samples of t, uniform = 1", fontsize=9)
    figure.suptitle("Exposure: how often each t was trained over the whole run", fontsize=9)
    return figure


def stages(folder: Path) -> "Figure":
    """When each stage ran, and what share of the samples each task had in it; arms of one stage are left out."""
    columns = ("arm", "lr_schedule", "seed", "stage", "start", "end", "samples_per_task")
    table = read_table(folder / "stages.csv", columns)
    table = table[(table["seed"] == table["seed"].min()) & (table["lr_schedule"] == table["lr_schedule"].iloc[-1])]
    parts = table["arm"].value_counts()
    chosen = [arm for arm in dict.fromkeys(table["arm"]) if parts[arm] > 1] or [table["arm"].iloc[0]]
    figure, axes = grid(len(chosen), 1, 0.9 + 1.2 * len(chosen), sharex=True)
    for ax, arm in zip(axes[:, 0], chosen, strict=True):
        stage_panel(ax, table[table["arm"] == arm], arm)
    axes[-1, 0].set_xlabel("iteration")
    figure.suptitle("Share of the samples of each task per stage (bright: large), first seed", fontsize=9)
    return figure


def samples(folder: Path) -> "Figure | None":
    """Samples of every arm side by side, but for A/A arms drawn from the same noise; None where no runs are kept."""
    from safetensors.torch import load_file

    config = read_json(folder / "run.json")["config"]
    schedule, seed = config["lr_schedules"][-1], config["seeds"][0]
    every = {arm: run_file(folder, arm, seed, schedule).with_suffix(".safetensors") for arm in config["arms"]}
    files = {arm: path for arm, path in every.items() if path.exists()}
    if not files:
        return None
    names = list(files)
    figure, axes = _panels(names, 0.6, 2.1)
    for ax, name in zip(axes, names, strict=True):
        drawn = load_file(files[name])["data"]
        if is_picture(drawn):
            ax.imshow(mosaic(drawn[:36], config.get("value_range")), cmap="gray", vmin=0, vmax=255)
            ax.set_axis_off()
        else:
            scatter(ax, drawn)
    others = "".join(f", {name} from other" for name in _again(folder) if name in names)
    figure.suptitle(f"Samples, seed {seed}, learning rate {schedule}, from the same noise{others}", fontsize=9)
    return figure


def _panels(names: list[str], head: float, height: float, **shared: bool) -> "tuple[Figure, list[Axes]]":
    """One panel per name, ``PANELS`` in a row; tick labels below the last panel of every column.

    Args:
        names: their titles.
        head, height: inches, of what is around all panels and of each row.
        shared: axes that the panels share, as of ``plt.subplots``.
    """
    columns = min(PANELS, len(names))
    rows = -(-len(names) // columns)
    figure, axes = grid(rows, columns, head + height * rows, **shared)
    used = list(axes.flat[: len(names)])
    for ax, name in zip(used, names, strict=True):
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=7)
    for ax in used[-columns:]:
        ax.tick_params(labelbottom=True)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    return figure, used


def _bounds(folder: Path) -> pd.DataFrame:
    return read_table(folder / "task_bounds.csv", ("task", "t_first", "t_last", "log_snr_high", "log_snr_low"))


def _edges(bounds: pd.DataFrame) -> np.ndarray:
    """Boundaries of the tasks in log-SNR, cleanest first; a last one at -inf is put a neighbour's width away."""
    edges = np.append(bounds["log_snr_high"], bounds["log_snr_low"].iloc[-1])
    if not np.isfinite(edges[-1]):
        edges[-1] = 2 * edges[-2] - edges[-3] if len(edges) > 2 else edges[-2] - 2.0
    return edges


def _middle(bounds: pd.DataFrame) -> np.ndarray:
    edges = _edges(bounds)
    return 0.5 * (edges[:-1] + edges[1:])


def _again(folder: Path) -> list[str]:
    return arms_again(read_json(folder / "run.json")["config"]["arms"])


def _lines(arms: list[str], again: list[str]) -> list[tuple[str, str, str]]:
    """Arms with colour and line style; A/A arms are grey and come first, so that they lie below."""
    shown = [arm for arm in arms if arm not in again]
    styles = [(COLOURS[i % SHOWN_LINES], ("-", "--", ":")[i // SHOWN_LINES % 3]) for i in range(len(shown))]
    coloured = [(arm, colour, line) for arm, (colour, line) in zip(shown, styles, strict=True)]
    return [(arm, "#aaaaaa", "-") for arm in again if arm in arms] + coloured


def _legend(figure: "Figure", ax: "Axes", again: list[str]) -> None:
    from matplotlib.patches import Patch

    handles, labels = ax.get_legend_handles_labels()
    handles += [Patch(color="#aaaaaa", alpha=0.4) for _ in again]
    labels += [f"{name} (A/A), interval" for name in again]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=8, frameon=False)


def _bands(folder: Path, table: pd.DataFrame) -> tuple[list[str], str]:
    """The arms that are drawn as a band, and what the bands are; without other seeds there is none."""
    if table["seed"].nunique() == 1:
        return [], "one seed, no intervals"
    return _again(folder), "bands are 95 % intervals over paired seeds"


def _baseline(folder: Path) -> str:
    return next(iter(read_json(folder / "run.json")["config"]["arms"]))


def _arms(table: pd.DataFrame, without: str) -> list[str]:
    return [arm for arm in dict.fromkeys(table["arm"]) if arm != without]


COMPARISON_FIGURES: "Mapping[str, Callable[[Path], Figure | None]]" = {
    "forest": forest,
    "learning_curves": learning_curves,
    "task_differences": task_differences,
    "task_curves": task_curves,
    "exposure": exposure,
    "stages": stages,
    "samples": samples,
}
