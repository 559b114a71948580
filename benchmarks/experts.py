"""How much faster are twenty experts together than the loop that one would write?

    python benchmarks/experts.py [--networks ...] [--threads 1 2] [--rounds 7] [--compiled] [--out DIR]

Per network and number of threads: the plain loop, one module and one AdamW per expert; the same with an expert per task
of joblib, its build and dispatch included, over as many processes as threads; the same loop split over as many lasting
processes, which is what joblib comes to in the limit; every engine of `difficulty.engines` that fits, in one process;
and what ``choose_engine`` picks, in as many processes as threads, as ``difficulty measure --workers`` runs it; with
``--compiled`` also the engines through torch.compile, as with ``difficulty measure --compile``.

Each round times every contender once, in turn, on the same batches: x0, noise and timesteps of the experts' own tasks,
drawn beforehand. Reported are the median time per expert and iteration, and the ratio to the plain loop within a round,
which holds when the machine's speed drifts, as median and range over the rounds. Draws and evaluation are outside.

``gflops`` are those of the layers as torch counts them for the plain loop, forward and backward, per second; beside
them stands what one large matrix product reaches on the same threads. ``mb`` is the memory that the experts take,
weights, moments and activations, summed over processes, without the interpreter and its libraries.

Where torch finds a GPU, all of it runs there: N threads are then N processes that share it, ``mb`` is what torch took
on it, and rounds are of another length. CUDA_VISIBLE_DEVICES= in front of the command times the CPU of such a machine.

The table is written as table.csv, or gpu.csv, one row per contender, replacing rows of the networks and threads that
were timed.
"""

import argparse
import gc
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from difficulty.datasets import load_dataset
from difficulty.devices import training_device
from difficulty.engines import ENGINES, Bank, choose_engine
from difficulty.errors import InputError
from difficulty.expert_crew import build_expert
from difficulty.expert_plan import ExpertPlan
from difficulty.process import get_process
from difficulty.records import read_table, write_table

EXPERTS, BATCH = 20, 128
# On a GPU all networks wait for its kernels to be started, so that one length of a round serves all.
GPU_ITERATIONS = 20
# Data, network, iterations in a round on a CPU.
CASES = {
    "MLP 2-D": ("grid-2d", "mlp:width=64", 40),
    "MLP 64-D": ("digits-mixture", "mlp", 40),
    "small UNet 8x8": ("digits", "unet:width=16", 1),
    "tiny DiT 8x8": ("digits", "dit:width=32", 1),
}
PLAIN = "plain loop"
WARM_UP = 2


def fresh(case, experts):
    """Untrained experts of a case with batches of their tasks: x (E, B, *), t (E, B), target (E, B, *)."""
    device = training_device()
    dataset, process, plan = setting(case)
    members = [build_expert(dataset, process, plan, 0).to(device) for _ in experts]
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(EXPERTS, BATCH, *dataset.shape, generator=generator)[experts] for _ in range(2))
    position = torch.randint(1, 1001 // EXPERTS + 1, (EXPERTS, BATCH), generator=generator)
    t = (position + 1000 // EXPERTS * torch.arange(EXPERTS)[:, None])[experts]
    return members, x.to(device), t.to(device), target.to(device)


def setting(case):
    """Data, process and plan of a case."""
    data, network, _ = CASES[case]
    return load_dataset(data), get_process("vp-linear"), ExpertPlan(network=network)


def on_gpu():
    return training_device().type == "cuda"


def wait():
    """Until the GPU has done what it was told, if there is one."""
    if on_gpu():
        torch.cuda.synchronize()


def plain_loop(case, experts):
    """One optimizer per expert, one expert after the other."""
    members, x, t, target = fresh(case, experts)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3, weight_decay=0.0) for one in members]

    def run(iterations):
        for _ in range(iterations):
            for k, (one, optimizer) in enumerate(zip(members, optimizers, strict=True)):
                optimizer.zero_grad()
                (one(x[k], t[k]) - target[k]).square().mean().backward()
                optimizer.step()
        wait()

    return run


