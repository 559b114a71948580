"""Names with options, as written on the command line: ``gaussian:dim=64,var=0.25``."""

__all__ = ["build", "parse_spec"]

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from difficulty.errors import InputError, choose

Built = TypeVar("Built")


def parse_spec(spec: str) -> tuple[str, dict[str, int | float | str]]:
    """Split ``name:key=value,...`` into the name and its options.

    Values are read as int, then float, then text.

    Raises:
        InputError: if an option is not of the form key=value.
    """
    name, _, tail = spec.partition(":")
    options: dict[str, int | float | str] = {}
    for item in filter(None, tail.split(",")):
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise InputError(f"option {item!r} in {spec!r} is not of the form key=value")
        options[key.strip()] = _number(text.strip())
    return name, options


def build(kind: str, spec: str, known: Mapping[str, Callable[..., Built]]) -> Built:
    """Call the registered factory that ``spec`` names with the options that it gives.

    Raises:
        InputError: if the name or an option is unknown; the message lists the known ones.
    """
    name, options = parse_spec(spec)
    factory = choose(kind, name, known)
    parameters: Mapping[str, Any] = inspect.signature(factory).parameters
    for key in options:
        if key not in parameters:
            allowed = ", ".join(parameters) or "none"
            raise InputError(f"{kind} {name!r} has no option {key!r}; its options are: {allowed}")
    return factory(**options)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
