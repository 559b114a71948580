"""The commands of the relative entropy: ``difficulty kl`` and ``profile``."""

__all__ = ["kl", "profile"]

import sys
from pathlib import Path

from difficulty.commands.arguments import DataArgument, Posterior, StageBars, json_text, tell


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
    dataset = load_latents(data, vae, posterior, where, tell)
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

    dataset = load_latents(data, vae, posterior, chosen_device("auto"), tell)
    with StageBars() as bars:
        advice = run_profile(dataset, out, for_process, experts, seed, bars)
    if json:
        print(json_text(advice))
        return
    for line in advice["sentences"]:
        print(line)
    print(f"Results and figures: {out}", file=sys.stderr)
