"""Names with options, as written on the command line: ``gaussian:dim=64,var=0.25``."""

__all__ = ["build", "check_option", "parse_spec"]

import inspect
import math
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
        InputError: if the name or an option is unknown (the message lists the known ones), or an option is no number
            where its default is one.
    """
    name, options = parse_spec(spec)
    factory = choose(kind, name, known)
    parameters: Mapping[str, Any] = inspect.signature(factory).parameters
    for key, value in options.items():
        if key not in parameters:
            allowed = ", ".join(parameters) or "none"
            raise InputError(f"{kind} {name!r} has no option {key!r}; its options are: {allowed}")
        check_option(f"option {key!r} of {kind} {name!r}", value, parameters[key].default)
    return factory(**options)


def check_option(what: str, value: object, default: object) -> None:
    """Raise InputError unless a value is a whole or finite number, or true or false, where its default is one."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if type(default) is int and not (number and isinstance(value, int)):
        raise InputError(f"{what} must be a whole number, got {value!r}")
    if type(default) is float and not number:
        raise InputError(f"{what} must be a finite number, got {value!r}")
    if type(default) is bool and value not in (True, False):
        raise InputError(f"{what} must be true or false, got {value!r}")


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
