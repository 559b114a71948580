"""Command line ``difficulty``: the table of its subcommands."""

__all__ = ["SUBCOMMANDS", "main"]

import sys
from collections.abc import Callable
from typing import Any

from difficulty.commandline import run_cli
from difficulty.commands.entropy import kl, profile
from difficulty.commands.listing import datasets, processes
from difficulty.commands.measure import measure, probe
from difficulty.commands.results import agree, plot, rank, recommend

SUBCOMMANDS: dict[str, Callable[..., Any]] = {
    "measure": measure,
    "probe": probe,
    "kl": kl,
    "profile": profile,
    "rank": rank,
    "agree": agree,
    "recommend": recommend,
    "plot": plot,
    "datasets": datasets,
    "processes": processes,
}


def main() -> None:
    """Entry point of the console command and of ``python -m difficulty``."""
    sys.exit(run_cli(SUBCOMMANDS, "difficulty", "Measure which denoising tasks of a diffusion model are hard."))