class OverJoblib:
    """The plain loop with one task of joblib per expert; joblib keeps its processes between rounds."""

    longer = 20  # a task trains so many times the iterations of a round, or building the expert would decide

    def __init__(self, case, processes):
        self.case, self.processes = case, processes

    def __call__(self, iterations):
        from joblib import Parallel, delayed

        tasks = (delayed(train_alone)(self.case, k, self.longer * iterations) for k in range(EXPERTS))
        Parallel(n_jobs=self.processes)(tasks)


def train_alone(case, expert, iterations):
    """A task of joblib."""
    torch.set_num_threads(1)
    plain_loop(case, [expert])(iterations)


def together(case, experts, name, processes=1, compiled=False):
    """An engine of the project."""
    members, x, t, target = fresh(case, experts)
    choice = chosen(case, name, processes)
    bank = Bank(members, choice.engine, min(choice.block, len(members)), compiled=compiled)
    optimizer = torch.optim.AdamW(bank.leaves, lr=1e-3, weight_decay=0.0, fused=True)

    def run(iterations):
        for _ in range(iterations):
            optimizer.zero_grad()
            for block, own in bank.slices():
                block.backward(x[own], t[own], target[own])
            optimizer.step()
        wait()

    return run


def chosen(case, name, processes):
    """What ``choose_engine`` says."""
    dataset, process, plan = setting(case)
    return choose_engine(
        build_expert(dataset, process, plan, 0).to(training_device()), dataset.shape, batch=BATCH, experts=EXPERTS,
        iterations=plan.iterations[-1], engine=name, processes=processes,
    )  # fmt: skip


def _serve(connection, make, case, share, arguments):
    torch.set_num_threads(1)
    run = make(case, share, *arguments)
    connection.send(True)
    while iterations := connection.recv():
        run(iterations)
        connection.send(True)


class OverProcesses:
    """A contender on a share of the experts in each of the processes, which are started once and kept.

    Processes that start or end take the cores from whoever is timed, so both are waited for.
    """

    def __init__(self, make, case, workers, *arguments):
        context = multiprocessing.get_context("spawn")
        self.connections, self.processes = [], []
        for w in range(workers):
            share = list(range(w * EXPERTS // workers, (w + 1) * EXPERTS // workers))
            own, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, make, case, share, arguments), daemon=True)
            process.start()
            self.connections.append(own)
            self.processes.append(process)
        for connection in self.connections:
            connection.recv()

    def __call__(self, iterations):
        for connection in self.connections:
            connection.send(iterations)
        for connection in self.connections:
            connection.recv()

    def close(self):
        for connection in self.connections:
            connection.send(0)
        for process in self.processes:
            process.join()


def contenders(case, threads, compiled):
    """Name to (function that makes it, arguments, processes)."""
    found = {PLAIN: (plain_loop, (), 1)}
    if threads > 1:
        found[f"{PLAIN}, {threads} processes"] = (plain_loop, (), threads)
    for name in ENGINES:
        try:
            chosen(case, name, 1)
        except InputError:
            continue
        found[name] = (together, (name,), 1)
        if compiled and name != "loop":
            found[f"{name}, compiled"] = (together, (name, 1, True), 1)
            if threads > 1:
                found[f"{name}, compiled, {threads} processes"] = (together, (name, threads, True), threads)
    if threads > 1:
        found[f"{chosen(case, 'auto', threads).engine}, {threads} processes"] = (together, ("auto", threads), threads)
    return found


