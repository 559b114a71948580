"""Does a ranking survive another budget, another seed? The same definitions on parts of the same learning curves.

stability.csv holds, per definition, variant and task, the value and its rank (1 = easiest). Variants are the budget
itself, half of it, twice it, and every seed alone at the budget; ``iterations`` says at which checkpoint each ends, the
last up to there. A rank survives if it lies, at half and at twice the budget, within its own 90 % interval at the
budget.
"""

__all__ = ["STABILITY_COLUMNS", "stability_sentences", "stability_table", "variants_of"]

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, rankdata

from difficulty.convergence import convergence_table
from difficulty.process import Array
from difficulty.ranking import MeasureRanking
from difficulty.records import check_columns

STABILITY_COLUMNS: Mapping[str, type] = {
    "definition": str, "variant": str, "iterations": int, "task": int, "value": float, "rank": float,
}  # fmt: skip
BUDGET, HALF, DOUBLE = "budget", "half budget", "double budget"


def variants_of(seeds: Iterable[int]) -> list[str]:
    """The variants in stability.csv of a measurement with these seeds."""
    return [BUDGET, HALF, DOUBLE, *(_of_seed(seed) for seed in seeds)]


def _of_seed(seed: object) -> str:
    return f"seed {seed}"


def stability_table(losses: pd.DataFrame, budget: int) -> pd.DataFrame:
    """stability.csv from losses.csv.

    Args:
        losses: losses.csv, with checkpoints up to twice the budget.
        budget: iterations at which difficulty is read off.

    Returns:
        Columns ``STABILITY_COLUMNS``.
    """
    variants = {BUDGET: (losses, budget), HALF: (losses, budget // 2), DOUBLE: (losses, 2 * budget)}
    for seed, part in losses.groupby("seed"):
        variants[_of_seed(seed)] = (part, budget)
    parts = []
    for variant, (rows, iterations) in variants.items():
        table = convergence_table(rows, iterations)[["definition", "task", "value"]]
        last = rows.loc[rows["iteration"] <= iterations, "iteration"].max()
        parts.append(table.assign(variant=variant, iterations=last))
    stacked = pd.concat(parts, ignore_index=True)
    stacked["rank"] = stacked.groupby(["definition", "variant"])["value"].transform(_ranks)
    return stacked[list(STABILITY_COLUMNS)]


def _ranks(values: pd.Series) -> Array:
    """Ranks from 1; a task without a value could not be learned and is hardest."""
    return rankdata(values.fillna(np.inf), method="average")


def stability_sentences(table: pd.DataFrame, measures: Mapping[str, MeasureRanking]) -> list[str]:
    """One sentence per definition: agreement of the budgets and seeds, and how many ranks survive.

    Ranks of tasks whose value is a bound are none that could survive; where all are, nothing is said, nor of one task.
    """
    check_columns(table, STABILITY_COLUMNS, "stability.csv")
    sentences = []
    for definition, part in table.groupby("definition", sort=False):
        ranks = part.pivot(index="task", columns="variant", values="rank")
        measure = measures[str(definition)]
        low, high = (np.array(v, dtype=np.float64) for v in (measure.rank_low, measure.rank_high))
        known = ~np.array(measure.flagged)
        if not known.any() or len(known) < 2:
            continue
        survive = known.copy()
        for variant in (HALF, DOUBLE):
            survive &= (low <= ranks[variant]) & (ranks[variant] <= high)
        seeds = [name for name in ranks.columns if str(name).startswith("seed ")]
        between = [_tau(ranks[a], ranks[b]) for i, a in enumerate(seeds) for b in seeds[i + 1 :]]
        last = part.groupby("variant")["iterations"].first()
        half, double = (_tau(ranks[BUDGET], ranks[variant]) for variant in (HALF, DOUBLE))
        sentence = (
            f"{definition} at half the budget ({last[HALF]} of {last[BUDGET]} iterations) tau {half:+.2f}, "
            f"at twice the budget tau {double:+.2f}"
        )
        # Where every rank may be any, all survive whatever happens.
        if ((high - low)[known] < len(ranks) - 1).any():
            which = "" if known.all() else " that are no bounds"
            sentence += f"; {int(survive.sum())} of {int(known.sum())} ranks{which} survive both"
        sentences.append(sentence + (f"; between seeds tau at least {min(between):+.2f}." if between else "."))
    return sentences


def _tau(first: pd.Series, second: pd.Series) -> float:
    """Kendall's tau-b; 0 where one side is all ties."""
    return float(np.nan_to_num(kendalltau(first, second).statistic))
