"""The one exception for input that the user can mend.

Its message is one sentence: what is wrong, what was given, what to do. The command lines print it without a
traceback and exit with code 2; from Python it is an ordinary ``ValueError``.
"""

__all__ = ["InputError", "choose", "first_line"]

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


class InputError(ValueError):
    """Input that cannot be used as given; the message says what to do instead."""


def choose(kind: str, name: str, known: Mapping[str, Value]) -> Value:
    """Look ``name`` up in a registry.

    Raises:
        InputError: if the name is unknown; the message lists the known ones.
    """
    try:
        return known[name]
    except KeyError:
        raise InputError(f"unknown {kind} {name!r}; known are {', '.join(known)}") from None


def first_line(error: BaseException) -> str:
    """What an error of somebody else's code says, in one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
