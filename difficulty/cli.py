"""Command line ``difficulty``: every subcommand calls one public function and prints what it found."""

__all__ = ["main"]

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from difficulty.commandline import run_cli

DataArgument = Annotated[str, tyro.conf.Positional]
Measures = Literal["convergence", "sample-quality", "relative-entropy"]
FolderArgument = Annotated[Path, tyro.conf.Positional]
Posterior = Literal["mean", "sample"]


class StageBars:
    """One progress bar on stderr per stage, in order of appearance.

    What the user's own networks and functions print meanwhile goes there as well: standard output is for the result.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage = ""
        self._aside = redirect_stdout(sys.stderr)

    def __enter__(self) -> "StageBars":
        self._aside.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
        self._aside.__exit__(*error)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage, self._bar = stage, tqdm(total=total, desc=stage, mininterval=0.5, file=sys.stderr)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """End the current bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


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
    dataset = load_latents(data, vae, posterior, chosen_device("auto"), _tell if first else lambda message: None)
    with StageBars() as bars:
        found = run(
            dataset, process, out=out, tasks=tasks, grid=grid, measures=measures, plan=plan, estimator=estimator,
            processes=workers, progress=bars if first else None,
        )  # fmt: skip
    if not first:
        return
    plot_folder(out)
    _print_ranking(found.ranking.model_dump(), json)
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
            device=chosen_device(device), vae=vae, posterior=posterior, tell=_tell,
            progress=lambda done, total: bars("tasks", done, total),
        )  # fmt: skip
    _print_ranking(found.ranking.model_dump(), json)
    print(f"Results: {out}", file=sys.stderr)


def rank(folder: FolderArgument, /, floor_from: tuple[Path, ...] = (), json: bool = False) -> None:
    """Make ranking.json of a finished measurement again from its tables.

    Example: difficulty rank runs/digits --json

    Args:
        folder: of a finished measurement.
        floor_from: folders of `difficulty measure` or `difficulty probe` on the same data, process and tasks; the best
            loss that any of them knows becomes the floor, and the tables are written anew.
        json: print ranking.json on standard output.
    """
    from difficulty.agreement import rank_over_joint_floor
    from difficulty.measurement_folder import rank_folder

    found = rank_over_joint_floor(folder, floor_from) if floor_from else rank_folder(folder)
    _print_ranking(found.model_dump(), json)


