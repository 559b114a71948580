"""One training run in one folder, which can be killed at any moment and continued.

run.json          settings, fingerprints of data and process, versions, status
curriculum.json   if there is one
losses.csv        step, samples, stage, task, nats_per_log_snr, loss: held-out, per task, averaged weights
curve.csv         step, samples, stage, train_loss, lr, nats, loss
probe.csv         if asked for, see `probing.py`
stages.csv        stage, start, end, reason, samples_per_task
coverage.csv      t, log_snr, samples, expected: how often each t was drawn, and how often its densities ask for
samples/          grids over training
denoiser.safetensors  the averaged weights at the end, for `difficulty probe`; not of a conditional network
text-encoder/     the text encoder, if it was trained for the run
network/          the file that the network is made from, if it is one of the user's own or of diffusers
checkpoints/      see `checkpoint.py`; the tables up to the step are part of the checkpoint
"""

__all__ = ["Cadence", "Tell", "restore", "silent", "train"]

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist

from difficulty.datasets import Dataset
from difficulty.denoiser import Denoiser
from difficulty.errors import InputError, first_line
from difficulty.large import DataLost
from difficulty.models import DENOISER_FILE, save_denoiser
from difficulty.network_file import fingerprint_network, fingerprint_weights, keep_network, network_of
from difficulty.networks import build_network
from difficulty.process import Process
from difficulty.process_file import write_process
from difficulty.ranking import RankingTask
from difficulty.records import (
    RUN_FORMAT,
    changed_settings,
    digest,
    finish_run,
    read_json,
    start_run,
    write_json,
    write_table,
)
from training.checkpoint import list_checkpoints, load_latest, save_checkpoint
from training.conditional import ConditionalNetwork, conditional_network, is_null_caption
from training.curriculum import Curriculum, recorded_process, tasks_of
from training.density import task_masses
from training.heldout import HeldOut, HeldOutLoss
from training.parallel import Sharded
from training.sampling import draw_samples
from training.text import TextTable
from training.timesteps import coverage_rows, stage_rows
from training.trainer import Diverged, Trainer, TrainPlan

RESUME = ("auto", "never")
FREE = ("cadence",)  # of a run's settings, those that a continued run may change: no draw and no weight depends on them
LOSS_COLUMNS = ("step", "samples", "stage", "task", "nats_per_log_snr", "loss")
CURVE_COLUMNS = ("step", "samples", "stage", "train_loss", "lr", "nats", "loss")
Watcher = Callable[[Trainer, float], None]
Shower = Callable[[torch.Tensor, Path], None]
Judged = Callable[[Trainer, HeldOutLoss], None]
Tell = Callable[[str], None]


