"""What several comparisons say together: one row per setting, arm, learning-rate schedule and metric, and in words.

Read from the folders of finished comparisons. A cell says what an arm did to a metric: helps, hurts, or no difference
shown, with the change and its 95 % interval; ``share`` is the part of the baseline's iterations after which its final
held-out nats were reached, the median over the seeds.
"""

__all__ = ["verdict_table", "verdicts_in_words"]

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from difficulty.records import read_table
from training.effects import EFFECT_COLUMNS
from training.report import percent


def verdict_table(folders: Mapping[str, Path]) -> pd.DataFrame:
    """Effects and speed of all comparisons.

    Args:
        folders: finished comparisons by the name of their setting.

    Returns:
        Columns setting, those of effects.csv, share, share_low, share_high (over the seeds) and reached, the number of
        seeds that reached the baseline's final nats.
    """
    tables = []
    for setting, folder in folders.items():
        effects = read_table(folder / "effects.csv", EFFECT_COLUMNS)
        speed = read_table(folder / "speed.csv", ("arm", "lr_schedule", "share", "censored"))
        runs = speed.assign(reached=~speed["censored"].astype(bool)).groupby(["arm", "lr_schedule"])
        shares = runs["share"].agg(share="median", share_low="min", share_high="max").join(runs["reached"].sum())
        tables.append(effects.join(shares, on=["arm", "lr_schedule"]).assign(setting=setting))
    table = pd.concat(tables, ignore_index=True)
    return table[["setting", *table.columns.drop("setting")]]


def verdicts_in_words(table: pd.DataFrame, metrics: Sequence[str], schedule: str = "cosine") -> pd.DataFrame:
    """One row per setting and arm, one column per metric, and the iterations needed, as text.

    Args:
        table: from ``verdict_table``.
        metrics: columns of the result, in order.
        schedule: learning-rate schedule.
    """
    rows = []
    for (setting, arm), own in table[table["lr_schedule"] == schedule].groupby(["setting", "arm"], sort=False):
        by_metric = own.set_index("metric").to_dict("index")
        cells = {metric: _cell(by_metric[metric]) for metric in metrics}
        first = next(iter(by_metric.values()))
        reached, seeds = int(first["reached"]), int(first["seeds"])
        if 2 * reached > seeds:
            needed = f"{100 * first['share']:.0f} % ({reached} of {seeds} seeds)"
        else:
            needed = f"not reached ({reached} of {seeds} seeds)"
        rows.append({"setting": setting, "arm": arm} | cells | {"iterations": needed})
    return pd.DataFrame(rows)


def _cell(effect: Mapping[Any, Any]) -> str:
    low, middle, high = (percent(effect[name]) for name in ("ci_low", "log_ratio", "ci_high"))
    return f"{effect['verdict']}: {middle} [{low}, {high}]"
