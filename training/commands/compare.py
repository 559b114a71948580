"""The commands that compare arms: ``training compare`` and ``training quickstart``."""

__all__ = ["compare", "quickstart"]

import os
import sys
from pathlib import Path

from tqdm import tqdm

from difficulty.datasets import load_dataset
from difficulty.devices import chosen_device
from difficulty.ranking import Ranking
from training.commands.arguments import Text, chosen_process, ranked_process
from training.compare import compare as compare_arms
from training.curriculum import Curriculum
from training.plots import draw_folder
from training.report import percent, write_report


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
    lr_schedules: tuple[str, ...] = ("cosine",),
    metrics: tuple[str, ...] = ("fd-pca", "sw-pixels"),
    samples: int = 512,
    confirms: Path | None = None,
    device: str = "auto",
    workers: int = 0,
    json: bool = False,
) -> None:
    """Train arms with paired seeds and state the differences with intervals; the same command continues.

    Example: training compare digits --ranking results/quickstart-digits/measurement --arms vanilla curriculum static
    --out compared

    Args:
        data: Built-in data set, array file, or folder of images.
        out: Folder of the comparison.
        arms: What is compared, the first being the baseline: vanilla, vanilla-again, curriculum, anti, random,
            non-accumulating, first-then-all, static, paper, measured, measured-static, log-snr, logit-normal,
            log-normal, min-snr, p2, a curriculum.json, and any without a weight of its own with one, as in
            curriculum+min-snr.
        ranking: Results folder with ranking.json, for the arm measured and for a default curriculum.
        curriculum: A curriculum.json for the arms that need one.
        process: Forward process by name; default: that of the curriculum or the ranking, or vp-linear.
        seeds: Paired seeds per arm.
        first_seed: The first of them; confirm on seeds that were not explored.
        budget: Iterations of every run.
        network: mlp, unet or dit, with options as in mlp:width=256.
        prediction: What the network predicts.
        batch: Samples per iteration.
        lr: Peak learning rate.
        lr_schedules: One or more of constant, cosine, linear; effects are reported under each.
        metrics: Of the samples: fd or sw on pixels, pca, digits-cnn or inception, as in fd-pca.
        samples: Samples that are judged.
        confirms: Folder of the exploration that this comparison repeats on other seeds; without it nothing is claimed.
        device: cpu, cuda, or auto.
        workers: Processes, 0 for one per core, or one where the device is a GPU.
        json: Print the effects as JSON.
    """
    dataset, where = load_dataset(data), chosen_device(device)
    ranked = Ranking.load(ranking) if ranking else None
    chosen = Curriculum.load(curriculum) if curriculum else None
    if chosen is None and ranking and ranked:
        forward = ranked_process(process, ranked, ranking)
    else:
        forward = chosen_process(process, chosen, str(curriculum))
    bar = tqdm(desc="comparing", mininterval=0.5, file=sys.stderr, disable=json or None)

    def progress(what: str, done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        bar.set_postfix_str(what)

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
        lr_schedules=lr_schedules,
        metrics=metrics,
        samples=samples,
        confirms=confirms,
        device=where,
        workers=workers or _processes(where),
        progress=progress,
    )
    bar.close()
    figures = draw_folder(out)
    report = write_report(out)[0]
    if json:
        print(table.assign(confirmed=confirms is not None).to_json(orient="records"))
        return
    said = f"{seeds} paired seeds" if seeds > 1 else "one seed"
    print(f"{out}: change against {next(iter(dict.fromkeys(arms)))} over {said} (negative is better)")
    for row in table.to_dict("records"):
        low, middle, high = (percent(row[name]) for name in ("ci_low", "log_ratio", "ci_high"))
        what = f"{row['arm']:18} {row['lr_schedule']:9} {row['metric']:10}"
        interval = f" [{low}, {high}]" if seeds > 1 else ""
        print(f"  {what} {middle}{interval}  {row['verdict']}")
    if confirms is None:
        print(f"  these are leads, no claims: confirm them on other seeds with --first-seed and --confirms {out}")
    print(f"  report: {report}")
    print(f"  figures: {', '.join(str(path) for path in figures if path.suffix == '.png')}")


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
    device: str = "auto",
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
        device: Of the comparison: cpu, cuda, or auto. Experts take a GPU where there is one.
        workers: Processes of the comparison, 0 for one per core, or one where the device is a GPU.
    """
    from difficulty.commands.arguments import StageBars
    from training.quickstart import QuickstartPlan
    from training.quickstart import quickstart as run_quickstart

    where = chosen_device(device)
    plan = QuickstartPlan(
        process=process,
        tasks=tasks,
        expert_seeds=expert_seeds,
        expert_budget=expert_budget,
        compare_seeds=compare_seeds,
        steps=steps,
        network=network,
        device=where,
        workers=workers or _processes(where),
    )
    with StageBars() as bars:
        lines = run_quickstart(data, out, plan, progress=bars)
    print("\n".join(lines))


def _processes(device: str) -> int:
    if device != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
