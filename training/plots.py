"""Figures of training and comparison, each drawn from the CSV files of a results folder, so that it can be drawn again.

Colours are Okabe and Ito's, which colour-blind readers tell apart. On every log-SNR axis noise grows to the right, with
t on the opposite edge. Intervals are always shown.
"""

__all__ = ["COMPARISON_FIGURES", "RUN_FIGURES", "draw_folder", "save_grid"]

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from difficulty.errors import InputError
from difficulty.records import read_json, read_table, write_bytes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
BETTER, WORSE, NEUTRAL = "#0072B2", "#D55E00", "#666666"
COVERAGE_PARTS = 50
WIDTH = 8.0  # inches: readable at the width of a page
DISTANCE_NAMES = {"fd": "Fréchet distance", "sw": "sliced Wasserstein"}
METRIC_NAMES = {"nats": "held-out nats", "loss": "held-out loss"} | {
    f"{short}-{features}": f"{name} ({features})"
    for short, name in DISTANCE_NAMES.items()
    for features in ("pca", "pixels", "digits-cnn", "inception")
}


def _figure(height: float, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(WIDTH, height), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def _percent(log_ratio: "npt.ArrayLike") -> "np.ndarray":
    return 100 * np.expm1(np.asarray(log_ratio, dtype=float))


def forest(folder: Path) -> "Figure":
    """Effect of every arm on every metric with its 95 % interval; the interval of the A/A arm as a grey band."""
    table = read_table(folder / "effects.csv", ("arm", "metric", "log_ratio", "ci_low", "ci_high", "verdict"))
    metrics, arms = list(dict.fromkeys(table["metric"])), list(dict.fromkeys(table["arm"]))
    figure, axes = _figure(1.3 + 0.32 * len(arms), len(metrics))
    for column, (ax, metric) in enumerate(zip(axes, metrics, strict=True)):
        rows = table[table["metric"] == metric].set_index("arm")
        for y, arm in enumerate(arms):
            low, middle, high = _percent(rows.loc[arm, ["ci_low", "log_ratio", "ci_high"]].to_numpy(float))
            verdict = str(rows.loc[arm, "verdict"])
            if "A/A" in verdict:
                ax.axvspan(low, high, color="#e4e4e4", zorder=0)
            colour = BETTER if verdict.startswith("helps") else WORSE if verdict.startswith("hurts") else NEUTRAL
            ax.plot([low, high], [y, y], color=colour, lw=2, solid_capstyle="butt")
            ax.plot([middle], [y], "o", ms=5, color=colour, mfc=colour if colour != NEUTRAL else "white")
        ax.axvline(0, color="black", lw=0.8)
        ax.set_yticks(range(len(arms)), arms if column == 0 else [""] * len(arms))
        ax.set_ylim(len(arms) - 0.5, -0.5)
        ax.set_title(METRIC_NAMES.get(metric, metric), fontsize=9)
        ax.set_xlabel("change, %", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", alpha=0.3)
    seeds = int(table["seeds"].iloc[0])
    figure.suptitle(
        f"Against {_baseline(folder)}, {seeds} paired seeds, 95 % intervals: left of 0 is better\n"
        "filled: significant after Holm; open: no difference shown" + ("; grey band: A/A" if _again(folder) else ""),
        fontsize=9,
    )
    return figure


def learning_curves(folder: Path) -> "Figure":
    """Held-out nats and loss over training as % of the baseline at the same iteration: mean and interval of seeds."""
    table = read_table(folder / "curves.csv", ("arm", "seed", "step", "metric", "value"))
    baseline, again = _baseline(folder), _again(folder)
    figure, axes = _figure(3.6, 2)
    for ax, metric in zip(axes, ("nats", "loss"), strict=True):
        wide = table[table["metric"] == metric].pivot(index=["step", "seed"], columns="arm", values="value")
        logs = _log(wide).sub(_log(wide)[baseline], axis=0)
        late = 0.0
        for arm, colour in _colours(_arms(table, without=baseline), again):
            grouped = logs[arm].groupby("step")
            mean, half = grouped.mean(), _half_width(grouped.std(ddof=1).to_numpy(), grouped.size().to_numpy())
            low, high = _percent(mean - half), _percent(mean + half)
            ax.fill_between(mean.index, low, high, color=colour, alpha=0.25, lw=0)
            if arm not in again:
                ax.plot(mean.index, _percent(mean), color=colour, label=arm, lw=1.5)
            # The first evaluations, inside the first stages, would set the scale of everything after them.
            later = slice(len(mean) // 4, None)
            late = max(late, float(np.nanmax(np.abs([low[later], high[later], _percent(mean)[later]]))))
        ax.axhline(0, color="black", lw=0.8)
        ax.set_xlabel("iteration")
        ax.set_ylabel(f"{METRIC_NAMES[metric]}, % from {baseline}", fontsize=9)
        ax.grid(alpha=0.3)
        if late > 0:
            ax.set_ylim(-1.1 * late, 1.1 * late)
    _legend(figure, axes[0], again)
    figure.suptitle(
        "Against the baseline at the same iteration; bands are 95 % intervals over paired seeds", fontsize=9
    )
    return figure


def task_differences(folder: Path) -> "Figure":
    """Final nats per unit log-SNR of every task minus the baseline's; the area under a line is its change in nats."""
    table = read_table(folder / "tasks.csv", ("arm", "seed", "task", "nats_per_log_snr"))
    bounds = read_table(folder / "task_bounds.csv", ("task", "t_first", "t_last", "log_snr_high", "log_snr_low"))
    baseline, again = _baseline(folder), _again(folder)
    wide = table.pivot(index=["task", "seed"], columns="arm", values="nats_per_log_snr")
    difference = wide.sub(wide[baseline], axis=0)
    middle = bounds[["log_snr_high", "log_snr_low"]].mean(axis=1).to_numpy()
    figure, (ax,) = _figure(3.8)
    for arm, colour in _colours(_arms(table, without=baseline), again):
        grouped = difference[arm].groupby("task")
        mean, half = grouped.mean(), _half_width(grouped.std(ddof=1).to_numpy(), grouped.size().to_numpy())
        ax.fill_between(middle, mean - half, mean + half, color=colour, alpha=0.25, lw=0)
        if arm not in again:
            ax.plot(middle, mean, color=colour, label=arm, lw=1.5, marker="o", ms=3)
    ax.axhline(0, color="black", lw=0.8)
    ax.set_ylabel(f"nats per unit log-SNR\nminus those of {baseline}", fontsize=9)
    _log_snr_axis(ax, middle, bounds[["t_first", "t_last"]].mean(axis=1).to_numpy())
    _legend(figure, ax, again)
    figure.suptitle("Where on the noise axis the arms differ: below 0 is better, bands are 95 % intervals", fontsize=9)
    ax.grid(alpha=0.3)
    return figure


def stage_timeline(folder: Path) -> "Figure":
    """When each stage of a curriculum ran, and what share of the samples each task had in it."""
    stages = read_table(folder / "stages.csv", ("stage", "start", "end", "samples_per_task"))
    if "arm" in stages:
        stages = stages[(stages["seed"] == stages["seed"].min())]
        counts = stages.groupby("arm")["stage"].max()
        chosen = [arm for arm in dict.fromkeys(stages["arm"]) if counts[arm] > 0] or [stages["arm"].iloc[0]]
    else:
        stages, chosen = stages.assign(arm="run"), ["run"]
    figure, axes = _figure(0.9 + 1.5 * len(chosen), 1) if len(chosen) == 1 else _rows(len(chosen))
    for ax, arm in zip(axes, chosen, strict=True):
        for row in stages[stages["arm"] == arm].itertuples():
            counts_of_task = np.array([int(n) for n in str(row.samples_per_task).split()])
            share = counts_of_task / max(counts_of_task.sum(), 1)
            end = row.end if row.end == row.end else stages["end"].max()
            image = ax.pcolormesh(
                [row.start, end],
                np.arange(len(share) + 1) - 0.5,
                share[:, None],
                cmap="cividis",
                vmin=0,
                vmax=max(0.3, 1.5 / len(share)),
            )
            ax.axvline(row.start, color="white", lw=0.5)
        ax.set_ylabel(f"{arm}\ntask (0 cleanest)", fontsize=8)
    axes[-1].set_xlabel("iteration")
    figure.colorbar(image, ax=axes, label="share of the stage's samples")
    figure.suptitle("What each stage trained: share of its samples that each task had", fontsize=9)
    return figure


def run_curve(folder: Path) -> "Figure":
    """Held-out nats, held-out loss and learning rate of one run."""
    table = read_table(folder / "curve.csv", ("step", "nats", "loss", "lr"))
    stages = read_table(folder / "stages.csv", ("stage", "start"))
    figure, axes = _figure(2.8, 3)
    for ax, (name, label) in zip(
        axes, (("nats", "held-out nats"), ("loss", "held-out loss"), ("lr", "learning rate")), strict=True
    ):
        ax.plot(table["step"], table[name], color=COLOURS[0], lw=1.5)
        for start in stages.loc[stages["stage"].diff() > 0, "start"]:
            ax.axvline(start, color="#999999", lw=0.7, ls=":")
        ax.set_xlabel("iteration")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    figure.suptitle("Averaged weights on fixed held-out draws; dotted: start of a stage", fontsize=9)
    return figure


def loss_heat_map(folder: Path) -> "Figure":
    """Nats of every task over training, relative to its own least value."""
    table = read_table(folder / "losses.csv", ("step", "task", "nats_per_log_snr"))
    wide = table.pivot(index="task", columns="step", values="nats_per_log_snr")
    relative = _log(wide.div(wide.min(axis=1), axis=0)) / np.log(10)
    figure, (ax,) = _figure(3.6)
    steps = np.concatenate([[0], wide.columns.to_numpy()])
    edges = np.arange(len(wide) + 1) - 0.5
    image = ax.pcolormesh(steps, edges, relative, cmap="cividis", vmin=0, vmax=max(0.05, relative.to_numpy().max()))
    ax.set_xlabel("iteration")
    ax.set_ylabel("task (0 cleanest)")
    ax.set_yticks(range(0, len(wide), max(1, len(wide) // 10)))
    figure.colorbar(image, ax=ax, label="log10 of nats over the task's least")
    figure.suptitle("Held-out nats of each task over training, its best evaluation being 0 (dark)", fontsize=9)
    return figure


def probe_curves(folder: Path) -> "Figure":
    """Excess of every task over training with its interval over draws; log-SNR falls from task to task."""
    table = read_table(folder / "probe.csv", ("step", "task", "excess_nats", "excess_se", "floor_kind"))
    figure, (ax,) = _figure(3.8)
    tasks = int(table["task"].max()) + 1
    import matplotlib.pyplot as plt

    colours = plt.get_cmap("cividis_r")
    for task, rows in table.groupby("task"):
        colour = colours(int(str(task)) / max(tasks - 1, 1))
        value, half = rows["excess_nats"], 1.645 * rows["excess_se"]
        shown = value > 0  # a model may be better than a floor that is only the best known
        ax.plot(rows["step"][shown], value[shown], color=colour, lw=1.3)
        low = (value - half).where(value > half, value)
        ax.fill_between(rows["step"], low, value + half, where=shown, color=colour, alpha=0.2, lw=0)
    ax.set_yscale("log")
    ax.set_xlabel("iteration")
    floor = {"exact": "Bayes loss", "upper_bound": "best known loss", "linear": "loss of a linear denoiser"}
    ax.set_ylabel(f"excess over the {floor[table['floor_kind'].iloc[0]]}\n[nats per unit log-SNR]", fontsize=9)
    ax.grid(alpha=0.3)
    mappable = plt.cm.ScalarMappable(plt.Normalize(0, tasks - 1), colours)
    figure.colorbar(mappable, ax=ax, label="task (0 cleanest)")
    figure.suptitle("Probe of the averaged weights over training; bands are 90 % intervals over draws", fontsize=9)
    return figure


def coverage(folder: Path) -> "Figure":
    """How often each t was drawn against how often the densities of the stages ask for it, in equal parts of t."""
    table = read_table(folder / "coverage.csv", ("t", "log_snr", "samples", "expected"))
    parts = np.array_split(np.arange(len(table)), min(COVERAGE_PARTS, len(table)))
    samples, expected = (np.array([table[name].to_numpy()[p].sum() for p in parts]) for name in ("samples", "expected"))
    edges = np.array([0.5, *(p[-1] + 1.5 for p in parts)])
    size = np.diff(edges)
    noise = 2 * np.sqrt(expected)
    figure, (above, below) = _rows(2, height=1.9)
    above.stairs(samples / size, edges, color=COLOURS[0], lw=1.5, label="drawn")
    above.stairs(expected / size, edges, color="black", lw=1, ls="--", label="asked for")
    above.set_ylabel("samples per t")
    above.set_ylim(bottom=0)
    above.legend(fontsize=8, frameon=False, loc="upper left")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio, reach = 100 * (samples / expected - 1), 100 * noise / expected
    below.stairs(np.nan_to_num(reach), edges, baseline=-np.nan_to_num(reach), fill=True, color="#dddddd",
                 label="chance (two standard deviations)")  # fmt: skip
    below.stairs(ratio, edges, color=COLOURS[0], lw=1.5)
    below.axhline(0, color="black", lw=0.8)
    below.set_ylabel("drawn over\nasked for, %")
    below.set_xlabel("t (noise grows to the right)")
    below.set_ylim(-2.2 * np.nanmax(reach), 2.2 * np.nanmax(reach))
    below.legend(fontsize=8, frameon=False, loc="upper left")
    for ax in (above, below):
        ax.set_xlim(edges[0], edges[-1])
    finite = table[np.isfinite(table["log_snr"])]
    shown = np.unique(np.linspace(0, len(finite) - 1, 8).astype(int))
    top = above.secondary_xaxis("top")
    top.set_xticks(finite["t"].to_numpy()[shown], [f"{value:.1f}" for value in finite["log_snr"].to_numpy()[shown]])
    top.set_xlabel("log-SNR")
    never = int(((table["samples"] == 0) & (table["expected"] > 0)).sum())
    figure.suptitle(f"Coverage of t: {never} of {len(table)} timesteps that are asked for were never drawn", fontsize=9)
    return figure


def samples_over_time(folder: Path) -> "Figure":
    """The grids of samples that the run wrote, from the same noise, at up to four iterations."""
    from PIL import Image

    files = sorted((folder / "samples").glob("step-*.png"))
    if not files:
        raise InputError(f"{folder} holds no samples; give --sample-every")
    chosen = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, 4).astype(int))]
    figure, axes = _figure(WIDTH / len(chosen) + 0.4, len(chosen))
    for ax, file in zip(axes, chosen, strict=True):
        with Image.open(file) as image:
            ax.imshow(np.asarray(image.convert("RGB")))
        ax.set_title(f"iteration {int(file.stem.removeprefix('step-'))}", fontsize=8)
        ax.axis("off")
    figure.suptitle("Samples over training, from the same noise", fontsize=9)
    return figure


def _rows(count: int, height: float = 1.3) -> "tuple[Figure, list[Axes]]":
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(count, 1, figsize=(WIDTH, 0.9 + height * count), layout="constrained", sharex=True)
    return figure, list(np.atleast_1d(axes))


def _log_snr_axis(ax: "Axes", log_snr: "np.ndarray", t: "np.ndarray") -> None:
    """Noise to the right: log-SNR falls; t on the opposite edge."""
    ax.set_xlabel("log-SNR (noise grows to the right)")
    ax.invert_xaxis()
    chosen: list[int] = []
    for index in range(len(t)):  # labels nearer than this would overlap
        if not chosen or abs(log_snr[index] - log_snr[chosen[-1]]) > 0.07 * np.ptp(log_snr):
            chosen.append(index)
    top = ax.secondary_xaxis("top")
    top.set_xticks(log_snr[chosen], [str(int(value)) for value in t[chosen]])
    top.set_xlabel("t")


def _log(table: "pd.DataFrame") -> "pd.DataFrame":
    return table.apply(np.log)


def _again(folder: Path) -> list[str]:
    arms = read_json(folder / "run.json")["config"]["arms"]
    return [name for name, spec in arms.items() if spec["fresh_seeds"]]


def _colours(arms: list[str], again: list[str]) -> list[tuple[str, str]]:
    """Arms with their colours; A/A arms are grey and come first, so that they lie below."""
    coloured = [arm for arm in arms if arm not in again]
    return [(arm, "#aaaaaa") for arm in again if arm in arms] + list(zip(coloured, COLOURS, strict=False))


def _legend(figure: "Figure", ax: "Axes", again: list[str]) -> None:
    from matplotlib.patches import Patch

    handles, labels = ax.get_legend_handles_labels()
    handles += [Patch(color="#aaaaaa", alpha=0.4) for _ in again]
    labels += [f"{name} (A/A), interval" for name in again]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=8, frameon=False)


def _half_width(sd: "np.ndarray", n: "np.ndarray") -> "np.ndarray":
    from scipy import stats

    with np.errstate(invalid="ignore"):
        return stats.t.ppf(0.975, np.maximum(n - 1, 1)) * sd / np.sqrt(n)


def _baseline(folder: Path) -> str:
    return next(iter(read_json(folder / "run.json")["config"]["arms"]))


def _arms(table: "pd.DataFrame", without: str) -> list[str]:
    return [arm for arm in dict.fromkeys(table["arm"]) if arm != without]


COMPARISON_FIGURES: "Mapping[str, Callable[[Path], Figure]]" = {
    "forest": forest,
    "learning_curves": learning_curves,
    "task_differences": task_differences,
    "stages": stage_timeline,
}
RUN_FIGURES: "Mapping[str, Callable[[Path], Figure]]" = {
    "curve": run_curve,
    "loss_heat_map": loss_heat_map,
    "stages": stage_timeline,
    "probe": probe_curves,
    "coverage": coverage,
    "samples": samples_over_time,
}


def draw_folder(folder: Path) -> list[Path]:
    """Draw every figure of a run or a comparison as PNG and SVG into ``figures``.

    Raises:
        InputError: if the folder is neither, or a table is missing.
    """
    import matplotlib

    kinds = {"compare": COMPARISON_FIGURES, "train": RUN_FIGURES}
    if not (folder / "run.json").exists():
        raise InputError(f"{folder} holds no run.json; give the folder of `training run` or `training compare`")
    run = read_json(folder / "run.json")
    kind = run.get("kind") if isinstance(run, dict) else None
    if kind not in kinds:
        raise InputError(f"{folder} was written by {kind!r}; give the folder of `training run` or `training compare`")
    matplotlib.use("Agg", force=False)
    paths = []
    for name, draw in kinds[kind].items():
        if name == "probe" and not (folder / "probe.csv").exists():  # only written when asked for
            continue
        figure = draw(folder)
        for suffix in ("png", "svg"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=150)
            paths.append(folder / "figures" / f"{name}.{suffix}")
            write_bytes(paths[-1], buffer.getvalue())
        _close(figure)
    if kind == "compare":
        paths += _sample_grids(folder, run["config"].get("value_range"))
    return paths


def _close(figure: "Figure") -> None:
    import matplotlib.pyplot as plt

    plt.close(figure)


def _sample_grids(folder: Path, value_range: list[float] | None) -> list[Path]:
    """Samples of every arm with its first seed, drawn from the same noise."""
    from safetensors.torch import load_file

    paths = []
    for file in sorted((folder / "runs").glob("*.safetensors")):
        path = folder / "figures" / f"samples-{file.stem}.png"
        save_grid(load_file(file)["data"], path, (value_range[0], value_range[1]) if value_range else None)
        paths.append(path)
    return paths


def save_grid(samples: torch.Tensor, path: Path, value_range: tuple[float, float] | None = None) -> None:
    """Samples as one PNG: images in a grid, vectors as points in their first two dimensions.

    Args:
        samples: (n, C, H, W) or (n, D).
        path: of the PNG.
        value_range: values shown as black and white; None takes the range of the samples.
    """
    buffer = io.BytesIO()
    if samples.ndim == 4 and samples.shape[1] in (1, 3):
        from PIL import Image

        low, high = value_range or (float(samples.min()), float(samples.max()))
        columns = int(np.ceil(np.sqrt(len(samples))))
        rows = -(-len(samples) // columns)
        n, channels, height, width = samples.shape
        grid = torch.full((rows * columns, channels, height + 1, width + 1), 1.0)
        grid[:n, :, :height, :width] = ((samples - low) / max(high - low, 1e-12)).clamp(0, 1)
        grid = grid.reshape(rows, columns, channels, height + 1, width + 1).permute(2, 0, 3, 1, 4)
        pixels = (grid.reshape(channels, rows * (height + 1), columns * (width + 1)) * 255).byte().numpy()
        image = Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0))
        scale = max(1, 512 // max(image.size))
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    else:
        import matplotlib

        matplotlib.use("Agg", force=False)
        figure, (ax,) = _figure(4.0)
        flat = samples.flatten(1)
        ax.scatter(flat[:, 0], flat[:, min(1, flat.shape[1] - 1)], s=4, color=COLOURS[0])
        ax.set_xlabel("dimension 1")
        ax.set_ylabel(f"dimension {min(2, flat.shape[1])}")
        ax.set_aspect("equal")
        figure.savefig(buffer, format="png", dpi=100)
        _close(figure)
    write_bytes(path, buffer.getvalue())
