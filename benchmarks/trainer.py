"""How fast does the trainer train, and what do the sampler and the pacing cost per step?

The reference is the loop of the diffusers training tutorial: accelerate, DDPMScheduler.add_noise, torch.randint for t,
AdamW, gradient clipping, a cosine learning rate, EMAModel, and a DataLoader; on the same network, batch and machine.
Blocks of both alternate, so that a busy machine disturbs both alike; speeds are paired ratios with 95 % intervals, and
what draws and checks cost are medians with the 95 % intervals of their order statistics.

    python benchmarks/trainer.py --out results/trainer-speed
    python benchmarks/trainer.py --device cuda --precision bf16 --compile
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from memory import peak_resident_gib
from scipy import stats
from torch import nn

from difficulty.datasets import load_dataset
from difficulty.networks import build_network
from difficulty.process import get_process
from difficulty.records import finish_run, start_run, write_table
from training.curriculum import tasks_of
from training.curriculum_builders import interval_curriculum
from training.heldout import HeldOut
from training.plan import PRECISIONS, TrainPlan
from training.timesteps import TimestepSampler
from training.trainer import Trainer

BATCH = 128
NETWORKS = ("mlp", "unet", "dit")


class IndexedNetwork(nn.Module):
    """The project's network with the call of a diffusers model: (noisy, index from 0)."""

    def __init__(self, network: nn.Module, log_snr: torch.Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("log_snr", log_snr)

    def forward(self, x, index):
        return self.network(x, self.log_snr[index])


def ours(data, process, network: str, options, curriculum=None) -> Callable[[int], None]:
    plan = TrainPlan(
        steps=10**6, batch=BATCH, network=network, precision=options.precision, compile=options.compile
    )
    trainer = Trainer(data, process, plan, curriculum, device=options.device)

    def run(steps: int) -> None:
        for _ in range(steps):
            trainer.step()

    return run


def reference(data, process, network: str, options) -> Callable[[int], None]:
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    log_snr = torch.as_tensor(process.log_snr(range(1, process.T + 1)), dtype=torch.float32)
    model = IndexedNetwork(build_network(network, data.shape, 0), log_snr)
    if options.compile:
        model.compile()
    mixed = "no" if options.precision == "fp32" else options.precision
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision=mixed)
    scheduler = DDPMScheduler(num_train_timesteps=process.T)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rate = get_cosine_schedule_with_warmup(optimizer, 50, 10**6)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data.train), batch_size=BATCH, shuffle=True, drop_last=True
    )
    model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)

    def batches():
        while True:
            yield from loader

    stream = batches()

    def run(steps: int) -> None:
        for _ in range(steps):
            (clean,) = next(stream)
            noise = torch.randn_like(clean)
            t = torch.randint(0, process.T, (len(clean),), device=clean.device)
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(scheduler.add_noise(clean, noise, t), t), noise)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            ema.step(model.parameters())
            loss.detach().item()

    return run


def paired(runs: dict[str, Callable[[int], None]], steps: int, blocks: int) -> pd.DataFrame:
    """Milliseconds per step of every run, one row per block; within a block the order alternates."""
    for run in runs.values():
        run(min(steps, 10))
    rows = []
    for block in range(blocks):
        row = {}
        for name in list(runs)[:: -1 if block % 2 else 1]:
            begin = time.perf_counter()
            runs[name](steps)
            row[name] = (time.perf_counter() - begin) / steps * 1e3
        rows.append(row)
    return pd.DataFrame(rows)


def ratio(over: pd.Series, under: pd.Series) -> dict[str, float]:
    """Geometric mean of the paired ratios with its 95 % interval, Student's t on their logarithms."""
    logs = np.log(over / under)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    return {
        "speed": float(np.exp(logs.mean())),
        "ci_low": float(np.exp(logs.mean() - half)),
        "ci_high": float(np.exp(logs.mean() + half)),
    }


def median_interval(values: np.ndarray) -> np.ndarray:
    """Median, and the order statistics that hold the true one in at least 95 % of the cases."""
    return np.array([np.median(values), *stats.quantile_test(values, p=0.5).confidence_interval(0.95)])


