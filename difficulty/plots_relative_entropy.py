"""Figures of the relative entropy, drawn from the files of its folders; axes and colours as in ``plots``."""

__all__ = ["atlas_figure", "profile_figure"]

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from difficulty.plots import LOG_SNR_LABEL, PAGE_WIDTH, PALETTE, add_t_axis
from difficulty.profile import PROFILE_COLUMNS
from difficulty.records import read_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def profile_figure(folder: Path) -> "Figure":
    """A, C, I_min and mmse over log-SNR with 90 % intervals; grey where the profile is not valid."""
    import matplotlib.pyplot as plt

    table = read_table(folder / "profile.csv", PROFILE_COLUMNS)
    figure, axes = plt.subplots(figsize=(PAGE_WIDTH, 4.0), layout="constrained")
    valid = table["valid"].astype(bool).to_numpy()
    labels = {"A": "A = E[F²]", "C": "C = E[q²]", "i_min": "I_min = A - B²/C", "mmse": "mmse  [data units²]"}
    for (name, label), colour, dash in zip(labels.items(), PALETTE, DASHES, strict=False):
        value = table[name].where(table[name] > 0)
        axes.plot(table["log_snr"], value.where(valid), color=colour, linestyle=dash, linewidth=1.5, label=label)
        axes.plot(table["log_snr"], value.where(~valid), color="0.6", linewidth=0.8)
        low, high = (table[f"{name}_ci_{end}"].where(valid & (table[name] > 0)) for end in ("low", "high"))
        axes.fill_between(table["log_snr"], low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlim(table["log_snr"].max(), table["log_snr"].min())
    axes.set_xlabel(LOG_SNR_LABEL)
    axes.set_ylabel("nats per (d log s)²; mmse apart")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return figure


def atlas_figure(folder: Path, process: str) -> "Figure":
    """KL per step, per (d log-SNR)^2 and I_min of all laws of the atlas for one process."""
    import matplotlib.pyplot as plt

    table = read_table(folder / "pairs.csv", ["law", "process", "t", "log_snr", "kl", "per_dlogsnr2", "i_min"])
    table = table[(table["process"] == process) & np.isfinite(table["log_snr"])]
    figure, panels = plt.subplots(3, 1, figsize=(PAGE_WIDTH, 8.4), sharex=True, layout="constrained")
    titles = {
        "kl": "KL(p_{t-1} || p_t) per step   [nats]",
        "per_dlogsnr2": "the same per (d log-SNR)²   [nats]",
        "i_min": "I_min, the part that no schedule can remove   [nats per (d log s)²]",
    }
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for i, (law, part) in enumerate(table.groupby("law", sort=False)):
            colour, dash = PALETTE[i % len(PALETTE)], DASHES[i % len(DASHES)]
            positive = part["kl"] > 1e-25
            shown = part[positive & part["valid"].astype(bool)]
            values, label = shown[name].where(shown[name] > 1e-24), law if positive.any() else f"{law}: KL = 0"
            axes.plot(shown["log_snr"], values, color=colour, linestyle=dash, label=label)
            if name == "kl":
                axes.fill_between(shown["log_snr"], shown["ci_low"], shown["ci_high"], color=colour, alpha=0.2, lw=0)
        axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(alpha=0.3)
    one = table[table["law"] == table["law"].iloc[0]]
    add_t_axis(panels[0], one["t"].to_numpy(), one["log_snr"].to_numpy())
    for axes in panels[1:]:
        axes.set_xlim(panels[0].get_xlim())
    panels[2].set_xlabel(LOG_SNR_LABEL)
    panels[1].legend(fontsize=7, frameon=False, ncols=2)
    return figure
