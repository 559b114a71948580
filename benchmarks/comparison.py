"""Do small networks train faster side by side? One batched program against one run after the other.

Blocks alternate, so that a busy machine disturbs both alike; medians over the blocks are printed, per step of one run.
Two worker processes on two idle cores would halve the time of one run after the other, and that of the batched program
as well: workers and batches multiply.

    python benchmarks/comparison.py [--runs 32] [--blocks 5]
"""

import argparse
import statistics
import time

import torch

from difficulty.datasets import load_dataset
from difficulty.process import get_process
from training.batched import Stacked
from training.plan import TrainPlan
from training.trainer import Trainer

CASES = (
    ("grid-2d", "mlp:width=64"),
    ("grid-2d", "mlp"),
    ("digits-mixture", "mlp"),
    ("photo-patches-8", "mlp:width=256"),
)


def make_trainers(data, process, network: str, runs: int) -> list[Trainer]:
    weights = ("constant", "min-snr", "p2", "soft-min-snr")
    plans = [TrainPlan(steps=10**6, network=network, weight=weights[i % 4], seed=i // 4) for i in range(runs)]
    return [Trainer(data, process, plan) for plan in plans]


def one_after_the_other(trainers: list[Trainer], steps: int) -> None:
    for trainer in trainers:
        for _ in range(steps):
            trainer.step()


def stacked(runs: Stacked, steps: int) -> None:
    for _ in range(steps):
        runs.step()


def milliseconds(train, runs, count: int, steps: int) -> float:
    begin = time.perf_counter()
    train(runs, steps)
    return (time.perf_counter() - begin) / steps / count * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    process = get_process("vp-linear")
    print(f"{options.runs} runs, batch 128, one thread; milliseconds per step of one run, median of {options.blocks}")
    print(f"{'data':16} {'network':14} {'one by one':>10} {'stacked':>8} {'ratio':>6} [range]")
    for name, network in CASES:
        data = load_dataset(name)
        kinds = [
            (one_after_the_other, make_trainers(data, process, network, options.runs)),
            (stacked, Stacked(make_trainers(data, process, network, options.runs))),
        ]
        for train, runs in kinds:
            milliseconds(train, runs, options.runs, 3)
        pairs = [
            [milliseconds(train, runs, options.runs, options.steps) for train, runs in kinds]
            for _ in range(options.blocks)
        ]
        ratios = sorted(alone / together for alone, together in pairs)
        alone, together = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{name:16} {network:14} {alone:10.3f} {together:8.3f} {statistics.median(ratios):5.2f}x "
            f"[{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        )


if __name__ == "__main__":
    main()