def gpu_megabytes(make, case, arguments, processes):
    """Peak of what torch takes on the GPU for a share of the experts, times the processes."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    make(case, list(range(EXPERTS // processes)), *arguments)(2)
    return processes * (torch.cuda.max_memory_allocated() - before) / 2**20


def cpu_megabytes(make, case, arguments, processes):
    """Growth of the peak memory of a forked process that runs the contender, times the processes."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        plain_loop(case, [0])(1)  # loads data and libraries
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        make(case, list(range(EXPERTS // processes)), *arguments)(2)
        os.write(writing, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        kilobytes = int(stream.read())
    os.waitpid(child, 0)
    return processes * kilobytes / 1024


def flops_per_iteration(case):
    """Of one expert, forward and backward."""
    (one,), x, t, target = fresh(case, [0])
    with FlopCounterMode(display=False) as counter:
        (one(x[0], t[0]) - target[0]).square().mean().backward()
    return counter.get_total_flops()


def matrix_gflops():
    """What one large product of matrices reaches."""
    size = 8192 if on_gpu() else 1024
    a = torch.randn(size, size, device=training_device())
    best = float("inf")
    for _ in range(10):
        wait()
        start = time.perf_counter()
        a @ a
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def measure(case, threads, rounds, compiled, memory):
    """One row per contender."""
    torch.set_num_threads(threads)
    peak, flops = matrix_gflops(), flops_per_iteration(case)
    iterations = GPU_ITERATIONS if on_gpu() else CASES[case][2]
    kinds = contenders(case, threads, compiled)
    runs = {
        name: make(case, list(range(EXPERTS)), *arguments)
        if processes == 1
        else OverProcesses(make, case, processes, *arguments)
        for name, (make, arguments, processes) in kinds.items()
    }
    if threads > 1:
        runs[f"{PLAIN}, joblib"] = OverJoblib(case, threads)
    times = {name: [] for name in runs}
    for round_number in range(rounds + WARM_UP):
        for name, run in runs.items():
            start = time.perf_counter()
            run(iterations)
            if round_number >= WARM_UP:
                done = iterations * getattr(run, "longer", 1)
                times[name].append((time.perf_counter() - start) / done / EXPERTS)
    for run in runs.values():
        if isinstance(run, OverProcesses):
            run.close()
    rows = []
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(times[PLAIN], values, strict=True))
        median = statistics.median(values)
        rows.append(
            {
                "network": case,
                "threads": threads,
                "contender": name,
                "ms": round(1e3 * median, 4),
                "ratio": round(statistics.median(ratios), 2),
                "ratio_low": round(ratios[0], 2),
                "ratio_high": round(ratios[-1], 2),
                "rounds": rounds,
                "gflops": round(flops / median / 1e9, 1),
                "gflops_matrix": round(peak, 1),
                "mb": round(memory.get(name, float("nan")), 1),
                "torch": torch.__version__,
                "processor": torch.cuda.get_device_name() if on_gpu() else platform.processor() or platform.machine(),
            }
        )
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--compiled", action="store_true", help="also the compiled engines (a minute each, twice: for memory and speed)"
    )
    parser.add_argument("--out", type=Path, default=Path("results/experts-speed"))
    arguments = parser.parse_args()
    cells = [(case, threads) for case in arguments.networks for threads in arguments.threads]
    # Before the first parallel region: a forked process cannot use threads that its parent started.
    torch.set_num_threads(1)
    megabytes = gpu_megabytes if on_gpu() else cpu_megabytes
    memory = {
        (case, threads): {
            name: megabytes(make, case, rest, processes)
            for name, (make, rest, processes) in contenders(case, threads, arguments.compiled).items()
        }
        for case, threads in cells
    }
    path = arguments.out / ("gpu.csv" if on_gpu() else "table.csv")
    table = read_table(path) if path.exists() else pd.DataFrame()
    for case, threads in cells:
        rows = measure(case, threads, arguments.rounds, arguments.compiled, memory[case, threads])
        print(rows.drop(columns=["rounds", "torch", "processor"]).to_string(index=False), flush=True)
        if len(table):
            table = table[(table["network"] != case) | (table["threads"] != threads)]
        table = pd.concat([table, rows], ignore_index=True)
        order = {name: place for place, name in enumerate(CASES)}
        table = table.sort_values(["network", "threads"], key=lambda c: c.map(order).fillna(c), kind="stable")
        write_table(path, table)


if __name__ == "__main__":
    sys.exit(main())
