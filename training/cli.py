"""Command line ``training``: every subcommand calls one public function and prints what it found."""

__all__ = ["main"]

import atexit
import json as jsonlib
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from difficulty.commandline import run_cli
from difficulty.datasets import load_dataset
from difficulty.errors import InputError
from difficulty.process import Process, get_process
from difficulty.ranking import Ranking
from difficulty.records import write_bytes, write_json
from training.compare import compare as compare_arms
from training.conditional import accuracy
from training.curriculum import Curriculum, known_process, make_curriculum
from training.heldout import HeldOut
from training.metrics import SampleJudge
from training.plots import draw_folder, save_grid
from training.report import percent, write_report
from training.run import Cadence, restore, train
from training.sampling import draw_samples
from training.trainer import Trainer, TrainPlan

Text = Annotated[str, tyro.conf.Positional]
File = Annotated[Path, tyro.conf.Positional]


def cluster(
    folder: File,
    method: str = "kmeans",
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 5,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("curriculum.json"),
    measure: str | None = None,
    order: str = "easy-to-hard",
    seed: int = 0,
    accumulate: bool = True,
    pacing: str = "fraction",
    pacing_options: tuple[str, ...] = (),
    density: str = "uniform",
    json: bool = False,
) -> None:
    """Group the tasks of a ranking into clusters and write a curriculum.

    Example: training cluster results/digits --method kmeans -k 5 -o curriculum.json

    Args:
        folder: Results folder with ranking.json, or that file.
        method: kmeans, quantile, mass, uniform or contiguous group the tasks; snr and log-snr cut the timesteps anew by
            noise level, as in the paper.
        k: Number of clusters.
        output: File to write.
        measure: Measure of the ranking that decides; noise-level for noisier is easier. Default: excess_nats if there.
        order: easy-to-hard, hard-to-easy or random.
        seed: Of the random order.
        accumulate: Whether clusters stay in training once they joined.
        pacing: Rule that ends a stage: fraction, patience, patience-smoothed, patience-kept or held-out.
        pacing_options: Options of the rule as name=value, such as share=0.2 or tau=200.
        density: Base density of t: uniform, log-snr, log-normal:mean=-1.2,std=1.2, logit-normal, cosine-map, or
            measured:power=1,uniform_share=0.5, partly proportional to the measure.
        json: Print the curriculum as JSON.
    """
    ranking = Ranking.load(folder)
    curriculum = make_curriculum(
        ranking,
        method=method,
        k=k,
        measure=measure,
        order=order,
        seed=seed,
        accumulate=accumulate,
        pacing=pacing,
        pacing_options=_options(pacing_options),
        base_density=density,
    )
    curriculum.save(output)
    if json:
        print(jsonlib.dumps(curriculum.model_dump()))
        return
    print(f"{output}: {k} clusters by {method} of {curriculum.provenance['measure']}, {order}")
    _describe(curriculum)


def validate(curriculum: File, process: str | None = None, json: bool = False) -> int:
    """Check a curriculum.json; exit code 2 and one sentence if it is not valid.

    Example: training validate curriculum.json --process vp-linear

    Args:
        curriculum: The file.
        process: Process that it must have been made for, by name; default: the one that it names, if built in.
        json: Print the verdict as JSON.
    """
    loaded = Curriculum.load(curriculum)
    chosen = get_process(process) if process else known_process(loaded.process, str(curriculum))
    loaded.validate_for(chosen, str(curriculum))
    if json:
        print(jsonlib.dumps({"valid": True, "sha256": loaded.sha256, "stages": loaded.stages()}))
        return 0
    print(f"{curriculum} is valid for process {chosen.name!r} with T = {chosen.T}")
    _describe(loaded)
    return 0


