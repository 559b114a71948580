"""Is the relative entropy higher at low t? KL of consecutive marginals for eleven laws and five processes.

    python benchmarks/relative_entropy_atlas.py --out results/relative-entropy-atlas

Writes pairs.csv (every 8th pair and both ends: KL per step with intervals, per (d log-SNR)^2, I_min), table.csv (rank
correlation of KL with t over the valid pairs, and t/T where it is largest) and a figure per process. Laws with known
densities are exact; digits and photo patches are estimated from their samples. A run that was stopped goes on.

The 1/k^2 spectrum has a mean variance of 1/4, about that of images in [-1, 1]; where the KL of a variance-exploding
process is largest depends on it (mean variance 1 under EDM: rank -.17, largest at t/T = .28; 1/4: -.39 and .23).
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
    "t", "log_snr", "kl", "ci_low", "ci_high", "per_dlogsnr2", "i_min", "ratio", "estimator", "valid", "reason",
]  # fmt: skip
# Every 8th pair and all at both ends. Rank correlations use every 8th only: the ends are sampled more densely.
SPACING = 8
STEPS = np.unique(np.r_[2:12, 16:1000:SPACING, 990:1001])
# Below these a value is the rounding of zero.
ZERO = {"kl": 1e-25, "per_dlogsnr2": 1e-20, "i_min": 1e-20}


def gaussian(eigenvalues: np.ndarray) -> Law:
    return GaussianMixture([1.0], np.zeros((1, len(eigenvalues))), np.diag(eigenvalues)[None])


def coloured(dim: int) -> np.ndarray:
    """1/k^2 spectrum of mean variance 1/4."""
    spectrum = 1.0 / np.arange(1, dim + 1) ** 2
    return 0.25 * spectrum / spectrum.mean()


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
    """Rank correlation of each measure with t, and t/T of the largest KL, over the valid pairs and where they begin."""
    rows = []
    for (law, process), group in pairs[pairs.valid].groupby(["law", "process"], sort=False):
        row: dict[str, object] = {"law": law, "process": process, "pairs": len(group)}
        row["valid_from_t_over_T"] = group.t.min() / get_process(process).T
        zero = {name: bool((group[name].fillna(0.0) < least).all()) for name, least in ZERO.items()}
        for name in ZERO:
            finite = group[np.isfinite(group[name]) & (group.t % SPACING == 0)]
            row[f"rank_{name}"] = np.nan if zero[name] else spearmanr(finite[name], finite.t).statistic
        # The first of equals: a point mass under evenly spaced log sigma has the same KL at every t.
        largest = group.t[group.kl > (1 - 1e-6) * group.kl.max()].min()
        row["argmax_t_over_T"] = np.nan if zero["kl"] else largest / get_process(process).T
        rank = -1.0 if zero["kl"] else float(row["rank_kl"])  # type: ignore[arg-type]
        row["answer"] = "KL = 0" if zero["kl"] else "yes" if rank < -0.9 else "mostly" if rank < -0.5 else "no"
        row["i_min_is_zero"] = zero["i_min"]
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", type=Path, default=Path("runs/atlas"), help="finished curves, one file each")
    out, finished = (getattr(parser.parse_args(), name) for name in ("out", "parts"))
    run = start_run(out, "atlas", {"processes": list(PROCESSES), "seed": 0})
    parts = []
    for label, data in laws().items():
        for name in PROCESSES:
            path = finished / f"{data.name}_{name}.csv"
            if not path.exists():
                write_table(path, kl(data, name, pairs=STEPS, bootstrap=8)[COLUMNS], digits=5)
            table = pd.read_csv(path).assign(law=label, process=name)
            parts.append(table.assign(reason=table.reason.astype(object).fillna("")))
            print(label, name, f"{table.valid.mean():.0%} valid", flush=True)
    pairs = pd.concat(parts, ignore_index=True)
    write_table(out / "pairs.csv", pairs, digits=5)
    write_table(out / "table.csv", summarise(pairs), digits=5)
    for name in PROCESSES:
        save_figure(atlas_figure(out, name), out / "figures", name)
    finish_run(out, run)
    print(summarise(pairs).pivot(index="law", columns="process", values="rank_kl").round(2).to_string())


if __name__ == "__main__":
    main()
