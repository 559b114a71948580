"""Does it train better? Arms against plain training, with paired seeds, equal iterations, and intervals.

Arms of one seed share the initial weights, the data order, the noise, the uniform u behind every t, and the noise of
the sampler. One finished (arm, seed) is one file in ``runs``, so an interrupted comparison goes on where it stopped.

The folder holds run.json; comparison.csv (arm, seed, metric, value at the end); curves.csv (the held-out metrics over
training); tasks.csv (nats per task at the end) and task_bounds.csv (what the tasks are); stages.csv; effects.csv, see
`effects.py`; order.csv, the same for a curriculum against its exposure without order; speed.csv (iterations to the
baseline's final nats). Figures and the report are made from these.
"""

__all__ = ["compare", "run_arm"]

import hashlib
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from difficulty.datasets import Dataset
from difficulty.errors import InputError
from difficulty.process import Array, Process
from difficulty.ranking import Ranking, RankingTask
from difficulty.records import finish_run, read_json, read_run, start_run, write_bytes, write_json, write_table
from difficulty.tasks import make_tasks
from training.arms import ArmSpec, choose_arms
from training.curriculum import Curriculum, make_curriculum
from training.effects import EFFECT_COLUMNS, effects, iterations_to_baseline
from training.heldout import HeldOut
from training.metrics import SampleJudge, check_metrics
from training.sampling import draw_samples
from training.timesteps import stage_rows
from training.trainer import Diverged, Trainer, TrainPlan

# Added to the seeds of A/A arms: far from any seed that a user would give.
FRESH = 1_000_003
EVALUATIONS = 20
SAMPLES = 512
SHOWN = 64

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Setting:
    """What all arms of a comparison share."""

    data: Dataset
    process: Process
    tasks: list[RankingTask]
    plan: TrainPlan
    samples: int
    metrics: tuple[str, ...]

    @cached_property
    def heldout(self) -> HeldOut:
        """The fixed draws, made once in every worker."""
        return HeldOut(self.data, self.process, self.tasks)

    @cached_property
    def judge(self) -> SampleJudge:
        """The metrics of samples, with features fitted once in every worker."""
        return SampleJudge(self.data.train, self.metrics, self.data.value_range)


