"""The results folders of ``difficulty kl`` and ``difficulty profile``: what is run, written and drawn."""

__all__ = ["run_kl", "run_profile"]

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from difficulty.datasets import Dataset, load_dataset
from difficulty.errors import InputError
from difficulty.models import TrainedModel, load_model
from difficulty.plots import relative_entropy_figure, save_figure
from difficulty.plots_relative_entropy import profile_figure
from difficulty.process import Process, get_process
from difficulty.profile import measure_profile
from difficulty.randomness import check_seed
from difficulty.recommend import advise, burden_of_profile, check_experts
from difficulty.records import finish_run, start_run, write_json, write_table
from difficulty.relative_entropy import choose_estimator, kl
from difficulty.relative_entropy.exact import known_law
from difficulty.relative_entropy.pairs import make_pairs

Report = Callable[[str, int, int], None]


def run_kl(
    data: str | Dataset,
    process_name: str,
    out: Path,
    estimator: str,
    pairs: Sequence[int] | None,
    tasks: int | None,
    seed: int,
    report: Report,
    model: str | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Measure, write relative_entropy.csv and its figure, and return the table.

    Args: as of ``kl``, and ``device``, where the network of a model runs.

    Raises:
        InputError: if an argument cannot be used, in which case nothing is written, or the folder cannot be written.
    """
    dataset, process = load_dataset(data), get_process(process_name)
    check_seed(seed)
    choose_estimator(estimator, model)
    make_pairs(process, pairs, tasks)
    if estimator == "exact":
        known_law(dataset)
    trained = _model_of(process, model, device)
    config = {
        "data": dataset.name, "dataset": dataset.fingerprint, "process": process.fingerprint, "estimator": estimator,
        "pairs": list(pairs) if pairs else None, "tasks": tasks, "seed": seed,
        "model": model, **dataset.provenance,
    }  # fmt: skip
    started = time.perf_counter()
    run = start_run(out, "kl", config)
    table = kl(
        dataset, process, estimator=estimator, pairs=pairs, tasks=tasks, seed=seed, model=trained,
        progress=lambda done, total: report("relative entropy", done, total),
    )  # fmt: skip
    write_table(out / "relative_entropy.csv", table)
    if len(table) > 1:
        save_figure(relative_entropy_figure(out), out / "figures", "relative_entropy")
    finish_run(out, run, wall_seconds=round(time.perf_counter() - started, 2))
    return table


def run_profile(
    data: str | Dataset, out: Path, processes: Sequence[str], experts: int, seed: int, report: Report
) -> dict[str, Any]:
    """Measure, write profile.csv, kl-NAME.csv, recommendation.json and the figure, and return the recommendation.

    Raises:
        InputError: if an argument cannot be used, in which case nothing is written, or the folder cannot be written.
    """
    check_seed(seed)
    check_experts(experts)
    dataset, chosen = load_dataset(data), _named(processes)
    config = {
        "data": dataset.name, "dataset": dataset.fingerprint, "seed": seed, "experts": experts,
        "processes": [process.fingerprint for process in chosen.values()], **dataset.provenance,
    }  # fmt: skip
    started = time.perf_counter()
    run = start_run(out, "profile", config)
    profile = measure_profile(dataset, seed=seed, progress=lambda done, total: report("profile", done, total))
    write_table(out / "profile.csv", profile.table)
    for name, process in chosen.items():
        write_table(out / f"kl-{name}.csv", profile.kl(process))
    try:
        advice = advise("sqrt(I_min) per unit log s", *burden_of_profile(profile), chosen, experts)
    except InputError as error:
        advice = {"sentences": [f"No recommendation: {error}."]}
    write_json(out / "recommendation.json", advice)
    save_figure(profile_figure(out), out / "figures", "profile")
    finish_run(out, run, wall_seconds=round(time.perf_counter() - started, 2))
    return advice


def _model_of(process: Process, model: str | None, device: str) -> TrainedModel | None:
    if model is None:
        return None
    trained = load_model(model, device)
    if trained.process is not None:
        process.check_fingerprint(trained.process.fingerprint, trained.name)
    return trained


def _named(specs: Sequence[str]) -> dict[str, Process]:
    """The processes by the names of their files: with the options, as in vp-linear-T=500, since these tell them apart.

    Raises:
        InputError: if a process cannot be used, or two would be written to one file.
    """
    named: dict[str, Process] = {}
    for spec in specs:
        process = get_process(spec)
        name, _, options = spec.partition(":")
        label = f"{name}-{options}" if options and name == process.name else process.name
        if label in named:
            raise InputError(f"two processes would both be written to kl-{label}.csv; leave one to another call")
        named[label] = process
    return named
