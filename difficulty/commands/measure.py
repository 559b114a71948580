"""The commands that measure tasks: ``difficulty measure`` and ``probe``."""

__all__ = ["measure", "probe"]

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from difficulty.commands.arguments import DataArgument, Posterior, StageBars, print_ranking, tell

Measures = Literal["convergence", "sample-quality", "relative-entropy"]


def measure(
    data: DataArgument,
    /,
    out: Path,
    process: str = "vp-linear",
    tasks: int = 20,
    grid: Literal["t", "log-snr"] = "t",
    measures: tuple[Measures, ...] = ("convergence", "relative-entropy"),
    prediction: str = "eps",
    network: str = "mlp",
    seeds: int = 3,
    budget: int = 2000,
    batch: int = 128,
    draws: int = 1024,
    learning_rate: float = 1e-3,
    engine: str = "auto",
    compile: bool = False,
    workers: int | None = None,
    start: Literal["cold", "shared", "neighbour"] = "cold",
    estimator: str = "auto",
    vae: str | None = None,
    posterior: Posterior = "mean",
    json: bool = False,
) -> None:
    """Measure how hard every denoising task is: experts, relative entropy, ranking, figures.

    Example: difficulty measure digits --tasks 10 --budget 400 --out runs/digits

    An interrupted measurement goes on where it stopped when its command is given again; a finished one is repeated.

    Args:
        data: built-in name (see `difficulty datasets`), array file, image folder, hf:NAME, or wds:PATTERN.
        out: folder to write.
        process: forward process (see `difficulty processes`), with options as in vp-linear:T=500; or your own:
            FILE.npz (arrays alpha and sigma, or alphas_cumprod) or the FOLDER of a diffusers scheduler.
        tasks: number of tasks.
        grid: tasks of equal length in t, or in log-SNR.
        measures: what to measure: convergence of experts, sample-quality when an expert denoises its own task and a
            network on all t the rest (needs and brings convergence), relative-entropy of neighbouring marginals.
        prediction: what the experts predict: eps, x0, v, score, velocity or edm (or edm:sigma_data=1).
        network: of each expert: mlp, unet or dit, with options as in mlp:width=256, or your own FILE.py:FACTORY.
        seeds: how many experts per task; more make the intervals narrower.
        budget: iterations at which difficulty is read off; training goes on to twice that for the floor.
        batch: samples per iteration and expert.
        draws: fixed held-out draws per task, on which experts are judged at every checkpoint.
        learning_rate: of AdamW.
        engine: how experts are trained together: auto, batched, vmap or loop.
        compile: compile the experts' program; takes about a minute, and a C++ compiler (on a GPU, triton).
        workers: processes that share the experts on this machine, one thread each; by default as many as torch has
            threads if the work is worth it. On several GPUs or machines, torchrun --nproc-per-node 4 -m -- difficulty
            measure ... does the same.
        start: experts start cold, or warm from a network trained on all t, or from their noisier neighbour.
        estimator: of the relative entropy (see `difficulty kl --help`).
        vae: measure latents of an autoencoder of diffusers: its folder, a pipeline's folder, or a hub name.
        posterior: which latent of an image: the mean of the autoencoder's posterior, or one sample of it.
        json: print ranking.json on standard output.
    """
    from difficulty.devices import chosen_device
    from difficulty.expert_plan import ExpertPlan
    from difficulty.latents import load_latents
    from difficulty.measurement import measure as run
    from difficulty.plots import plot_folder
    from difficulty.ranks import launched_ranks

    plan = ExpertPlan(
        network=network,
        prediction=prediction,
        seeds=tuple(range(seeds)),
        budget=budget,
        batch=batch,
        heldout_draws=draws,
        learning_rate=learning_rate,
        engine=engine,
        compile=compile,
        start=start,
    )
    first = launched_ranks().first
    dataset = load_latents(data, vae, posterior, chosen_device("auto"), tell if first else lambda message: None)
    with StageBars() as bars:
        found = run(
            dataset, process, out=out, tasks=tasks, grid=grid, measures=measures, plan=plan, estimator=estimator,
            processes=workers, progress=bars if first else None,
        )  # fmt: skip
    if not first:
        return
    plot_folder(out)
    print_ranking(found.ranking.model_dump(), json)
    print(f"Results and figures: {out}", file=sys.stderr)


def probe(
    model: Annotated[str, tyro.conf.Positional],
    data: DataArgument,
    /,
    out: Path,
    process: str | None = None,
    tasks: int = 20,
    grid: Literal["t", "log-snr"] = "t",
    draws: int = 1024,
    floor_from: Path | None = None,
    device: str = "auto",
    vae: str | None = None,
    posterior: Posterior | None = None,
    json: bool = False,
) -> None:
    """Judge an existing checkpoint on every denoising task, on fixed held-out draws.

    Example: difficulty probe runs/mine digits --out runs/probe

    Args:
        model: an unconditional training run's folder, a denoiser.safetensors, a diffusers folder with its scheduler, or
            FILE.py:FUNCTION with FUNCTION(x_t, t) -> eps.
        data: built-in name (see `difficulty datasets`), array file, image folder, hf:NAME, or wds:PATTERN.
        out: folder to write.
        process: as in `difficulty measure`; needed only for FILE.py:FUNCTION.
        tasks: number of tasks.
        grid: tasks of equal length in t, or in log-SNR.
        draws: fixed draws per task.
        floor_from: folder of `difficulty measure` with the same data, process, tasks and draws.
        device: cpu, cuda, or auto, where the network of a folder or file runs; a FUNCTION is given tensors of the CPU.
        vae: autoencoder of a model of latents, as in `training run`; a run's or a pipeline's own is found by itself.
        posterior: which latent of an image, as in `training run`; by default that of the model's run, or the mean.
        json: print ranking.json on standard output.
    """
    from difficulty.devices import chosen_device
    from difficulty.probe import probe as run

    with StageBars() as bars:
        found = run(
            model, data, process, out=out, tasks=tasks, grid=grid, draws=draws, floor_from=floor_from,
            device=chosen_device(device), vae=vae, posterior=posterior, tell=tell,
            progress=lambda done, total: bars("tasks", done, total),
        )  # fmt: skip
    print_ranking(found.ranking.model_dump(), json)
    print(f"Results: {out}", file=sys.stderr)