def run(
    data: Text,
    out: Path,
    curriculum: str = "none",
    process: str | None = None,
    steps: int = 2000,
    batch: int = 128,
    micro_batches: int = 1,
    precision: str = "fp32",
    network: str = "mlp",
    prediction: str = "eps",
    weight: str = "constant",
    density: str | None = None,
    stratified: bool = False,
    lr: float = 1e-3,
    lr_schedule: str = "cosine",
    warmup: int = 50,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    ema_decay: float = 0.9999,
    conditional: bool = False,
    label_dropout: float = 0.1,
    seed: int = 0,
    evaluate_every: int = 100,
    checkpoint_every: int = 200,
    sample_every: int = 500,
    keep: int = 3,
    resume: Literal["auto", "never"] = "auto",
    device: str = "auto",
    json: bool = False,
) -> None:
    """Train a denoiser, with a curriculum or without; the same command continues a run that was stopped.

    Example: training run digits --curriculum curriculum.json --out runs/digits --steps 2000
    On several devices: torchrun --nproc-per-node 4 -m training run ...

    Args:
        data: Built-in data set, array file, or folder of images.
        out: Folder of the run.
        curriculum: A curriculum.json, or none.
        process: Forward process by name; default: that of the curriculum, or vp-linear.
        steps: Iterations.
        batch: Samples per iteration, over all processes together.
        micro_batches: Parts into which each process cuts its samples to save memory.
        precision: fp32, or bf16 for the forward and backward pass.
        network: mlp, unet or dit, with options as in mlp:width=256.
        prediction: What the network predicts: eps, x0, v, score, velocity or edm.
        weight: Loss weight, such as constant, min-snr:gamma=5 or p2.
        density: Base density of t in place of the curriculum's.
        stratified: Spread the timesteps of a batch evenly.
        lr: Peak learning rate.
        lr_schedule: Its course after the warm-up: constant, cosine or linear.
        warmup: Iterations of linear warm-up.
        weight_decay: Of AdamW.
        clip: Greatest norm of the gradient, 0 for none.
        ema_decay: Greatest decay of the averaged weights.
        conditional: Tell the network the class of each sample.
        label_dropout: How often it is not told, which makes guidance possible.
        seed: Of weights, batches, noise and timesteps.
        evaluate_every: Iterations between held-out losses, 0 for the end only.
        checkpoint_every: Iterations between checkpoints, 0 for the end only.
        sample_every: Iterations between sample grids, 0 for the end only.
        keep: Checkpoints that stay.
        resume: auto continues a run of the same settings in the folder, never refuses one.
        device: cpu, cuda, or auto.
        json: Print the final losses as JSON.
    """
    rank, where = _join_processes(device)
    dataset = load_dataset(data)
    chosen = None if curriculum == "none" else Curriculum.load(curriculum)
    forward = _process(process, chosen, curriculum)
    plan = TrainPlan(
        steps=steps,
        batch=batch,
        micro_batches=micro_batches,
        precision=precision,
        network=network,
        prediction=prediction,
        weight=weight,
        density=density,
        stratified=stratified,
        lr=lr,
        lr_schedule=lr_schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        ema_decay=ema_decay,
        conditional=conditional,
        label_dropout=label_dropout,
        seed=seed,
    )
    cadence = Cadence(evaluate=evaluate_every, checkpoint=checkpoint_every, sample=sample_every, keep=keep)
    bar = tqdm(total=steps, desc="training", mininterval=0.5, file=sys.stderr, disable=json or rank > 0 or None)

    def watch(trainer: Trainer, loss: float) -> None:
        bar.update(trainer.done - bar.n)
        if trainer.done % 50 == 0:
            bar.set_postfix_str(
                f"stage {trainer.sampler.stage + 1}/{trainer.sampler.stages}, loss {loss:.4f}", refresh=False
            )

    trainer = train(
        dataset,
        forward,
        plan,
        out,
        chosen,
        cadence=cadence,
        resume=resume,
        device=where,
        watch=watch,
        tell=lambda message: tqdm.write(message, file=sys.stderr),
        show=lambda samples, path: save_grid(samples, path, dataset.value_range),
    )
    bar.close()
    if rank > 0:
        return
    write_bytes(out / "command.txt", (shlex.join(["training", *sys.argv[1:]]) + "\n").encode())
    figures = draw_folder(out)
    tasks = HeldOut(dataset, forward, _tasks(chosen, forward))
    measured = tasks.evaluate(trainer.ema)
    if json:
        print(jsonlib.dumps({"out": str(out), "steps": trainer.done, "nats": measured.nats, "loss": measured.loss}))
        return
    print(f"{out}: {trainer.done} iterations, held-out nats {measured.nats:.2f}, loss {measured.loss:.5f}")
    for record in trainer.sampler.log():
        print(f"  stage {record.stage + 1}: iterations {record.start} to {record.end}, {record.reason}")
    print(f"  figures: {', '.join(str(path) for path in figures if path.suffix == '.png')}")