def silent(message: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Cadence:
    """How often a run writes, in iterations; 0 for never. All of it happens after the last iteration too.

    Args:
        evaluate: held-out losses.
        checkpoint: checkpoints.
        sample: sample grids.
        keep: checkpoints that stay.
        grid: samples of a grid.
        watch: the averaged weights are brought up to date for ``watch`` where processes have parts of them.
    """

    evaluate: int = 100
    checkpoint: int = 200
    sample: int = 500
    keep: int = 3
    grid: int = 64
    watch: int = 0

    def __post_init__(self) -> None:
        if min(self.evaluate, self.checkpoint, self.sample, self.watch) < 0 or min(self.keep, self.grid) < 1:
            raise InputError("intervals between writes must not be negative, and keep and grid at least 1")


def train(
    data: Dataset,
    process: Process,
    plan: TrainPlan,
    out: Path,
    curriculum: Curriculum | None = None,
    *,
    text: TextTable | None = None,
    cadence: Cadence | None = None,
    resume: str = "auto",
    init_from: Path | None = None,
    device: str = "cpu",
    parallel: str = "ddp",
    watch: Watcher | None = None,
    tell: Tell = silent,
    show: Shower | None = None,
    judged: Judged | None = None,
) -> Trainer:
    """Train, or continue a run of the same settings in ``out``; run.json of a finished one stays as it is.

    How often a run writes may change when it is continued.

    Args:
        data, process, plan, curriculum: what to train; see ``Trainer``.
        out: folder of the run.
        text: the embedded captions of the data, if the plan's condition is text.
        cadence: how often to write.
        resume: ``auto`` continues what is there, ``never`` refuses a folder that holds a run.
        init_from: folder of a run of the same network whose trained weights, not their average, this one starts from.
        device: torch device.
        parallel: how several processes share the weights; see ``training.parallel``.
        watch: called with the trainer and the batch loss after every iteration.
        tell: called with sentences for the user.
        show: called with samples and a path to draw them to.
        judged: called with the trainer and its held-out losses after every evaluation.

    Raises:
        InputError: if the folder holds another run, ``init_from`` is of another network, the loss diverged
            (``Diverged``), or data are gone (``DataLost``): then the last good state is kept as a checkpoint.
    """
    cadence = cadence or Cadence()
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    trainer = Trainer(
        data, process, plan, curriculum, device=device, text=text, rank=rank, world=world, parallel=parallel
    )
    trainer.sampler.warn = silent if rank else lambda said: tell(f"warning: {said}")
    tasks = tasks_of(curriculum, process)
    heldout = HeldOut(data, process, tasks, conditioning=trainer.conditioning)
    source = _start_from(trainer, init_from, tell if rank == 0 else silent) if init_from else None
    run, state = _open_together(trainer, out, cadence, resume, source, len(heldout.t), tell)
    log: dict[str, list[list[float]]] = {"losses": [], "curve": []}
    if state is not None:
        log = state.pop("log")
        trainer.load_state_dict(state)
    if rank == 0:
        # By every start, also by one that follows a kill before this line.
        write_process(out, process)
        keep_network(plan.network, out)
    if curriculum and rank == 0:
        curriculum.save(out / "curriculum.json")
    if trainer.conditioning and rank == 0:
        trainer.conditioning.save(out)
    began, before = time.monotonic(), run.get("wall_seconds", 0.0)

    def wall_seconds() -> float:
        return round(before + time.monotonic() - began, 1)

    while trainer.done < plan.steps:
        try:
            loss = trainer.step()
        except (Diverged, DataLost) as error:
            # All processes see that the loss diverged; data may be lost to one alone, and saving needs all of them.
            trainer.sampler.take_back(trainer.done)
            if isinstance(error, Diverged) and not _sound(trainer, heldout):
                earlier = list_checkpoints(out / "checkpoints")
                good = f"{earlier[-1].name} in {out} is the last good state" if earlier else "there is no checkpoint"
                raise Diverged(f"{error}, its weights have grown too large; {good}; lower the learning rate") from None
            alone = world > 1 and isinstance(error, DataLost)
            state = None if alone else trainer.state_dict()
            if rank == 0 and state is not None:
                save_checkpoint(out / "checkpoints", state | {"log": log}, cadence.keep)
            kept = "the last checkpoint" if alone else f"checkpoint {trainer.done}"
            onward = f"; go on from it by --init-from {out} in a new folder" if isinstance(error, Diverged) else ""
            raise type(error)(f"{error}; the last good state is {kept} in {out}{onward}") from None
        trainer.report_heldout(heldout)
        last = trainer.done == plan.steps
        if cadence.watch and _now(cadence.watch, trainer.done, last):
            trainer.gather()
        if watch and rank == 0:
            watch(trainer, float(loss))
        if last:
            trainer.sampler.finish(trainer.done)
        evaluated, saved = (_now(every, trainer.done, last) for every in (cadence.evaluate, cadence.checkpoint))
        sampled = show is not None and _now(cadence.sample, trainer.done, last)
        if evaluated or sampled:
            trainer.gather()
        current = trainer.state_dict() if saved else {}
        if rank > 0:  # the first process writes
            continue
        if evaluated:
            measured = _log_heldout(trainer, heldout, float(loss), log)
            if judged:
                judged(trainer, measured)
            _write_tables(trainer, out, log, tasks)
        if show and sampled:
            wanted = trainer.conditioning.examples(cadence.grid) if trainer.conditioning else None
            drawn = draw_samples(trainer.ema, cadence.grid, data.shape, seed=plan.seed, condition=wanted, device=device)
            show(drawn, out / "samples" / f"step-{trainer.done:08d}.png")
        if saved:
            save_checkpoint(out / "checkpoints", current | {"log": log}, cadence.keep)
            # Not in the checkpoint, which is the same file in every run of these settings.
            write_json(out / "run.json", run | {"wall_seconds": wall_seconds()})
    if rank > 0:
        return trainer
    _write_tables(trainer, out, log, tasks)
    seen = np.sum([record.samples_per_t for record in trainer.sampler.log()], axis=0)
    likeliest = np.max([task_masses(base, tasks) for base in trainer.sampler.bases], axis=0)
    for task, mass in zip(tasks, likeliest.tolist(), strict=True):
        if not seen[task.t_first : task.t_last + 1].any():
            advice = "train longer"
            if mass * seen.sum() < 1:
                advice = f"its share of the density of t is {mass:.1g}, so choose a wider density"
            tell(f"warning: task {task.index} (t = {task.t_first}..{task.t_last}) was never trained; {advice}")
    if not isinstance(trainer.ema.network, ConditionalNetwork):
        save_denoiser(trainer.ema, out / DENOISER_FILE, plan.network, data.shape, run["config"].get("network_file"))
    if run["status"] != "finished":
        finish_run(out, run, wall_seconds=wall_seconds())
    return trainer


def _sound(trainer: Trainer, heldout: HeldOut) -> bool:
    """Whether the weights give a finite held-out loss; taken for granted of weights that processes have parts of."""
    return isinstance(trainer.parallel, Sharded) or bool(np.isfinite(heldout.evaluate(trainer.denoiser).loss))


def _now(every: int, done: int, last: bool) -> bool:
    return last or (every > 0 and done % every == 0)


def _start_from(trainer: Trainer, folder: Path, tell: Tell) -> dict[str, Any]:
    """Take over the trained weights of another run; returns which these are."""
    config, state = _last_state(folder, tell)
    plan = config["plan"]
    own_condition = trainer.conditioning.facts if trainer.conditioning else None
    for what, theirs, own in (
        ("network", plan["network"], trainer.plan.network),
        ("network file", config.get("network_file"), fingerprint_network(trainer.plan.network)),
        ("prediction", plan["prediction"], trainer.plan.prediction),
        ("shape of data", config["shape"], list(trainer.data.shape)),
        ("text encoder", *((told or {}).get("fingerprint") for told in (config["condition"], own_condition))),
    ):
        if theirs != own:
            raise InputError(f"the weights of {folder} are of {what} {theirs}, this run has {own}; give the same")
    # The null caption is that of this run's captions, which may be longer.
    null = {name: value for name, value in trainer.denoiser.network.state_dict().items() if is_null_caption(name)}
    trainer.load_weights(state["model"] | null, state["model"] | null)
    facts = {key: value for key, value in config.items() if key not in FREE}
    return {"config": digest(facts), "step": state["step"]}


def _open_together(
    trainer: Trainer, out: Path, cadence: Cadence, resume: str, source: dict[str, Any] | None, draws: int, tell: Tell
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """``_open`` by the first process; the others take over what it found, an error included, and read the same."""
    if trainer.world == 1:
        return _open(trainer, out, cadence, resume, source, draws, tell)
    found: list[Any] = [None, None, None]  # run, step of the checkpoint, error
    state = None
    if trainer.rank == 0:
        try:
            found[0], state = _open(trainer, out, cadence, resume, source, draws, tell)
            found[1] = None if state is None else state["step"]
        except InputError as error:
            found[2] = str(error)
    dist.broadcast_object_list(found)
    run, step, refused = found
    if refused is not None:
        raise InputError(refused)
    if trainer.rank > 0 and step is not None:  # a message of its size would lie on every GPU
        state, _ = load_latest(out / "checkpoints")
        if state is None or state["step"] != step:
            raise InputError(f"process {trainer.rank} does not find checkpoint {step} in {out}; share the folder")
    return run, state


def _open(
    trainer: Trainer, out: Path, cadence: Cadence, resume: str, source: dict[str, Any] | None, draws: int, tell: Tell
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    if resume not in RESUME:
        raise InputError(f"unknown resume {resume!r}; known are {', '.join(RESUME)}")
    curriculum = trainer.sampler.curriculum
    config = {
        "plan": asdict(trainer.plan),
        "network_file": fingerprint_network(trainer.plan.network),
        "initial_weights": fingerprint_weights(trainer.plan.network),
        "cadence": asdict(cadence),
        "init_from": source,
        "curriculum": curriculum.sha256 if curriculum else None,
        "data": trainer.data.fingerprint,
        "process": trainer.process.fingerprint,
        "shape": list(trainer.data.shape),
        "data_std": trainer.denoiser.data_std,
        "value_range": trainer.data.value_range,
        "latents": dict(trainer.data.latents) if trainer.data.latents else None,
        "condition": trainer.conditioning.facts if trainer.conditioning else None,
        "held_out_draws": draws,
    }
    if not (out / "run.json").exists():
        return start_run(out, "train", config), None
    found = read_json(out / "run.json")
    if not isinstance(found, dict) or found.get("kind") != "train":
        raise InputError(f"{out} holds the results of another command; choose another output folder")
    if resume == "never":
        raise InputError(f"{out} already holds a run; continue it with --resume auto or choose another folder")
    changed = changed_settings(found.get("config") or {}, config, FREE)
    if changed:
        raise InputError(
            f"{out} holds a run with other settings ({changed}); choose another folder or repeat its settings"
        )
    state, passed = load_latest(out / "checkpoints")
    for sentence in passed:
        tell(sentence)
    if state is None:
        if passed:
            tell(f"no whole checkpoint is left in {out}; starting anew")
        return start_run(out, "train", config, FREE), None
    tell(f"continuing {out} after step {state['step']}")
    if found.get("status") == "finished" and state["step"] == trainer.plan.steps:
        return found, state
    return start_run(out, "train", config, FREE) | {"wall_seconds": found.get("wall_seconds", 0.0)}, state


def _log_heldout(trainer: Trainer, heldout: HeldOut, loss: float, log: dict[str, list[list[float]]]) -> HeldOutLoss:
    measured = heldout.evaluate(trainer.ema)
    done, stage = trainer.done, trainer.sampler.stage
    samples, lr = done * trainer.plan.batch, trainer.lr_at(done - 1)
    log["curve"].append([done, samples, stage, loss, lr, measured.nats, measured.loss])
    pairs = zip(measured.nats_per_task.tolist(), measured.loss_per_task.tolist(), strict=True)
    log["losses"] += [[done, samples, stage, task, nats, own] for task, (nats, own) in enumerate(pairs)]
    return measured


def _write_tables(trainer: Trainer, out: Path, log: dict[str, list[list[float]]], tasks: list[RankingTask]) -> None:
    for name, columns in (("losses", LOSS_COLUMNS), ("curve", CURVE_COLUMNS)):
        write_table(out / f"{name}.csv", pd.DataFrame(log[name], columns=columns))
    write_table(out / "stages.csv", pd.DataFrame(stage_rows(trainer.sampler, tasks)))
    write_table(out / "coverage.csv", pd.DataFrame(coverage_rows(trainer.sampler, trainer.process)))


def restore(folder: Path, tell: Tell = silent) -> tuple[Denoiser, dict[str, Any]]:
    """The denoiser of a run with its averaged weights, from the last whole checkpoint, and the run's settings.

    Beside the settings stands ``step``, that of the checkpoint.

    Args:
        folder: of the run.
        tell: called with a sentence for every damaged checkpoint that was passed over.

    Raises:
        InputError: if the folder holds no run of this version, or no whole checkpoint, or its network can no longer be
            made.
    """
    config, state = _last_state(folder, tell)
    plan = config["plan"]
    spec = network_of(plan["network"], config.get("network_file"), folder)
    network = build_network(spec, tuple(config["shape"]), plan["seed"])
    if config["condition"]:
        network = conditional_network(network, config["condition"])
    try:
        network.load_state_dict(state["ema"])
    except RuntimeError as error:
        reason = first_line(error).rstrip(":")
        raise InputError(f"the weights of {folder} do not fit network {plan['network']!r} ({reason})") from None
    process = recorded_process(folder, config["process"], f"the run in {folder}")
    return Denoiser(network, process, plan["prediction"], config["data_std"]).eval(), config | {"step": state["step"]}


def _last_state(folder: Path, tell: Tell) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a run and its last whole checkpoint."""
    if not (folder / "run.json").exists():
        raise InputError(f"{folder} holds no run.json; give the --out folder of `training run`")
    run = read_json(folder / "run.json")
    if not isinstance(run, dict) or run.get("kind") != "train":
        raise InputError(f"{folder} holds the results of another command; give the --out folder of `training run`")
    config = run.get("config")
    if run.get("format") != RUN_FORMAT or not isinstance(config, dict):
        raise InputError(f"{folder / 'run.json'} is of another version or damaged; this version reads {RUN_FORMAT!r}")
    state, passed = load_latest(folder / "checkpoints")
    if state is None:
        reason = passed[0] if passed else "no checkpoint was written yet"
        raise InputError(f"{folder} cannot be used: {reason}")
    for sentence in passed:
        tell(sentence)
    return config, state