def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Sum of two independent medians with intervals."""
    middle = first[0] + second[0]
    half = np.hypot(first[1:] - first[0], second[1:] - second[0])
    return np.array([middle, middle - half[0], middle + half[1]])


def draws(process, curriculum) -> Callable[[int], None]:
    sampler = TimestepSampler(process, curriculum, budget=10**9)
    loss, step = torch.tensor(1.0), iter(range(10**9))

    def run(steps: int) -> None:
        for _ in range(steps):
            sampler.sample(BATCH, step=next(step))
            sampler.update(loss)

    return run


def randint(process) -> Callable[[int], None]:
    def run(steps: int) -> None:
        for _ in range(steps):
            torch.randint(0, process.T, (BATCH,))

    return run


def check_microseconds(network: str, options: argparse.Namespace, checks: int = 30) -> np.ndarray:
    """Cost per step of each of some checks of `held-out`, with draws enough for its ``cost`` to limit them."""
    data, process = load_dataset("digits"), get_process("vp-linear")
    endless = interval_curriculum(process, k=2, pacing="held-out", pacing_options={"least": 10**6, "cap": 1.0})
    plan = TrainPlan(
        steps=10**6, batch=BATCH, network=network, precision=options.precision, compile=options.compile
    )
    trainer = Trainer(data, process, plan, endless, device=options.device)
    heldout = HeldOut(data, process, tasks_of(None, process))
    every, _ = trainer.sampler.heldout_plan(BATCH, int(trainer.sampler.active(heldout.t.numpy()).sum()))
    while trainer.done < every:
        trainer.step()
    seconds = []
    for _ in range(checks):
        begin = time.perf_counter()
        trainer.report_heldout(heldout)
        seconds.append(time.perf_counter() - begin)
    return 1e6 * np.array(seconds) / every


def contestants(network: str, options: argparse.Namespace) -> dict[str, Callable[[], Callable[[int], None]]]:
    data, process = load_dataset("digits"), get_process("vp-linear")
    # tau is never reached: every step is in a stage in which the rule reads the loss
    patient = interval_curriculum(process, k=20, pacing_options={"tau": 10**6})
    return {
        "diffusers": lambda: reference(data, process, network, options),
        "trainer": lambda: ours(data, process, network, options),
        "patience": lambda: ours(data, process, network, options, patient),
    }


def peak_gib(network: str, name: str, options: argparse.Namespace) -> float:
    """Peak memory of a process that runs a few steps: of the device where it is a GPU, else resident."""
    command = [sys.executable, __file__, "--memory", network, name, "--threads", str(options.threads)]
    command += ["--device", options.device, "--precision", options.precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(network: str, name: str, options: argparse.Namespace) -> None:
    import accelerate  # noqa: F401 - both contestants with the same libraries in memory
    import diffusers  # noqa: F401

    contestants(network, options)[name]()(5)
    on_gpu = torch.cuda.max_memory_allocated() / 2**30 if options.device != "cpu" else 0.0
    print(on_gpu or peak_resident_gib())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of the mlp per block; a tenth of it of the others")
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for speed.csv, overhead.csv and run.json")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print_peak(*options.memory, options)
        return
    config = {name: value for name, value in vars(options).items() if name not in ("out", "memory")}
    run = start_run(options.out, "trainer-speed", config) if options.out else None
    process = get_process("vp-linear")
    patient = interval_curriculum(process, k=20, pacing_options={"tau": 10**6})
    cost = paired(
        {"randint": randint(process), "uniform": draws(process, None), "patience": draws(process, patient)}, 2000, 30
    )
    beyond = {name: 1e3 * (cost[name] - cost["randint"]).to_numpy() for name in ("uniform", "patience")}
    drawing = {name: median_interval(micros) for name, micros in beyond.items()}
    speed, overhead = [], []
    for network in NETWORKS:
        steps = options.steps if network == "mlp" else max(options.steps // 10, 2)
        made = {name: make() for name, make in contestants(network, options).items()}
        ms = paired(made, steps, options.blocks)
        median = ms.median()
        memory = {f"{name}_gib": peak_gib(network, name, options) for name in ("diffusers", "trainer")}
        speed.append(
            {"network": network, **{f"{name}_ms": median[name] for name in ms}}
            | {"samples_per_second": BATCH / median["trainer"] * 1e3, **ratio(ms["diffusers"], ms["trainer"]), **memory}
        )
        checking = joined(drawing["uniform"], median_interval(check_microseconds(network, options)))
        for pacing, found in (drawing | {"held-out": checking}).items():
            facts = {"network": network, "pacing": pacing}
            for name, unit in (("microseconds", 1.0), ("share_of_step", 1e3 * median["trainer"])):
                facts |= dict(zip((name, f"{name}_low", f"{name}_high"), found / unit, strict=True))
            overhead.append(facts)
    tables = {"speed": pd.DataFrame(speed), "overhead": pd.DataFrame(overhead)}
    for table in tables.values():
        print(table.round(4).to_string(index=False))
    if options.out:
        for name, table in tables.items():
            write_table(options.out / f"{name}.csv", table)
        finish_run(options.out, run, command=shlex.join(["python", "benchmarks/trainer.py", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
