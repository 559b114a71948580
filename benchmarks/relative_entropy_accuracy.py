"""How accurate are the estimators of the relative entropy on laws that they know from samples only?

    python benchmarks/relative_entropy_accuracy.py --out results/relative-entropy-accuracy

Runs ``PLAN``; a run that was stopped goes on where it was. Writes pairs.csv, one row per law, process, estimator, data
set and pair, and accuracy.csv, the table: share of pairs marked valid, and of these the median and worst relative error
and the coverage of the 90 % intervals; rank correlation over all pairs; seconds per pair. Shares over all laws have a
90 % interval over data sets. The laws (``known_laws.JUDGING``) played no part in the making of the estimators.
deceiving.csv and deceiving_pairs.csv are the same for laws that were made to deceive them (``known_laws.DECEIVING``).
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from known_laws import DECEIVING, JUDGING
from scipy.stats import spearmanr

from difficulty.datasets import split_samples
from difficulty.process import get_process
from difficulty.records import write_table
from difficulty.relative_entropy import kl
from difficulty.relative_entropy.pairs import make_pairs

TIMES = np.array([2, 4, 8, 16, 32, 65, 100, 150, 220, 320, 430, 550, 651, 800, 950])
SIZES = (2000, 3500)
# Of the bootstrap of a share over data sets: its draws, and the number of data sets below which it says nothing.
DRAWS, FEW_DATA_SETS = 2000, 6

# Too dear in fits or in their own exact values.
LEFT_OUT = ("spikes200-24", "spiral-loose-2", "radial-student6-40")
LAWS = tuple(name for name in JUDGING if name not in LEFT_OUT)
DEAR = ("gauss-150", "modes6-96", "modes2-192", "modes10-64", "uniform-112", "bimodal-72", "radial-student4-5")
SOME = ("gauss-3", "modes4-5", "modes7-24", "uniform-3", "laplace-2", "ring-6")
# Estimator, process, laws and seeds of the data sets.
PLAN: list[tuple[str, str, tuple[str, ...], tuple[int, ...]]] = [
    ("auto", "vp-linear", LAWS, (128,)),
    # The pairs of a data set share its error, so that a coverage needs many data sets.
    *(("auto", process, SOME, tuple(range(128, 132))) for process in ("edm", "ve", "vp-cosine", "flow-matching")),
    *((name, "vp-linear", SOME, tuple(range(128, 134))) for name in ("gaussian", "mixture")),
    ("empirical", "vp-linear", SOME, (59, 60)),
    ("score", "vp-linear", ("gauss-3", "modes4-5", "laplace-2", "ring-6"), (122, 123, 124)),
    ("auto", "vp-linear", tuple(name for name in LAWS if name not in DEAR), (129,)),
]
DECEIVING_PLAN = [("auto", "vp-linear", tuple(DECEIVING), (128, 129))]


def measure(name: str, process_name: str, estimator: str, seed: int) -> pd.DataFrame:
    """One data set: n alternates with the seed."""
    law, process = {**JUDGING, **DECEIVING}[name](), get_process(process_name)
    pairs = make_pairs(process, TIMES)
    n = SIZES[seed % len(SIZES)]
    rows = law.sample(n, np.random.default_rng([seed, 1 + sum(map(ord, name))]))
    data = split_samples(name, rows.astype(np.float32))
    start = time.perf_counter()
    table = kl(data, process, estimator=estimator, pairs=TIMES, seed=seed)
    seconds = (time.perf_counter() - start) / len(TIMES)
    kept = table[["t", "log_snr", "kl", "ci_low", "ci_high", "upper_bound", "valid", "reason"]]
    kept = kept.assign(family=table.estimator, truth=law.kl(pairs), seconds_per_pair=seconds)
    facts = {"law": name, "dim": law.dim, "n": n, "process": process_name, "estimator": estimator, "seed": seed}
    return pd.DataFrame([facts] * len(kept)).join(kept)


def share_interval(flags: pd.Series, data_sets: pd.Series) -> tuple[float, float]:
    """90 % interval of the share of pairs with a flag, by a bootstrap of whole data sets; none from too few of them."""
    by_set = flags.groupby(data_sets.loc[flags.index]).agg(["sum", "size"]).to_numpy(float)
    if len(by_set) < FEW_DATA_SETS:
        return np.nan, np.nan
    drawn = np.random.default_rng(0).integers(len(by_set), size=(DRAWS, len(by_set)))
    with_flag, size = by_set[drawn].sum(1).T
    low, high = np.quantile(with_flag / size, [0.05, 0.95])
    return float(low), float(high)


def summarise(pairs: pd.DataFrame) -> pd.DataFrame:
    """The table, one row per estimator, process and law, and one per estimator and process for all laws."""
    rows = []
    keys = ["estimator", "process", "law"]
    pairs = pairs.assign(data_set=pairs.law + "/" + pairs.seed.astype(str))
    everything = pairs.assign(law="(all)")
    for key, group in pd.concat([everything, pairs]).groupby(keys, sort=False):
        valid = group[group.valid]
        error = np.abs(valid.kl / valid.truth - 1)
        covered = (valid.ci_low <= valid.truth) & (valid.truth <= valid.ci_high)
        middle = group[group.t.between(65, 651)]
        single = group.law.iloc[0] != "(all)"
        data_sets = group.data_set
        coverage_interval, middle_interval = (
            share_interval(flags, data_sets) for flags in (covered, middle.valid)
        )
        rows.append(
            dict(zip(keys, key, strict=True))
            | {
                "pairs": len(group),
                "valid": group.valid.mean(),
                "valid_65_651": middle.valid.mean(),
                "valid_65_651_low": middle_interval[0],
                "valid_65_651_high": middle_interval[1],
                "median_error": error.median(),
                "worst_error": error.max(),
                "beyond_30_percent": int((error > 0.3).sum()),
                "coverage": covered.mean() if len(valid) else np.nan,
                "coverage_low": coverage_interval[0],
                "coverage_high": coverage_interval[1],
                "rank_correlation": spearmanr(group.kl, group.truth).statistic if single else np.nan,
                "seconds_per_pair": group.seconds_per_pair.mean(),
            }
        )
    return pd.DataFrame(rows)


def measured(name: str, process: str, estimator: str, seed: int, parts: Path) -> pd.DataFrame:
    """One data set, from its file if it was measured before."""
    path = parts / f"{name}_{process}_{estimator}_{seed}.csv"
    if not path.exists():
        write_table(path, measure(name, process, estimator, seed))
    table = pd.read_csv(path)
    return table.assign(reason=table.reason.astype(object).fillna(""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", type=Path, default=Path("runs/accuracy"), help="finished data sets, one file each")
    every = (*LAWS, *DECEIVING)
    parser.add_argument("--laws", nargs="+", choices=every, default=every, help="only these of the plan")
    arguments = parser.parse_args()
    for plan, files in ((PLAN, ("pairs", "accuracy")), (DECEIVING_PLAN, ("deceiving_pairs", "deceiving"))):
        parts = []
        for estimator, process, laws, seeds in plan:
            for name in [law for law in laws if law in arguments.laws]:
                for seed in seeds:
                    parts.append(measured(name, process, estimator, seed, arguments.parts))
                    row = summarise(parts[-1]).iloc[-1]
                    print(row.to_frame().T.to_string(index=False, header=len(parts) == 1), flush=True)
        if not parts:
            continue
        pairs = pd.concat(parts, ignore_index=True)
        summary = summarise(pairs)
        for file, table in zip(files, (pairs, summary), strict=True):
            write_table(arguments.out / f"{file}.csv", table, digits=5)
        print(summary.query("law == '(all)'").to_string(index=False))


if __name__ == "__main__":
    main()
