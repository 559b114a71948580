"""The probe of `difficulty/probe.py` during a run: probe.csv gets step and samples in front of its columns.

What it shows beside the held-out losses is the excess over the Bayes loss of an exact law, or over the best loss that a
measurement of experts knows (``floor_from``), per task and with its standard error.
"""

__all__ = ["ProbeLog"]

from pathlib import Path

import pandas as pd

from difficulty.datasets import Dataset
from difficulty.errors import InputError
from difficulty.models import TrainedModel, on_cpu
from difficulty.probe import PROBE_COLUMNS, Prober
from difficulty.process import Process
from difficulty.records import read_table, write_table
from training.curriculum import tasks_of
from training.trainer import Trainer, TrainPlan


class ProbeLog:
    """Probes the averaged weights every so many iterations and after the last one, and writes probe.csv.

    Args:
        data, process, plan: of the run; no conditional one.
        out: folder of the run; rows there of earlier steps stay, so that a continued run continues its table.
        every: iterations between probes, at least 1.
        floor_from: folder of a measurement of experts in 20 tasks of equal length in t, or as many as there are t.

    Raises:
        InputError: if the run is conditional, ``every`` is below 1, or the floor is of something else.
    """

    def __init__(
        self, data: Dataset, process: Process, plan: TrainPlan, out: Path, every: int, floor_from: Path | None = None
    ) -> None:
        if plan.condition != "none":
            raise InputError("a conditional network has no one loss per task; probe an unconditional run")
        if every < 1:
            raise InputError(f"the iterations between probes must be at least 1, got {every}")
        self.path, self.every, self.plan = out / "probe.csv", every, plan
        self.prober = Prober(data, process, len(tasks_of(None, process)), floor_from=floor_from)

    def __call__(self, trainer: Trainer) -> None:
        """To be called after every iteration."""
        if trainer.done % self.every and trainer.done != self.plan.steps:
            return
        model = TrainedModel("the run", trainer.process, on_cpu(trainer.ema.eps, trainer.device))
        table = self.prober.table(self.prober(model))
        table.insert(0, "step", trainer.done)
        table.insert(1, "samples", trainer.done * self.plan.batch)
        if self.path.exists():
            earlier = read_table(self.path, ("step", *PROBE_COLUMNS))
            # After an interruption the same steps come again.
            table = pd.concat([earlier[earlier["step"] < trainer.done], table], ignore_index=True)
        write_table(self.path, table)
