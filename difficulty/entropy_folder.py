"""The results folders of ``difficulty kl`` and ``difficulty profile``: what is run, written and drawn."""

__all__ = ["run_kl", "run_profile"]

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from difficulty.datasets import load_dataset
from difficulty.errors import InputError
from difficulty.plots import relative_entropy_figure, save_figure
from difficulty.plots_relative_entropy import profile_figure
from difficulty.process import get_process
from difficulty.profile import measure_profile
from difficulty.recommend import advise, burden_of_profile
from difficulty.records import finish_run, start_run, write_json, write_table
from difficulty.relative_entropy import kl

Report = Callable[[str, int, int], None]


def run_kl(
    data: str,
    process_name: str,
    out: Path,
    estimator: str,
    pairs: Sequence[int] | None,
    tasks: int | None,
    seed: int,
    report: Report,
    model: str | None = None,
) -> pd.DataFrame:
    """Measure, write relative_entropy.csv and its figure, and return the table.

    Raises:
        InputError: if an argument cannot be used or the folder cannot be written.
    """
    dataset, process = load_dataset(data), get_process(process_name)
    config = {
        "data": data, "dataset": dataset.fingerprint, "process": process.fingerprint, "estimator": estimator,
        "pairs": list(pairs) if pairs else None, "tasks": tasks, "seed": seed,
        "model": model,
    }  # fmt: skip
    started = time.perf_counter()
    run = start_run(out, "kl", config)
    table = kl(
        dataset, process, estimator=estimator, pairs=pairs, tasks=tasks, seed=seed, model=model,
        progress=lambda done, total: report("relative entropy", done, total),
    )  # fmt: skip
    write_table(out / "relative_entropy.csv", table)
    if len(table) > 1:
        save_figure(relative_entropy_figure(out), out / "figures", "relative_entropy")
    finish_run(out, run, wall_seconds=round(time.perf_counter() - started, 2))
    return table


def run_profile(
    data: str, out: Path, processes: Sequence[str], experts: int, seed: int, report: Report
) -> dict[str, Any]:
    """Measure, write profile.csv, kl-NAME.csv, recommendation.json and the figure, and return the recommendation.

    Raises:
        InputError: if an argument cannot be used or the folder cannot be written.
    """
    dataset = load_dataset(data)
    chosen = [get_process(name) for name in processes]
    config = {
        "data": data, "dataset": dataset.fingerprint, "seed": seed, "experts": experts,
        "processes": [process.fingerprint for process in chosen],
    }  # fmt: skip
    started = time.perf_counter()
    run = start_run(out, "profile", config)
    profile = measure_profile(dataset, seed=seed, progress=lambda done, total: report("profile", done, total))
    write_table(out / "profile.csv", profile.table)
    for process in chosen:
        write_table(out / f"kl-{process.name}.csv", profile.kl(process))
    try:
        advice = advise("sqrt(I_min) per unit log s", *burden_of_profile(profile), chosen, experts)
    except InputError as error:
        advice = {"sentences": [f"No recommendation: {error}."]}
    write_json(out / "recommendation.json", advice)
    save_figure(profile_figure(out), out / "figures", "profile")
    finish_run(out, run, wall_seconds=round(time.perf_counter() - started, 2))
    return advice
