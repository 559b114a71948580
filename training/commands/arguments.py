"""What several commands make of their arguments."""

__all__ = ["File", "Text", "chosen_process", "ranked_process", "warn"]

import sys
from pathlib import Path
from typing import Annotated

import tyro

from difficulty.process import PROCESSES, Process, get_process
from difficulty.process_file import read_process
from difficulty.ranking import Ranking
from training.curriculum import Curriculum, known_process

Text = Annotated[str, tyro.conf.Positional]
File = Annotated[Path, tyro.conf.Positional]


def warn(message: str) -> None:
    """Say something beside the result."""
    print(message, file=sys.stderr)


def chosen_process(name: str | None, curriculum: Curriculum | None, source: str) -> Process:
    """The process named, or that of the curriculum read from ``source``, or vp-linear."""
    if name is not None:
        return get_process(name)
    return known_process(curriculum.process, source) if curriculum else get_process("vp-linear")


def ranked_process(name: str | None, ranking: Ranking, path: Path) -> Process:
    """The process named, or that of the ranking at ``path``, from the process.csv beside it if it is not built in."""
    if name is not None:
        return get_process(name)
    folder = path if path.is_dir() else path.parent
    if ranking.process.get("name") not in PROCESSES and (folder / "process.csv").exists():
        return read_process(folder, ranking.process)
    return known_process(ranking.process, str(path))
