"""What do one expert and one run of a comparison cost, and how does it grow with network, data and number of tasks?

    python benchmarks/cost.py [--rounds 3] [--out results/cost]

CPU seconds of one thread, so that a machine with other work changes little. Per case and round: experts are trained
once with next to no held-out draws, which gives the price of an iteration, and once briefly with the usual 1024, which
gives that of the evaluations; a run is stepped; and it is sampled (ddim, 50 steps, 1000 samples) and judged by fd-pca
and sw-pixels, as in a comparison. Medians over the rounds are written to cost.csv.
"""

import argparse
import statistics
import time
from pathlib import Path

import pandas as pd
import torch

from difficulty.datasets import load_dataset
from difficulty.expert_plan import ExpertPlan
from difficulty.experts import train_experts
from difficulty.process import get_process
from difficulty.records import finish_run, start_run, write_table
from difficulty.tasks import make_tasks
from training.metrics import SampleJudge
from training.sampling import draw_samples
from training.trainer import Trainer, TrainPlan

# data, network, tasks, budget of the experts, steps of the run
CASES = [
    ("grid-2d", "mlp:width=64", 20, 50, 200),
    ("digits", "mlp:width=64", 20, 50, 200),
    ("digits", "mlp", 5, 50, 200),
    ("digits", "mlp", 20, 50, 200),
    ("digits", "mlp:width=512", 5, 20, 50),
    ("digits", "unet:width=16", 2, 20, 10),
    ("digits", "dit:width=32", 2, 20, 10),
    ("photo-patches-16", "unet:width=16", 1, 20, 5),
]
EVALUATED = 20  # budget of the brief training whose evaluations are timed


def cpu_seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def one_round(data_name, network, tasks, budget, steps):
    """(ms per expert and iteration, s of evaluations per expert, ms per step of a run, s of judging a run)."""
    data, process = load_dataset(data_name), get_process("vp-linear")
    parts = make_tasks(process, tasks)

    def experts(budget, draws):
        plan = ExpertPlan(network=network, seeds=(0,), budget=budget, heldout_draws=draws)
        return cpu_seconds(lambda: train_experts(data, process, parts, plan)) / tasks

    per_iteration = experts(budget, 8) / (2 * budget)
    evaluations = experts(EVALUATED, 1024) - 2 * EVALUATED * per_iteration
    trainer = Trainer(data, process, TrainPlan(steps=10_000, network=network))
    for _ in range(3):
        trainer.step()
    stepped = cpu_seconds(lambda: [trainer.step() for _ in range(steps)]) / steps
    judge = SampleJudge(data.train)
    count = 1000 if network.startswith("mlp") else 20
    drawn = cpu_seconds(lambda: draw_samples(trainer.ema, count, data.shape, seed=0)) * 1000 / count
    samples = torch.randn(1000, *data.shape)
    judged = drawn + cpu_seconds(lambda: judge(samples))
    return 1e3 * per_iteration, evaluations, 1e3 * stepped, judged


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/cost"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python benchmarks/cost.py --rounds {arguments.rounds}"
    run = start_run(arguments.out, "cost", {"command": command, "cases": [list(case) for case in CASES]})
    found = {case: [] for case in CASES}
    for _ in range(arguments.rounds):
        for case in CASES:
            found[case].append(one_round(*case))
    rows = []
    for (data_name, network, tasks, _, _), rounds in found.items():
        data = load_dataset(data_name)
        trainer = Trainer(data, get_process("vp-linear"), TrainPlan(network=network))
        weights = sum(parameter.numel() for parameter in trainer.denoiser.network.parameters())
        medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
        rows.append([data_name, data.dim, network, weights, tasks, *medians])
    columns = ["data", "dimensions", "network", "parameters", "tasks", "expert_ms_per_iteration",
               "expert_s_evaluations", "run_ms_per_step", "run_s_judging"]  # fmt: skip
    table = pd.DataFrame(rows, columns=columns)
    write_table(arguments.out / "cost.csv", table.round(4))
    finish_run(arguments.out, run)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