@dataclass(frozen=True)
class Job:
    """One arm with one seed; ``exposure`` replaces the density of t where the arm copies another's histogram."""

    arm: str
    spec: ArmSpec
    seed: int
    file: Path
    keep_samples: bool
    exposure: Array | None = None


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
    lr_schedule: str = "cosine",
    metrics: Sequence[str] = ("fd-pca", "sw-pixels"),
    samples: int = SAMPLES,
    confirms: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Train every arm with every seed and state the paired differences to the first arm.

    Args:
        data: what to train on.
        process: the forward process; must be that of the ranking and the curriculum.
        arms: names in ``training.arms.ARMS``, or specs by name of your own; the first is the baseline.
        ranking: from which a default curriculum is made if none is given.
        curriculum: for the arms that use one.
        seeds: of the paired runs; at least 2 for an interval.
        steps: iterations of every run.
        out: results folder; a folder of the same comparison is continued.
        network, prediction, batch, lr, lr_schedule: as in ``TrainPlan``.
        metrics: of samples, names in ``training.metrics.METRICS``; held-out nats and loss are always measured.
        samples: number of samples that are judged.
        confirms: folder of the comparison that explored; this one must repeat its setting on other seeds.
        workers: processes. More than one needs a script that guards its entry by ``if __name__ == "__main__"``.
        progress: called with (what, done, in all) after every run.

    Returns:
        The table of effects, as in effects.csv.

    Raises:
        InputError: if a name is unknown, an input does not fit, or the folder holds another comparison.
    """
    started = time.monotonic()
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise InputError(f"seeds must be different whole numbers from 0, got {list(seeds)}")
    if curriculum is None and ranking is not None:
        curriculum = make_curriculum(ranking, process=process)
    if curriculum is not None:
        curriculum.validate_for(process)
    specs = dict(arms) if isinstance(arms, Mapping) else choose_arms(arms, curriculum, process, steps)
    if len(specs) < 2:
        raise InputError("a comparison needs at least two arms, the first of which is the baseline")
    for name, spec in specs.items():
        if spec.exposure_of is not None and spec.exposure_of not in specs:
            raise InputError(f"arm {name!r} copies the histogram of {spec.exposure_of!r}; add that arm")
    plan = TrainPlan(steps=steps, batch=batch, network=network, prediction=prediction, lr=lr, lr_schedule=lr_schedule)
    tasks = curriculum.tasks if curriculum else [RankingTask.of(task, process) for task in make_tasks(process)]
    # Training happens on the grid; without its closed form a process can be sent to another Python process.
    setting = Setting(data, replace(process, closed_form=None), tasks, plan, samples, tuple(metrics))
    for spec in specs.values():  # whatever cannot be built is refused before anything is written
        Trainer(data, process, _plan_of(spec, plan, seeds[0]), spec.curriculum_for(seeds[0]))
    check_metrics(setting.metrics, ratios=True)
    run = _open(out, setting, specs, list(seeds), confirms)
    jobs = [
        Job(arm, spec, seed, _file(out, arm, seed), keep_samples=seed == seeds[0])
        for seed in seeds
        for arm, spec in specs.items()
    ]
    first = [job for job in jobs if job.spec.exposure_of is None]
    with _workers(setting, min(workers, sum(not job.file.exists() for job in jobs))) as run_jobs:
        _run_all(run_jobs, first, progress, 0, len(jobs))
        # The histogram of the arm that is copied is known only after its run.
        copies = [
            replace(job, exposure=np.array(read_json(_file(out, str(job.spec.exposure_of), job.seed))["exposure"]))
            for job in jobs
            if job.spec.exposure_of is not None
        ]
        _run_all(run_jobs, copies, progress, len(first), len(jobs))
    table = _write_tables(out, jobs, specs, tasks)
    finish_run(out, run, wall_seconds=round(time.monotonic() - started, 1))
    return table


def run_arm(setting: Setting, job: Job) -> dict[str, Any]:
    """Train one arm with one seed and judge it."""
    began = time.monotonic()
    plan = _plan_of(job.spec, setting.plan, job.seed)
    curriculum = job.spec.curriculum_for(job.seed)
    trainer = Trainer(setting.data, setting.process, plan, curriculum, base_density=job.exposure)
    heldout = setting.heldout
    at = {max(1, round(plan.steps * (i + 1) / EVALUATIONS)) for i in range(EVALUATIONS)}
    curve = []
    while trainer.done < plan.steps:
        try:
            trainer.step()
        except Diverged as error:
            raise InputError(f"arm {job.arm!r} with seed {job.seed}: {error}; finished runs are kept") from None
        trainer.report_heldout(heldout)
        if trainer.done in at:
            measured = heldout.evaluate(trainer.ema)
            curve.append({"step": trainer.done, "nats": measured.nats, "loss": measured.loss})
    trainer.sampler.finish(trainer.done)
    drawn = draw_samples(trainer.ema, setting.samples, setting.data.shape, seed=plan.seed)
    if job.keep_samples:
        from safetensors.torch import save

        write_bytes(job.file.with_suffix(".safetensors"), save({"data": drawn[:SHOWN].contiguous()}))
    return {
        "arm": job.arm,
        "seed": job.seed,
        "final": {"nats": measured.nats, "loss": measured.loss} | setting.judge(drawn),
        "curve": curve,
        "nats_per_task": measured.nats_per_task.tolist(),
        "stages": stage_rows(trainer.sampler, setting.tasks),
        "exposure": trainer.sampler.exposure().tolist(),
        "seconds": round(time.monotonic() - began, 2),
    }


def _plan_of(spec: ArmSpec, plan: TrainPlan, seed: int) -> TrainPlan:
    seed = seed + FRESH if spec.fresh_seeds else seed
    return replace(plan, seed=seed, density=spec.density, weight=spec.weight)


def _file(out: Path, arm: str, seed: int) -> Path:
    return out / "runs" / f"{arm}-seed{seed}.json"


def _open(
    out: Path, setting: Setting, specs: Mapping[str, ArmSpec], seeds: list[int], confirms: Path | None
) -> dict[str, Any]:
    """run.json of the comparison; a folder that holds another one is refused, the same one is continued."""
    config = {
        "arms": {name: _described(spec) for name, spec in specs.items()},
        "seeds": seeds,
        "plan": asdict(setting.plan),
        "samples": setting.samples,
        "metrics": list(setting.metrics),
        "tasks": [[task.t_first, task.t_last] for task in setting.tasks],
        "data": setting.data.fingerprint,
        "value_range": setting.data.value_range,
        "process": setting.process.fingerprint,
    }
    config = json.loads(json.dumps(config))
    config["confirms"] = _explored(confirms, config) if confirms else None
    if (out / "run.json").exists():
        found = read_json(out / "run.json")
        if not isinstance(found, dict) or found.get("kind") != "compare":
            raise InputError(f"{out} holds the results of another command; choose another output folder")
        if found.get("config") != config:
            raise InputError(f"{out} holds a comparison with other settings; choose another folder or repeat them")
    return start_run(out, "compare", config)


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
    for name in ("data", "process", "plan", "samples", "metrics"):
        if explored[name] != config[name]:
            raise InputError(f"{folder} explored another {name}; a confirmation repeats the setting")
    for arm, spec in config["arms"].items():
        if explored["arms"].get(arm) != spec:
            raise InputError(f"{folder} did not explore arm {arm!r} as it is here")
    return hashlib.sha256((folder / "run.json").read_bytes()).hexdigest()


def _described(spec: ArmSpec) -> dict[str, Any]:
    described = {name: value for name, value in vars(spec).items() if name != "curriculum"}
    return described | {"curriculum": spec.curriculum.sha256 if spec.curriculum else None}


Run = Callable[[Sequence[Job]], Iterator[tuple[Job, dict[str, Any]]]]


def _run_all(run: Run, jobs: Sequence[Job], progress: Progress | None, before: int, total: int) -> None:
    """Run the jobs that have no file yet, and write the file of each."""
    pending = [job for job in jobs if not job.file.exists()]
    done = before + len(jobs) - len(pending)
    for job, result in run(pending):
        write_json(job.file, result)
        done += 1
        if progress:
            progress(f"{job.arm} seed {job.seed}", done, total)


@contextmanager
def _workers(setting: Setting, count: int) -> Iterator[Run]:
    """A function that runs jobs, here or in worker processes; arms are small networks and get one thread each."""
    if count <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with threadpool_limits(1):
                yield lambda jobs: ((job, run_arm(setting, job)) for job in jobs)
        finally:
            torch.set_num_threads(threads)
        return
    # Spawned, not forked: a fork would inherit torch's thread pools in an unknown state. The setting is pickled once,
    # by plain pickle, because torch's own would pass tensors through shared memory, which containers keep small.
    pool = ProcessPoolExecutor(count, get_context("spawn"), _begin_worker, (pickle.dumps(setting),))

    def run(jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        futures = {pool.submit(_work, pickle.dumps(job)): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield run
    except BrokenProcessPool:
        raise InputError(
            "a worker process died, perhaps for lack of memory; finished runs are kept, repeat with one worker"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_setting: Setting | None = None  # of this worker process, set once when it starts


def _begin_worker(setting: bytes) -> None:
    global _setting
    # Ctrl-C reaches the workers too; they end without a word and leave the sentence to the parent.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    threadpool_limits(1)
    _setting = pickle.loads(setting)


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers, which would wait for it forever."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(job: bytes) -> dict[str, Any]:
    assert _setting is not None
    return run_arm(_setting, pickle.loads(job))


def _order_effects(final: pd.DataFrame, specs: Mapping[str, ArmSpec]) -> pd.DataFrame:
    """Effects of the arms whose exposure another arm copies, against that arm: what their order alone does."""
    tables = [
        effects(final[final["arm"].isin([name, spec.exposure_of])], baseline=name)
        for name, spec in specs.items()
        if spec.exposure_of is not None
    ]
    return pd.concat(tables) if tables else pd.DataFrame(columns=list(EFFECT_COLUMNS))


def _write_tables(
    out: Path, jobs: Sequence[Job], specs: Mapping[str, ArmSpec], bounds: Sequence[RankingTask]
) -> pd.DataFrame:
    """All CSV files from the files of the runs; returns the effects."""
    results = [read_json(job.file) for job in jobs]
    key = [(result["arm"], result["seed"]) for result in results]
    final = pd.DataFrame(
        [(*k, name, value) for k, r in zip(key, results, strict=True) for name, value in r["final"].items()],
        columns=["arm", "seed", "metric", "value"],
    )
    curves = pd.DataFrame(
        [
            (*k, point["step"], name, point[name])
            for k, r in zip(key, results, strict=True)
            for point in r["curve"]
            for name in ("nats", "loss")
        ],
        columns=["arm", "seed", "step", "metric", "value"],
    )
    tasks = pd.DataFrame(
        [(*k, task, value) for k, r in zip(key, results, strict=True) for task, value in enumerate(r["nats_per_task"])],
        columns=["arm", "seed", "task", "nats_per_log_snr"],
    )
    stages = pd.DataFrame(
        [{"arm": k[0], "seed": k[1]} | row for k, r in zip(key, results, strict=True) for row in r["stages"]]
    )
    baseline = next(iter(specs))
    again = [name for name, spec in specs.items() if spec.fresh_seeds]
    table = effects(final, baseline, again)
    for name, frame in (
        ("comparison", final),
        ("curves", curves),
        ("tasks", tasks),
        ("task_bounds", pd.DataFrame([bound.model_dump() for bound in bounds]).rename(columns={"index": "task"})),
        ("stages", stages),
        ("effects", table),
        ("order", _order_effects(final, specs)),
        ("speed", iterations_to_baseline(curves, baseline, "nats")),
    ):
        write_table(out / f"{name}.csv", frame)
    return table
