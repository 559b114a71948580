"""Does it train better? Arms against plain training, with paired seeds, equal iterations, and intervals.

Arms of one seed share the initial weights, the data order, the noise, the uniform u behind every t, and the noise of
the sampler. One finished run (arm, seed, learning-rate schedule) is one file in ``runs``, so an interrupted comparison
goes on where it stopped. Every table has the column ``lr_schedule``; effects are those within a schedule.

The folder holds run.json; comparison.csv (arm, seed, metric, value at the end); curves.csv (the held-out metrics over
training); tasks.csv (nats per task at the end), task_curves.csv (their difference to the baseline over training) and
task_bounds.csv (what the tasks are); stages.csv; exposure.csv (share of the samples per interval of t); effects.csv,
see `effects.py`; order.csv, the same for a curriculum against its exposure without order; speed.csv (iterations to the
baseline's final nats). Figures and the report are made from these.
"""

__all__ = ["compare"]

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from difficulty.datasets import Dataset
from difficulty.errors import InputError, choose
from difficulty.network_file import fingerprint_network, fingerprint_weights
from difficulty.process import Array, Process
from difficulty.ranking import Ranking, RankingTask
from difficulty.records import (
    changed_settings,
    digest,
    finish_run,
    read_json,
    read_run,
    start_run,
    write_json,
    write_table,
)
from training.arms import ArmSpec, choose_arms
from training.curriculum import Curriculum, tasks_of
from training.curriculum_builders import make_curriculum
from training.effects import (
    EFFECT_COLUMNS,
    arms_again,
    arms_without_order,
    effects,
    iterations_to_baseline,
    paired_intervals,
)
from training.jobs import HELD_OUT, Job, Setting, group_jobs, run_file
from training.metrics import check_enough, check_metrics
from training.plan import LR_SCHEDULES, TrainPlan
from training.workers import GroupRunner, worker_processes

SAMPLES = 512
EXPOSURE_BINS = 50
FREE = ("device",)  # of a comparison's settings, those that a continued one may change
OF_A_RUN = ("seed", "density", "weight", "lr_schedule")  # what the plans of a comparison do not share

Progress = Callable[[str, int, int], None]


