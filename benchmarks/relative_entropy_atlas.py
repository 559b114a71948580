"""Is the relative entropy higher at low t? KL of consecutive marginals for eleven laws and five processes.

    python benchmarks/relative_entropy_atlas.py --out results/relative-entropy-atlas

Writes pairs.csv (every 4th pair and both ends: KL per step with intervals, per (d log-SNR)^2, I_min), table.csv (rank
correlation of KL with t over the valid pairs, and t/T where it is largest) and a figure per process. Laws with known
densities are exact; digits and photo patches are estimated from their samples.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from difficulty.datasets import Dataset, load_dataset
from difficulty.laws import GaussianMixture, Law, Ring
from difficulty.plots import save_figure
from difficulty.plots_relative_entropy import atlas_figure
from difficulty.process import PROCESSES, get_process
from difficulty.records import finish_run, start_run, write_table
from difficulty.relative_entropy import kl

COLUMNS = [
    "t", "log_snr", "kl", "ci_low", "ci_high", "per_dlogsnr2", "i_min", "upper_bound", "estimator", "valid", "reason",
]  # fmt: skip


def gaussian(eigenvalues: np.ndarray) -> Law:
    return GaussianMixture([1.0], np.zeros((1, len(eigenvalues))), np.diag(eigenvalues)[None])


def coloured(dim: int) -> np.ndarray:
    """1/k^2 spectrum of mean variance 1."""
    spectrum = 1.0 / np.arange(1, dim + 1) ** 2
    return spectrum / spectrum.mean()


def two_points() -> Law:
    return GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], np.zeros((2, 1, 1)))


def exact(name: str, law: Law) -> Dataset:
    draws = law.sample(100, torch.Generator().manual_seed(0)).float()
    return Dataset(name, draws[20:], draws[:20], law=law)


def laws() -> Mapping[str, Dataset]:
    return {
        "isotropic, variance 1": exact("whitened", gaussian(np.ones(64))),
        "isotropic, variance 0.25": exact("quarter", gaussian(np.full(64, 0.25))),
        "isotropic, variance 4": exact("four", gaussian(np.full(64, 4.0))),
        "1/k² spectrum, D = 768": exact("coloured", gaussian(coloured(768))),
        "rank 8 of 64": exact("rank", gaussian(np.repeat([1.0, 0.0], [8, 56]))),
        "ring in 16-D": exact("ring", Ring(16)),
        "two points ±1": exact("points", two_points()),
        "2-D grid of 25 modes": load_dataset("grid-2d"),
        "digits mixture": load_dataset("digits-mixture"),
        "digits (estimated)": load_dataset("digits"),
        "photo patches 8x8 (estimated)": load_dataset("photo-patches-8:n=2000"),
    }


def summarise(pairs: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of each measure with t, and t/T of the largest KL, over the valid pairs."""
    rows = []
    for (law, process), group in pairs[pairs.valid].groupby(["law", "process"], sort=False):
        row: dict[str, object] = {"law": law, "process": process, "pairs": len(group)}
        zero = (group.kl < 1e-25).all()
        for name in ("kl", "per_dlogsnr2", "i_min"):
            # Evenly spaced t only: the ends are sampled more densely.
            finite = group[np.isfinite(group[name]) & (group.t % 4 == 0)]
            row[f"rank_{name}"] = np.nan if zero else spearmanr(finite[name], finite.t).statistic
        row["argmax_t_over_T"] = np.nan if zero else group.t[group.kl.idxmax()] / get_process(process).T
        rank = -1.0 if zero else float(row["rank_kl"])  # type: ignore[arg-type]
        row["answer"] = "KL = 0" if zero else "yes" if rank < -0.9 else "mostly" if rank < -0.5 else "no"
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    run = start_run(out, "atlas", {"processes": list(PROCESSES), "seed": 0})
    parts = []
    for label, data in laws().items():
        for name in PROCESSES:
            steps = np.unique(np.r_[2:12, 12:1000:4, 990:1001])
            # Only the pairs that are measured one by one where the law is exact; a sample interpolates between anchors.
            table = kl(data, name, pairs=steps, bootstrap=4)
            parts.append(table[COLUMNS].assign(law=label, process=name))
            print(label, name, f"{table.valid.mean():.0%} valid", flush=True)
    pairs = pd.concat(parts, ignore_index=True)
    write_table(out / "pairs.csv", pairs)
    write_table(out / "table.csv", summarise(pairs))
    for name in PROCESSES:
        save_figure(atlas_figure(out, name), out / "figures", name)
    finish_run(out, run)
    print(summarise(pairs).pivot(index="law", columns="process", values="rank_kl").round(2).to_string())


if __name__ == "__main__":
    main()
