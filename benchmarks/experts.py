"""How much faster are twenty experts together than the loop that one would write?

    python benchmarks/experts.py [--repeats 5] [--iterations 10] [--threads 1 2]

Per network: (a) the plain loop, one module and one AdamW per expert; (b) the same loop split over processes with one
thread each (joblib); and the engines of `difficulty.engines`. Each round times every contender once, in turn, on the
same batches; reported are medians over the rounds of the time per expert and iteration, and of the ratio to (a) within
its round, which holds when the machine's speed drifts. Draws and evaluation are outside the timing.
"""

import argparse
import statistics
import time

import joblib
import torch

from difficulty.datasets import load_dataset
from difficulty.engines import ENGINES
from difficulty.experts import ExpertPlan, build_expert
from difficulty.process import get_process

EXPERTS, BATCH = 20, 128
CASES = {
    "MLP 2-D": ("grid-2d", "mlp:width=64"),
    "MLP 64-D": ("digits-mixture", "mlp"),
    "small UNet 8x8": ("digits", "unet:width=16"),
    "tiny DiT 8x8": ("digits", "dit:width=32"),
}


def plain_loop(denoisers, x, t, target, iterations):
    """One optimizer per expert, one expert after the other."""
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3, weight_decay=0.0) for one in denoisers]

    def run():
        for _ in range(iterations):
            for k, (one, optimizer) in enumerate(zip(denoisers, optimizers, strict=True)):
                optimizer.zero_grad()
                (one(x[k], t[k]) - target[k]).square().mean().backward()
                optimizer.step()

    return run


def _worker(denoisers, x, t, target, iterations):
    torch.set_num_threads(1)
    plain_loop(denoisers, x, t, target, iterations)()


def processes(denoisers, x, t, target, iterations, workers):
    """The plain loop on a share of the experts in each of the processes, which are started once and kept."""
    shares = [list(range(w, EXPERTS, workers)) for w in range(workers)]
    pool = joblib.Parallel(n_jobs=workers)

    def run():
        pool(
            joblib.delayed(_worker)([denoisers[k] for k in share], x[share], t[share], target[share], iterations)
            for share in shares
        )

    return run


def engine(name, denoisers, x, t, target, iterations):
    """One of the project's engines."""
    bank = ENGINES[name](denoisers)
    optimizer = torch.optim.AdamW(bank.parameters.values(), lr=1e-3, weight_decay=0.0, fused=True)

    def run():
        for _ in range(iterations):
            optimizer.zero_grad()
            bank.backward(x, t, target)
            optimizer.step()

    return run


def measure(data, network, threads, repeats, iterations):
    """Seconds per expert and iteration, a list per contender."""
    torch.set_num_threads(threads)
    dataset, process = load_dataset(data), get_process("vp-linear")
    plan = ExpertPlan(network=network)

    def fresh():
        return [build_expert(dataset, process, plan, 0) for _ in range(EXPERTS)]

    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(EXPERTS, BATCH, *dataset.shape, generator=generator) for _ in range(2))
    t = torch.randint(1, 1001, (EXPERTS, BATCH), generator=generator)
    contenders = {"plain loop": plain_loop(fresh(), x, t, target, iterations)}
    if threads > 1:
        contenders["processes"] = processes(fresh(), x, t, target, iterations, threads)
    contenders |= {name: engine(name, fresh(), x, t, target, iterations) for name in ENGINES}
    times = {name: [] for name in contenders}
    for round_number in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if round_number:  # the first round warms up
                times[name].append((time.perf_counter() - start) / iterations / EXPERTS)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    print(f"{'network':16} {'threads':>7} {'contender':12} {'ms/expert-iteration':>20} {'times the loop speed':>21}")
    for label, (data, network) in CASES.items():
        for threads in arguments.threads:
            times = measure(data, network, threads, arguments.repeats, arguments.iterations)
            for name, values in times.items():
                ratio = statistics.median(a / b for a, b in zip(times["plain loop"], values, strict=True))
                print(f"{label:16} {threads:7} {name:12} {1e3 * statistics.median(values):20.3f} {ratio:21.2f}")


if __name__ == "__main__":
    main()
