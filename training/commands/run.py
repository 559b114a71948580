"""``training run``: one training, on one device or several."""

__all__ = ["run"]

import functools
import json as jsonlib
import sys
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from difficulty.datasets import load_dataset
from difficulty.devices import chosen_device
from difficulty.errors import InputError
from difficulty.latents import Autoencoder, check_posterior, latent_dataset
from training.commands.arguments import Text, chosen_process
from training.commands.condition import chosen_condition, chosen_text
from training.curriculum import Curriculum, tasks_of
from training.events import EventLog
from training.heldout import HeldOut
from training.parallel import join_processes
from training.plan import TrainPlan
from training.plots import draw_folder, save_grid
from training.probing import ProbeLog
from training.run import Cadence, train
from training.trainer import Trainer


def run(
    data: Text,
    out: Path,
    curriculum: str = "none",
    resident: int | None = None,
    process: str | None = None,
    steps: int = 2000,
    batch: int = 128,
    micro_batches: int = 1,
    precision: str = "fp32",
    gradient_checkpointing: bool = False,
    compile: bool = False,
    parallel: Literal["ddp", "fsdp"] = "ddp",
    network: str = "mlp",
    prediction: str = "eps",
    weight: str = "constant",
    density: str | None = None,
    stratified: bool = False,
    lr: float = 1e-3,
    lr_schedule: str = "cosine",
    lr_start: Literal["begin", "after-curriculum"] = "begin",
    warmup: int = 50,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    ema_decay: float = 0.9999,
    conditional: bool = False,
    text_encoder: str | None = None,
    vae: str | None = None,
    posterior: str = "mean",
    condition_dropout: float = 0.1,
    seed: int = 0,
    evaluate_every: int = 100,
    checkpoint_every: int = 200,
    sample_every: int = 500,
    probe_every: int = 0,
    floor_from: Path | None = None,
    keep: int = 3,
    resume: Literal["auto", "never"] = "auto",
    init_from: Path | None = None,
    tensorboard: bool = False,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Train a denoiser, with a curriculum or without; the same command continues a run that was stopped.

    Example: training run digits --curriculum curriculum.json --out runs/digits --steps 2000
    On several devices: torchrun --nproc-per-node 4 -m training run ...

    Args:
        data: Built-in data set, array file, folder of images, hf:NAME, or wds:PATTERN for tar shards.
        out: Folder of the run.
        curriculum: A curriculum.json, or none.
        resident: Train samples of folders, hf: and wds: that are kept in memory; if there are more, all are read while
            training. Default: as many as fill a gibibyte.
        process: Forward process by name; default: that of the curriculum, or vp-linear.
        steps: Iterations.
        batch: Samples per iteration, over all processes together.
        micro_batches: Parts into which each process cuts its samples to save memory.
        precision: fp32, or bf16 or fp16 for the forward and backward pass.
        gradient_checkpointing: Compute the blocks of a dit or a model of diffusers again in the backward pass, to
            save memory.
        compile: Compile the network with torch.compile.
        parallel: How the processes of torchrun share the weights: ddp holds them in each, fsdp cuts them in parts.
        network: mlp, unet or dit, with options as in mlp:width=256; dit-s/2 to dit-xl/8; diffusers:config.json or
            diffusers:FOLDER; or your own as FILE.py:FACTORY.
        prediction: What the network predicts: eps, x0, v, score, velocity or edm (or edm:sigma_data=1).
        weight: Loss weight, such as constant, min-snr:gamma=5 or p2; uncertainty, or min-snr+uncertainty, learns one.
        density: Base density of t in place of the curriculum's.
        stratified: Spread the timesteps of a batch evenly.
        lr: Peak learning rate.
        lr_schedule: Its course after the warm-up: constant, cosine or linear.
        lr_start: Where that course starts: at the begin, or after-curriculum, when the last stage begins.
        warmup: Iterations of linear warm-up.
        weight_decay: Of AdamW.
        clip: Greatest norm of the gradient, 0 for none.
        ema_decay: Greatest decay of the averaged weights.
        conditional: Tell the network the class of each sample.
        text_encoder: Tell it the caption, embedded by this: a folder or hub name of a text encoder of transformers, or
            tiny, a small one trained on the data's own captions.
        vae: Train on latents of an autoencoder of diffusers: its folder, a pipeline's folder, or a hub name.
        posterior: Which latent of an image: the mean of the autoencoder's posterior, or one sample of it.
        condition_dropout: How often it is told neither, which makes guidance possible.
        seed: Of weights, batches, noise and timesteps.
        evaluate_every: Iterations between held-out losses, 0 for the end only.
        checkpoint_every: Iterations between checkpoints, 0 for the end only.
        sample_every: Iterations between sample grids, 0 for the end only.
        probe_every: Iterations between probes: excess over the best known loss per task, as `difficulty probe`; 0 for
            no probe.
        floor_from: Folder of `difficulty measure` on the same data, process and 20 tasks, for the probe.
        keep: Checkpoints that stay.
        resume: auto continues a run of the same settings in the folder, never refuses one.
        init_from: Folder of a run of the same network whose trained weights this new one starts from, for instance with
            a lower learning rate after its loss diverged.
        tensorboard: Also write events for `tensorboard --logdir`, in the folder's tensorboard/.
        device: cpu, cuda, or auto.
        json: Print the final losses as JSON.
    """
    check_posterior(posterior, vae)
    if floor_from and not probe_every:
        raise InputError("--floor-from is of the probe; ask for one with --probe-every")
    rank, where = join_processes(chosen_device(device))
    tell = functools.partial(tqdm.write, file=sys.stderr)
    dataset = load_dataset(data, resident)
    text = chosen_text(text_encoder, dataset, tell) if text_encoder else None
    autoencoder = Autoencoder(vae, where) if vae else None
    if autoencoder:
        dataset = latent_dataset(dataset, autoencoder, posterior, tell)
    chosen = None if curriculum == "none" else Curriculum.load(curriculum)
    ordered = chosen.provenance.get("dataset") if chosen else None
    if isinstance(ordered, dict) and ordered.get("train") != dataset.fingerprint["train"]:
        tell(f"{curriculum} was made on other data ({ordered.get('name')}), which may order their tasks in another way")
    forward = chosen_process(process, chosen, curriculum)
    plan = TrainPlan(
        steps=steps,
        batch=batch,
        micro_batches=micro_batches,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
        network=network,
        prediction=prediction,
        weight=weight,
        density=density,
        stratified=stratified,
        lr=lr,
        lr_schedule=lr_schedule,
        lr_start=lr_start,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        ema_decay=ema_decay,
        condition=chosen_condition(conditional, text_encoder),
        condition_dropout=condition_dropout,
        seed=seed,
    )
    cadence = Cadence(
        evaluate=evaluate_every, checkpoint=checkpoint_every, sample=sample_every, keep=keep, watch=probe_every
    )
    probe = ProbeLog(dataset, forward, plan, out, probe_every, floor_from) if probe_every and rank == 0 else None
    events = EventLog(out / "tensorboard") if tensorboard and rank == 0 else None
    bar = tqdm(total=steps, desc="training", mininterval=0.5, file=sys.stderr, disable=json or rank > 0 or None)

    def watch(trainer: Trainer, loss: float) -> None:
        bar.update(trainer.done - bar.n)
        if events:
            events.iteration(trainer, loss)
        if probe:
            probe(trainer)
        if trainer.done % 50 == 0:
            bar.set_postfix_str(
                f"stage {trainer.sampler.stage + 1}/{trainer.sampler.stages}, loss {loss:.4f}", refresh=False
            )

    def show(samples: torch.Tensor, path: Path) -> None:
        save_grid(autoencoder.decode(samples) if autoencoder else samples, path, dataset.value_range)
        if events:
            events.picture(path)

    trainer = train(
        dataset,
        forward,
        plan,
        out,
        chosen,
        text=text,
        cadence=cadence,
        resume=resume,
        init_from=init_from,
        device=where,
        parallel=parallel,
        watch=watch,
        tell=tell,
        show=show,
        judged=events.evaluation if events else None,
    )
    bar.close()
    if events:
        events.close()
    if rank > 0:
        return
    figures = draw_folder(out)
    tasks = HeldOut(dataset, forward, tasks_of(chosen, forward), conditioning=trainer.conditioning)
    measured = tasks.evaluate(trainer.ema)
    if json:
        print(jsonlib.dumps({"out": str(out), "steps": trainer.done, "nats": measured.nats, "loss": measured.loss}))
        return
    print(f"{out}: {trainer.done} iterations, held-out nats {measured.nats:.2f}, loss {measured.loss:.5f}")
    for record in trainer.sampler.log():
        print(f"  stage {record.stage + 1}: iterations {record.start} to {record.end}, {record.reason}")
    print(f"  figures: {', '.join(str(path) for path in figures if path.suffix == '.png')}")