def agree(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    measures: tuple[str, ...] = ("excess_nats",),
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Do results folders agree on which tasks are hard? Predictions, processes, seeds, experts and shared networks.

    Example: difficulty agree runs/eps runs/x0 runs/v-probe --measures excess_nats log_regret

    Folders are compared two by two, over their tasks if these are the same, else over the log-SNR that both cover; the
    seeds of each measurement are compared too. Without an exact law those of equal process and tasks are given the best
    floor that any one knows.

    Args:
        folders: of `difficulty measure` or `difficulty probe`, all of the same data.
        measures: by which the tasks are ordered, of convergence or relative entropy, as named in ranking.json.
        out: CSV file to write.
        json: print the table as JSON on standard output.
    """
    from difficulty.agreement import agreement_sentences, agreement_table
    from difficulty.records import write_table

    table = agreement_table(folders, measures)
    if out is not None:
        write_table(out, table)
    print(table.to_json(orient="records") if json else "\n".join(agreement_sentences(table)))


def plot(folder: FolderArgument, /) -> None:
    """Draw the figures of a finished measurement again from its tables.

    Example: difficulty plot runs/digits

    Args:
        folder: of a finished measurement.
    """
    from difficulty.plots import plot_folder

    for path in plot_folder(folder):
        print(path)


def recommend(
    folder: FolderArgument, /, experts: int = 4, measure: str = "excess_nats", json: bool = False
) -> None:
    """From a ranking: boundaries of experts with equal burden, and densities of noise levels as trainers' flags.

    Example: difficulty recommend runs/digits --experts 4

    `difficulty profile` prints the same from a profile.

    Args:
        folder: with ranking.json, of `difficulty measure` or `difficulty probe`.
        experts: number of experts.
        measure: of the ranking; must be a density per unit log-SNR.
        json: print everything as JSON.
    """
    from difficulty.process_file import read_process
    from difficulty.ranking import Ranking
    from difficulty.recommend import advise, burden_of_ranking, wide_tasks

    ranking = Ranking.load(folder)
    process = read_process(folder, ranking.process)
    burden = burden_of_ranking(ranking, measure)
    advice = advise(f"{measure} of the ranking", *burden, {process.name: process}, experts)
    for sentence in [*ranking.doubts(measure), *wide_tasks(ranking)]:
        _tell(sentence)
    print(_json(advice) if json else "\n".join(advice["sentences"]))


def datasets(json: bool = False) -> None:
    """List the built-in data sets and their options.

    Example: difficulty datasets

    Args:
        json: print them as JSON.
    """
    from difficulty.datasets import DATASETS

    _print_registry(DATASETS, json)


def processes(json: bool = False) -> None:
    """List the forward processes and their options.

    Example: difficulty processes

    Your own process needs no name: give FILE.npz or the FOLDER of a diffusers scheduler in its place.

    Args:
        json: print them as JSON.
    """
    from difficulty.process import PROCESSES

    _print_registry(PROCESSES, json)


def kl(
    data: DataArgument,
    /,
    out: Path,
    process: str = "vp-linear",
    estimator: str = "auto",
    pairs: tuple[int, ...] = (),
    tasks: int | None = None,
    model: str | None = None,
    device: str = "auto",
    vae: str | None = None,
    posterior: Posterior = "mean",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Relative entropy between consecutive marginals, KL(p_{t-1} || p_t); only the estimator `score` trains anything.

    Example: difficulty kl digits --process vp-linear --out runs/digits-kl

    Args:
        data: built-in name (see `difficulty datasets`), array file, image folder, hf:NAME, or wds:PATTERN.
        out: folder to write: run.json, relative_entropy.csv, figures/.
        process: forward process (see `difficulty processes`), with options as in vp-linear:T=500; or your own:
            FILE.npz (arrays alpha and sigma, or alphas_cumprod) or the FOLDER of a diffusers scheduler.
        estimator: auto, exact (built-in laws only), gaussian, mixture, empirical, or score (a trained denoiser).
        pairs: the t of the pairs (t-1, t), in 2..T; all by default.
        tasks: that many coarse intervals instead, uniform in t.
        model: for the estimator `score`, a denoiser that was trained for this process (see `difficulty probe --help`);
            without one a small network is trained.
        device: cpu, cuda, or auto, where the model and the autoencoder run.
        vae: measure latents of an autoencoder of diffusers: its folder, a pipeline's folder, or a hub name.
        posterior: which latent of an image: the mean of the autoencoder's posterior, or one sample of it.
        seed: of every random draw.
        json: print the table as JSON on standard output.
    """
    from difficulty.devices import chosen_device
    from difficulty.entropy_folder import run_kl
    from difficulty.latents import load_latents
    from difficulty.tasks import runs

    where = chosen_device(device)
    dataset = load_latents(data, vae, posterior, where, _tell)
    with StageBars() as bars:
        table = run_kl(dataset, process, out, estimator, pairs or None, tasks, seed, bars, model, where)
    if json:
        print(table.to_json(orient="records"))
        return
    valid = table[table["valid"]]
    print(f"{len(valid)} of {len(table)} pairs are valid.")
    t = table["t"].tolist()
    for reason, part in table[~table["valid"]].groupby("reason", sort=False):
        # Neighbours in the table are a span, whatever t between them was not asked for.
        spans = ", ".join(f"{t[i]}..{t[j]}" if i < j else str(t[i]) for i, j in runs(part.index))
        print(f"  not valid at t = {spans} ({len(part)} pairs): {reason}")
    print(f"Results and figures: {out}", file=sys.stderr)


def profile(
    data: DataArgument,
    /,
    out: Path,
    for_process: tuple[str, ...] = (),
    experts: int = 5,
    vae: str | None = None,
    posterior: Posterior = "mean",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Schedule-free profile of the data over log-SNR, the relative entropies of any process from it, and advice.

    Example: difficulty profile digits --for-process vp-linear edm --out runs/digits-profile

    Args:
        data: built-in name (see `difficulty datasets`), array file, image folder, hf:NAME, or wds:PATTERN.
        out: folder to write: run.json, profile.csv, recommendation.json, kl-NAME.csv per process, figures/; NAME has
            the options of the process in it, as in kl-vp-linear-T=500.csv.
        for_process: processes, as in `difficulty kl`, whose relative entropies are derived from the profile.
        experts: number of experts in the advice on boundaries.
        vae: measure latents of an autoencoder of diffusers: its folder, a pipeline's folder, or a hub name.
        posterior: which latent of an image: the mean of the autoencoder's posterior, or one sample of it.
        seed: of every random draw.
        json: print recommendation.json on standard output.
    """
    from difficulty.devices import chosen_device
    from difficulty.entropy_folder import run_profile
    from difficulty.latents import load_latents

    dataset = load_latents(data, vae, posterior, chosen_device("auto"), _tell)
    with StageBars() as bars:
        advice = run_profile(dataset, out, for_process, experts, seed, bars)
    if json:
        print(_json(advice))
        return
    for line in advice["sentences"]:
        print(line)
    print(f"Results and figures: {out}", file=sys.stderr)


def _tell(message: str) -> None:
    """Say something beside the result."""
    tqdm.write(message, file=sys.stderr)


def _json(value: dict[str, Any]) -> str:
    """JSON text; a function of its own because ``json`` is also the name of the option."""
    return json.dumps(value)


def _print_ranking(ranking: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(_json(ranking))
        return
    for sentence in ranking["verdict"]:
        print(sentence)


def _print_registry(factories: Mapping[str, Callable[..., Any]], as_json: bool) -> None:
    import inspect

    entries: dict[str, dict[str, Any]] = {}
    for name, factory in factories.items():
        options = {key: parameter.default for key, parameter in inspect.signature(factory).parameters.items()}
        entries[name] = {"description": inspect.cleandoc(factory.__doc__ or "").splitlines()[0], "options": options}
    if as_json:
        print(_json(entries))
        return
    for name, entry in entries.items():
        settings = ",".join(f"{key}={value}" for key, value in entry["options"].items())
        print(f"{name + (':' + settings if settings else ''):<58} {entry['description']}")


SUBCOMMANDS: dict[str, Callable[..., Any]] = {
    "measure": measure,
    "probe": probe,
    "kl": kl,
    "profile": profile,
    "rank": rank,
    "agree": agree,
    "recommend": recommend,
    "plot": plot,
    "datasets": datasets,
    "processes": processes,
}


def main() -> None:
    """Entry point of the console command and of ``python -m difficulty``."""
    sys.exit(run_cli(SUBCOMMANDS, "difficulty", "Measure which denoising tasks of a diffusion model are hard."))