def compare(
    data: Dataset,
    process: Process,
    arms: Mapping[str, ArmSpec] | Sequence[str],
    *,
    ranking: Ranking | None = None,
    curriculum: Curriculum | None = None,
    seeds: Sequence[int],
    steps: int,
    out: Path,
    network: str = "mlp",
    prediction: str = "eps",
    batch: int = 128,
    lr: float = 1e-3,
    lr_schedules: Sequence[str] = ("cosine",),
    metrics: Sequence[str] = ("fd-pca", "sw-pixels"),
    samples: int = SAMPLES,
    confirms: Path | None = None,
    device: str = "cpu",
    workers: int = 1,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Train every arm with every seed and state the paired differences to the first arm.

    Args:
        data: what to train on.
        process: the forward process; must be that of the ranking and the curriculum.
        arms: names as ``choose_arms`` reads them, or specs by name of your own; the first is the baseline.
        ranking: for the arms that need measured difficulty, and for a default curriculum if none is given.
        curriculum: for the arms that use one.
        seeds: of the paired runs; at least 2 for an interval.
        steps: iterations of every run.
        out: results folder; a folder of the same comparison is continued.
        network, prediction, batch, lr: as in ``TrainPlan``.
        lr_schedules: every arm is trained with every seed under each of these.
        metrics: of samples, names in ``training.metrics.METRICS``; held-out nats and loss are always measured.
        samples: number of samples that are judged.
        confirms: folder of the comparison that explored; this one must repeat its setting on other seeds.
        device: torch device of the runs; a comparison may go on on another, equal up to rounding.
        workers: processes, all of which use that device. More than one needs a script that guards its entry by
            ``if __name__ == "__main__"``.
        progress: called with (what, done, in all) whenever runs are finished.

    Returns:
        The table of effects, as in effects.csv.

    Raises:
        InputError: if a name is unknown, an input does not fit, or the folder holds another comparison.
    """
    started = time.monotonic()
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        found = list(seeds) or "none"
        raise InputError(f"seeds must be one or more different whole numbers from 0, got {found}")
    if workers < 1:
        raise InputError(f"the number of worker processes must be at least 1, got {workers}")
    if curriculum is None and ranking is not None:
        curriculum = make_curriculum(ranking, process=process)
    if curriculum is not None:
        curriculum.validate_for(process)
    specs = dict(arms) if isinstance(arms, Mapping) else choose_arms(arms, curriculum, process, steps, ranking)
    if len(specs) < 2:
        raise InputError("a comparison needs at least two arms, the first of which is the baseline")
    for name, spec in specs.items():
        if spec.exposure_of is not None and spec.exposure_of not in specs:
            raise InputError(f"arm {name!r} copies the histogram of {spec.exposure_of!r}; add that arm")
    holder: dict[Path, str] = {}
    for name in specs:
        file = run_file(out, name, seeds[0], "any")
        if file in holder:
            raise InputError(f"arms {holder[file]!r} and {name!r} would share one file of runs; rename one of them")
        holder[file] = name
    schedules = list(dict.fromkeys(lr_schedules))
    for schedule in schedules:
        choose("learning-rate schedule", schedule, LR_SCHEDULES)
    if not schedules:
        raise InputError(f"no learning-rate schedule is asked for; known are {', '.join(LR_SCHEDULES)}")
    plan = TrainPlan(steps=steps, batch=batch, network=network, prediction=prediction, lr=lr, lr_schedule=schedules[0])
    tasks = tasks_of(curriculum, process)
    # Training happens on the grid; without its closed form a process can be sent to another Python process.
    setting = Setting(data, replace(process, closed_form=None), tasks, plan, samples, tuple(metrics), device)
    for spec in specs.values():  # whatever cannot be built is refused before anything is written
        setting.trainer(spec, seeds[0], schedules[0])
    check_metrics(setting.metrics, ratios=True)
    check_enough("data", len(data.train))
    check_enough("samples", samples)
    run, before = _open(out, setting, specs, list(seeds), schedules, confirms)
    jobs = [
        Job(arm, spec, seed, schedule, run_file(out, arm, seed, schedule), keep_samples=seed == seeds[0])
        for schedule in schedules
        for seed in seeds
        for arm, spec in specs.items()
    ]
    first = [job for job in jobs if job.spec.exposure_of is None]
    with worker_processes(setting, out / "partial", min(workers, sum(not job.file.exists() for job in jobs))) as runner:
        _run_all(runner, setting, first, workers, progress, 0, len(jobs))
        # The histogram of the arm that is copied is known only after its run.
        copies = [replace(job, exposure=_exposure_of(job, out)) for job in jobs if job.spec.exposure_of is not None]
        _run_all(runner, setting, copies, workers, progress, len(first), len(jobs))
    shutil.rmtree(out / "partial", ignore_errors=True)
    table = _write_tables(out, jobs, specs, tasks)
    finish_run(out, run, wall_seconds=round(before + time.monotonic() - started, 1))
    return table


def _exposure_of(job: Job, out: Path) -> Array:
    """Histogram of t, shape (T+1,), of the finished run that a job copies."""
    copied = run_file(out, str(job.spec.exposure_of), job.seed, job.lr_schedule)
    return np.array(_read_run_file(copied)["exposure"])


def _read_run_file(path: Path) -> dict[str, Any]:
    """What ``run_group`` found of one run.

    Raises:
        InputError: if the file holds something else.
    """
    found = read_json(path)
    wanted = ("arm", "seed", "lr_schedule", "final", "curve", "stages", "exposure")
    if not isinstance(found, dict) or any(name not in found for name in wanted):
        raise InputError(f"{path} is not the file of a finished run; delete it and repeat the command")
    return found


def _open(
    out: Path,
    setting: Setting,
    specs: Mapping[str, ArmSpec],
    seeds: list[int],
    schedules: list[str],
    confirms: Path | None,
) -> tuple[dict[str, Any], float]:
    """run.json of the comparison and the seconds spent on it; a folder of another one is refused, the same continued.
    """
    config = {
        "arms": {name: _described(spec) for name, spec in specs.items()},
        "baseline": next(iter(specs)),
        "seeds": seeds,
        "lr_schedules": schedules,
        "plan": {name: value for name, value in asdict(setting.plan).items() if name not in OF_A_RUN},
        "network_file": fingerprint_network(setting.plan.network),
        "initial_weights": fingerprint_weights(setting.plan.network),
        "samples": setting.samples,
        "metrics": list(setting.metrics),
        "tasks": [[task.t_first, task.t_last] for task in setting.tasks],
        "held_out_draws": len(setting.heldout.t),
        "data": setting.data.fingerprint,
        "value_range": setting.data.value_range,
        "process": setting.process.fingerprint,
        "device": setting.device,
    }
    config = json.loads(json.dumps(config))
    config["confirms"] = _explored(confirms, config) if confirms else None
    before = 0.0
    if (out / "run.json").exists():
        found = read_json(out / "run.json")
        if not isinstance(found, dict) or found.get("kind") != "compare":
            raise InputError(f"{out} holds the results of another command; choose another output folder")
        changed = changed_settings(found.get("config") or {}, config, FREE)
        if changed:
            raise InputError(
                f"{out} holds a comparison with other settings ({changed}); choose another folder or repeat them"
            )
        before = float(found.get("wall_seconds") or 0.0)
    return start_run(out, "compare", config, FREE), before


def _explored(folder: Path, config: dict[str, Any]) -> str:
    """Identity of the exploration that a comparison confirms.

    Args:
        folder: of the exploration.
        config: of the confirmation.

    Raises:
        InputError: if the exploration is unfinished, shares a seed, or had another data set, process or plan.
    """
    explored = read_run(folder, "compare")["config"]
    shared = sorted(set(explored["seeds"]) & set(config["seeds"]))
    if shared:
        raise InputError(f"seed {shared[0]} was explored in {folder}; confirm on seeds that it did not use")
    alike = ("data", "process", "plan", "network_file", "initial_weights", "samples", "metrics", "baseline")
    for name in (*alike, "held_out_draws"):
        if explored.get(name) != config[name]:
            raise InputError(f"{folder} explored another {name}; a confirmation repeats the setting")
    # An arm or a learning-rate schedule that was not explored was not chosen by looking, and is judged all the same.
    for arm, spec in config["arms"].items():
        if explored["arms"].get(arm, spec) != spec:
            raise InputError(f"{folder} explored another arm {arm!r}; a confirmation repeats what was explored")
    return digest({name: value for name, value in explored.items() if name not in FREE})


def _described(spec: ArmSpec) -> dict[str, Any]:
    described = {name: value for name, value in vars(spec).items() if name != "curriculum"}
    return described | {"curriculum": spec.curriculum.sha256 if spec.curriculum else None}


def _run_all(
    runner: GroupRunner,
    setting: Setting,
    jobs: Sequence[Job],
    workers: int,
    progress: Progress | None,
    before: int,
    total: int,
) -> None:
    """Run the jobs that have no file yet, and write the file of each."""
    pending = [job for job in jobs if not job.file.exists()]
    done = before + len(jobs) - len(pending)
    if progress and pending:  # the first group may take a minute
        progress(pending[0].label, done, total)
    for group, results in runner(group_jobs(setting, pending, workers)):
        for job, result in zip(group, results, strict=True):
            write_json(job.file, result)
        done += len(group)
        if progress:
            progress(group[-1].label, done, total)


def _order_effects(final: pd.DataFrame, arms: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Effects of the arms whose exposure another arm copies, against that arm: what their order alone does.

    Every pair is a question, and a family of p values, of its own.
    """
    tables = [
        effects(final[final["arm"].isin([arm, copy])], baseline=copy) for arm, copy in arms_without_order(arms).items()
    ]
    return pd.concat(tables) if tables else pd.DataFrame(columns=list(EFFECT_COLUMNS))


def _exposure(runs: pd.DataFrame, T: int) -> pd.DataFrame:
    """Share of the samples in equal intervals of t, mean over the seeds; columns t_first, t_last, share."""
    edges = np.unique(np.linspace(0, T, EXPOSURE_BINS + 1).round().astype(int))
    intervals = [(a + 1, b) for a, b in pairwise(edges.tolist())]
    rows = []
    for (arm, schedule), own in runs.groupby(["arm", "lr_schedule"], sort=False):
        mean = np.mean(own["exposure"].tolist(), axis=0)
        rows += [(arm, schedule, first, last, mean[first : last + 1].sum()) for first, last in intervals]
    return pd.DataFrame(rows, columns=["arm", "lr_schedule", "t_first", "t_last", "share"])


def _task_curves(points: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Paired difference of nats per unit log-SNR to the baseline, per task and evaluation, with its interval."""
    wide = points.pivot(index=["lr_schedule", "step", "task", "seed"], columns="arm", values="nats_per_log_snr")
    tables = []
    for arm in points["arm"].drop_duplicates():
        if arm == baseline:
            continue
        difference = (wide[arm] - wide[baseline]).unstack("seed")
        tables.append(paired_intervals(difference).reset_index().assign(arm=arm))
    columns = ["arm", "lr_schedule", "step", "task", "difference", "ci_low", "ci_high"]
    return pd.concat(tables)[columns].round(6)


def _write_tables(
    out: Path, jobs: Sequence[Job], specs: Mapping[str, ArmSpec], bounds: Sequence[RankingTask]
) -> pd.DataFrame:
    """All CSV files from the files of the runs; returns the effects."""
    runs = pd.DataFrame([_read_run_file(job.file) for job in jobs])
    key = ["arm", "lr_schedule", "seed"]
    final = pd.DataFrame(
        [(*k, name, value) for *k, found in runs[[*key, "final"]].to_numpy() for name, value in found.items()],
        columns=[*key, "metric", "value"],
    )
    points = [(*k, point) for *k, curve in runs[[*key, "curve"]].to_numpy() for point in curve]
    curves = pd.DataFrame(
        [(*k, point["step"], name, point[name]) for *k, point in points for name in HELD_OUT if name in point],
        columns=[*key, "step", "metric", "value"],
    )
    per_task = pd.DataFrame(
        [(*k, point["step"], task, v) for *k, point in points for task, v in enumerate(point["nats_per_task"])],
        columns=[*key, "step", "task", "nats_per_log_snr"],
    )
    stages = pd.DataFrame(
        [dict(zip(key, k, strict=True)) | row for *k, rows in runs[[*key, "stages"]].to_numpy() for row in rows]
    )
    baseline = next(iter(specs))
    arms = {name: _described(spec) for name, spec in specs.items()}
    table = effects(final, baseline, arms_again(arms))
    for name, frame in (
        ("comparison", final),
        ("curves", curves),
        ("tasks", per_task[per_task["step"] == per_task["step"].max()].drop(columns="step")),
        ("task_curves", _task_curves(per_task, baseline)),
        ("task_bounds", pd.DataFrame([bound.model_dump() for bound in bounds]).rename(columns={"index": "task"})),
        ("stages", stages),
        ("exposure", _exposure(runs, bounds[-1].t_last)),
        ("effects", table),
        ("order", _order_effects(final, arms)),
        ("speed", iterations_to_baseline(curves, baseline, "nats")),
    ):
        write_table(out / f"{name}.csv", frame)
    return table
