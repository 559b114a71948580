"""Learning curves whose answers are known, for the tests of convergence and stability."""

import numpy as np
import pandas as pd

from difficulty.expert_plan import log_spaced_iterations

BUDGET = 1000
ITERATIONS = [0, *log_spaced_iterations(BUDGET, 60), 2 * BUDGET]
FLOOR = 3.0


def losses_of(curves, seeds=(0, 1, 2), noise=0.0):
    """losses.csv of tasks whose excess over the floor is the given function of the iteration, in nats."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "task": task,
            "seed": seed,
            "iteration": iteration,
            "samples": iteration * 8,
            "heldout_loss": FLOOR + 2 * excess,
            "floor": FLOOR,
            "floor_kind": "exact",
            "zero_loss": FLOOR + 2 * curve(0),
            "excess_nats": excess,
            "excess_se": 1e-9,
        }
        for task, curve in enumerate(curves)
        for seed in seeds
        for factor in [np.exp(noise * rng.standard_normal())]
        for iteration in ITERATIONS
        for excess in [factor * curve(iteration)]
    ]
    return pd.DataFrame(rows)



def exponential(rate, height=1.0):
    return lambda i: height * np.exp(-i / rate)
