"""Figures of a run, and the drawing of a folder: every figure comes from the files of a results folder, so that it can
be drawn again. Those of a comparison stand in `plots_comparison.py`.
"""

__all__ = ["RUN_FIGURES", "draw_folder", "save_grid"]

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from difficulty.errors import InputError
from difficulty.plots import save_figure
from difficulty.records import read_json, read_table, write_bytes
from training.plot_style import COLOURS, WIDTH, grid, is_picture, mosaic, scatter, stage_panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COVERAGE_PARTS = 50


def run_stages(folder: Path) -> "Figure":
    """When each stage of the curriculum ran, and what share of the samples each task had in it."""
    table = read_table(folder / "stages.csv", ("stage", "start", "end", "samples_per_task"))
    figure, axes = grid(1, 1, 2.4)
    stage_panel(axes[0, 0], table, "run")
    axes[0, 0].set_xlabel("iteration")
    figure.suptitle("Share of the samples of each task per stage (bright: large)", fontsize=9)
    return figure


def run_curve(folder: Path) -> "Figure":
    """Held-out nats, held-out loss and learning rate of one run."""
    table = read_table(folder / "curve.csv", ("step", "nats", "loss", "lr"))
    stages = read_table(folder / "stages.csv", ("stage", "start"))
    figure, axes = grid(1, 3, 2.8)
    for ax, (name, label) in zip(
        axes[0], (("nats", "held-out nats"), ("loss", "held-out loss"), ("lr", "learning rate")), strict=True
    ):
        ax.plot(table["step"], table[name], color=COLOURS[0], lw=1.5, marker="o" if len(table) == 1 else None)
        for start in stages.loc[stages["stage"].diff() > 0, "start"]:
            ax.axvline(start, color="#999999", lw=0.7, ls=":")
        ax.set_xlabel("iteration")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    figure.suptitle("Averaged weights on fixed held-out draws; dotted: start of a stage", fontsize=9)
    return figure


def loss_heat_map(folder: Path) -> "Figure | None":
    """Nats of every task over training, relative to its own least value; None of one evaluation."""
    table = read_table(folder / "losses.csv", ("step", "task", "nats_per_log_snr"))
    wide = table.pivot(index="task", columns="step", values="nats_per_log_snr")
    if wide.shape[1] < 2:
        return None
    relative = np.log10(wide.div(wide.min(axis=1), axis=0).to_numpy())  # NaN, left blank, for pure noise alone
    figure, axes = grid(1, 1, 3.6)
    ax = axes[0, 0]
    steps = np.concatenate([[0], wide.columns.to_numpy()])
    edges = np.arange(len(wide) + 1) - 0.5
    image = ax.pcolormesh(steps, edges, relative, cmap="cividis", vmin=0, vmax=max(0.05, np.nanmax(relative)))
    ax.set_xlabel("iteration")
    ax.set_ylabel("task (0 cleanest)")
    ax.set_yticks(range(0, len(wide), max(1, len(wide) // 10)))
    figure.colorbar(image, ax=ax, label="log10 of nats over the task's least")
    figure.suptitle("Held-out nats of each task over training, its best evaluation being 0 (dark)", fontsize=9)
    return figure


def probe_curves(folder: Path) -> "Figure | None":
    """Excess of every task over training with its interval over draws; None if the run was not probed."""
    if not (folder / "probe.csv").exists():  # only written when asked for
        return None
    table = read_table(folder / "probe.csv", ("step", "task", "excess_nats", "excess_se", "floor_kind"))
    figure, axes = grid(1, 1, 3.8)
    ax = axes[0, 0]
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
    figure, axes = grid(2, 1, 4.7, sharex=True)
    above, below = axes[:, 0]
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
    figure, axes = grid(1, len(chosen), WIDTH / len(chosen) + 0.4)
    for ax, file in zip(axes[0], chosen, strict=True):
        with Image.open(file) as image:
            ax.imshow(np.asarray(image.convert("RGB")))
        ax.set_title(f"iteration {int(file.stem.removeprefix('step-'))}", fontsize=8)
        ax.axis("off")
    figure.suptitle("Samples over training, from the same noise", fontsize=9)
    return figure


RUN_FIGURES: "Mapping[str, Callable[[Path], Figure | None]]" = {
    "curve": run_curve,
    "loss_heat_map": loss_heat_map,
    "stages": run_stages,
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

    from training.plots_comparison import COMPARISON_FIGURES

    kinds: Mapping[str, Mapping[str, Callable[[Path], Figure | None]]] = {
        "compare": COMPARISON_FIGURES,
        "train": RUN_FIGURES,
    }
    if not (folder / "run.json").exists():
        raise InputError(f"{folder} holds no run.json; give the folder of `training run` or `training compare`")
    run = read_json(folder / "run.json")
    kind = str(run.get("kind") if isinstance(run, dict) else None)
    if kind not in kinds:
        raise InputError(f"{folder} was written by {kind!r}; give the folder of `training run` or `training compare`")
    matplotlib.use("Agg", force=False)
    paths = []
    for name, draw in kinds[kind].items():
        figure = draw(folder)
        if figure is not None:
            paths += save_figure(figure, folder / "figures", name)
    return paths


def save_grid(samples: torch.Tensor, path: Path, value_range: tuple[float, float] | None = None) -> None:
    """Samples as one PNG: images in a grid, vectors as points in their first two dimensions.

    Args:
        samples: (n, C, H, W) or (n, D).
        path: of the PNG.
        value_range: values shown as black and white; None takes the range of the samples.
    """
    buffer = io.BytesIO()
    if is_picture(samples):
        from PIL import Image

        image = Image.fromarray(mosaic(samples, value_range))
        scale = max(1, 512 // max(image.size))
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    else:
        import matplotlib
        import matplotlib.pyplot as plt

        matplotlib.use("Agg", force=False)
        figure, axes = grid(1, 1, 4.0)
        scatter(axes[0, 0], samples)
        axes[0, 0].set_xlabel("dimension 1")
        axes[0, 0].set_ylabel(f"dimension {min(2, samples[0].numel())}")
        figure.savefig(buffer, format="png", dpi=100)
        plt.close(figure)
    write_bytes(path, buffer.getvalue())