def compare(
    data: Text,
    out: Path,
    arms: tuple[str, ...] = ("vanilla", "vanilla-again", "curriculum", "anti", "random", "static"),
    ranking: Path | None = None,
    curriculum: Path | None = None,
    process: str | None = None,
    seeds: int = 5,
    first_seed: int = 0,
    budget: int = 2000,
    network: str = "mlp",
    prediction: str = "eps",
    batch: int = 128,
    lr: float = 1e-3,
    lr_schedule: str = "cosine",
    metrics: tuple[str, ...] = ("fd-pca", "sw-pixels"),
    samples: int = 512,
    confirms: Path | None = None,
    workers: int = 0,
    json: bool = False,
) -> None:
    """Train arms with paired seeds and state the differences with intervals; the same command continues.

    Example: training compare digits --ranking results/digits --arms vanilla curriculum anti --seeds 5 --out compared

    Args:
        data: Built-in data set, array file, or folder of images.
        out: Folder of the comparison.
        arms: What is compared, the first being the baseline: vanilla, vanilla-again, curriculum, anti, random,
            non-accumulating, first-then-all, static, paper, log-snr, logit-normal, log-normal, min-snr, p2,
            curriculum+min-snr, curriculum+p2.
        ranking: Results folder with ranking.json, from which a default curriculum is made.
        curriculum: A curriculum.json for the arms that need one.
        process: Forward process by name; default: that of the curriculum or the ranking, or vp-linear.
        seeds: Paired seeds per arm.
        first_seed: The first of them; confirm on seeds that were not explored.
        budget: Iterations of every run.
        network: mlp, unet or dit, with options as in mlp:width=256.
        prediction: What the network predicts.
        batch: Samples per iteration.
        lr: Peak learning rate.
        lr_schedule: constant, cosine or linear.
        metrics: Of the samples: fd-pca, fd-pixels, sw-pixels, sw-pca.
        samples: Samples that are judged.
        confirms: Folder of the exploration that this comparison repeats on other seeds; without it nothing is claimed.
        workers: Processes, 0 for one per core.
        json: Print the effects as JSON.
    """
    dataset = load_dataset(data)
    ranked = Ranking.load(ranking) if ranking else None
    chosen = Curriculum.load(curriculum) if curriculum else None
    if process is None and chosen is None and ranked is not None:
        forward = known_process(ranked.process, str(ranking))
    else:
        forward = _process(process, chosen, str(curriculum))
    bar = tqdm(desc="comparing", mininterval=0.5, file=sys.stderr, disable=json or None)

    def progress(what: str, done: int, total: int) -> None:
        bar.total = total
        bar.set_postfix_str(what, refresh=False)
        bar.update(done - bar.n)

    table = compare_arms(
        dataset,
        forward,
        list(dict.fromkeys(arms)),
        ranking=ranked,
        curriculum=chosen,
        seeds=range(first_seed, first_seed + seeds),
        steps=budget,
        out=out,
        network=network,
        prediction=prediction,
        batch=batch,
        lr=lr,
        lr_schedule=lr_schedule,
        metrics=metrics,
        samples=samples,
        confirms=confirms,
        workers=workers or _cores(),
        progress=progress,
    )
    bar.close()
    figures = draw_folder(out)
    report = write_report(out)[0]
    if json:
        print(table.to_json(orient="records"))
        return
    print(f"{out}: change against {next(iter(dict.fromkeys(arms)))} over {seeds} paired seeds (negative is better)")
    for row in table.to_dict("records"):
        low, middle, high = (percent(row[name]) for name in ("ci_low", "log_ratio", "ci_high"))
        print(f"  {row['arm']:18} {row['metric']:10} {middle} [{low}, {high}]  {row['verdict']}")
    print(f"  report: {report}")
    print(f"  figures: {', '.join(str(path) for path in figures if path.suffix == '.png')}")


