"""What the commands share: types of arguments, progress bars, and how they print."""

__all__ = ["DataArgument", "FolderArgument", "Posterior", "StageBars", "json_text", "print_ranking", "tell"]

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

DataArgument = Annotated[str, tyro.conf.Positional]
FolderArgument = Annotated[Path, tyro.conf.Positional]
Posterior = Literal["mean", "sample"]



class StageBars:
    """One progress bar on stderr per stage, in order of appearance.

    What the user's own networks and functions print meanwhile goes there as well: standard output is for the result.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage = ""
        self._aside = redirect_stdout(sys.stderr)

    def __enter__(self) -> "StageBars":
        self._aside.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
        self._aside.__exit__(*error)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage, self._bar = stage, tqdm(total=total, desc=stage, mininterval=0.5, file=sys.stderr)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """End the current bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def tell(message: str) -> None:
    """Say something beside the result."""
    tqdm.write(message, file=sys.stderr)


def json_text(value: dict[str, Any]) -> str:
    """JSON text; a function of its own because ``json`` is also the name of the option."""
    return json.dumps(value)


def print_ranking(ranking: dict[str, Any], as_json: bool) -> None:
    """The verdict of a ranking in sentences, or all of it as JSON."""
    if as_json:
        print(json_text(ranking))
        return
    for sentence in ranking["verdict"]:
        print(sentence)
