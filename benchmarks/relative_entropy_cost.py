"""Seconds and memory of `difficulty kl` and `difficulty profile` on real data of growing dimension.

    python benchmarks/relative_entropy_cost.py --out results/relative-entropy-cost

Each case is one command in a process of its own, all pairs of one process, figures included: cost.csv has the wall
time, the largest resident memory, and how many pairs are valid. The profile is read for five processes at once.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd
from memory import peak_resident_gib

from difficulty.datasets import load_dataset
from difficulty.process import PROCESSES
from difficulty.records import finish_run, start_run, write_table

DATA = ("grid-2d", "digits", "photo-patches-8", "photo-patches-16", "photo-patches-32")
PROFILED = "digits"


def timed(arguments: list[str], threads: int) -> tuple[float, float]:
    """Wall seconds and peak resident GiB of `python -m difficulty ...`."""
    command = [sys.executable, "-m", "difficulty", *arguments]
    begin, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
    )
    said: list[bytes] = []
    reader = threading.Thread(target=lambda: said.append(process.stderr.read()))
    reader.start()
    while process.poll() is None:
        peak = max(peak, peak_resident_gib(process.pid))
        time.sleep(0.05)
    reader.join()
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}: {said[0].decode()[-500:]}")
    return time.perf_counter() - begin, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", nargs="+", default=DATA)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    config = {"data": list(options.data), "threads": options.threads}
    run = start_run(options.out, "relative-entropy-cost", config)
    commands = [("kl", name, ["--process", "vp-linear"], "relative_entropy.csv") for name in options.data]
    if PROFILED in options.data:
        commands.append(("profile", PROFILED, ["--for-process", *PROCESSES], "kl-*.csv"))
    rows = []
    for command, name, more, tables in commands:
        with tempfile.TemporaryDirectory() as folder:
            seconds, peak = timed([command, name, *more, "--out", folder], options.threads)
            pairs = pd.concat([pd.read_csv(path) for path in Path(folder).glob(tables)])
        data = load_dataset(name)
        rows.append({
            "command": command, "data": name, "samples": len(data.train), "dimensions": data.dim, "pairs": len(pairs),
            "valid": pairs["valid"].mean(), "seconds": seconds, "peak_gib": peak,
        })  # fmt: skip
        print(pd.DataFrame(rows[-1:]).to_string(index=False), flush=True)
    write_table(options.out / "cost.csv", pd.DataFrame(rows).round(3))
    finish_run(options.out, run, command=shlex.join(["python", "benchmarks/relative_entropy_cost.py", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
