"""The results folders of ``difficulty kl`` and ``difficulty profile``: what is run, written and drawn."""

__all__ = ["run_kl", "run_profile"]

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from difficulty.datasets import load_dataset
from difficulty.errors import InputError
from difficulty.plots import save_figure
from difficulty.plots_relative_entropy import pairs_figure, profile_figure
from difficulty.process import get_process
from difficulty.profile import measure_profile
from difficulty.recommend import burden_of_profile, equal_burden, fit_density, flags
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
) -> pd.DataFrame:
    """Measure, write relative_entropy.csv and its figure, and return the table.

    Raises:
        InputError: if an argument cannot be used or the folder cannot be written.
    """
    dataset, process = load_dataset(data), get_process(process_name)
    config = {
        "data": data, "dataset": dataset.fingerprint, "process": process.fingerprint, "estimator": estimator,
        "pairs": list(pairs) if pairs else None, "tasks": tasks, "seed": seed,
    }  # fmt: skip
    started = time.perf_counter()
    run = start_run(out, "kl", config)
    table = kl(
        dataset, process, estimator=estimator, pairs=pairs, tasks=tasks, seed=seed,
        progress=lambda done, total: report("relative entropy", done, total),
    )  # fmt: skip
    write_table(out / "relative_entropy.csv", table)
    if len(table) > 1:
        save_figure(pairs_figure(out), out / "figures", "relative_entropy")
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
    advice = _advice(profile, chosen, experts)
    write_json(out / "recommendation.json", advice)
    save_figure(profile_figure(out), out / "figures", "profile")
    finish_run(out, run, wall_seconds=round(time.perf_counter() - started, 2))
    return advice


def _advice(profile: Any, processes: Sequence[Any], experts: int) -> dict[str, Any]:
    try:
        tau, rate = burden_of_profile(profile)
    except InputError as error:
        return {"sentences": [f"No recommendation: {error}."]}
    density = fit_density(tau, rate)
    sentences = [
        f"Burden sqrt(I_min) over log-SNR {-2 * tau[0]:.3g} to {-2 * tau[-1]:.3g}: normal in log s with mean "
        f"{density.mean:.3f}, std {density.std:.3f}; total-variation distance {density.distance:.2f} "
        f"({'good' if density.distance < 0.1 else 'fair' if density.distance < 0.2 else 'poor'} fit).",
        *(f"  {trainer}: {text}" for trainer, text in flags(density).items()),
    ]
    boundaries = {}
    for process in processes:
        table = equal_burden(tau, rate, process, experts).table
        boundaries[process.name] = table.to_dict(orient="list")
        sentences.append(f"Boundaries of {experts} experts of equal burden, {process.name}:")
        sentences += [
            f"  t = {row.t:7.1f}  u = {row.u:.4f}  sigma/alpha = {row.sigma:9.4g}  log-SNR = {row.log_snr:7.3f}"
            for row in table.itertuples()
        ]
    density_table = {"log_snr": (-2 * tau).tolist(), "rate": rate.tolist()}
    return {
        "burden": "sqrt(I_min) per unit log s",
        "density": {"P_mean": density.mean, "P_std": density.std, "total_variation_distance": density.distance},
        "piecewise_density_over_log_snr": density_table,
        "boundaries": boundaries,
        "sentences": sentences,
    }
