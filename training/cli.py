"""Command line ``training``: the table of its subcommands."""

__all__ = ["SUBCOMMANDS", "main"]

from collections.abc import Callable, Mapping
from typing import Any

from difficulty.commandline import run_cli
from training.commands.compare import compare, quickstart
from training.commands.export import export
from training.commands.order import cluster, recipe, static, validate
from training.commands.outcome import evaluate, plot, sample
from training.commands.run import run

SUBCOMMANDS: Mapping[str, Callable[..., Any]] = {
    "cluster": cluster,
    "recipe": recipe,
    "static": static,
    "validate": validate,
    "run": run,
    "compare": compare,
    "quickstart": quickstart,
    "sample": sample,
    "evaluate": evaluate,
    "export": export,
    "plot": plot,
}


def main() -> int:
    """Entry point of the ``training`` command."""
    return run_cli(dict(SUBCOMMANDS), "training", "Curricula over denoising tasks, and the training that judges them.")
