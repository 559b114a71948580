"""What several commands make of their arguments."""

__all__ = ["File", "Text", "chosen_process", "ranked_process", "warn"]

import sys
from pathlib import Path
from typing import Annotated

import tyro

from difficulty.process import Process, get_process
from difficulty.ranking import Ranking
from training.curriculum import Curriculum, known_process, recorded_process

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
    """The process named, or that of the ranking at ``path``."""
    if name is not None:
        return get_process(name)
    return recorded_process(path if path.is_dir() else path.parent, ranking.process, str(path))
