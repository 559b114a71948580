"""process.csv: the scales of a process, so that a results folder can be used where the process has no name.

Columns t, alpha, sigma, log_snr for t = 1..T, with all digits of a double: a task may begin exactly at a timestep.
"""

__all__ = ["read_process", "write_process"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from difficulty.errors import InputError
from difficulty.process import Process, from_arrays
from difficulty.records import read_table, write_table


def write_process(folder: Path, process: Process) -> None:
    """Write process.csv into a results folder."""
    t = np.arange(1, process.T + 1)
    scales = {"t": t, "alpha": process.alpha[1:], "sigma": process.sigma[1:], "log_snr": process.log_snr(t)}
    write_table(folder / "process.csv", pd.DataFrame(scales), digits=17)


def read_process(folder: Path, fingerprint: Mapping[str, Any]) -> Process:
    """The process of a results folder.

    Raises:
        InputError: if process.csv is missing, malformed, or not that of the fingerprint.
    """
    scales = read_table(folder / "process.csv", {"t": int, "alpha": float, "sigma": float})
    try:
        process = from_arrays(scales["alpha"].to_numpy(), scales["sigma"].to_numpy(), str(fingerprint.get("name")))
    except InputError as error:
        raise InputError(f"{folder / 'process.csv'} was edited or cut short ({error})") from None
    process.check_fingerprint(fingerprint, str(folder / "process.csv"))
    return process
