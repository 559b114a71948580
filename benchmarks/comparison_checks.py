"""Two checks on small networks: does the comparison find what is not there, and is patience a clock?

noise   plain training against itself with fresh seeds, 400 real pairs: how often would a difference be claimed? The
        pairs are read as 100 comparisons of 4, 50 of 8 and 10 of 40, each corrected as any other. As all 800 runs have
        seeds of their own, any may stand in either arm and against any other: 1000 times 40 pairs are formed anew.
clock   how long are the stages of `patience` and of `held-out`, with learning and with the learning rate next to zero?
        A rule that looks at the batch loss alone ends its stages as early when nothing is learned.

    python benchmarks/comparison_checks.py [--out results/comparison-checks] [--share 1.0]
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from difficulty.datasets import load_dataset
from difficulty.process import get_process
from difficulty.records import finish_run, start_run, write_table
from training.batched import Stacked
from training.compare import compare
from training.curriculum_builders import interval_curriculum
from training.effects import effects
from training.heldout import HeldOut
from training.plan import TrainPlan
from training.trainer import Trainer

DATA, PROCESS, NETWORK = "grid-2d", "vp-linear", "mlp:width=32,depth=2"
PAIRS, SEEDS_OF_A_COMPARISON = 400, (4, 8, 40)
ANEW = 1000
STAGES = 4
SEEDS = range(8)
LEARNING = {"learning": 1e-3, "not learning": 1e-9}


def noise(out: Path, share: float) -> pd.DataFrame:
    """How many of the comparisons of equal arms claim a difference."""
    compare(
        load_dataset(DATA), get_process(PROCESS), ["vanilla", "vanilla-again"], seeds=range(PAIRS),
        steps=max(round(200 * share), 5), out=out, network=NETWORK, samples=256, metrics=("fd-pixels", "sw-pixels"),
    )  # fmt: skip
    final = pd.read_csv(out / "comparison.csv")
    rows = []
    for seeds in SEEDS_OF_A_COMPARISON:
        parts = [final[final["seed"].between(first, first + seeds - 1)] for first in range(0, PAIRS, seeds)]
        rows.append(("as trained", seeds, *claims(parts)))
    rows.append(("anew", seeds, *claims(paired_anew(final, seeds))))
    columns = ["pairing", "seeds", "comparisons", "claims", "share_of_claims", "share_of_p_below_5_percent"]
    return pd.DataFrame(rows, columns=columns)


def claims(comparisons: Iterable[pd.DataFrame]) -> tuple[int, int, float, float]:
    """Number of comparisons, how many of them claim a difference, their share, and that of the uncorrected p < 0.05."""
    tables = [effects(part, "vanilla") for part in comparisons]
    found = sum(not (table["verdict"] == "no difference shown").all() for table in tables)
    uncorrected = float(np.mean([(table["p"] < 0.05).mean() for table in tables]))
    return len(tables), found, found / len(tables), uncorrected


def paired_anew(final: pd.DataFrame, seeds: int) -> Iterator[pd.DataFrame]:
    """Comparisons of other runs in other pairs, drawn from the runs of both arms together.

    Were each arm drawn from its own runs, the difference that the means of those few happen to have would be in all.
    """
    rng = np.random.default_rng(0)
    arms = list(final["arm"].unique())
    runs = pd.MultiIndex.from_frame(final[["arm", "seed"]].drop_duplicates())
    by_run = final.set_index(["arm", "seed"])
    for _ in range(ANEW):
        drawn = runs[rng.choice(len(runs), len(arms) * seeds, replace=False)]
        places = pd.MultiIndex.from_product([arms, range(seeds)]).to_frame(index=False, name=["arm", "seed"])
        yield by_run.join(places.set_index(drawn), how="inner").reset_index(drop=True)


def clock(share: float) -> pd.DataFrame:
    """Length of the stages of pacing rules, in iterations and in units of their patience."""
    data, process = load_dataset(DATA), get_process(PROCESS)
    rules = [("patience", tau, {"tau": tau}) for tau in (10, 30, 100)]
    rules.append(("held-out", 25, {"check_every": 25, "least": 25, "cap": 1.0, "cost": 1.0}))
    rows = []
    for rule, unit, options in rules:
        curriculum = interval_curriculum(process, k=STAGES, pacing=rule, pacing_options=options)
        heldout = HeldOut(data, process, curriculum.tasks)
        for name, lr in LEARNING.items():
            steps = max(round(12 * unit * STAGES * share), 40)
            plans = [TrainPlan(steps=steps, lr=lr, lr_schedule="constant", network=NETWORK, seed=s) for s in SEEDS]
            runs = Stacked([Trainer(data, process, plan, curriculum) for plan in plans])
            for _ in range(steps):
                runs.step()
                for trainer in runs.trainers:
                    trainer.report_heldout(heldout)
            lengths = [
                record.end - record.start
                for trainer in runs.trainers
                for record in trainer.sampler.log()
                if record.end is not None
            ]
            ended = len(lengths) / (len(plans) * (STAGES - 1))
            mean, se = (np.mean(lengths), np.std(lengths, ddof=1) / np.sqrt(len(lengths))) if lengths else (np.nan,) * 2
            rows.append((rule, unit, name, ended, mean, mean / unit, 1.96 * se / unit))
    columns = ["rule", "unit", "network", "share_of_stages_ended", "mean_length", "in_units", "half_width"]
    return pd.DataFrame(rows, columns=columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/comparison-checks"))
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison-checks"))
    parser.add_argument("--share", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = start_run(options.out, "comparison-checks", {"share": options.share})
    for name, table in (("noise", noise(options.runs, options.share)), ("clock", clock(options.share))):
        write_table(options.out / f"{name}.csv", table)
        print(table.round(3).to_string(index=False))
    finish_run(options.out, run)


if __name__ == "__main__":
    main()
