"""How fast does the trainer train, and what do the sampler and the pacing cost per step?

The reference is the loop of the diffusers training tutorial: accelerate, DDPMScheduler.add_noise, torch.randint for t,
AdamW, gradient clipping, a cosine learning rate, EMAModel, and a DataLoader; on the same network, batch and machine.
Blocks of both alternate, so that a busy machine disturbs both alike; medians over the blocks are printed.

    python benchmarks/trainer.py [--steps 200] [--blocks 5] [--threads 1]
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from difficulty.datasets import load_dataset
from difficulty.networks import build_network
from difficulty.process import get_process
from training.curriculum import interval_curriculum
from training.timesteps import TimestepSampler
from training.trainer import Trainer, TrainPlan

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


def ours(data, process, network: str, curriculum=None) -> Callable[[int], None]:
    trainer = Trainer(data, process, TrainPlan(steps=10**6, batch=BATCH, network=network), curriculum)

    def run(steps: int) -> None:
        for _ in range(steps):
            trainer.step()

    return run


def reference(data, process, network: str) -> Callable[[int], None]:
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    log_snr = torch.as_tensor(process.log_snr(range(1, process.T + 1)), dtype=torch.float32)
    model = IndexedNetwork(build_network(network, data.shape, 0), log_snr)
    accelerator, scheduler = Accelerator(cpu=True), DDPMScheduler(num_train_timesteps=process.T)
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


def milliseconds(runs: dict[str, Callable[[int], None]], steps: int, blocks: int) -> dict[str, float]:
    """Median time of one step of every run, in alternating blocks."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(10)
    for _ in range(blocks):
        for name, run in runs.items():
            begin = time.perf_counter()
            run(steps)
            taken[name].append((time.perf_counter() - begin) / steps * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data, process = load_dataset("digits"), get_process("vp-linear")
    # tau is never reached: every step is in a stage in which the rule reads the loss
    patient = interval_curriculum(process, k=20, pacing_options={"tau": 10**6})
    print(f"digits, batch {BATCH}, {options.threads} thread(s), {options.blocks} blocks of {options.steps} steps")
    print(f"{'network':8} {'diffusers':>10} {'trainer':>10} {'+patience':>10} {'samples/s':>10} {'speed':>7}")
    steps_ms = {}
    for network in NETWORKS:
        steps = options.steps if network == "mlp" else max(options.steps // 10, 2)
        ms = milliseconds(
            {
                "diffusers": reference(data, process, network),
                "trainer": ours(data, process, network),
                "patience": ours(data, process, network, patient),
            },
            steps,
            options.blocks,
        )
        steps_ms[network] = ms["trainer"]
        print(
            f"{network:8} {ms['diffusers']:7.2f} ms {ms['trainer']:7.2f} ms {ms['patience']:7.2f} ms "
            f"{BATCH / ms['trainer'] * 1e3:10.0f} {ms['diffusers'] / ms['trainer']:6.2f}x"
        )
    cost = milliseconds(
        {"randint": randint(process), "uniform": draws(process, None), "patience": draws(process, patient)}, 2000, 5
    )
    print("draw of t per step: " + ", ".join(f"{name} {1e3 * value:.0f} us" for name, value in cost.items()))
    for network, ms in steps_ms.items():
        share = 100 * (cost["patience"] - cost["randint"]) / ms
        print(f"  sampler and pacing over torch.randint, of a step of {network}: {share:.2f} %")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
