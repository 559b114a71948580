"""What all figures of training share: palette, sizes, the log-SNR axis, the panel of stages, pictures of samples.

Colours are Okabe and Ito's, which colour-blind readers tell apart. On every log-SNR axis noise grows to the right, with
t on the opposite edge.
"""

__all__ = [
    "BETTER",
    "COLOURS",
    "METRIC_NAMES",
    "NEUTRAL",
    "WIDTH",
    "WORSE",
    "grid",
    "is_picture",
    "log_snr_axis",
    "mosaic",
    "scatter",
    "stage_panel",
]

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#B8A800")
BETTER, WORSE, NEUTRAL = "#0072B2", "#D55E00", "#666666"
WIDTH = 8.0  # inches: readable at the width of a page
DISTANCE_NAMES = {"fd": "Fréchet", "sw": "sliced W."}
METRIC_NAMES = {"nats": "held-out nats", "excess": "nats above Bayes", "loss": "held-out loss"} | {
    f"{short}-{features}": f"{name} ({features})"
    for short, name in DISTANCE_NAMES.items()
    for features in ("pca", "pixels", "digits-cnn", "inception")
}


def grid(rows: int, columns: int, height: float, **options: Any) -> "tuple[Figure, np.ndarray]":
    """A page-wide figure of ``height`` inches and its axes as an array (rows, columns)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height), layout="constrained", squeeze=False, **options
    )
    return figure, axes


def log_snr_axis(ax: "Axes", log_snr: "np.ndarray", t: "np.ndarray") -> None:
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


def stage_panel(ax: "Axes", stages: "pd.DataFrame", label: str) -> None:
    """Share of the samples of each task in every stage of one run; bright is large."""
    starts = stages["start"].to_numpy(float)
    ends = stages["end"].fillna(stages["end"].max()).to_numpy(float)
    for start, end, counts in zip(starts, ends, stages["samples_per_task"], strict=True):
        samples = np.array([int(n) for n in str(counts).split()])
        share = samples / max(samples.sum(), 1)
        ax.pcolormesh(
            [start, end],
            np.arange(len(share) + 1) - 0.5,
            share[:, None],
            cmap="cividis",
            vmin=0,
            vmax=max(0.3, 1.5 / len(share)),
        )
        ax.axvline(start, color="white", lw=0.5)
    ax.set_ylabel(f"{label}\ntask (0 cleanest)", fontsize=8)


def is_picture(samples: torch.Tensor) -> bool:
    """Whether samples are grey or colour images."""
    return samples.ndim == 4 and samples.shape[1] in (1, 3)


def mosaic(samples: torch.Tensor, value_range: tuple[float, float] | None = None) -> "np.ndarray":
    """Images (n, C, H, W) side by side as one array of bytes, (rows, columns) or (rows, columns, 3).

    Args:
        samples: the images.
        value_range: values shown as black and white; None takes the range of the samples.
    """
    low, high = value_range or (float(samples.min()), float(samples.max()))
    columns = int(np.ceil(np.sqrt(len(samples))))
    rows = -(-len(samples) // columns)
    n, channels, height, width = samples.shape
    tiles = torch.full((rows * columns, channels, height + 1, width + 1), 1.0)
    tiles[:n, :, :height, :width] = ((samples - low) / max(high - low, 1e-12)).clamp(0, 1)
    tiles = tiles.reshape(rows, columns, channels, height + 1, width + 1).permute(2, 0, 3, 1, 4)
    pixels = (tiles.reshape(channels, rows * (height + 1), columns * (width + 1)) * 255).byte().numpy()
    return pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)


def scatter(ax: "Axes", samples: torch.Tensor) -> None:
    """Vectors as points in their first two dimensions."""
    flat = samples.flatten(1)
    ax.scatter(flat[:, 0], flat[:, min(1, flat.shape[1] - 1)], s=4, color=COLOURS[0])
    ax.set_aspect("equal")