def sample(
    folder: File,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    count: int = 64,
    method: str = "ddim",
    steps: int = 50,
    labels: tuple[int, ...] = (),
    guidance: float = 1.0,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Draw samples of a run with its averaged weights, as an array file and a picture.

    Example: training sample runs/digits --count 64 --method heun

    Args:
        folder: Folder of `training run`.
        output: Array file .npz; a .png of the same name is drawn beside it. Default: samples.npz in the folder.
        count: Samples.
        method: Sampler: ddim, heun or ancestral.
        steps: Steps of the sampler.
        labels: Wanted classes of a conditional run, repeated in turn; default: all of them.
        guidance: Classifier-free guidance; 1 is the conditional model itself.
        seed: Of the noise.
        device: cpu, cuda, or auto.
    """
    import io

    import numpy as np

    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    denoiser, config = restore(folder)
    where = _device(device)
    drawn = draw_samples(
        denoiser.to(where),
        count,
        tuple(config["shape"]),
        seed=seed,
        method=method,
        steps=steps,
        labels=_labels(labels, count, config["classes"]),
        guidance=guidance,
        device=where,
    )
    target = output or folder / "samples.npz"
    if target.suffix != ".npz":
        raise InputError(f"{target} should end in .npz")
    buffer = io.BytesIO()
    np.savez(buffer, data=drawn.numpy())
    write_bytes(target, buffer.getvalue())
    picture = target.with_suffix(".png")
    save_grid(drawn[:256], picture, tuple(config["value_range"]) if config["value_range"] else None)
    print(f"{count} samples in {target}, drawn in {picture}")


def evaluate(
    folder: File,
    data: Text,
    metrics: tuple[str, ...] = ("fd-pca", "fd-pixels", "sw-pixels"),
    samples: int = 1000,
    method: str = "ddim",
    steps: int = 50,
    guidance: float = 1.0,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Held-out nats per task and distances of samples from the data, of a run's averaged weights.

    Example: training evaluate runs/digits digits --json

    Args:
        folder: Folder of `training run`.
        data: The data set that the run was trained on.
        metrics: Of the samples; the name says the distance and the features.
        samples: Samples that are judged.
        method: Sampler: ddim, heun or ancestral.
        steps: Steps of the sampler.
        guidance: Of a conditional run, whose samples are also judged by a separate classifier.
        seed: Of the noise.
        json: Print everything as JSON, and write evaluation.json.
    """
    denoiser, config = restore(folder)
    dataset = load_dataset(data)
    if list(dataset.shape) != config["shape"]:
        raise InputError(f"{folder} was trained on samples of shape {config['shape']}, {data} has {dataset.shape}")
    chosen = Curriculum.load(folder / "curriculum.json") if config["curriculum"] else None
    tasks = _tasks(chosen, denoiser.process)
    measured = HeldOut(dataset, denoiser.process, tasks).evaluate(denoiser)
    judge = SampleJudge(dataset.train, metrics)
    labels = _labels((), samples, config["classes"])
    drawn = draw_samples(
        denoiser, samples, dataset.shape, seed=seed, method=method, steps=steps, labels=labels, guidance=guidance
    )
    found = judge(drawn)
    report: dict[str, Any] = {
        "nats": measured.nats,
        "loss": measured.loss,
        "nats_per_task": measured.nats_per_task.tolist(),
        "tasks": [[task.t_first, task.t_last] for task in tasks],
        "samples": samples,
        "metrics": found,
        "split_half": judge.split_half(),
    }
    if labels is not None:
        report["condition"] = accuracy(drawn, labels, dataset)
    write_json(folder / "evaluation.json", report)
    if json:
        print(jsonlib.dumps(report))
        return
    print(f"held-out nats {measured.nats:.3f}, loss {measured.loss:.6f}")
    for name, value in found.items():
        print(f"  {name:10} {value:.4f}   (between two halves of the data: {report['split_half'][name]:.4f})")
    if labels is not None:
        obeyed = report["condition"]
        print(
            f"  class obeyed by {obeyed['accuracy']:.1%} [{obeyed['ci_low']:.1%}, {obeyed['ci_high']:.1%}] of the "
            f"samples, judged by a classifier that is right on {obeyed['heldout']:.1%} of held-out data"
        )


def quickstart(
    data: Text,
    out: Path,
    process: str = "vp-linear",
    tasks: int = 20,
    expert_seeds: int = 3,
    expert_budget: int = 600,
    compare_seeds: int = 6,
    steps: int = 2000,
    network: str = "mlp",
    workers: int = 0,
) -> None:
    """The whole path in a few minutes: measure, rank, cluster, train in pairs, compare, figures, what was found.

    Example: training quickstart digits --out runs/quickstart-digits

    Args:
        data: Built-in data set, array file, or folder of images.
        out: Folder to write; an interrupted run goes on where it stopped.
        process: Forward process by name.
        tasks: Number of denoising tasks.
        expert_seeds: Experts per task.
        expert_budget: Iterations of an expert at which difficulty is read off.
        compare_seeds: Paired seeds of the comparison.
        steps: Iterations of every run of the comparison.
        network: mlp, unet or dit, with options as in mlp:width=256.
        workers: Processes of the comparison, 0 for one per core.
    """
    from difficulty.cli import StageBars
    from training.quickstart import QuickstartPlan
    from training.quickstart import quickstart as run_quickstart

    plan = QuickstartPlan(
        process=process,
        tasks=tasks,
        expert_seeds=expert_seeds,
        expert_budget=expert_budget,
        compare_seeds=compare_seeds,
        steps=steps,
        network=network,
        workers=workers or _cores(),
    )
    bars = StageBars()
    try:
        lines = run_quickstart(data, out, plan, progress=bars)
    finally:
        bars.close()
    print("\n".join(lines))


def plot(folder: File) -> None:
    """Draw the figures of a run or a comparison again from its CSV files.

    Example: training plot runs/digits

    Args:
        folder: Folder of `training run` or `training compare`.
    """
    for path in draw_folder(folder):
        print(path)


def _labels(wanted: tuple[int, ...], count: int, classes: int) -> torch.Tensor | None:
    """Labels of the samples to draw; None for a model that was trained without."""
    if not classes:
        if wanted:
            raise InputError("this run was trained without --conditional; it knows no labels")
        return None
    unknown = [label for label in wanted if not 0 <= label < classes]
    if unknown:
        raise InputError(f"label {unknown[0]} is none of the run's classes 0..{classes - 1}")
    return torch.tensor(wanted or range(classes))[torch.arange(count) % (len(wanted) or classes)]


def _options(items: tuple[str, ...]) -> dict[str, float | int | bool]:
    options: dict[str, float | int | bool] = {}
    for item in items:
        name, equals, text = item.partition("=")
        try:
            options[name] = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:
            raise InputError(f"pacing option {item!r} is not of the form name=number") from None
        if not equals:
            raise InputError(f"pacing option {item!r} is not of the form name=number")
    return options


def _process(name: str | None, curriculum: Curriculum | None, source: str) -> Process:
    if name is not None:
        return get_process(name)
    return known_process(curriculum.process, source) if curriculum else get_process("vp-linear")


def _tasks(curriculum: Curriculum | None, process: Process) -> list[Any]:
    from difficulty.ranking import RankingTask
    from difficulty.tasks import make_tasks

    return curriculum.tasks if curriculum else [RankingTask.of(task, process) for task in make_tasks(process)]


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used ({str(error).splitlines()[0]})") from None
    return name


def _join_processes(device: str) -> tuple[int, str]:
    """Rank of this process and its device; joins the others if torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, _device(device)
    import torch.distributed as dist

    where = _device(device)
    if where == "cuda":
        where = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if where.startswith("cuda") else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), where


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe(curriculum: Curriculum) -> None:
    for number, held in enumerate(curriculum.clusters, 1):
        tasks = [curriculum.tasks[index] for index in sorted(held.tasks)]
        timesteps = ", ".join(f"{task.t_first}..{task.t_last}" for task in tasks)
        difficulty = "" if held.difficulty is None else f" difficulty {held.difficulty:.4g};"
        print(f"  cluster {number}:{difficulty} t = {timesteps}")


SUBCOMMANDS: Mapping[str, Callable[..., Any]] = {
    "cluster": cluster,
    "validate": validate,
    "run": run,
    "compare": compare,
    "quickstart": quickstart,
    "sample": sample,
    "evaluate": evaluate,
    "plot": plot,
}


def main() -> int:
    """Entry point of the ``training`` command."""
    return run_cli(dict(SUBCOMMANDS), "training", "Curricula over denoising tasks, and the training that judges them.")
